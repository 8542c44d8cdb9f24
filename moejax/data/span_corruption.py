"""How does text become a source with spans cut out and a target that says them? T5's objective (arXiv 1910.10683, 3.1).

Row i takes its tokens from the packed stream, as rows of next-token training do. Of them 15 % are noise, in spans of 3
on average: the source has a sentinel for each span, the target each sentinel and what stood there; both end with an end
token. The lengths of all rows are the same, only the places are drawn, from (seed, i) alone.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Int32, Int64

from moejax.config.model import START_TOKEN
from moejax.data.packing import Batch, PackedIndex, TokenStore, stack_rows

NOISE: Final = 0.15
MEAN_SPAN: Final = 3.0


@dataclass(frozen=True)
class SpanLengths:
    """Lengths of every row: what is taken from the stream, and what its source and target have room for."""

    tokens: int
    source_len: int
    target_len: int

    @property
    def num_noise(self) -> int:
        """Tokens that are cut out."""
        return min(max(round(self.tokens * NOISE), 1), self.tokens - 1)

    @property
    def num_spans(self) -> int:
        """Runs that they stand in, as many sentinels."""
        return min(max(round(self.num_noise / MEAN_SPAN), 1), self.tokens - self.num_noise)

    @property
    def fits(self) -> bool:
        """Whether source and target hold all, their end tokens included."""
        source = self.tokens - self.num_noise + self.num_spans + 1
        return source <= self.source_len and self.num_noise + self.num_spans + 1 <= self.target_len

    @classmethod
    def within(cls, source_len: int, target_len: int) -> "SpanLengths":
        """Take as many tokens as fit; raise ValueError where not even two do."""
        lengths = cls(2, source_len, target_len)
        if not lengths.fits:
            raise ValueError(
                f"span corruption needs source_len ({source_len}) and seq_len ({target_len}) of 3 at least each"
            )
        while (longer := cls(lengths.tokens + 1, source_len, target_len)).fits:
            lengths = longer
        return lengths


class SpanDataset:
    """Rows by number and without end; row i depends on (store, lengths, seed, i) alone.

    Of a row: source and source_segments [S]; inputs, targets, segments, positions, weights and bytes [T], as of packed
    rows; the inputs are the targets behind a start token. Documents run into one another, as T5's did.
    """

    def __init__(self, store: TokenStore, lengths: SpanLengths, sentinels: Int32[np.ndarray, " num_spans"], seed: int):
        assert len(sentinels) == lengths.num_spans, (len(sentinels), lengths)
        self.store, self.lengths, self.sentinels = store, lengths, sentinels
        self.index = PackedIndex(store.doc_lengths, lengths.tokens, seed)
        self._seed = seed % 2**64
        self._end = int(store.tokens[store.offsets[1] - 1])

    def __getitem__(self, row: int) -> Batch:
        """Build one row."""
        spans = self.index.spans(row)
        offsets = self.store.offsets
        pieces = [self.store.tokens[offsets[doc] + start : offsets[doc] + stop] for doc, start, stop in spans.tolist()]
        tokens = np.concatenate(pieces)[: self.lengths.tokens]
        noise = noise_mask(self.lengths, self._seed, row)
        source = self._with_sentinels(tokens, noise)
        target = self._with_sentinels(tokens, ~noise)
        text = np.append(self._with_sentinels(self.store.token_bytes[tokens], ~noise, np.zeros_like(self.sentinels)), 0)
        source, target = np.append(source, self._end), np.append(target, self._end)
        targets, length = _fill(target, self.lengths.target_len), self.lengths.target_len
        real = np.arange(length) < len(target)
        return {
            "source": _fill(source, self.lengths.source_len),
            "source_segments": _fill(np.ones_like(source), self.lengths.source_len),
            "inputs": np.append(np.int32(START_TOKEN), targets[:-1]),
            "targets": targets,
            "segments": real.astype(np.int32),
            "positions": np.arange(length, dtype=np.int32),
            "weights": real.astype(np.float32),
            "bytes": _fill(text, length),
        }

    def rows(self, start: int, stop: int) -> Batch:
        """Build rows start to stop, each array [stop - start, S or T]."""
        return stack_rows(self, start, stop)

    def in_first_epoch(self, rows: Int64[np.ndarray, "*B 1"]) -> Bool[np.ndarray, "*B 1"]:
        """Say which rows lie in the first epoch; the first one counts in any case."""
        return ((rows + 1) * self.lengths.tokens <= self.index.num_tokens) | (rows == 0)

    def _with_sentinels(
        self, tokens: np.ndarray, cut: Bool[np.ndarray, " tokens"], sentinels: np.ndarray | None = None
    ) -> Int32[np.ndarray, " shorter"]:
        """Put one sentinel in the place of each run that is cut, in their order."""
        begins = cut & ~np.append(False, cut[:-1])
        replaced = tokens.astype(np.int32)
        replaced[begins] = self.sentinels if sentinels is None else sentinels
        return replaced[~cut | begins]


def noise_mask(lengths: SpanLengths, seed: int, row: int) -> Bool[np.ndarray, " tokens"]:
    """Draw which tokens are noise: runs of text and noise take turns, text first, each of one token at least."""
    # raw bits, because numpy promises their stream for all versions, and shuffle's for none
    bits = np.random.PCG64([seed, row, 1]).random_raw(lengths.tokens)
    kept = lengths.tokens - lengths.num_noise
    text = _split(kept, lengths.num_spans, bits[:kept])
    noise = _split(lengths.num_noise, lengths.num_spans, bits[kept:])
    runs = np.stack([text, noise], axis=1).reshape(-1)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _split(total: int, parts: int, bits: np.ndarray) -> Int64[np.ndarray, " parts"]:
    """Cut `total` into parts of one at least; all ways are as likely."""
    cuts = np.sort(np.argsort(bits[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _fill(values: np.ndarray, length: int) -> Int32[np.ndarray, " length"]:
    return np.pad(values, (0, length - len(values)), constant_values=START_TOKEN).astype(np.int32)
