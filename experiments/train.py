"""Train a language model on real text: pick a model file and a mesh file, watch, stop, resume.

OUT gets config.toml, metrics.jsonl, tokenizer.json, checkpoints/, loss.png, router_load.png and result.json.
Ctrl-C and SIGTERM save first; `--resume` goes on from the newest checkpoint, on this mesh or another.
"""

import functools
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from moejax.config.run import RunConfig

if TYPE_CHECKING:
    from moejax.data import Data
    from moejax.train.loop import Result


def main(argv: list[str]) -> int:
    """Run the experiment."""
    arguments = cli.parse(argv, name="train", doc=__doc__)
    cli.setup_jax()
    from moejax.models import ModelParts
    from moejax.parallel import launch
    from moejax.parallel.plan import MeshPlan
    from moejax.train.loop import Trainer

    config = arguments.config
    plan = MeshPlan.from_config(config.mesh)
    parts = ModelParts.of(config.model, plan)
    out = Path(launch.from_first("out", lambda: str(arguments.out)))
    if out != arguments.out:
        arguments.out.rmdir()  # a fresh one, of --smoke without --out: process 0 has another
    data = prepare_data(config)
    trainer = Trainer(config, plan, parts, data, out)  # refuses what does not fit, before anything is written
    resuming = launch.from_first("resuming", lambda: cli.prepare_out(out, config, arguments.resume))
    launch.say(f"{describe(config, parts)}\n{data.describe()}")
    if resuming and trainer.checkpoints.latest() is None:
        launch.say(f"{out} holds no complete checkpoint yet: starting at step 0")
    result = trainer.fit()
    baselines = {
        "byte unigram": data.val_text_stats.unigram_entropy,
        "bz2 -9": data.val_text_stats.bz2_bits_per_byte,
    }
    if launch.is_first():
        finish(out, result, config.train.steps, baselines)
    return 0


def prepare_data(config: RunConfig) -> "Data":
    """Prepare the corpus, process 0 first: others find it in the cache, and raise ValueError where theirs differs."""
    from moejax.data import prepare
    from moejax.parallel import launch

    train = config.train
    build = functools.cache(
        lambda: prepare(config.data, config.model.vocab, train.seq_len, train.seed, source_len=train.num_source())
    )
    first = launch.from_first("data", lambda: [build().fingerprint, build().tokenizer.hash()])
    if (own := [build().fingerprint, build().tokenizer.hash()]) != first:
        raise ValueError(
            f"data.source ({config.data.source}) or its tokenizer is another here (sha256 {own[0][:12]}, "
            f"{own[1][:12]}) than on process 0 ({first[0][:12]}, {first[1][:12]}): give all processes the same files, "
            "Python and packages"
        )
    return build()


def finish(out: Path, result: "Result", steps: int, baselines: dict[str, float]) -> None:
    """Draw the pictures, write result.json, and say what came out and how to go on."""
    import jax

    from moejax.train.metrics import finite

    path = shlex.quote(str(out))
    fake = f" --fake-devices {jax.device_count()}" if jax.default_backend() == "cpu" and jax.device_count() > 1 else ""
    resume = f"python -m experiments.train --out {path} --resume{fake}"
    if not (result.validation or result.stopped_early):
        print(f"{out} is at step {result.step} of {steps} already; go on with")
        print(f"  {resume} --train.steps {2 * result.step}")
        return
    draw(out, baselines)
    if result.stopped_early:
        print(f"stopped at step {result.step} of {steps}, saved; go on with\n  {resume}")
        return
    report = {"step": result.step} | finite(result.validation) | {"bits_per_byte_of": baselines}
    (out / "result.json").write_text(json.dumps(report, indent=1) + "\n")
    others = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
    print(f"held-out text: {result.validation['val_bits_per_byte']:.3f} bits per byte ({others})")
    print(f"pictures: {', '.join(str(picture) for picture in sorted(out.glob('*.png')))}")
    print(f"sample:   python -m experiments.generate --run {path} --prompt 'The '")
    print(f"go on:    {resume} --train.steps {2 * steps}")


def describe(config: RunConfig, parts) -> str:
    """Say before step 0 what will run: mesh, weights, memory per device by kind, FLOPs."""
    import jax

    from moejax.accounting.memory import estimate_memory
    from moejax.accounting.model_cost import model_cost

    mesh, train, device = parts.plan.config, config.train, jax.devices()[0]
    axes = " ".join(f"{axis}={size}" for axis, size in parts.plan.mesh.shape.items() if size > 1) or "one device"
    cost, memory = model_cost(parts, train.seq_len, train.num_source()), estimate_memory(parts, train)
    tokens = train.global_batch * train.seq_len
    kinds = ("params", "gradients", "optimizer", "activations", "workspace")
    shares = ", ".join(f"{kind} {_units(getattr(memory, kind), 'B')}" for kind in kinds)
    split = f"; ZeRO-{mesh.zero_stage}" + (", sequence parallel" if mesh.sequence_parallel else "")
    precision = config.model.precision
    lossy = precision.params in ("bfloat16", "float16") and config.model.lora is None
    warning = (
        f"warning: weights are kept in {precision.params}: small updates are lost; --model.precision.params float32"
    )
    return "\n".join(
        [
            *([warning] if lossy else []),
            f"devices: {len(jax.devices())} x {device.device_kind} ({device.platform}); mesh: {axes}{split}",
            f"model:   {config.model.name}, {cost.total_params / 1e6:.2f} M weights, "
            f"{cost.active_params / 1e6:.2f} M active per token",
            f"memory:  {_units(memory.total, 'B')} per device predicted: {shares}",
            f"step:    {tokens:,} tokens, {_units(tokens * cost.train_flops, 'FLOP')}",
        ]
    )


def _units(count: float, unit: str) -> str:
    for prefix in ("", "K", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} P{unit}"


def draw(out: Path, baselines: dict[str, float]) -> None:
    """Draw the pictures from metrics.jsonl."""
    from moejax.train.metrics import read_metrics
    from moejax.train.plots import plot_loss, plot_router_load

    records = read_metrics(out)
    plot_loss(records, out / "loss.png", baselines)
    plot_router_load(records, out / "router_load.png")


if __name__ == "__main__":
    sys.exit(cli.run(main))
