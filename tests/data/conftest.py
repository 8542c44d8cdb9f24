from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

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


CHAT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>")


@pytest.fixture
def write_tokenizer() -> Callable[..., Path]:
    """A function that writes a chat model's tokenizer of single bytes, one special looked for in normal form."""

    def write(path: Path, merges: Sequence[tuple[str, str]] = (), **greedy: bool) -> Path:
        tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
        backend = tokenizers.Tokenizer(models.BPE(vocab={text: n for n, text in enumerate(tokens)}, merges=[*merges]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        normalized = (AddedToken(text, normalized=text == "<tool>", **greedy) for text in CHAT_SPECIALS)
        backend.add_special_tokens([*normalized])
        backend.save(str(path))
        return path

    return write


@pytest.fixture
def chat_tokenizer(tmp_path, write_tokenizer) -> Path:
    """The tokenizer.json of a chat model, alone in its folder."""
    (tmp_path / "model").mkdir()
    return write_tokenizer(tmp_path / "model" / "tokenizer.json")
