"""Which rows make up the batch of a step?

Step s takes rows s * G to (s + 1) * G of the packed dataset. The batch depends on (seed, step) alone: a checkpoint
saves the step, and any process builds the rows it needs without asking another.
"""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from moejax.data.packing import Batch, Rows

_NO_END = 2**62
_THREADS = 2  # a batch is numpy work that holds the lock for most of its time: more threads only wait


class BatchSource:
    """The batches of a run: every array is [Y, B, T], microbatch y holding the y-th part of the step's rows, in order.

    Raises ValueError where the rows do not divide into microbatches.
    """

    def __init__(self, dataset: Rows, global_batch: int, microbatches: int = 1):
        if global_batch < 1 or microbatches < 1 or global_batch % microbatches:
            raise ValueError(
                f"global_batch ({global_batch}) must divide by microbatches ({microbatches}), both at least 1"
            )
        self.dataset = dataset
        self.global_batch = global_batch
        self.microbatches = microbatches
        self.rows_per_microbatch = global_batch // microbatches

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Build rows start to stop of a step's G, each array [stop - start, T]."""
        assert 0 <= start < stop <= self.global_batch, (start, stop)
        first = int(step) * self.global_batch
        return self.dataset.rows(first + start, first + stop)

    def local(self, step: int, part: slice) -> Batch:
        """Build a part of every microbatch, each array [Y, part, T]: all that a process needs for its own devices."""
        start, stop, stride = part.indices(self.rows_per_microbatch)
        assert stride == 1, part
        firsts = range(0, self.global_batch, self.rows_per_microbatch)
        microbatches = [self.rows(step, first + start, first + stop) for first in firsts]
        return {name: np.stack([rows[name] for rows in microbatches]) for name in microbatches[0]}

    def batch(self, step: int) -> Batch:
        """Build the whole batch of a step, each array [Y, G / Y, T]."""
        return self.local(step, slice(None))

    def batches(
        self, start_step: int = 0, prefetch: int = 2, part: slice = slice(None)
    ) -> Generator[Batch, None, None]:
        """Give the batches from start_step on, without end, `prefetch` of them built ahead in threads."""
        import grain  # here: its import brings jax, which serving a batch does not need

        options = grain.ReadOptions(num_threads=min(prefetch, _THREADS), prefetch_buffer_size=prefetch)
        iterator = iter(grain.MapDataset.source(_Steps(self, start_step, part)).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()  # ends the threads when the loop is left

    def eval_batches(self, num: int, part: slice = slice(None)) -> Generator[Batch, None, None]:
        """Give the first `num` batches, or fewer where the first epoch ends before: no target counts twice.

        Targets beyond that epoch have weight 0 and 0 bytes; the shapes are those of `local`.
        """
        index = self.dataset.index
        for step in range(min(num, -(-index.rows_per_epoch // self.global_batch))):
            batch = self.local(step, part)
            rows = step * self.global_batch + np.arange(self.global_batch).reshape(self.microbatches, -1, 1)[:, part]
            inside = self.dataset.in_first_epoch(rows)
            yield batch | {name: batch[name] * inside.astype(batch[name].dtype) for name in ("weights", "bytes")}


@dataclass(frozen=True)
class _Steps:
    """Steps from a first one on, as the random access source that grain reads."""

    source: BatchSource
    start_step: int
    part: slice

    def __len__(self) -> int:
        return _NO_END

    def __getitem__(self, index: int) -> Batch:
        return self.source.local(self.start_step + int(index), self.part)
