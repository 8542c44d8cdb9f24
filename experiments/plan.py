"""Which mesh for this model on N devices? Each layout's memory, traffic, bubble and step time on paper, the best first.

OUT gets config.toml (the best layout with its microbatches and remat: give it to experiments.train as --model and as
--mesh), mesh.toml, memory.png and result.json. --compile compiles it for that many H200s, on this machine, without one.
"""

import argparse
import collections
import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import cli
from moejax.axes import MESH_AXES
from moejax.config import load

if TYPE_CHECKING:
    from moejax.accounting.candidates import Candidate, Rejected
    from moejax.accounting.chips import Chip
    from moejax.accounting.roofline import Assumptions, StepTime


class Ranked(NamedTuple):
    """A candidate and its predicted step."""

    candidate: "Candidate"
    step: "StepTime"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what this experiment understands besides the shared options."""
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="how many devices (default: 8)")
    parser.add_argument("--chip", default="h200", help="h200, h100 or a100 (default: h200)")
    parser.add_argument("--global-batch", type=int, help="sequences per step (default: the model file's)")
    parser.add_argument("--seq", type=int, help="tokens per sequence (default: the model file's)")
    parser.add_argument("--top", type=int, default=12, help="layouts shown and drawn (default: 12)")
    parser.add_argument("--verbose", action="store_true", help="print every rejected layout, not one for each reason")
    parser.add_argument("--compile", action="store_true", help="compile the best for as many H200s, ahead of time")
    parser.add_argument("--serve", type=int, metavar="SEQUENCES", help="also count key/value caches of --seq tokens")
    parser.add_argument(
        "--mfu-cap", type=float, default=0.6, help="share of the peak that matmuls reach (default: 0.6)"
    )
    parser.add_argument("--link-share", type=float, default=0.8, help="share of a link's peak (default: 0.8)")
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="share of computing that hides traffic (default: 0.5)"
    )
    parser.add_argument("--network", type=float, metavar="GB/s", help="a device's link to other nodes (default: 50)")
    parser.add_argument("--headroom", type=float, default=0.9, help="share of the memory to plan with (default: 0.9)")


def main(argv: list[str]) -> int:
    """Run the experiment."""
    arguments = cli.parse(argv, name="plan", doc=__doc__, add_options=add_options)
    cli.setup_jax()
    from moejax.accounting.chips import named_chip
    from moejax.accounting.roofline import Assumptions
    from moejax.accounting.target import missing_plugins
    from moejax.config.mesh import MeshConfig
    from moejax.models import ModelParts
    from moejax.parallel.plan import MeshPlan

    options, config, began = arguments.options, arguments.config, time.perf_counter()
    sizes = {"global_batch": options.global_batch, "seq_len": options.seq}
    changes = {f"train.{key}": value for key, value in sizes.items() if value is not None}
    config = load.override(config, changes | {"train.microbatches": 1}, "command line")
    chip, network = named_chip(options.chip), options.network
    if options.devices < 1:
        raise ValueError(f"--devices ({options.devices}) must be at least 1")
    if options.compile and (missing := missing_plugins()) is not None:
        raise ValueError(missing)
    assume = Assumptions(
        options.mfu_cap, options.link_share, options.overlap, network and network * 1e9, options.headroom
    )
    parts = ModelParts.of(config.model, MeshPlan.on_paper(MeshConfig()))
    best, rejected, counts = search(parts, config.train, options.devices, chip, assume, options.top)
    print_rejected(rejected, options.verbose)
    if not best:
        raise ValueError(
            f"no layout of {options.devices} x {options.chip} fits: take more devices, or a smaller --global-batch"
        )
    print(describe(counts, options, config, assume, time.perf_counter() - began))
    print_table(best)
    first = best[0].candidate
    mesh = first.parts.plan.config
    chosen = dataclasses.replace(config, model=first.parts.config, train=first.train, mesh=mesh)
    cli.prepare_out(arguments.out, chosen, resume=False)
    write_mesh(arguments.out / "mesh.toml", best[0], options)
    draw(best, chip, arguments.out / "memory.png")
    if options.serve:
        print(serving(best, options.serve))
    report = {"devices": options.devices, "chip": options.chip} | counts
    report["best"] = [row(ranked) for ranked in best]
    if options.compile:
        report["compiled"] = compile_ahead(chosen, options.devices, chip, best[0])
    (arguments.out / "result.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {arguments.out}/config.toml (for --model and --mesh), mesh.toml, memory.png, result.json")
    return 0


def search(
    parts: Any, train: Any, devices: int, chip: "Chip", assume: "Assumptions", top: int
) -> tuple[list[Ranked], list["Rejected"], dict[str, int]]:
    """Give the `top` fastest layouts, best first, and what was rejected; a bound says when the rest must be slower."""
    from tqdm import tqdm

    from moejax.accounting.candidates import consider, layouts
    from moejax.accounting.roofline import compute_time, step_time

    fits, rejected, legal = [], [], 0
    tables = list(layouts(devices, parts.config, chip))
    for table in tqdm(tables, desc="layouts", delay=2.0, leave=False):
        found, refused = consider(parts, table, train, chip.memory * assume.headroom)
        fits += found
        legal += bool(found)
        rejected += [refused] if refused else []
    bounds = [(sum(compute_time(c.parts, c.train, chip, assume)), i) for i, c in enumerate(fits)]
    best: list[Ranked] = []
    for bound, index in sorted(bounds):
        if len(best) == top and bound > best[-1].step.total:
            break
        candidate = fits[index]
        step = step_time(candidate.parts, candidate.train, candidate.memory, chip, assume)
        best = sorted([*best, Ranked(candidate, step)], key=lambda ranked: ranked.step.total)[:top]
    return best, rejected, {"layouts": len(tables), "fit": legal, "rejected": len(rejected)}


def describe(counts: dict[str, int], options: Any, config: Any, assume: "Assumptions", seconds: float) -> str:
    """Say what was searched and what is assumed."""
    train = config.train
    return (
        f"\n{counts['layouts']} layouts of {options.devices} x {options.chip} in {seconds:.1f} s: {counts['fit']} fit, "
        f"{counts['rejected']} do not. {train.global_batch} sequences of {train.seq_len} tokens a step.\n"
        f"Assumed: matmuls reach {assume.matmul:.0%} of the peak, links {assume.link:.0%} of theirs; weights,\n"
        f"gradients and ring keys hide behind {assume.overlap:.0%} of the computing; {assume.headroom:.0%} of memory "
        "may be used."
    )


def row(ranked: Ranked) -> dict[str, Any]:
    """Give one layout's figures: bytes of a device, seconds of a step."""
    candidate, step = ranked
    memory = dataclasses.asdict(candidate.memory) | {"total": candidate.memory.total}
    return {
        "mesh": load.to_table(candidate.parts.plan.config),
        "microbatches": candidate.train.microbatches,
        "remat": candidate.parts.config.remat,
        "memory": memory,
        "step": dataclasses.asdict(step) | {"total": step.total},
    }


