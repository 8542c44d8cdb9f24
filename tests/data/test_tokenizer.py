import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config.run import DataConfig
from moejax.data import Tokenizer, build_tokenizer
from moejax.data.tokenizer import _sample

ANY_TEXT = st.text(max_size=60) | st.sampled_from(["<|bos|>", "a<|eos|>b", " \n\t  x", "\u200d🙂", "\x00\x7f\u0080"])


@pytest.fixture(params=["bpe", "bytes"])
def tokenizer(request, bpe, byte_tokenizer) -> Tokenizer:
    return {"bpe": bpe, "bytes": byte_tokenizer}[request.param]


def save_backend(path, special: list[str], **parts) -> str:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.add_special_tokens(special)
    backend.save(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_survives_the_round_trip_and_its_bytes_are_counted(kind, text, bpe, byte_tokenizer):
    tokenizer = bpe if kind == "bpe" else byte_tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_byte_ids_are_the_bytes(byte_tokenizer):
    text = "aé🙂\n\x00"
    assert byte_tokenizer.encode(text) == list(text.encode())
    assert (byte_tokenizer.vocab_size, byte_tokenizer.bos_id, byte_tokenizer.eos_id) == (258, 256, 257)


def test_bpe_has_the_vocabulary_asked_for_and_merges(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode("the expert")) < len("the expert")


def test_decode_skips_specials_and_unknown_ids(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id, 10_000]
    assert tokenizer.decode(np.array(ids)) == "hi"
    assert tokenizer.token_bytes[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]


def test_batches_encode_as_single_texts(tokenizer):
    texts = ["", "one", "zwei Bälle"]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in batch)


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.hash() == tokenizer.hash()
    assert loaded.encode("die Bälle <|bos|>") == tokenizer.encode("die Bälle <|bos|>")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_is_deterministic():
    texts = [f"to learn {n} is to {n * 7} forget {n % 5}" for n in range(300)]
    first, second = (build_tokenizer(DataConfig(), 400, texts) for _ in range(2))
    assert first.hash() == second.hash()


def test_a_large_corpus_is_sampled_from_everywhere():
    documents = [chr(97 + n) * 900_000 for n in range(10)]
    sample = _sample(documents)
    assert sample == _sample(documents)
    assert sum(map(len, sample)) == pytest.approx(4e6, rel=0.02)
    assert {piece[0] for piece in sample} == set("abcdefghij")


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_vocabulary_too_small_for_bytes_is_refused(kind):
    with pytest.raises(ValueError, match=r"model\.vocab \(257\) must be at least 258 for tokenizer"):
        build_tokenizer(DataConfig(tokenizer=kind), 257, ["text"])


def test_a_file_larger_than_the_vocabulary_is_refused(bpe, tmp_path):
    bpe.save(tmp_path / "t.json")
    config = DataConfig(tokenizer=str(tmp_path / "t.json"))
    assert build_tokenizer(config, 300, []).vocab_size == 300
    with pytest.raises(
        ValueError, match=r"model\.vocab \(299\) must hold the 300 ids of data\.tokenizer .* 300 or more"
    ):
        build_tokenizer(config, 299, [])


def test_a_file_that_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json\) is no file: give bpe, bytes, or a tokenizer\.json"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json\) is no readable tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("special", "bos", "eos"),
    [(["<s>", "</s>"], "<s>", "</s>"), (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>")],
)
def test_common_names_of_begin_and_end_are_found(tmp_path, special, bos, eos):
    tokenizer = Tokenizer.load(save_backend(tmp_path / "t.json", special))
    names = {i: name for name, i in json.loads((tmp_path / "t.json").read_text())["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in json.loads((tmp_path / "t.json").read_text())["added_tokens"]}
    assert (names[tokenizer.bos_id], names[tokenizer.eos_id]) == (bos, eos)


def test_a_file_without_begin_or_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"t\.json\) has no bos token: add one of <\|bos\|>, <s>"):
        Tokenizer.load(save_backend(tmp_path / "t.json", ["</s>"]))


def test_a_files_own_truncation_and_padding_are_switched_off(bpe, tmp_path):
    bpe.save(tmp_path / "t.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json").encode("the expert learns") == bpe.encode("the expert learns")


def test_bytes_of_other_tokenizers_are_counted_or_refused(tmp_path):
    vocab = {"▁a": 0, "é": 1, "<0x0A>": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "sp.json"))
    assert Tokenizer.load(tmp_path / "sp.json").token_bytes.tolist() == [2, 2, 1, 0, 0]
    other = Tokenizer.load(save_backend(tmp_path / "t.json", ["<s>", "</s>"]))
    with pytest.raises(ValueError, match=r"t\.json\) must be byte-level, or fall back to bytes"):
        _ = other.token_bytes
