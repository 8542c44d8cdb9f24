import threading
from itertools import islice

import numpy as np
import pytest

from moejax.data import BatchSource, PackedDataset


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_microbatches_are_the_steps_rows_in_order(source):
    batch = source.batch(5)
    for array in batch.values():
        assert array.shape == (2, 4, 16)
    for n in range(8):
        np.testing.assert_array_equal(batch["inputs"][n // 4, n % 4], source.dataset[5 * 8 + n]["inputs"])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_any_number_of_processes_builds_the_same_global_batch(source, num_processes):
    rows = 8 // num_processes
    parts = [source.rows(3, n * rows, (n + 1) * rows) for n in range(num_processes)]
    whole = {name: np.concatenate([part[name] for part in parts]).reshape(2, 4, 16) for name in parts[0]}
    assert_same(whole, source.batch(3))
    rows = 4 // num_processes
    parts = [source.local(3, slice(n * rows, (n + 1) * rows)) for n in range(num_processes)]
    assert_same({name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}, source.batch(3))


def test_a_batch_depends_on_seed_and_step_alone(source):
    again = BatchSource(PackedDataset(source.dataset.store, 16, seed=3), 8, 2)
    again.batch(9)
    assert_same(again.batch(4), source.batch(4))
    other = BatchSource(PackedDataset(source.dataset.store, 16, seed=4), 8, 2)
    assert not np.array_equal(other.batch(4)["inputs"], source.batch(4)["inputs"])


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_restart_continues_with_the_same_batches(source, prefetch):
    whole = list(islice(source.batches(0, prefetch), 9))
    restarted = list(islice(source.batches(4, prefetch), 5))
    for step, batch in enumerate(whole):
        assert_same(batch, source.batch(step))
    for left, right in zip(whole[4:], restarted, strict=True):
        assert_same(left, right)


def test_prefetched_parts_are_the_batchs_parts(source):
    batch = next(source.batches(2, prefetch=2, part=slice(1, 3)))
    assert_same(batch, {name: array[:, 1:3] for name, array in source.batch(2).items()})


def test_threads_end_when_the_loop_is_left(source):
    batches = source.batches(0, prefetch=2)
    next(batches)
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
    assert workers
    batches.close()
    for thread in workers:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in workers)


def test_validation_counts_every_target_once(source):
    index = source.dataset.index
    batches = list(source.eval_batches(1000))
    assert len(batches) == -(-index.rows_per_epoch // 8)
    assert sum(batch["bytes"].sum() for batch in batches) == source.dataset.store.num_bytes
    num_documents = len(source.dataset.store.doc_lengths)
    assert sum(batch["weights"].sum() for batch in batches) == index.num_tokens - num_documents
    for batch, again in zip(source.eval_batches(2), batches, strict=False):
        assert batch["inputs"].shape == (2, 4, 16)
        assert_same(batch, again)
    parts = [list(source.eval_batches(1000, part))[-1] for part in (slice(0, 3), slice(3, 4))]
    assert_same({name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}, batches[-1])


def test_a_corpus_smaller_than_a_row_repeats(store_of):
    source = BatchSource(PackedDataset(store_of("ab"), seq_len=10, seed=0), 2)
    assert source.batch(0)["inputs"][0, 0].tolist() == [256, 97, 98, 257, 256, 97, 98, 257, 256, 97]
    (batch,) = source.eval_batches(3)
    assert batch["bytes"].sum() == 2
    assert batch["weights"].sum() == 3


def test_rows_that_do_not_divide_are_refused(source):
    with pytest.raises(ValueError, match=r"global_batch \(8\) must divide by microbatches \(3\)"):
        BatchSource(source.dataset, 8, 3)
