"""How long does a call keep the GPU busy? The sum of its kernels' times by CUPTI, the same clock for JAX and torch.

Where CUPTI cannot be had: CUDA events for torch, and for JAX many calls between two waits (which counts the gaps too).
Every time carries the name of its clock. CUPTI counts kernels alone: no gap between two kernels of one call, no memcpy.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

WARM_UPS = 10
ROUNDS = 3
CALLS = 30
"""calls a round; a third of them where one takes longer than SLOW"""
SLOW = 0.02
"""seconds"""
COLD_BYTES = 256 << 20
"""Inputs are rotated among sets of so many bytes together, several times the L2: no call finds its own there."""
MOST_SETS = 128


@dataclass(frozen=True)
class Runnable:
    """A compiled function with its sets of inputs."""

    call: Callable[[int], Any]
    """enqueue call number i"""
    wait: Callable[[Any], None]
    """wait until what a call gave is there"""
    torch: bool = False
    """whether torch runs it"""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of all rounds, and where 20 % and 80 % of the calls lie."""

    median: float
    p20: float
    p80: float
    calls: int
    clock: str
    """cupti, events or enqueued"""
    kernels: int | None = None
    """kernels a call, where the clock counts them"""

    @staticmethod
    def of(samples: Sequence[float], clock: str, kernels: int | None) -> "Timing":
        """Summarise the samples of one way."""
        ordered = sorted(samples)
        low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
        return Timing(statistics.median(ordered), low, high, len(ordered), clock, kernels)


class Clock(Protocol):
    """Something that times `calls` calls of a runnable, beginning with call number `first`."""

    name: str

    def samples(self, run: Runnable, first: int, calls: int) -> tuple[list[float], int | None]:
        """Give seconds for each call (or for each group of calls), and kernels a call if counted."""
        ...


class ClockFailed(RuntimeError):
    """The clock cannot time this: the message says why."""


class Cupti:
    """Kernel times from CUDA's profiling interface, through the binding that jaxlib brings for Mosaic."""

    name = "cupti"

    def __init__(self) -> None:
        try:
            from jax._src.lib import mosaic_gpu  # no public way counts the kernels of torch too

            binding: Any = mosaic_gpu._mosaic_gpu_ext
            self._begin, self._end = binding._cupti_init, binding._cupti_get_timings
        except (ImportError, AttributeError) as error:
            raise ClockFailed(f"jaxlib has no CUPTI binding: {error}") from error

    def samples(self, run: Runnable, first: int, calls: int) -> tuple[list[float], int | None]:
        """Give each call's kernel time."""
        out = None
        try:
            self._begin()
        except Exception as error:
            raise ClockFailed(f"CUPTI does not start: {error}") from error
        try:
            for i in range(first, first + calls):
                out = run.call(i)
            run.wait(out)
        finally:
            records = self._end(False)
        return split_calls(records, calls)


def split_calls(records: Sequence[tuple[str, float]], calls: int) -> tuple[list[float], int]:
    """Cut kernels and their milliseconds into calls; raise ClockFailed unless each call has the same kernels."""
    kernels, rest = divmod(len(records), calls)
    cut = [records[i * kernels : (i + 1) * kernels] for i in range(calls)]
    if not kernels or rest or any(sorted(name for name, _ in one) != sorted(name for name, _ in cut[0]) for one in cut):
        raise ClockFailed(f"CUPTI saw {len(records)} kernels of {calls} calls: not the same ones for each")
    return [sum(milliseconds for _, milliseconds in one) / 1e3 for one in cut], kernels


class Enqueued:
    """The host's clock around groups of ten calls that were enqueued without waiting."""

    name = "enqueued"
    group = 10

    def samples(self, run: Runnable, first: int, calls: int) -> tuple[list[float], int | None]:
        """Give each group's seconds a call."""
        found = []
        for begin in range(first, first + calls, self.group):
            began, out = time.perf_counter(), None
            for i in range(begin, begin + self.group):
                out = run.call(i)
            run.wait(out)
            found.append((time.perf_counter() - began) / self.group)
        return found, None


class Events:
    """CUDA events around each call; torch alone."""

    name = "events"

    def samples(self, run: Runnable, first: int, calls: int) -> tuple[list[float], int | None]:
        """Give the time between each call's two events."""
        import torch  # pyright: ignore[reportMissingImports]

        pairs = []
        for i in range(first, first + calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run.call(i)
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs], None


def clocks(run: Runnable) -> list[Clock]:
    """List the clocks to try for a runnable, the best first."""
    found: list[Clock] = []
    with contextlib.suppress(ClockFailed):
        found.append(Cupti())
    return [*found, Events() if run.torch else Enqueued()]


def measure(runs: Mapping[str, Runnable]) -> dict[str, Timing]:
    """Time several ways against one another: warm-ups, then rounds in which each has its turn."""
    chosen: dict[str, Clock] = {}
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    kernels: dict[str, int | None] = {}
    for name, run in runs.items():
        calls[name] = CALLS if warm_up(run) < SLOW else CALLS // ROUNDS
        chosen[name] = working_clock(run)
    for turn in range(ROUNDS):
        for name, run in runs.items():
            try:
                found, kernels[name] = chosen[name].samples(run, turn * calls[name], calls[name])
            except ClockFailed:  # another number of kernels than before: one clock for all rounds, so begin again
                chosen[name], samples[name] = clocks(run)[-1], []
                found, kernels[name] = chosen[name].samples(run, turn * calls[name], calls[name])
            samples[name] += found
    return {name: Timing.of(samples[name], chosen[name].name, kernels[name]) for name in runs}


def warm_up(run: Runnable) -> float:
    """Call it ten times; give the host's seconds for the last call."""
    return [one_call(run, i) for i in range(WARM_UPS)][-1]


def one_call(run: Runnable, number: int = 0) -> float:
    """Call it once; give the host's seconds."""
    began = time.perf_counter()
    run.wait(run.call(number))
    return time.perf_counter() - began


def working_clock(run: Runnable) -> Clock:
    """Give the first clock that can time two calls; the last one always can."""
    *better, last = clocks(run)
    for clock in better:
        try:
            clock.samples(run, 0, 2)
        except ClockFailed:
            continue
        return clock
    return last


def number_of_sets(num_bytes: int) -> int:
    """Say how many sets of inputs of so many bytes keep the cache cold."""
    return max(1, min(MOST_SETS, -(-COLD_BYTES // max(num_bytes, 1))))
