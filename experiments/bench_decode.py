"""Time generation with random weights: median new tokens/s with its spread, compilation and prefill apart."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from experiments import cli


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what this experiment understands besides the shared options."""
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of prompt (default: 256)")
    parser.add_argument("--new", type=int, default=128, help="tokens to write (default: 128)")
    parser.add_argument("--iterations", type=int, default=7, help="timed runs (default: 7)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")


def main(argv: list[str]) -> int:
    """Run the experiment."""
    arguments = cli.parse(argv, name="bench_decode", doc=__doc__, add_options=add_options)
    cli.setup_jax()
    import jax
    import numpy as np

    from moejax.models import ModelParts
    from moejax.parallel.plan import MeshPlan
    from moejax.serve.generate import pad_prompts

    options, config = arguments.options, arguments.config
    plan = MeshPlan.from_config(config.mesh.for_decoding())
    parts = ModelParts.of(config.model, plan)
    state = parts.init(config.train.seed)
    prompts = np.random.default_rng(0).integers(0, config.model.vocab, (options.batch, options.prompt)).tolist()
    inputs = (*state, *pad_prompts(prompts, plan.degree("batch")), np.int32(0))
    # What a call of one token takes is the prompt's; the rest is the new tokens'.
    first, _ = timed(parts, 1, inputs, options.iterations)
    whole, compile_s = timed(parts, options.new, inputs, options.iterations)
    prefill = statistics.median(first)
    rates = sorted(options.batch * (options.new - 1) / (s - prefill) for s in whole)
    report = {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_p20": float(np.quantile(rates, 0.2)),
        "tokens_per_s_p80": float(np.quantile(rates, 0.8)),
        "tokens_per_s_with_prompt": options.batch * options.new / statistics.median(whole),
        "prefill_s": prefill,
        "compile_s": compile_s,
        "batch": options.batch,
        "prompt": options.prompt,
        "new": options.new,
        "device": jax.devices()[0].device_kind,
        "num_devices": plan.mesh.size,
        "jax": jax.__version__,
    }
    print(
        f"{report['tokens_per_s']:.0f} tokens/s (p20 {report['tokens_per_s_p20']:.0f}, p80 "
        f"{report['tokens_per_s_p80']:.0f}); {report['tokens_per_s_with_prompt']:.0f} with the prompt's "
        f"{prefill * 1e3:.0f} ms; compiled in {compile_s:.1f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def timed(parts: Any, new: int, inputs: tuple[Any, ...], iterations: int) -> tuple[list[float], float]:
    """Time whole calls that write `new` tokens; give the seconds of each, and those of compilation."""
    import jax

    from moejax.serve.generate import Generator
    from moejax.serve.sampling import Sampling

    began = time.perf_counter()
    call = Generator(parts, new, Sampling(temperature=0.0)).compile().lower(*inputs).compile()
    compile_s = time.perf_counter() - began
    seconds = []
    for _ in range(iterations + 1):
        began = time.perf_counter()
        jax.block_until_ready(call(*inputs))
        seconds.append(time.perf_counter() - began)
    return seconds[1:], compile_s


if __name__ == "__main__":
    sys.exit(cli.run(main))
