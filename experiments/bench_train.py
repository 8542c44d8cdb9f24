"""Time the training step: median tokens/s with its spread, compilation apart."""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import cli


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what this experiment understands besides the shared options."""
    parser.add_argument("--batch", type=int, help="sequences per step (default: the model file's)")
    parser.add_argument("--seq", type=int, help="tokens per sequence (default: the model file's)")
    parser.add_argument("--iterations", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")


def main(argv: list[str]) -> int:
    """Run the experiment."""
    arguments = cli.parse(argv, name="bench_train", doc=__doc__, add_options=add_options)
    cli.setup_jax()
    import jax
    import numpy as np

    from moejax.accounting.model_cost import model_cost
    from moejax.models import ModelParts
    from moejax.parallel.plan import MeshPlan
    from moejax.train import optimizer as optimizers
    from moejax.train.state import init_state
    from moejax.train.step import make_train_step, place_batch

    options, config = arguments.options, arguments.config
    sizes = {"global_batch": options.batch, "seq_len": options.seq}
    train = dataclasses.replace(config.train, **{key: value for key, value in sizes.items() if value})
    config = dataclasses.replace(config, train=train)
    plan = MeshPlan.from_config(config.mesh)
    parts = ModelParts.of(config.model, plan)
    optimizer = optimizers.build(config.optimizer, train.steps, parts.placements)
    state = init_state(parts, optimizer, train.seed)
    host = random_batch(train.microbatches, train.global_batch, train.seq_len, config.model.vocab, train.seed)
    batch = place_batch(plan, host)
    began = time.perf_counter()
    step = make_train_step(parts, optimizer, config).lower(state, batch).compile()
    compile_s = time.perf_counter() - began
    tokens = train.global_batch * train.seq_len
    rates = sorted(tokens / s for s in timed(step, state, batch, options.iterations))
    flops = model_cost(parts, train.seq_len).train_flops
    median = statistics.median(rates)
    report = {
        "tokens_per_s": median,
        "tokens_per_s_p20": float(np.quantile(rates, 0.2)),
        "tokens_per_s_p80": float(np.quantile(rates, 0.8)),
        "gflops_per_s": median * flops / 1e9,
        "compile_s": compile_s,
        "batch": train.global_batch,
        "seq": train.seq_len,
        "device": jax.devices()[0].device_kind,
        "num_devices": plan.mesh.size,
        "jax": jax.__version__,
    }
    print(
        f"{median:.0f} tokens/s (p20 {report['tokens_per_s_p20']:.0f}, p80 {report['tokens_per_s_p80']:.0f}), "
        f"{report['gflops_per_s']:.1f} GFLOP/s of the model; compiled in {compile_s:.1f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def timed(step: Callable[..., Any], state: Any, batch: Any, iterations: int) -> list[float]:
    """Give the seconds of each step, after two that are not counted."""
    import jax

    seconds = []
    for _ in range(iterations + 2):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def random_batch(microbatches: int, batch: int, length: int, vocab: int, seed: int):
    """Make a batch [Y, B, T] of random tokens, one document a row."""
    import numpy as np

    ids = np.random.default_rng(seed).integers(0, vocab, (microbatches, batch // microbatches, length + 1), np.int32)
    shape = ids[..., 1:].shape
    return {
        "inputs": ids[..., :-1],
        "targets": ids[..., 1:],
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        "weights": np.ones(shape, np.float32),
        "bytes": np.ones(shape, np.int32),
    }


if __name__ == "__main__":
    sys.exit(cli.run(main))
