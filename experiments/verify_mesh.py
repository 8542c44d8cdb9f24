"""Prove a layout: the same steps on one device and on the mesh, leaf by leaf, and what it sends and computes against
the analytic bounds.

A mesh file's devices are made of the CPU (float64 is exact there); --here takes the devices that jax sees. Three
questions, each answered by a table; a breach ends with exit code 1.
  equality   loss, router, grad norm, every gradient, every weight after 3 steps: all precisions float64, <= 1e-10
  bytes      each collective of the compiled step, by mesh axes and kind: <= 1.05 of the bound, and none undeclared
  FLOPs      the matmuls of the traced step: <= 1.1 of the model's own and what the layout is known to repeat
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from experiments import cli
from moejax.config.mesh import MeshConfig
from moejax.config.run import RunConfig

if TYPE_CHECKING:
    from moejax.accounting.contract import Line
    from moejax.train.proof import Trial

STEPS = 3
SMOKE_MESH = MeshConfig(data=2, expert=2, tensor=2, sequence_parallel=True)
LARGEST = 2e8
"""Weights of the largest model that is proven."""
EQUAL = 1e-10
"""Largest relative error of a leaf in float64."""
DISTANCE = 2.0
"""In its own precision a mesh may be so many times as far from float64 as one device is: it rounds no worse."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what this experiment understands besides the shared options."""
    parser.add_argument("--here", action="store_true", help="prove it on the devices that jax sees, not on a cut CPU")
    parser.add_argument(
        "--own-precision", action="store_true", help="also ask how far from float64 the model's own precision is"
    )
    parser.add_argument("--batch", type=int, help="sequences per step (default: 2 per batch rank and microbatch)")
    parser.add_argument("--seq", type=int, default=16, help="tokens per sequence (default: 16)")


