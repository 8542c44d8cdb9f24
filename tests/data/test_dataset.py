import bz2
import logging
import math
import subprocess
import sys

import numpy as np
import pytest

from moejax.config.run import DataConfig
from moejax.data import dataset, prepare
from moejax.data.dataset import text_stats


@pytest.fixture
def config(corpus) -> DataConfig:
    return DataConfig(source=str(corpus), val_fraction=0.2)


def tokens_of(data) -> list[list[int]]:
    return [side.store.tokens.tolist() for side in (data.train, data.val)]


def never(*_):
    raise AssertionError("must have come from the cache")


def test_prepared_rows_decode_to_the_documents(config, tmp_path):
    data = prepare(config, vocab=300, seq_len=8, seed=0, cache_dir=tmp_path / "cache")
    store, tokenizer = data.train.store, data.tokenizer
    documents = [tokenizer.decode(store.tokens[a:b]) for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    assert documents == dataset.load_documents(config).train
    assert "bytes per token" in data.describe()


def test_second_start_reads_the_cache(config, tmp_path, monkeypatch):
    first = prepare(config, 300, 8, 0, tmp_path / "cache")
    monkeypatch.setattr(dataset, "load_documents", never)
    second = prepare(config, 300, 16, 1, tmp_path / "cache")
    assert tokens_of(first) == tokens_of(second)
    assert first.val_text_stats == second.val_text_stats
    assert first.fingerprint == second.fingerprint
    assert first.tokenizer.hash() == second.tokenizer.hash()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_other_vocabularies_tokenizers_and_contents_have_their_own_entries(config, corpus, tmp_path):
    cache = tmp_path / "cache"
    prepare(config, 300, 8, 0, cache)
    prepare(config, 310, 8, 0, cache)
    prepare(DataConfig(source=str(corpus), val_fraction=0.2, tokenizer="bytes"), 300, 8, 0, cache)
    (corpus / "00.txt").write_text("edited")
    edited = prepare(config, 300, 8, 0, cache)
    assert "edited" in edited.tokenizer.decode(np.concatenate([edited.train.store.tokens, edited.val.store.tokens]))
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("name", ["tokens.npz", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "reword"])
def test_a_damaged_entry_is_built_anew(config, tmp_path, caplog, name, damage):
    cache = tmp_path / "cache"
    first = prepare(config, 300, 8, 0, cache)
    (entry,) = cache.iterdir()
    path = entry / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "reword" and name == "tokenizer.json":
        path.write_bytes(content.replace(b'"a":', b'"\\u0a0a":'))
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        second = prepare(config, 300, 8, 0, cache)
    assert "building it anew" in caplog.text
    assert tokens_of(first) == tokens_of(second)
    assert sorted(path.name for path in entry.iterdir()) == ["tokenizer.json", "tokens.npz"]


def test_a_cache_that_cannot_be_written_is_done_without(config, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert prepare(config, 300, 8, 0, tmp_path / "file" / "cache").tokenizer.vocab_size == 300
    assert "cannot be written" in caplog.text


def test_the_environment_names_the_cache(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "here"))
    prepare(config, 300, 8, 0)
    assert len(list((tmp_path / "here").iterdir())) == 1


def test_validation_rows_are_the_same_for_every_seed(config, tmp_path):
    first, second = (prepare(config, 300, 8, seed, tmp_path / "cache") for seed in (0, 1))
    np.testing.assert_array_equal(first.val[3]["inputs"], second.val[3]["inputs"])
    assert not np.array_equal(first.train.rows(0, 9)["inputs"], second.train.rows(0, 9)["inputs"])


def test_text_stats_of_known_text():
    assert text_stats(["ab", "ab"]).unigram_entropy == pytest.approx(1.0)
    assert math.copysign(1, text_stats(["aaaa"]).unigram_entropy) == 1
    text = "the expert " * 100
    assert text_stats([text]).bz2_bits_per_byte == pytest.approx(8 * len(bz2.compress(text.encode(), 9)) / len(text))


def test_a_missing_tokenizer_is_named_before_any_work(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "load_documents", never)
    config = DataConfig(source=str(corpus), tokenizer=str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer .*none\.json"):
        prepare(config, 300, 8, 0, tmp_path / "cache")


def test_importing_the_package_brings_no_jax():
    code = "import sys, moejax.data as d; d.prepare, d.BatchSource, d.load_documents; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
