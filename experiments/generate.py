"""Let a trained run write: greedy, or by temperature, top-k and top-p, with a KV cache in one compiled loop."""

import argparse
import sys
import time
from pathlib import Path

from experiments import cli
from moejax.config.load import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what this experiment understands besides the shared options."""
    parser.add_argument("--run", type=Path, required=True, help="directory of the run to load")
    parser.add_argument("--prompt", action="append", help="text to go on from (repeat for a batch; default: a few)")
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


def main(argv: list[str]) -> int:
    """Run the experiment."""
    arguments = cli.parse(with_run_config(argv), name="generate", doc=__doc__, add_options=add_options)
    cli.setup_jax()
    from moejax.data.tokenizer import Tokenizer
    from moejax.models import ModelParts
    from moejax.parallel.plan import MeshPlan
    from moejax.serve.generate import Generator, generate
    from moejax.serve.sampling import Sampling
    from moejax.train.checkpoint import Checkpoints

    config, options = arguments.config, arguments.options
    tokenizer = Tokenizer.load(options.run / "tokenizer.json")
    parts = ModelParts.of(config.model, MeshPlan.from_config(config.mesh.for_decoding()))
    checkpoints = Checkpoints(options.run / "checkpoints", read_only=True)
    params, buffers = checkpoints.restore_weights(checkpoints.choose(options.step), parts)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    generator = Generator(parts, options.new, sampling, tokenizer.eos_id, cached=not options.no_cache)
    prompts = options.prompt or ["The ", "Return ", "class "]
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    began = time.perf_counter()
    written = generate(generator, params, buffers, ids, options.seed)
    seconds = time.perf_counter() - began
    for prompt, tokens in zip(prompts, written, strict=True):
        print(f"--- {prompt!r}\n{prompt}{tokenizer.decode(tokens)}\n")
    print(f"{sum(map(len, written))} tokens in {seconds:.1f} s, compilation included")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