def label(candidate: "Candidate") -> str:
    """Name a layout in a few words."""
    mesh = candidate.parts.plan.config
    axes = " ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, mesh.degrees(), strict=True) if size > 1)
    schedule = f" {mesh.schedule}" + (f" v{mesh.chunks}" if mesh.chunks > 1 else "") if mesh.pipeline > 1 else ""
    context = f" {mesh.context}" if mesh.sequence > 1 else ""
    return f"{axes or 'one device'} zero{mesh.zero_stage}{context}{schedule}"


def print_table(best: Sequence[Ranked]) -> None:
    """Print the layouts, the fastest first."""
    kinds = ("weights", "grads", "optim", "kept", "work", "total")
    heads = [
        f"{'layout':54}{'micro':>6}{'remat':>6} ",
        *(f"{kind:>8}" for kind in kinds),
        f"{'nvlink':>10}{'network':>8}",
    ]
    print(f"\n{'':67}GB on one device at the peak{'':27}GB sent a step{'':8}seconds of a step")
    print("".join(heads) + "  " + "".join(f"{name:>9}" for name in ("compute", "wait", "bubble", "step", "MFU")))
    for candidate, step in best:
        memory = candidate.memory
        sizes = (memory.params, memory.gradients, memory.optimizer, memory.activations, memory.workspace, memory.total)
        figures = [f"{size / 1e9:9.3g}" for size in sizes]
        figures += [f"  {step.nvlink / 1e9:9.3g}{step.network / 1e9:9.3g}  "]
        figures += [f"{time:9.3g}" for time in (step.compute, step.exposed, step.bubble, step.total)]
        split = f"{candidate.train.microbatches:6}{candidate.parts.config.remat:>6} "
        print(f"{label(candidate):54}{split}{''.join(figures)}{step.mfu:9.1%}")


def write_mesh(path: Path, best: Ranked, options: Any) -> None:
    """Write the best layout as a mesh file; what it wants of the model and the loop stands in its first lines."""
    import tomli_w

    candidate, step = best
    train = candidate.train
    mesh = load.to_table(candidate.parts.plan.config)
    lines = (
        f"# {options.devices} x {options.chip}; planned: {step.total:.3g} s a step, "
        f"{candidate.memory.total / 1e9:.3g} GB a device.",
        f"# Wants --model.remat {candidate.parts.config.remat} --train.microbatches {train.microbatches} "
        f"--train.global-batch {train.global_batch} --train.seq-len {train.seq_len}",
    )
    path.write_text("\n".join(lines) + "\n" + tomli_w.dumps({"mesh": mesh}))


