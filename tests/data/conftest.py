from pathlib import Path

import pytest

from moejax.config.run import DataConfig
from moejax.data import BatchSource, PackedDataset, Tokenizer, TokenStore, build_tokenizer

SENTENCES = ("the router sends the token to the expert", "an idle expert learns nothing", "größere Bälle — 专家 🙂")


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return build_tokenizer(
        DataConfig(tokenizer="bpe"), 300, [f"{sentence} {n}\n" for sentence in SENTENCES for n in range(9)]
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer="bytes"), 258, [])


def make_store(tokenizer: Tokenizer, texts: list[str]) -> TokenStore:
    return TokenStore.from_ids(tokenizer.encode_batch(texts), tokenizer.bos_id, tokenizer.eos_id, tokenizer.token_bytes)


@pytest.fixture
def store_of(byte_tokenizer):
    return lambda *texts: make_store(byte_tokenizer, list(texts))


@pytest.fixture(scope="session")
def source(bpe) -> BatchSource:
    texts = [f"{sentence} {n}" for n in range(12) for sentence in SENTENCES]
    return BatchSource(PackedDataset(make_store(bpe, texts), seq_len=16, seed=3), global_batch=8, microbatches=2)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of twenty text files of like size."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(20):
        (folder / f"{n:02}.txt").write_text(f"document {n} about {SENTENCES[n % 3]}. " * 3, encoding="utf-8")
    return folder
