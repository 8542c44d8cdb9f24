"""Let a trained run, or a Hugging Face folder, write: greedy, or by temperature, top-k and top-p, with a KV cache."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import cli
from moejax.config.load import ConfigError
from moejax.config.run import RunConfig

if TYPE_CHECKING:
    from moejax.data.tokenizer import Tokenizer
    from moejax.models import ModelParts


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what this experiment understands besides the shared options."""
    parser.add_argument("--run", type=Path, help="directory of the run to load (or --model a Hugging Face folder)")
    parser.add_argument("--prompt", action="append", help="text to go on from (repeat for a batch; default: a few)")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message, for the chat template")
    parser.add_argument("--new", type=int, default=128, help="tokens to write (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens (default: 0, all)")
    parser.add_argument("--top-p", type=float, default=0.95, help="keep the likeliest of this mass (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--step", type=int, help="checkpoint to load (default: the newest)")
    parser.add_argument("--no-cache", action="store_true", help="read everything again for each token: the oracle")


def with_run_config(argv: list[str]) -> list[str]:
    """Let the run's own config.toml stand for the model and mesh files that were not named."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--run", type=Path)
    run = early.parse_known_args(argv)[0].run
    if run is None or {"-h", "--help"} & set(argv):
        return argv
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} holds no run (no config.toml): give the --out of a training")
    named = {word.partition("=")[0] for word in argv}
    stand_in = str(run / "config.toml")
    return argv + [word for option in ("--model", "--mesh") if option not in named for word in (option, stand_in)]


class Writer(NamedTuple):
    """A model with its weights and its tokenizer."""

    parts: "ModelParts"
    params: Any
    buffers: Any
    tokenizer: "Tokenizer"
    folder: Path
    """where tokenizer.json lies, and the chat template"""
    ends: tuple[int, ...]
    """tokens that end a text"""


def load_run(config: RunConfig, run: Path, step: int | None) -> Writer:
    """Load a run's checkpoint."""
    from moejax.data.tokenizer import Tokenizer
    from moejax.models import ModelParts
    from moejax.parallel.plan import MeshPlan
    from moejax.train.checkpoint import Checkpoints

    tokenizer = Tokenizer.load(run / "tokenizer.json")
    parts = ModelParts.of(config.model, MeshPlan.from_config(config.mesh.for_decoding()))
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    weights = checkpoints.restore_weights(checkpoints.choose(step), parts)
    return Writer(parts, *weights, tokenizer, run, (tokenizer.eos_id,))


def load_folder(config: RunConfig, folder: Path) -> Writer:
    """Load a Hugging Face folder."""
    from moejax.data.tokenizer import Tokenizer
    from moejax.interop.weights import load
    from moejax.models import ModelParts
    from moejax.parallel.plan import MeshPlan

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    parts = ModelParts.of(config.model, MeshPlan.from_config(config.mesh.for_decoding()))
    loaded = load(parts, folder)
    return Writer(parts, loaded.params, loaded.buffers, tokenizer, folder, end_tokens(folder) or (tokenizer.eos_id,))


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Read which tokens end a text: generation_config.json knows of more (the end of a turn) than config.json."""
    from moejax.interop.config_json import ConfigJson

    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and (ends := ConfigJson.read(folder, name).get("eos_token_id", None)) is not None:
            return tuple(ends) if isinstance(ends, list) else (ends,)
    return ()


def encode(writer: Writer, prompt: str, chat: bool, trained_here: bool) -> list[int]:
    """Turn a prompt into tokens: as the chat template says, or with what the tokenizer puts around a text."""
    from moejax.config.run import DataConfig
    from moejax.data.chat import TEXT, ChatFormat

    tokenizer = writer.tokenizer
    if chat:
        template = ChatFormat.of(DataConfig(tokenizer=str(writer.folder / "tokenizer.json")))
        [(ids, _)] = tokenizer.encode_with_specials([template.prompt(prompt)], TEXT)
        return ids.tolist()
    if not trained_here:
        return tokenizer.encode_prompt(prompt)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if writer.parts.config.encoder is None:
        return ids
    # It learned to say what a sentinel stands for.
    return [*ids, *tokenizer.sentinels(writer.parts.config.vocab, 1).tolist(), tokenizer.eos_id]


def main(argv: list[str]) -> int:
    """Run the experiment."""
    arguments = cli.parse(with_run_config(argv), name="generate", doc=__doc__, add_options=add_options)
    config, options = arguments.config, arguments.options
    folder = Path(config.train.init_from).expanduser() if config.train.init_from else None
    cli.setup_jax()
    from moejax.serve.generate import Generator, generate
    from moejax.serve.sampling import Sampling

    if options.run is not None:
        writer = load_run(config, options.run, options.step)
    elif folder is not None:
        writer = load_folder(config, folder)
    else:
        raise ConfigError("generate needs weights: give --run DIR of a training, or --model FOLDER of open weights")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    generator = Generator(writer.parts, options.new, sampling, writer.ends, cached=not options.no_cache)
    prompts = options.prompt or ["The ", "Return ", "class "]
    ids = [encode(writer, prompt, options.chat, options.run is not None) for prompt in prompts]
    began = time.perf_counter()
    written = generate(generator, writer.params, writer.buffers, ids, options.seed)
    seconds = time.perf_counter() - began
    for prompt, tokens in zip(prompts, written, strict=True):
        print(f"--- {prompt!r}\n{prompt}{writer.tokenizer.decode(tokens)}\n")
    print(f"{sum(map(len, written))} tokens in {seconds:.1f} s, compilation included")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
