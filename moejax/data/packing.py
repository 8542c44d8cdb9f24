"""Which tokens stand in row number i, when documents are packed end to end without padding?

The stream is [bos] tokens [eos] of every document, epoch after epoch without end, each epoch in an order of its own.
Row i reads seq_len + 1 tokens at i * seq_len: one row's last target is the next one's first input, so every token of
the stream but the very first is the target of exactly one row. Any row is found by arithmetic and two binary searches;
no state is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int32, Int64

Batch = dict[str, np.ndarray]
"""inputs, targets, segments, positions, bytes int32 and weights float32, each [..., T]"""

_CACHED_EPOCHS = 4


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The tokens of all documents, begin and end included: document d is tokens[offsets[d]:offsets[d + 1]]."""

    tokens: Int32[np.ndarray, " num_tokens"]
    offsets: Int64[np.ndarray, " num_documents_plus_1"]
    token_bytes: Int32[np.ndarray, " V"]
    """UTF-8 bytes of each id, 0 for specials"""
    answers: Bool[np.ndarray, " num_tokens"] | None = None
    """of conversations, the tokens that the loss counts; None: all"""

    @classmethod
    def from_ids(cls, ids: Sequence[np.ndarray], bos_id: int, eos_id: int, token_bytes: np.ndarray) -> "TokenStore":
        """Put begin and end around each document's ids and join them."""
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(document) + 2 for document in ids], out=offsets[1:])
        tokens = np.empty(offsets[-1], np.int32)
        tokens[offsets[:-1]] = bos_id
        tokens[offsets[1:] - 1] = eos_id
        for document, start in zip(ids, offsets[:-1], strict=True):
            tokens[start + 1 : start + 1 + len(document)] = document
        return cls(tokens, offsets, token_bytes.astype(np.int32))

    @classmethod
    def from_chats(
        cls, ids: Sequence[np.ndarray], answers: Sequence[np.ndarray], token_bytes: np.ndarray
    ) -> "TokenStore":
        """Join conversations as they are: begin and end are the chat template's."""
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(document) for document in ids], out=offsets[1:])
        return cls(np.concatenate(ids), offsets, token_bytes.astype(np.int32), np.concatenate(answers))

    @property
    def doc_lengths(self) -> Int64[np.ndarray, " num_documents"]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return int(self.token_bytes[self.tokens].sum(dtype=np.int64))


class PackedIndex:
    """Where each row's tokens lie: a map from row numbers, without end, to spans of documents.

    Raises ValueError for a corpus without tokens or a seq_len below 1.
    """

    def __init__(self, doc_lengths: Sequence[int] | np.ndarray, seq_len: int, seed: int):
        self._doc_lengths = np.asarray(doc_lengths, np.int64)
        if seq_len < 1:
            raise ValueError(f"seq_len ({seq_len}) must be at least 1")
        if not len(self._doc_lengths) or self._doc_lengths.min() < 1:
            raise ValueError(
                f"the corpus has {len(self._doc_lengths)} documents, must have some and none empty: give text"
            )
        self.seq_len = seq_len
        self.num_tokens = int(self._doc_lengths.sum())
        self._seed = seed % 2**64
        self._epoch = lru_cache(maxsize=_CACHED_EPOCHS)(self._make_epoch)  # threads may share it

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold all targets of the first epoch; the last of them may reach into the second."""
        return max(1, -(-(self.num_tokens - 1) // self.seq_len))

    def epoch_order(self, epoch: int) -> Int64[np.ndarray, " num_documents"]:
        """Give the order of the documents in an epoch."""
        return self._epoch(epoch)[0]

    def spans(self, row: int) -> Int64[np.ndarray, "num_spans 3"]:
        """Give the (document, start, stop) spans that make up the row's seq_len + 1 tokens."""
        assert row >= 0, row
        epoch, start = divmod(row * self.seq_len, self.num_tokens)
        missing = self.seq_len + 1
        parts = []
        while missing:
            stop = min(start + missing, self.num_tokens)
            parts.append(self._spans_of_epoch(epoch, start, stop))
            missing -= stop - start
            epoch, start = epoch + 1, 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def row(self, row: int) -> list[tuple[int, int, int]]:
        """Give the spans as plain tuples."""
        return [(doc, start, stop) for doc, start, stop in self.spans(row).tolist()]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        # raw bits, because numpy promises their stream for all versions, and shuffle's for none
        bits = np.random.PCG64([self._seed, epoch]).random_raw(len(self._doc_lengths))
        order = np.argsort(bits, kind="stable")
        bounds = np.zeros(len(order) + 1, np.int64)
        np.cumsum(self._doc_lengths[order], out=bounds[1:])
        return order, bounds

    def _spans_of_epoch(self, epoch: int, start: int, stop: int) -> np.ndarray:
        order, bounds = self._epoch(epoch)
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        last = int(np.searchsorted(bounds, stop, side="left"))
        begins = bounds[first:last]
        ends = np.minimum(bounds[first + 1 : last + 1], stop)
        return np.stack([order[first:last], np.maximum(start - begins, 0), ends - begins], axis=1)


