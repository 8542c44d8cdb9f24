"""How does a config become packed rows, and how does the second start skip the work of the first?"""

import bz2
import hashlib
import logging
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from moejax.config.run import DataConfig
from moejax.data.chat import ChatFormat, encode_chats
from moejax.data.corpus import Documents, fingerprint_files, load_documents
from moejax.data.packing import PackedDataset, TokenStore
from moejax.data.sources import list_files
from moejax.data.span_corruption import SpanDataset, SpanLengths
from moejax.data.tokenizer import Tokenizer, build_tokenizer

_FORMAT = "1"  # counts up when the meaning of a cache entry changes
_STATS_BYTES = 32_000_000  # of the held-out text; beyond, the figures no longer move
_VAL_SEED = 0  # the validation rows are the same in every run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextStats:
    """What the held-out text costs without a model: bits per byte that a trained one must beat."""

    unigram_entropy: float
    """entropy of its bytes, each for itself"""
    bz2_bits_per_byte: float
    """8 * compressed / plain, bz2 at level 9"""


@dataclass(frozen=True)
class Data:
    """A corpus ready to train on."""

    train: PackedDataset | SpanDataset
    val: PackedDataset | SpanDataset
    tokenizer: Tokenizer
    fingerprint: str
    val_text_stats: TextStats
    """of the held-out text; of conversations, of the answers alone"""
    chat_template: str = ""
    """the jinja source that conversations were rendered by"""

    def describe(self) -> str:
        """Say in one line how much there is."""
        train, val = self.train.store, self.val.store
        counted = "" if train.answers is None else f" (answers: {train.answers.sum():,})"
        return (
            f"train {len(train.tokens):,} tokens{counted}, validation {len(val.tokens):,};"
            f" vocab {self.tokenizer.vocab_size}, {train.num_bytes / len(train.tokens):.2f} bytes per token;"
            f" held-out text {self.val_text_stats.unigram_entropy:.3f} bits per byte as single bytes,"
            f" {self.val_text_stats.bz2_bits_per_byte:.3f} by bz2; sha256 {self.fingerprint[:12]}"
        )


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What a cache entry holds: all that does not depend on seq_len and seed."""

    train: TokenStore
    val: TokenStore
    tokenizer: Tokenizer
    stats: TextStats


def prepare(
    config: DataConfig,
    vocab: int,
    seq_len: int,
    seed: int,
    cache_dir: Path | None = None,
    source_len: int | None = None,
) -> Data:
    """Read, tokenize and pack a corpus, or take its tokens from the cache.

    The cache is cache_dir, or $MOEJAX_CACHE, or ~/.cache/moejax; its key is the content of the corpus's files, so that
    an edited file is never mistaken for the old one. A damaged entry is built anew; a cache that cannot be written is
    done without. Under span corruption rows have sources of `source_len` tokens, and the vocabulary's last ids are
    left to sentinels.

    Raises:
        FileNotFoundError: nothing matches data.source, or data.tokenizer names no file.
        ValueError: a file is unreadable, a side of the split empty, or the tokenizer does not fit into the vocabulary.
    """
    chat = ChatFormat.of(config) if config.format == "chat" else None
    fingerprint = fingerprint_files(config, list_files(config.source), chat)
    spans = SpanLengths.within(source_len or seq_len, seq_len) if config.objective == "span_corruption" else None
    words = vocab if spans is None else vocab - spans.num_spans
    entry = _cache_root(cache_dir) / _cache_key(config, words, fingerprint)
    prepared = _read_entry(entry)
    if prepared is None:
        prepared = _build(load_documents(config, chat), config, words, chat)
        _write_entry(entry, prepared)

    def rows(store: TokenStore, seed: int) -> PackedDataset | SpanDataset:
        if spans is None:
            return PackedDataset(store, seq_len, seed)
        return SpanDataset(store, spans, prepared.tokenizer.sentinels(vocab, spans.num_spans), seed)

    return Data(
        train=rows(prepared.train, seed),
        val=rows(prepared.val, _VAL_SEED),
        tokenizer=prepared.tokenizer,
        fingerprint=fingerprint,
        val_text_stats=prepared.stats,
        chat_template=chat.template.source if chat else "",
    )


def text_stats(texts: Sequence[str]) -> TextStats:
    """Measure the bytes of some texts, joined."""
    text = "".join(texts).encode()[:_STATS_BYTES]
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    p = counts[counts > 0] / len(text)
    return TextStats(
        # + 0.0: text of one byte value has entropy 0, not -0
        unigram_entropy=float(-(p * np.log2(p)).sum()) + 0.0,
        bz2_bits_per_byte=8 * len(bz2.compress(text, 9)) / len(text),
    )


def _build(documents: Documents, config: DataConfig, vocab: int, chat: ChatFormat | None) -> _Prepared:
    _log.info("%s", documents.describe())
    if chat is not None:
        tokenizer = build_tokenizer(config, vocab, [chat.words(text) for text in documents.train])
        train, val = (
            TokenStore.from_chats(*encode_chats(tokenizer, side), tokenizer.token_bytes)
            for side in (documents.train, documents.val)
        )
        return _Prepared(train, val, tokenizer, text_stats([chat.answers(text) for text in documents.val]))
    tokenizer = build_tokenizer(config, vocab, documents.train)
    train, val = (
        TokenStore.from_ids(tokenizer.encode_batch(side), tokenizer.bos_id, tokenizer.eos_id, tokenizer.token_bytes)
        for side in (documents.train, documents.val)
    )
    return _Prepared(train, val, tokenizer, text_stats(documents.val))


def _cache_root(cache_dir: Path | None) -> Path:
    return Path(cache_dir or os.environ.get("MOEJAX_CACHE") or "~/.cache/moejax").expanduser()


def _cache_key(config: DataConfig, vocab: int, fingerprint: str) -> str:
    if config.tokenizer in ("bytes", "bpe"):
        tokenizer = f"{config.tokenizer} tokenizers-{version('tokenizers')}"  # another version may learn other merges
    else:
        tokenizer = Tokenizer.load(config.tokenizer).hash()
    return hashlib.sha256(repr((_FORMAT, fingerprint, tokenizer, vocab)).encode()).hexdigest()[:32]


def _read_entry(entry: Path) -> _Prepared | None:
    """Read a cache entry; None where there is none or it is damaged (the archive has checksums)."""
    if not entry.is_dir():
        return None
    try:
        tokenizer = Tokenizer.load(entry / "tokenizer.json")
        # opened here: of a damaged archive np.load would leave the file open
        with (entry / "tokens.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            stores = [
                TokenStore(
                    arrays[f"{side}_tokens"],
                    arrays[f"{side}_offsets"],
                    tokenizer.token_bytes,
                    arrays.get(f"{side}_answers"),
                )
                for side in ("train", "val")
            ]
            stats = TextStats(*map(float, arrays["stats"]))
            if str(arrays["tokenizer"]) != tokenizer.hash():
                raise ValueError("another tokenizer than the tokens were made with")
        for store in stores:
            if store.offsets[-1] != len(store.tokens) or store.tokens.max() >= tokenizer.vocab_size:
                raise ValueError("tokens and offsets do not fit")
            if store.answers is not None and store.answers.shape != store.tokens.shape:
                raise ValueError("tokens and answers do not fit")
        return _Prepared(stores[0], stores[1], tokenizer, stats)
    except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        _log.warning("cache entry %s is damaged (%s): building it anew", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _write_entry(entry: Path, prepared: _Prepared) -> None:
    """Write a cache entry under another name and rename it: a reader sees all of it or nothing."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    except OSError as error:
        _log.warning("cache %s cannot be written (%s): the next start will tokenize again", entry.parent, error)
        return
    sides = {"train": prepared.train, "val": prepared.val}
    answers = {f"{side}_answers": store.answers for side, store in sides.items() if store.answers is not None}
    try:
        prepared.tokenizer.save(unfinished / "tokenizer.json")
        np.savez(
            unfinished / "tokens.npz",
            train_tokens=prepared.train.tokens,
            train_offsets=prepared.train.offsets,
            val_tokens=prepared.val.tokens,
            val_offsets=prepared.val.offsets,
            stats=np.array(astuple(prepared.stats)),
            tokenizer=np.array(prepared.tokenizer.hash()),
            allow_pickle=False,
            **answers,
        )
        unfinished.rename(entry)
    except OSError as error:
        if not entry.is_dir():  # else another process was first, with the same content
            _log.warning("cache entry %s could not be written (%s): the next start will tokenize again", entry, error)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
