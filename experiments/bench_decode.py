"""Time generation with random weights: median new tokens/s with its spread, compilation and prefill apart."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

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
    from moejax.serve.generate import Generator, pad_prompts
    from moejax.serve.sampling import Sampling

    options, config = arguments.options, arguments.config
    plan = MeshPlan.from_config(config.mesh.for_decoding())
    parts = ModelParts.of(config.model, plan)
    params, buffers = parts.init(config.train.seed)
    prompts = np.random.default_rng(0).integers(0, config.model.vocab, (options.batch, options.prompt)).tolist()
    ids_BT, pad_B = pad_prompts(prompts, plan.degree("batch"))

    def timed(new: int) -> tuple[list[float], float]:
        """Time whole calls that write `new` tokens."""
        began = time.perf_counter()
        program = Generator(parts, new, Sampling(temperature=0.0)).compile()
        call = program.lower(params, buffers, ids_BT, pad_B, np.int32(0)).compile()
        compile_s = time.perf_counter() - began
        seconds = []
        for _ in range(options.iterations + 1):
            began = time.perf_counter()
            jax.block_until_ready(call(params, buffers, ids_BT, pad_B, np.int32(0)))
            seconds.append(time.perf_counter() - began)
        return seconds[1:], compile_s

    # What a call of one token takes is the prompt's; the rest is the new tokens'.
    first, _ = timed(1)
    whole, compile_s = timed(options.new)
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


if __name__ == "__main__":
    sys.exit(cli.run(main))
