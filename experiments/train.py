"""Train a language model on real text: pick a model file and a mesh file, watch, stop, resume.

OUT gets config.toml, metrics.jsonl, tokenizer.json, checkpoints/, loss.png, router_load.png and result.json.
Ctrl-C and SIGTERM save first; `--resume` goes on from the newest checkpoint, on this mesh or another.
"""

import json
import sys
from pathlib import Path

from experiments import cli
from moejax.config.run import RunConfig


def main(argv: list[str]) -> int:
    """Run the experiment."""
    arguments = cli.parse(argv, name="train", doc=__doc__)
    cli.setup_jax()
    import jax

    from moejax.data import prepare
    from moejax.models import ModelParts
    from moejax.parallel.plan import MeshPlan
    from moejax.train.loop import Trainer

    config, out = arguments.config, arguments.out
    plan = MeshPlan.from_config(config.mesh)
    parts = ModelParts.of(config.model, plan)
    data = prepare(config.data, config.model.vocab, config.train.seq_len, config.train.seed)
    cli.prepare_out(out, config, arguments.resume)
    data.tokenizer.save(out / "tokenizer.json")
    print(describe(config, parts))
    print(data.describe())
    trainer = Trainer(config, plan, parts, data, out)
    result = trainer.fit()
    baselines = {
        "byte unigram": data.val_text_stats.unigram_entropy,
        "bz2 -9": data.val_text_stats.bz2_bits_per_byte,
    }
    if jax.process_index() == 0:
        draw(out, baselines)
    resume = f"python -m experiments.train --out {out} --resume"
    if result.stopped_early:
        print(f"stopped at step {result.step} of {config.train.steps}, saved; go on with\n  {resume}")
        return 0
    report = {"step": result.step} | result.validation | {"bits_per_byte_of": baselines}
    (out / "result.json").write_text(json.dumps(report, indent=1) + "\n")
    bits = result.validation.get("val_bits_per_byte", float("nan"))
    print(
        f"held-out text: {bits:.3f} bits per byte (byte unigram {baselines['byte unigram']:.3f}, "
        f"bz2 -9 {baselines['bz2 -9']:.3f}); loss {result.validation.get('val_loss', float('nan')):.4f} nats per token"
    )
    print(f"pictures: {out / 'loss.png'}" + (f", {out / 'router_load.png'}" if config.model.moe else ""))
    print(f"sample:   python -m experiments.generate --run {out} --prompt 'The '")
    print(f"go on:    {resume} --train.steps {2 * config.train.steps}")
    return 0


def describe(config: RunConfig, parts) -> str:
    """Say before step 0 what will run: mesh, weights, memory per device by kind, FLOPs."""
    import jax

    from moejax.accounting.memory import estimate_memory
    from moejax.accounting.model_cost import model_cost

    mesh, train, device = parts.plan.config, config.train, jax.devices()[0]
    axes = " ".join(f"{axis}={size}" for axis, size in parts.plan.mesh.shape.items() if size > 1) or "one device"
    cost, memory = model_cost(parts, train.seq_len), estimate_memory(parts, train)
    tokens = train.global_batch * train.seq_len
    kinds = ("params", "gradients", "optimizer", "activations")
    shares = ", ".join(f"{kind} {_bytes(getattr(memory, kind))}" for kind in kinds)
    split = f"; ZeRO-{mesh.zero_stage}" + (", sequence parallel" if mesh.sequence_parallel else "")
    return "\n".join(
        [
            f"devices: {len(jax.devices())} x {device.device_kind} ({device.platform}); mesh: {axes}{split}",
            f"model:   {config.model.name}, {cost.total_params / 1e6:.2f} M weights, "
            f"{cost.active_params / 1e6:.2f} M active per token",
            f"memory:  {_bytes(memory.total)} per device predicted: {shares}",
            f"step:    {tokens} tokens, {tokens * cost.train_flops / 1e12:.3f} TFLOP",
        ]
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def draw(out: Path, baselines: dict[str, float]) -> None:
    """Draw the pictures from metrics.jsonl."""
    from moejax.train.metrics import read_metrics
    from moejax.train.plots import plot_loss, plot_router_load

    records = read_metrics(out)
    plot_loss(records, out / "loss.png", baselines)
    plot_router_load(records, out / "router_load.png")


if __name__ == "__main__":
    sys.exit(cli.run(main))
