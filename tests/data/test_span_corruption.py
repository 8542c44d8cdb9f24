"""Spans cut out and said again: the text comes back whole, and a row is a function of its number."""

import numpy as np
import pytest

from moejax.config.run import DataConfig
from moejax.data import BatchSource, prepare
from moejax.data.packing import TokenStore
from moejax.data.span_corruption import SpanDataset, SpanLengths, noise_mask
from moejax.data.tokenizer import build_tokenizer

WORDS, END, VOCAB = 50, 1, 80
LENGTHS = SpanLengths.within(64, 20)


def store(documents: int = 5, length: int = 60) -> TokenStore:
    """Make documents whose every token differs from its neighbours."""
    rng = np.random.default_rng(0)
    ids = [rng.permutation(np.arange(2, WORDS)).repeat(2)[: length - 2].astype(np.int32) for _ in range(documents)]
    return TokenStore.from_ids(ids, 0, END, np.full(VOCAB, 2, np.int32))


def dataset(seed: int = 3, lengths: SpanLengths = LENGTHS) -> SpanDataset:
    return SpanDataset(store(), lengths, VOCAB - 1 - np.arange(lengths.num_spans, dtype=np.int32), seed)


def put_together(row: dict[str, np.ndarray]) -> list[int]:
    """Put each span in the place of its sentinel; both sides end with one end token and padding."""
    source = row["source"][row["source_segments"] > 0].tolist()
    target = row["targets"][row["weights"] > 0].tolist()
    assert source.pop() == target.pop() == END
    spans: dict[int, list[int]] = {}
    for token in target:
        if token > WORDS:
            spans[token] = last = []
        else:
            last.append(token)
    assert list(spans) == [VOCAB - 1 - i for i in range(len(spans))], "sentinels descend from the vocabulary's last id"
    assert [token for token in source if token > WORDS] == list(spans)
    return [piece for token in source for piece in spans.get(token, [token])]


@pytest.mark.parametrize("row", [0, 1, 7, 100])
def test_source_and_target_together_are_the_text(row):
    data = dataset()
    whole = data.index.spans(row)
    text = np.concatenate([data.store.tokens[data.store.offsets[d] :][start:stop] for d, start, stop in whole.tolist()])
    made = data[row]
    assert put_together(made) == text[: LENGTHS.tokens].tolist()
    assert made["inputs"].tolist() == [0, *made["targets"][:-1].tolist()]
    assert made["bytes"].sum() == 2 * LENGTHS.num_noise
    assert {name: len(array) for name, array in made.items()} == {
        "source": 64, "source_segments": 64, "inputs": 20, "targets": 20,
        "segments": 20, "positions": 20, "weights": 20, "bytes": 20,
    }  # fmt: skip


def test_a_row_depends_on_its_seed_and_number_alone():
    one, other = dataset(), dataset()
    other[5], other[2]
    for name, array in one[9].items():
        np.testing.assert_array_equal(array, other[9][name])
    assert (one[9]["source"] != dataset(seed=4)[9]["source"]).any()
    assert (noise_mask(LENGTHS, 3, 0) != noise_mask(LENGTHS, 3, 1)).any()


def test_noise_is_as_much_as_the_paper_says():
    lengths = SpanLengths.within(512, 114)
    assert (lengths.tokens, lengths.num_noise, lengths.num_spans) == (568, 85, 28)
    assert not SpanLengths(569, 512, 114).fits
    masks = np.stack([noise_mask(lengths, 0, row) for row in range(300)])
    begins = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert (masks.sum(1) == 85).all() and (begins.sum(1) == 28).all()
    assert not masks[:, 0].any() and masks[:, -1].all()
    middle = masks[:, 100:-100].mean()
    assert middle == pytest.approx(85 / 568, abs=0.01), "noise is spread over the row"


@pytest.mark.parametrize(("source", "target"), [(2, 20), (64, 2)])
def test_lengths_without_room_are_refused(source, target):
    with pytest.raises(ValueError, match="at least each"):
        SpanLengths.within(source, target)


def test_batches_are_rows_and_the_first_epoch_counts_once():
    data = dataset()
    source = BatchSource(data, 4, 2)
    batch = source.batch(1)
    assert batch["source"].shape == (2, 2, 64) and batch["targets"].shape == (2, 2, 20)
    np.testing.assert_array_equal(batch["source"][1, 0], data[6]["source"])
    counted = sum(batch["bytes"].sum() for batch in source.eval_batches(100))
    assert counted == 2 * LENGTHS.num_noise * (data.index.num_tokens // LENGTHS.tokens)


def test_a_corpus_leaves_the_last_ids_to_sentinels(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"document {number} says what it says\n" * 30)
    config = DataConfig(source=str(tmp_path), tokenizer="bytes", objective="span_corruption", val_fraction=0.3)
    data = prepare(config, 300, 20, 0, tmp_path / "cache", source_len=64)
    row = data.train[0]
    assert row["targets"][0] == 299
    words = data.tokenizer.decode(row["targets"][row["weights"] > 0])
    assert words and set(words) <= set("document 0123 says what it says\n")


def test_a_vocabulary_without_room_for_sentinels_is_refused():
    tokenizer = build_tokenizer(DataConfig(tokenizer="bytes"), 258, ["text"])
    with pytest.raises(ValueError, match="5 spans a row need as many behind them: set "):
        tokenizer.sentinels(260, 5)
