"""How does a run survive? Asynchronous, atomic Orbax checkpoints that restore onto any mesh."""

import contextlib
import functools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from moejax.models import ModelParts
from moejax.train.state import TrainState

VAL_LOSS = "val_loss"
SAVING = "saving a checkpoint"


class Checkpoints:
    """The checkpoints of one run: the newest few and the best by validation loss are kept.

    A save is written beside and renamed when complete: one that dies half-way leaves the others as they were, and the
    next start removes what it left.
    """

    def __init__(self, directory: Path, keep_last: int = 2, read_only: bool = False) -> None:
        self.directory = directory.absolute()
        _silence_libraries()
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_last),
                checkpoint_managers.BestN(
                    get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        # Without best_fn the metrics would not be written, and a resumed run would forget which one is the best.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=_val_loss,
            best_mode="min",
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        with self._clear_errors("opening the checkpoints"):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """Give the newest complete step (or the one that is being written), None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Give the step of the lowest validation loss, None if none was saved with one."""
        return self._manager.best_step()

    def steps(self) -> list[int]:
        """Give all complete steps."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: dict[str, Any], val_loss: float | None = None) -> None:
        """Start writing a checkpoint; the arrays may be donated as soon as this returns."""
        metrics = None if val_loss is None or not math.isfinite(val_loss) else {VAL_LOSS: val_loss}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), meta=ocp.args.JsonSave(meta))
        with self._clear_errors(SAVING):
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def meta(self, step: int) -> dict[str, Any]:
        """Read what was saved beside the arrays."""
        with self._clear_errors(f"reading the checkpoint of step {step}"):
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Read a checkpoint onto the shardings of `abstract`, whatever mesh it was saved on."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_tree(abstract)))
        with self._clear_errors(f"reading the checkpoint of step {step}"):
            return TrainState(**self._manager.restore(step, args=args)["state"])

    def choose(self, step: int | None) -> int:
        """Give `step`, or the newest one for None; raise ValueError where there is no such checkpoint."""
        steps = self.steps()
        if not steps:
            raise ValueError(f"{self.directory} holds no complete checkpoint: train first, or wait for the first save")
        if step is not None and step not in steps:
            raise ValueError(f"{self.directory} holds no checkpoint of step {step}, only of {steps}")
        return steps[-1] if step is None else step

    def restore_weights(self, step: int, parts: ModelParts) -> tuple[Any, Any]:
        """Read the weights and router buffers alone, onto the mesh of `parts`."""

        def place(shapes: Any, specs: Any) -> Any:
            return jax.tree.map(
                lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=parts.plan.place(spec)), shapes, specs
            )

        abstract = {
            "params": place(parts.shapes, parts.weight_specs()),
            "buffers": place(parts.buffer_shapes, parts.buffer_specs()),
        }
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        with self._clear_errors(f"reading the checkpoint of step {step}"):
            state = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        return state["params"], state["buffers"]

    def wait(self) -> None:
        """Wait until everything is on disk."""
        with self._clear_errors(SAVING):
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raise what a save in the background ran into; do not wait for one that is still running."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Finish what is being written and let go; errors are silent, lest they hide one on its way: `wait` before."""
        for finish in (self._manager.wait_until_finished, self._manager.close):
            with contextlib.suppress(Exception):
                finish()

    @contextlib.contextmanager
    def _clear_errors(self, doing: str) -> Iterator[None]:
        """Say in one line what failed and what is left; the libraries below raise many types for a full disk."""
        try:
            yield
        except Exception as error:
            hint = "make room on the disk" if doing == SAVING else "remove a damaged one (its folder)"
            raise OSError(
                f"{doing} in {self.directory} failed ({_reason(error)}); complete checkpoints there are untouched: "
                f"{hint} and start again with --resume"
            ) from error


def _val_loss(metrics: dict[str, float]) -> float:
    return metrics[VAL_LOSS]


def _reason(error: Exception) -> str:
    """Put a library's error into few words; tensorstore wraps the system's own in a long line."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _silence_libraries() -> None:
    """Keep Orbax and tensorstore from printing the tracebacks of what failed: it is raised here, once."""
    if os.environ.get("MOEJAX_DEBUG") == "1":
        return
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_is_not_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _report_unraisable:
        sys.unraisablehook = functools.partial(_report_unraisable, sys.unraisablehook)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname + record.getMessage()


def _report_unraisable(report: Callable[[Any], object], unraisable: Any) -> None:
    """Leave out what becomes of the threads and coroutines that were at work when another of them failed."""
    said = f"{unraisable.exc_value} {getattr(unraisable.object, 'cr_code', '')}"
    if "Event loop is closed" not in said and "orbax" not in said:
        report(unraisable)


def _tree(state: TrainState) -> dict[str, Any]:
    return dict(state.__dict__)


def _as_json(value: Any) -> Any:
    """Write tuples as JSON does, which a checkpoint's config has been through."""
    return [_as_json(x) for x in value] if isinstance(value, (list, tuple)) else value


def check_same_model(saved: dict[str, Any], model: dict[str, Any], where: Path) -> None:
    """Raise ValueError naming the first setting in which a checkpoint's model differs from this one."""

    def first(a: Any, b: Any, key: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in a | b:
                first(a.get(name), b.get(name), f"{key}.{name}")
        elif _as_json(a) != _as_json(b) and key not in (
            "model.remat",
            "model.attention.implementation",
            "model.moe.dispatch",
        ):
            raise ValueError(
                f"{where} holds another model: {key} is {a} there and {b} here; give that model, or another --out"
            )

    first(saved, model, "model")