class Rows(Protocol):
    """Rows of training data by number, without end."""

    store: TokenStore
    index: PackedIndex

    def rows(self, start: int, stop: int) -> Batch:
        """Build rows start to stop, each array [stop - start, T]."""
        ...

    def in_first_epoch(self, rows: Int64[np.ndarray, "*B 1"]) -> Bool[np.ndarray, "*B T"]:
        """Say which targets of rows of these numbers are of the first epoch."""
        ...


class PackedDataset:
    """The rows themselves, by number and without end; row i depends on (store, seq_len, seed, i) alone.

    Of a row, all [T]: inputs and targets; segments 1, 2, … and positions from 0 anew in each, also where a document
    continues from the row before; weights, 0 where the target is another document's or, in a conversation, of no
    answer; bytes of the target's text, 0 for specials and where the weight is 0, so that sum(nats) / ln 2 / sum(bytes)
    is bits per byte. The end of a document is predicted (weight 1) and stands for no byte.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int):
        self.store = store
        self.index = PackedIndex(store.doc_lengths, seq_len, seed)

    @property
    def seq_len(self) -> int:
        """T, the tokens of a row."""
        return self.index.seq_len

    def __getitem__(self, row: int) -> Batch:
        """Build one row."""
        spans = self.index.spans(row)
        starts, lengths = spans[:, 1], spans[:, 2] - spans[:, 1]
        ends = np.cumsum(lengths)
        begins = ends - lengths
        columns = np.arange(self.seq_len + 1)
        positions = columns - np.repeat(begins, lengths)
        segments = np.repeat(np.arange(1, len(spans) + 1, dtype=np.int32), lengths)
        places = np.repeat(self.store.offsets[spans[:, 0]] + starts, lengths) + positions
        tokens = self.store.tokens[places]
        counted = segments[1:] == segments[:-1]
        if self.store.answers is not None:
            counted &= self.store.answers[places[1:]]
        return {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "segments": segments[:-1],
            "positions": positions[:-1].astype(np.int32),
            "weights": counted.astype(np.float32),
            "bytes": np.where(counted, self.store.token_bytes[tokens[1:]], 0).astype(np.int32),
        }

    def rows(self, start: int, stop: int) -> Batch:
        """Build rows start to stop, each array [stop - start, T]."""
        return stack_rows(self, start, stop)

    def in_first_epoch(self, rows: Int64[np.ndarray, "*B 1"]) -> Bool[np.ndarray, "*B T"]:
        """Say which targets of rows of these numbers are of the first epoch."""
        return rows * self.seq_len + np.arange(self.seq_len) + 1 < self.index.num_tokens


def stack_rows(dataset: Any, start: int, stop: int) -> Batch:
    """Build rows start to stop of a dataset that gives one row at a time."""
    assert 0 <= start < stop, (start, stop)
    rows = [dataset[row] for row in range(start, stop)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
