"""Which rows are there still to measure? A family's cases one after another, each written when it is done.

OUT/FAMILY.jsonl has a line for the machine of each run, a line when a way begins, and a line for each finished row. A
row that is there is not measured again; a way that began and was never heard of again hung or broke the process, and
is not tried again.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.kernels.case import Case
from experiments.kernels.machine import on_gpu
from experiments.kernels.runner import Row, run_case

FAMILIES = ("attention", "decode", "moe", "fused", "lightning")
AGAIN = 75
"""exit code (EX_TEMPFAIL) of a process that a kernel broke: another one goes on, and leaves that kernel out"""
LONGEST_WAY = 120.0
"""seconds that a way may take to compile and run, before the process ends itself"""

CUT_OFF = "did not come back in an earlier run: it broke the process or was cut off"


class Lost(RuntimeError):
    """The GPU's context is lost: what follows needs another process."""


class Deadline:
    """Seconds until a moment by which the work must have ended; None has all the time."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._longest = 0.0

    def allows_another(self) -> bool:
        """Say whether there is time for a piece of work half as long again as the longest so far."""
        return self._end is None or time.monotonic() + 1.5 * self._longest < self._end

    @contextlib.contextmanager
    def piece(self) -> Iterator[None]:
        """Time a piece of work."""
        began = time.monotonic()
        yield
        self._longest = max(self._longest, time.monotonic() - began)


class Results:
    """A family's file of lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self.machines: list[dict[str, Any]] = []
        self.dead: dict[str, dict[str, str]] = {}
        """by row: ways that began in an earlier process and were not heard of again"""
        self._read()

    def _read(self) -> None:
        begun: dict[str, str] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                said = json.loads(line)
            except ValueError:  # the end of a process that was killed while it wrote
                continue
            if "machine" in said:
                self.machines.append(said["machine"])
                self._bury(begun)
            elif "began" in said:
                row, way = said["began"]
                begun[row] = way
            elif "died" in said:
                row, reason = said["died"]
                self._bury({row: begun.pop(row, "")}, reason)
            elif "failed" in said:
                begun.pop(said["failed"][0], None)
            elif "row" in said:
                self.rows[said["row"]["name"]] = said["row"]
                begun.pop(said["row"]["name"], None)
        self._bury(begun)

    def _bury(self, begun: dict[str, str], reason: str = CUT_OFF) -> None:
        for row, way in begun.items():
            self.dead.setdefault(row, {})[way] = reason
        begun.clear()

    def add(self, **line: Any) -> None:
        """Append a line, safe on the disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if "row" in line:
            self.rows[line["row"]["name"]] = line["row"]
        if "machine" in line:
            self.machines.append(line["machine"])


def cases_of(family: str, dry: bool) -> list[Case]:
    """Give a family's rows; raise ValueError for a family that is not there."""
    name = f"experiments.kernels.{family}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(f'no family of kernels "{family}" (known: {", ".join(FAMILIES)})') from error
    return list(module.cases(dry=dry))


def sweep(results: Results, cases: list[Case], deadline: Deadline, dry: bool = False) -> Iterator[Row]:
    """Measure the rows that are not there yet, and yield each; stop early when the time is up.

    Raises Lost when a way took the GPU's context with it: another process goes on with the row, without that way.
    """
    for case in cases:
        if case.name in results.rows:
            continue
        if not deadline.allows_another():
            return
        with deadline.piece():
            row = run_case(
                case, dry, lambda way, case=case: watched(results, case.name, way), results.dead.get(case.name)
            )
        release()
        if row.get("fatal"):
            results.add(died=[case.name, row["failed"]])
            raise Lost(f"{case.name}: {row['failed']}")
        results.add(row=row)
        yield row


def release() -> None:
    """Give a row's memory back before the next one: torch keeps what it freed, and errors hold on to arrays."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def watched(results: Results, row: str, way: str) -> Iterator[None]:
    """Write that a way begins, and end the process if it does not come back: nothing else ends a kernel that hangs."""

    def give_up() -> None:
        reason = f"hung: not back within {LONGEST_WAY:.0f} s"
        results.add(died=[row, reason])
        print(f"{row}: {way} {reason}", file=sys.stderr, flush=True)
        os._exit(AGAIN)

    results.add(began=[row, way])
    timer = threading.Timer(LONGEST_WAY, give_up)
    timer.daemon = True
    if on_gpu():  # the interpreter may take its time
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