def main(argv: list[str]) -> int:
    """Run the experiment."""
    arguments = cli.parse(argv, name="verify_mesh", doc=__doc__, add_options=add_options, smoke={"model.vocab": 64})
    options, config = arguments.options, sized(arguments.config, arguments.options)
    if arguments.smoke and config.mesh == MeshConfig():  # one device against itself would prove nothing
        config = sized(dataclasses.replace(config, mesh=SMOKE_MESH), options)
    if not options.here:
        cli.use_cpu(math.prod(config.mesh.degrees()) if config.mesh.data > 0 else None)
        # A proof runs its programs three times: compiling them without LLVM's optimiser saves most of the wait.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    cli.setup_jax()
    import jax

    cli.prepare_out(arguments.out, config, resume=False)
    with jax.enable_x64(True):
        report = prove(config, jax.devices(), options.own_precision)
    (arguments.out / "result.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    print("proven" if report["proven"] else "BREACH", f"({arguments.out / 'result.json'})")
    return 0 if report["proven"] else 1


def prove(config: RunConfig, devices: Any, own_precision: bool) -> dict[str, Any]:
    """Answer the three questions, printing each table; give them all."""
    from moejax.train.proof import in_float64

    report: dict[str, Any] = {"mesh": dataclasses.asdict(config.mesh), "model": config.model.name}
    exact = dataclasses.replace(config, model=in_float64(config.model))
    errors, trial, batch, rows_sent = compare(exact, devices)
    report["equality"] = {part: dict(zip(("error", "leaf"), worst(e), strict=True)) for part, e in errors.items()}
    good = show_equality(errors)
    lines = contracts(trial, batch, rows_sent)
    report["contract"] = [dataclasses.asdict(line) | {"kept": line.kept} for line in lines]
    good &= show_contract(lines)
    if own_precision:
        report["own_precision"] = distances(config, exact, devices)
        good &= show_distances(report["own_precision"])
    return report | {"proven": good}


def sized(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """Make the batch small, whatever the model file trains on: rows for every rank and microbatch."""
    mesh = config.mesh
    microbatches = 2 * mesh.pipeline
    rows = options.batch or 2 * microbatches * max(mesh.data, 1) * mesh.expert
    train = dataclasses.replace(
        config.train, global_batch=rows, microbatches=microbatches, seq_len=options.seq, steps=20
    )
    optimizer = dataclasses.replace(config.optimizer, lr=1e-2, warmup_steps=2, clip_norm=0.5)
    return dataclasses.replace(config, train=train, optimizer=optimizer)


def compare(config: RunConfig, devices: Any) -> tuple[dict[str, dict[str, float]], "Trial", dict, list[float]]:
    """Train a few steps on one device and on the mesh; give each leaf's relative error."""
    from moejax.accounting.model_cost import model_cost
    from moejax.train.proof import Trial, relative_errors, to_numpy

    mesh = Trial.of(config, devices)
    if (total := model_cost(mesh.parts, config.train.seq_len).total_params) > LARGEST:
        raise ValueError(
            f"the model ({total / 1e6:,.0f} M weights) must have at most {LARGEST / 1e6:,.0f} M: its twin runs on one "
            "device in float64, and a layout is proven as well by a narrow model (--model.embed 64 --model.vocab 256 …)"
        )
    single = Trial.of(dataclasses.replace(config, mesh=MeshConfig()), devices[:1])
    batches = some_batches(config)
    state = to_numpy(single.init())
    actual, expected = mesh.train(state, batches), single.train(state, batches)
    parts = ("gradient", "metrics", "state")
    errors = {part: relative_errors(getattr(actual, part), getattr(expected, part)) for part in parts}
    return errors, mesh, batches[0], actual.rows_sent


def some_batches(config: RunConfig) -> list[dict]:
    """Draw what both train on."""
    from moejax.train.proof import proof_batch

    train = config.train
    shape = (config.model.vocab, train.global_batch, train.seq_len, train.microbatches)
    return [proof_batch(seed, *shape) for seed in range(STEPS)]


def distances(config: RunConfig, exact: RunConfig, devices: Any) -> dict[str, dict[str, float]]:
    """Give how far the mesh and one device, in the model's own precision, end from one device in float64."""
    import jax
    import numpy as np

    from moejax.train.proof import Trial, relative_errors, to_numpy

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(np.float64) if jax.numpy.issubdtype(x.dtype, np.inexact) else x, tree)

    single, batches = Trial.of(dataclasses.replace(config, mesh=MeshConfig()), devices[:1]), some_batches(config)
    state = to_numpy(single.init())
    truth = Trial.of(dataclasses.replace(exact, mesh=MeshConfig()), devices[:1]).train(widen(state), batches)
    found: dict[str, dict[str, float]] = {part: {} for part in ("gradient", "metrics", "state")}
    for name, trial in (("mesh", Trial.of(config, devices)), ("one device", single)):
        trained = trial.train(state, batches)
        for part in found:
            errors = relative_errors(*(widen(getattr(t, part)) for t in (trained, truth)))
            found[part][name] = worst(errors)[0]
    return found


def show_distances(found: dict[str, dict[str, float]]) -> bool:
    """Print the distances from float64; say whether the mesh's are near one device's."""
    print(f"\nown precision: largest relative distance of a leaf from float64 (limit {DISTANCE:g} x one device's)")
    kept = {part: each["mesh"] <= DISTANCE * each["one device"] for part, each in found.items()}
    for part, each in found.items():
        print(f"{'  ' if kept[part] else '! '}{part:10} mesh {each['mesh']:9.1e}  one device {each['one device']:9.1e}")
    return all(kept.values())


def worst(leaves: dict[str, float]) -> tuple[float, str]:
    """Give the largest error and whose it is."""
    leaf = max(leaves, key=lambda path: leaves[path])
    return leaves[leaf], leaf


def show_equality(errors: dict[str, dict[str, float]]) -> bool:
    """Print the equality table; say whether it holds."""
    print(f"\nequality, float64: largest relative error of a leaf (limit {EQUAL:.0e})")
    for part, leaves in errors.items():
        error, leaf = worst(leaves)
        mark = "  " if error <= EQUAL else "! "
        print(f"{mark}{part:10} {len(leaves):4} leaves  {error:9.1e}  {leaf}")
    return all(error <= EQUAL for leaves in errors.values() for error in leaves.values())


def contracts(trial: "Trial", batch: dict, rows_sent: list[float]) -> list["Line"]:
    """Hold the compiled step to its bytes, and the traced one to its FLOPs."""
    from moejax.accounting.contract import communication_contract, exchange_line, flop_contract
    from moejax.train.proof import Trial

    train = trial.config.train
    lines = communication_contract(trial.program(batch).as_text(), trial.parts, train)
    extra = exchange_line(lines, trial.parts, train, rows_sent[0])
    moe = trial.config.model.moe
    if moe is not None:  # a grouped matmul by blocks has loops whose length no trace can know
        model = dataclasses.replace(trial.config.model, moe=dataclasses.replace(moe, implementation="ragged_dot"))
        devices = list(trial.parts.plan.mesh.devices.flat)
        trial = Trial.of(dataclasses.replace(trial.config, model=model), devices)
    flops = flop_contract(trial.jaxpr(batch), trial.parts, train)
    return [*lines, *([extra] if extra else []), *flops]


def show_contract(lines: list["Line"]) -> bool:
    """Print the contract; say whether it is kept."""
    print("\ncontract, one device, one step: bytes sent and FLOPs against their bounds")
    print(f"  {'what':44} {'bound':>12} {'found':>12} {'ratio':>7}  why")
    for line in lines:
        mark = "  " if line.kept else "! "
        print(f"{mark}{line.what:44} {line.bound:12,.0f} {line.found:12,.0f} {line.ratio:7.3f}  {line.why}")
    return all(line.kept for line in lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