def draw(best: Sequence[Ranked], chip: "Chip", path: Path) -> None:
    """Draw what fills the memory under each of the best layouts."""
    from moejax.accounting.plots import plot_memory

    bars = [
        (f"{label(c)}, {c.train.microbatches} microbatches, remat {c.parts.config.remat}", c.memory) for c, _ in best
    ]
    plot_memory(bars, chip.memory, "What is in a device's memory?", path)


def serving(best: Sequence[Ranked], sequences: int) -> str:
    """Say what each device holds when the best layout that can decode answers `sequences` at a time."""
    from moejax.accounting.memory import WeightBytes, cache_bytes
    from moejax.parallel.plan import MeshPlan

    for candidate, _ in best:
        mesh, length = candidate.parts.plan.config, candidate.train.seq_len
        if mesh.pipeline == mesh.sequence == 1:
            plan = MeshPlan.on_paper(mesh.for_decoding())
            weights = WeightBytes.of(candidate.parts.on(plan)).weights
            cache = cache_bytes(candidate.parts.config, plan, sequences, length)
            return (
                f"serving {sequences} sequences of {length} tokens on {label(candidate)}: "
                f"weights {weights / 1e9:.3g} GB, caches {cache / 1e9:.3g} GB a device"
            )
    return "serving: all layouts shown split layers or positions, which is for training: raise --top"


def compile_ahead(config: Any, number: int, chip: "Chip", best: Ranked) -> dict[str, Any]:
    """Compile the training step for devices that are not here; print the compiler's figures beside the estimate."""
    from moejax.accounting.communication import by_axes, expected_transfers
    from moejax.accounting.compiled import collectives
    from moejax.accounting.contract import pipeline_turns
    from moejax.accounting.target import h200_devices, nothing_kept
    from moejax.train.ahead import lower_train_step

    print(f"compiling for {number} x H200 (minutes) ...", flush=True)
    began, train = time.perf_counter(), config.train
    lowered, parts = lower_train_step(config, h200_devices(number, chip))
    with nothing_kept():
        compiled: Any = lowered.compile()
    plan = parts.plan
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    total, predicted = memory.argument_size_in_bytes + memory.temp_size_in_bytes, best.candidate.memory.total
    print(
        f"compiled in {seconds:.0f} s: {memory.argument_size_in_bytes / 1e9:.2f} GB of arguments + "
        f"{memory.temp_size_in_bytes / 1e9:.2f} GB of temporaries = {total / 1e9:.2f} GB a device; "
        f"estimated {predicted / 1e9:.2f} GB ({predicted / total - 1:+.1%})"
    )
    sent: dict[tuple[tuple[str, ...], str], float] = collections.defaultdict(float)
    for one in collectives(compiled.as_text(), dict(plan.mesh.shape), *pipeline_turns(plan, train)):
        # Turns that only a skewed load needs (an exchange's further rounds) are not a balanced step's.
        sent[one.axes, one.kind] += 0.0 if one.dynamic else one.sent * one.times
    expected = by_axes(expected_transfers(parts, train))
    print(f"{'GB that a device sends':40}{'compiled':>10}{'estimate':>10}")
    for key in sorted(sent | expected, key=lambda key: -max(sent.get(key, 0), expected.get(key, 0))):
        name = f"{key[1]} over {' '.join(key[0])}"
        print(f"{name:40}{sent.get(key, 0) / 1e9:10.3f}{expected.get(key, 0) / 1e9:10.3f}")
    figures = {"seconds": seconds, "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    return figures | {"sent": {f"{kind} over {' '.join(axes)}": size for (axes, kind), size in sent.items()}}


def print_rejected(rejected: Sequence["Rejected"], verbose: bool) -> None:
    """Print why layouts were rejected: all of them, or how many for each reason, with an example."""
    if verbose:
        for one in rejected:
            print(f"rejected {_short(one.mesh)}: {one.reason}")
        return
    groups: dict[str, list[Any]] = collections.defaultdict(list)
    for one in rejected:
        groups[re.sub(r"\d+", "#", one.reason)].append(one)
    for same in sorted(groups.values(), key=len, reverse=True):
        print(f"rejected {len(same):5}: {same[0].reason}  [{_short(same[0].mesh)}]")


def _short(table: dict[str, Any]) -> str:
    plain = {"context": "ring", "zero_stage": 0}
    return " ".join(f"{k}={v}" for k, v in table.items() if v != 1 and v is not False and v != plain.get(k))


if __name__ == "__main__":
    sys.exit(cli.run(main))
