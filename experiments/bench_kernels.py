"""Time every GPU kernel against its peers and the chip's measured ceilings, row by row.

    python -m experiments.bench_kernels --family attention --budget 500 --out runs/kernels    on an NVIDIA GPU
    python -m experiments.bench_kernels --smoke                                               tiny rows, on the CPU
    python -m experiments.bench_kernels --compile --out runs/aot                              for the H200, without one

Device time (CUPTI), 10 warm-ups and 90 calls in 3 alternating rounds, inputs rotated so that the cache is cold, the
median with p20 and p80. A way is compared with the reference before it is timed: a wrong one is never timed. Rows lie
in OUT/FAMILY.jsonl; the same command again measures what is missing. It also writes result.json and roofline.png.

It needs jax, numpy and matplotlib alone (no config, so not the other experiments' command line): it runs on a bare
machine with a GPU.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

SMOKE_SECONDS = 5.0
"""after which --smoke begins no further row of a family"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", nargs="+", metavar="NAME", help="families of rows (default: all)")
    parser.add_argument("--match", default="", metavar="TEXT", help="only rows whose name holds this text")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds after which no further row is begun")
    parser.add_argument("--smoke", action="store_true", help="tiny rows on the CPU: compares, measures nothing")
    parser.add_argument("--compile", action="store_true", help="compile for the H200 and report on the machine code")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: runs/bench_kernels)")
    options = parser.parse_args(argv)
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="moejax_kernels_") if options.smoke else "runs/bench_kernels")
    return options


def main(argv: list[str]) -> int:
    """Run the experiment; give 1 for a broken rule, 2 for a user's mistake, sweep.AGAIN to be started again."""
    options = parse(argv)
    if options.smoke or options.compile:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if options.smoke and "host_platform_device_count" not in (flags := os.environ.get("XLA_FLAGS", "")):
        # With more threads than cores: the interpreter's kernels wait in them for one another.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's peers want memory beside jax
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    try:
        return compile_all(options) if options.compile else bench(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def bench(options: argparse.Namespace) -> int:
    """Measure what is missing, then print and write everything that is there."""
    from experiments.kernels import machine, sweep, tables

    dry = options.smoke
    if not dry and not machine.on_gpu():
        raise ValueError("no NVIDIA GPU here: --smoke compares on the CPU, --compile compiles for the H200")
    deadline = sweep.Deadline(options.budget)
    here = machine.describe() | (machine.NO_CEILINGS if dry else machine.ceilings())
    print(json.dumps(here))
    lost = False
    for family in options.family or sweep.FAMILIES:
        try:
            cases = [case for case in sweep.cases_of(family, dry) if options.match in case.name]
        except (ValueError, ImportError) as error:
            if family not in sweep.FAMILIES:
                raise
            print(f"{family}: no rows: {error}")
            continue
        if dry and options.budget is None:
            deadline = sweep.Deadline(SMOKE_SECONDS)
        results = sweep.Results(options.out / f"{family}.jsonl")
        results.add(machine=here)
        try:
            for row in sweep.sweep(results, cases, deadline, dry):
                print(*tables.show_row(row, here), sep="\n", flush=True)
        except sweep.Lost as error:
            print(f"the GPU's context is lost; the same command goes on without what broke it: {error}")
            lost = True
        missing = sum(case.name not in results.rows for case in cases)
        if missing:
            print(f"{family}: {missing} rows are left for another run")
        if lost:
            break
    finish(options.out, here)
    return sweep.AGAIN if lost else 0


def finish(out: Path, here: dict[str, Any]) -> None:
    """Write result.json and roofline.png of all rows that lie in `out`, and print the summary last."""
    from experiments.kernels import sweep, tables

    out.mkdir(parents=True, exist_ok=True)
    found = [row for path in sorted(out.glob("*.jsonl")) for row in sweep.Results(path).rows.values()]
    rows = [row for row in found if "ways" in row]  # gpu_check's numerics lie there too
    (out / "result.json").write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n")
    tables.plot_roofline(rows, here, here["device"], out / "roofline.png")
    print(f"\n{here['device']}: {ceilings_line(here)}  ({out / 'result.json'})")
    print(*tables.summary(rows, here), sep="\n")


def ceilings_line(here: dict[str, Any]) -> str:
    """Say the measured ceilings in a line."""
    if not here.get("matmul_flops"):
        return "nothing is measured on it"
    return (
        f"matmul {here['matmul_flops'] / 1e12:.0f} TFLOP/s, copy {here['copy_bandwidth'] / 1e12:.2f} TB/s, "
        f"read {here['read_bandwidth'] / 1e12:.2f} TB/s, by {here['clock']}"
    )


def compile_all(options: argparse.Namespace) -> int:
    """Compile each family's `compiled` rows for the H200 and write the table; 1 if a kernel breaks a rule."""
    from experiments.kernels import compiled, sweep

    lines = []
    for family in options.family or sweep.FAMILIES:
        try:
            cases = [case for case in sweep.cases_of(family, dry=False) if case.compiled and options.match in case.name]
        except (ValueError, ImportError) as error:
            print(f"{family}: no rows: {error}")
            continue
        for case in cases:
            for line in compiled.compile_case(case):
                print(compiled.show(line), flush=True)
                lines.append(line)
    options.out.mkdir(parents=True, exist_ok=True)
    compiled.write(lines, options.out)
    broken = [line for line in lines if line.breaches]
    print(f"{len(lines)} kernels, {len(broken)} break a rule ({options.out / 'kernels.md'})")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
