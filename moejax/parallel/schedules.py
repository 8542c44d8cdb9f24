"""When does a pipeline stage run which microbatch? Tables of tick x stage, without jax.

A tick has room for one forward and, after it, one backward. Work is numbered microbatch * chunks + chunk, -1 is idle.
Stage s sends its results to stage s+1 (the last one's go round to the first, which holds the next chunk), and every
piece of work finds its input sent in the tick before: no queue is needed.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np

Kind = Literal["gpipe", "1f1b", "interleaved"]
IDLE = -1


@dataclass(frozen=True)
class Schedule:
    """The order of work of `stages` devices, each holding `chunks` groups of layers."""

    kind: Kind
    stages: int
    microbatches: int
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.chunks > 1 and self.microbatches % self.stages:
            raise ValueError(f"microbatches ({self.microbatches}) must divide by stages ({self.stages}) to interleave")

    @property
    def work(self) -> int:
        """Give the pieces of work of one stage, each to be run forward and backward."""
        return self.microbatches * self.chunks

    @property
    def delay(self) -> int:
        """Give the tick of the first backward: when the first microbatch is through; for GPipe, when all are."""
        through = self.stages * self.chunks - 1
        return through if self.kind != "gpipe" else self.work + self.stages - 1

    @property
    def ticks(self) -> int:
        """Give the number of ticks."""
        return self.delay + self.stages - 1 + self.work

    def _piece(self, turn: np.ndarray, backward: bool) -> np.ndarray:
        """Give the work of a stage's n-th turn: groups of `stages` microbatches, chunk after chunk."""
        group, rest = np.divmod(turn, self.stages * self.chunks)
        chunk, inside = np.divmod(rest, self.stages)
        if backward:
            chunk = self.chunks - 1 - chunk
        microbatch = group * self.stages + inside
        if self.chunks == 1:
            microbatch, chunk = turn, 0 * turn
        piece = microbatch * self.chunks + chunk
        return np.where((turn >= 0) & (turn < self.work), piece, IDLE)

    @cached_property
    def forward(self) -> np.ndarray:
        """Give the work that each stage runs forward in each tick, [ticks, stages]."""
        tick, stage = np.indices((self.ticks, self.stages))
        return self._piece(tick - stage, backward=False)

    @cached_property
    def backward(self) -> np.ndarray:
        """Give the work that each stage runs backward in each tick, [ticks, stages]."""
        tick, stage = np.indices((self.ticks, self.stages))
        return self._piece(tick - self.delay - (self.stages - 1 - stage), backward=True)

    @cached_property
    def slots(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Give where forward keeps its input and backward finds it, [ticks, stages] each, and the number of slots.

        The slot after the last is for idle ticks.
        """
        put, take = np.full_like(self.forward, IDLE), np.full_like(self.backward, IDLE)
        used = 0
        for stage in range(self.stages):
            free: list[int] = []
            held: dict[int, int] = {}
            made = 0
            for tick in range(self.ticks):
                if (piece := int(self.forward[tick, stage])) != IDLE:
                    if not free:
                        free.append(made)
                        made += 1
                    put[tick, stage] = held[piece] = free.pop()
                if (piece := int(self.backward[tick, stage])) != IDLE:
                    take[tick, stage] = held.pop(piece)
                    free.append(int(take[tick, stage]))
            used = max(used, made)
        return np.where(put == IDLE, used, put), np.where(take == IDLE, used, take), used


make_schedule = cache(Schedule)
"""A schedule's tables are worked out once for all who ask."""


def simulate(schedule: Schedule, forward_time: float = 1.0, backward_time: float = 2.0) -> tuple[float, float]:
    """Run a schedule's order of work as discrete events; give the end, and the bubble as a fraction of it.

    Times are of one whole stage; a chunk takes its part. A stage starts its next piece as soon as its input is there.
    """
    forward_done: dict[tuple[int, int, int], float] = {}
    backward_done: dict[tuple[int, int, int], float] = {}
    stages, chunks = schedule.stages, schedule.chunks
    free = [0.0] * stages
    for tick in range(schedule.ticks):
        for stage in range(stages):
            if (piece := int(schedule.forward[tick, stage])) != IDLE:
                microbatch, chunk = divmod(piece, chunks)
                before = (microbatch, chunk, stage - 1) if stage else (microbatch, chunk - 1, stages - 1)
                ready = 0.0 if stage == chunk == 0 else forward_done[before]
                free[stage] = max(free[stage], ready) + forward_time / chunks
                forward_done[microbatch, chunk, stage] = free[stage]
        for stage in reversed(range(stages)):
            if (piece := int(schedule.backward[tick, stage])) != IDLE:
                microbatch, chunk = divmod(piece, chunks)
                last = stage == stages - 1
                after = (microbatch, chunk + 1, 0) if last else (microbatch, chunk, stage + 1)
                end = last and chunk == chunks - 1
                ready = forward_done[microbatch, chunk, stage] if end else backward_done[after]
                free[stage] = max(free[stage], ready) + backward_time / chunks
                backward_done[microbatch, chunk, stage] = free[stage]
    total, ideal = max(free), schedule.microbatches * (forward_time + backward_time)
    return total, 1.0 - ideal / total


def bubble_fraction(schedule: Schedule) -> float:
    """Give the closed form, (p-1) / (v m + p-1) of the whole time (arXiv 2104.04473)."""
    return (schedule.stages - 1) / (schedule.work + schedule.stages - 1)
