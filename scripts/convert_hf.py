"""Turn a run's checkpoint into a Hugging Face folder, or such a folder into a run's checkpoint.

    python -m scripts.convert_hf to-hf runs/a out/a            newest checkpoint -> config.json, safetensors, tokenizer
    python -m scripts.convert_hf to-hf runs/a out/a --step 300 --dtype bfloat16
    python -m scripts.convert_hf from-hf path/to/folder runs/b   weights -> an Orbax checkpoint that generate reads

Low-rank updates are added to their matrices on the way out. A run from a folder holds weights alone: to train on from
them, give the folder itself, `python -m experiments.train --model path/to/folder`.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

from experiments.cli import CONFIGS, read_open_weights, run, setup_jax
from experiments.run_dir import prepare_out
from moejax.config import load


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ways = parser.add_subparsers(dest="way", required=True)
    out = ways.add_parser("to-hf", help="write a Hugging Face folder")
    out.add_argument("run", type=Path, help="the --out of a training")
    out.add_argument("folder", type=Path, help="where to write; it must hold no weights")
    out.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    out.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the files (default: the run's)")
    into = ways.add_parser("from-hf", help="write a run's directory")
    into.add_argument("folder", type=Path, help="config.json beside safetensors")
    into.add_argument("run", type=Path, help="where to write; it must be empty or new")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Convert."""
    options = parse(argv)
    setup_jax()
    if options.way == "to-hf":
        to_hf(options.run, options.folder, options.step, options.dtype)
    else:
        from_hf(options.folder, options.run)
    return 0


def to_hf(run_dir: Path, folder: Path, step: int | None, dtype: str | None) -> None:
    """Write a run's weights as a Hugging Face folder."""
    import jax

    from moejax.data.tokenizer import Tokenizer
    from moejax.interop.pretrained import Pretrained, save_pretrained
    from moejax.models import ModelParts
    from moejax.parallel.plan import MeshPlan
    from moejax.train.checkpoint import Checkpoints

    config = load.read_run(run_dir / "config.toml")
    parts = ModelParts.of(config.model, MeshPlan.single())
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    step = checkpoints.choose(step)
    params, buffers = checkpoints.restore_weights(step, parts)
    if dtype is not None:
        params = jax.tree.map(lambda w: w.astype(dtype), params)
        precision = dataclasses.replace(config.model.precision, params=dtype)
        parts = ModelParts.of(dataclasses.replace(config.model, precision=precision), parts.plan)
    tokenizer = Tokenizer.load(run_dir / "tokenizer.json")
    source = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "max_position_embeddings": config.train.seq_len,
    }
    save_pretrained(Pretrained(parts, params, buffers, source, run_dir), folder)
    print(f"{folder}: step {step} of {run_dir}")


def from_hf(folder: Path, run_dir: Path) -> None:
    """Write a Hugging Face folder's weights as a run with one checkpoint, of step 0."""
    import jax.numpy as jnp

    from moejax.data.tokenizer import Tokenizer
    from moejax.interop.pretrained import load_pretrained
    from moejax.train.checkpoint import Checkpoints
    from moejax.train.state import TrainState

    config = read_open_weights(folder, CONFIGS / "mesh" / "single.toml")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json: a run needs one beside its weights")
    model = load_pretrained(folder)
    prepare_out(run_dir, config, resume=False)
    shutil.copyfile(folder / "tokenizer.json", run_dir / "tokenizer.json")
    zero = jnp.int32(0)
    state = TrainState(zero, model.params, model.buffers, {"none": zero}, zero, zero)
    tokenizer = Tokenizer.load(run_dir / "tokenizer.json")
    meta = {"model": dataclasses.asdict(config.model), "data": "", "tokenizer": tokenizer.hash()}
    checkpoints = Checkpoints(run_dir / "checkpoints")
    checkpoints.save(0, state, meta)
    checkpoints.wait()
    checkpoints.close()
    left = f"; left out: {', '.join(model.left_out)}" if model.left_out else ""
    print(f"{run_dir}: weights of {folder}{left}")


if __name__ == "__main__":
    sys.exit(run(main))
