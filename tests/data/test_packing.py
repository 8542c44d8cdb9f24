import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data import PackedDataset, PackedIndex, TokenStore

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def numbered_store(lengths: list[int]) -> TokenStore:
    """A store whose tokens are all different, each standing for one byte."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenStore(np.arange(offsets[-1], dtype=np.int32), offsets, np.ones(offsets[-1], np.int32))


def naive_stream(index: PackedIndex, lengths: list[int], num_tokens: int) -> list[tuple[int, int, int]]:
    """Write out (occurrence, document, token of the document) one by one, epoch after epoch."""
    stream, epoch, occurrence = [], 0, 0
    while len(stream) < num_tokens:
        for doc in index.epoch_order(epoch):
            stream += [(occurrence, int(doc), n) for n in range(lengths[doc])]
            occurrence += 1
        epoch += 1
    return stream


def test_a_row_of_a_hand_written_corpus(store_of):
    store = store_of("abc")  # 256 a b c 257 | 256 a b c 257 | …
    rows = PackedDataset(store, seq_len=4, seed=0)
    a, b, c, bos, eos = 97, 98, 99, 256, 257
    expected = [
        # inputs, targets, segments, positions, weights, bytes
        ([bos, a, b, c], [a, b, c, eos], [1, 1, 1, 1], [0, 1, 2, 3], [1, 1, 1, 1], [1, 1, 1, 0]),
        ([eos, bos, a, b], [bos, a, b, c], [1, 2, 2, 2], [0, 0, 1, 2], [0, 1, 1, 1], [0, 1, 1, 1]),
        ([c, eos, bos, a], [eos, bos, a, b], [1, 1, 2, 2], [0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 1, 1]),
    ]
    for i, row in enumerate(expected):
        assert tuple(array.tolist() for array in rows[i].values()) == row, i
    assert [array.dtype for array in rows[0].values()] == [np.int32] * 4 + [np.float32, np.int32]
    assert list(rows[0]) == ["inputs", "targets", "segments", "positions", "weights", "bytes"]


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 12), seed=st.integers(-3, 2**63), row=st.integers(0, 40))
def test_rows_match_the_stream_written_out(lengths, seq_len, seed, row):
    dataset = PackedDataset(numbered_store(lengths), seq_len, seed)
    start = row * seq_len
    window = naive_stream(dataset.index, lengths, start + seq_len + 1)[start : start + seq_len + 1]
    tokens = np.array([dataset.store.offsets[doc] + n for _, doc, n in window])
    occurrences = np.array([occurrence for occurrence, _, _ in window])
    segments = occurrences - occurrences[0] + 1
    positions = [i - int(np.argmax(segments == segment)) for i, segment in enumerate(segments)]
    same = segments[1:] == segments[:-1]
    got = dataset[row]
    assert got["inputs"].tolist() == tokens[:-1].tolist()
    assert got["targets"].tolist() == tokens[1:].tolist()
    assert got["segments"].tolist() == segments[:-1].tolist()
    assert got["positions"].tolist() == positions[:-1]
    assert got["weights"].tolist() == got["bytes"].tolist() == same.tolist()
    spans = [(doc, n) for doc, first, stop in dataset.index.row(row) for n in range(first, stop)]
    assert spans == [(doc, n) for _, doc, n in window]


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_token_of_an_epoch_is_an_input_once(lengths, seq_len, seed):
    dataset = PackedDataset(numbered_store(lengths), seq_len, seed)
    num_tokens = sum(lengths)
    inputs = np.concatenate([dataset[row]["inputs"] for row in range(3 * num_tokens // seq_len + 1)])[: 3 * num_tokens]
    for epoch in inputs.reshape(3, num_tokens):
        assert sorted(epoch) == list(range(num_tokens))


def test_each_epoch_and_each_seed_has_its_own_order():
    index, other = (PackedIndex([2] * 50, 8, seed) for seed in (1, 2))
    orders = [index.epoch_order(0), index.epoch_order(1), other.epoch_order(0)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    again = PackedIndex([2] * 50, 8, 1)
    assert again.epoch_order(1).tolist() == orders[1].tolist()


def test_the_order_is_the_same_for_every_version_of_numpy():
    assert PackedIndex([3] * 8, 4, seed=7).epoch_order(2).tolist() == [6, 4, 0, 5, 7, 1, 3, 2]


def test_bytes_of_an_epochs_rows_are_the_texts_bytes(store_of):
    texts = ["größer", "a", "the expert 专家", "🙂🙂"]
    store = store_of(*texts)
    dataset = PackedDataset(store, seq_len=len(store.tokens) - 1, seed=5)
    assert dataset[0]["bytes"].sum() == store.num_bytes == sum(len(text.encode()) for text in texts)
    assert dataset[0]["weights"].sum() == len(store.tokens) - len(texts)


def test_a_row_costs_well_under_a_millisecond():
    from timeit import repeat

    dataset = PackedDataset(numbered_store([300] * 2000), seq_len=2048, seed=0)
    dataset[0]
    assert min(repeat(lambda: dataset[100], number=20, repeat=5)) / 20 < 1e-3


def test_rows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"seq_len \(0\) must be at least 1"):
        PackedIndex([3], 0, 0)
    with pytest.raises(ValueError, match="the corpus has 0 documents, must have some and none empty"):
        PackedIndex([], 4, 0)
