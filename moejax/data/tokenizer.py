"""How does text become token ids and come back, and how many bytes does each id stand for?"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from moejax.config.run import DataConfig

BOS, EOS = "<|bos|>", "<|eos|>"
MIN_VOCAB = 256 + 2

_BOS_NAMES = (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "<|endoftext|>")
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<|im_end|>")

_TRAINING_CHARS = 4_000_000  # more text changes the merges little and takes longer
_PIECE_CHARS = 65_536
_BATCH_CHARS = 4_000_000  # an Encoding takes about a hundred times the memory of its ids


class Tokenizer:
    """A tokenizer of the `tokenizers` library with begin and end, which drops no text and reads no specials from it."""

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "tokenizer"):
        # a file may say to cut or to fill what it encodes, and text that spells a special is text
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._name = name
        self.bos_id: int = self._special("bos", _BOS_NAMES)
        self.eos_id: int = self._special("eos", _EOS_NAMES)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises FileNotFoundError, or ValueError where the file is no tokenizer or has no begin or end.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"data.tokenizer ({path}) is no file: give bpe, bytes, or a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())
            raise ValueError(
                f"data.tokenizer ({path}) is no readable tokenizer.json ({reason}): save it again"
            ) from None
        return cls(backend, str(path))

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, at once or not at all."""
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(self._backend.to_str(), encoding="utf-8")
        unfinished.replace(path)

    def encode(self, text: str) -> list[int]:
        """Encode a text, without begin or end."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a text with what tokenizer.json itself puts around one: a begin, for most models."""
        return self._backend.encode(text, add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts in parallel, each to int32 ids without begin or end."""
        _allow_threads()
        ids = []
        for batch in _batches(texts, _BATCH_CHARS):
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return ids

    def encode_with_specials(self, texts: Sequence[str], skip: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode texts whose specials are meant, save those that the character `skip` stands in; it is no token.

        Gives the int32 ids of each text and the [num_tokens, 2] characters, begin and end, that each token is of.
        """
        backend = self._reading_specials(skip)
        encoded = []
        for batch in _batches(texts, _BATCH_CHARS):
            for encoding in backend.encode_batch(batch, add_special_tokens=False):
                encoded.append((np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)))
        return encoded

    def _reading_specials(self, skip: str) -> tokenizers.Tokenizer:
        """Copy the backend into one that looks for specials first and drops the character `skip` only then."""
        parts = json.loads(self._backend.to_str())
        for token in parts["added_tokens"]:
            # a special looked for in the normalized text would find what `skip` has kept apart
            token["normalized"] = token["normalized"] and not token["special"]
        drop = {"type": "Replace", "pattern": {"String": skip}, "content": ""}
        own = [parts["normalizer"]] if parts["normalizer"] else []
        parts["normalizer"] = {"type": "Sequence", "normalizers": [drop, *own]}
        parts["post_processor"] = None  # it may trim blanks from the offsets
        _allow_threads()
        return tokenizers.Tokenizer.from_str(json.dumps(parts))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Decode ids; specials, and ids that no token has, are skipped."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def specials(self) -> dict[str, int]:
        """The special tokens' texts and ids, by id."""
        added = sorted(self._backend.get_added_tokens_decoder().items())
        return {token.content: i for i, token in added if token.special}

    def sentinels(self, vocab: int, number: int) -> Int32[np.ndarray, " number"]:
        """Give the ids that stand for cut-out spans: <extra_id_0> and on, or the vocabulary's last ids, descending.

        Raises ValueError where the tokenizer uses those ids itself.
        """
        ids = [self._backend.token_to_id(f"<extra_id_{i}>") for i in range(number)]
        if number and None not in ids:
            return np.array(ids, np.int32)
        if vocab - number < self.vocab_size:
            raise ValueError(
                f"{self._name} has {self.vocab_size} ids, and {number} spans a row need as many behind them: set "
                f"model.vocab ({vocab}) to {self.vocab_size + number} at least, or source_len lower"
            )
        return np.arange(vocab - 1, vocab - 1 - number, -1, dtype=np.int32)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        """The number of UTF-8 bytes each id stands for, 0 for specials; a space put before the text counts.

        Raises ValueError for a tokenizer whose tokens do not spell the text (WordPiece, Unigram without byte fallback).
        """
        parts = json.loads(self._backend.to_str())
        byte_level = '"ByteLevel"' in json.dumps([parts["pre_tokenizer"], parts["decoder"]])
        if not byte_level and not parts["model"].get("byte_fallback"):
            raise ValueError(f"data.tokenizer ({self._name}) must be byte-level, or fall back to bytes: use bpe")
        added = self._backend.get_added_tokens_decoder()
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i in added:
                counts[i] = 0 if added[i].special else len(token.encode())
            else:
                counts[i] = len(token) if byte_level else _spelled_bytes(token)
        return counts

    def hash(self) -> str:
        """Hash what the tokenizer is."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def _special(self, kind: str, names: Sequence[str]) -> int:
        # among added tokens alone: in a vocabulary learned from HTML "<s>" is an ordinary token
        added = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}
        for name in names:
            if name in added:
                return added[name]
        raise ValueError(f"data.tokenizer ({self._name}) has no {kind} token: add one of {', '.join(names)}")


def build_tokenizer(config: DataConfig, vocab: int, documents: Sequence[str]) -> Tokenizer:
    """Build a run's tokenizer: bytes, a byte-level BPE (arXiv 1508.07909) trained on the documents, or one from a file.

    Raises ValueError where it does not fit into the model's vocabulary.
    """
    if config.tokenizer in ("bytes", "bpe"):
        if vocab < MIN_VOCAB:
            raise ValueError(
                f'model.vocab ({vocab}) must be at least {MIN_VOCAB} for tokenizer = "{config.tokenizer}"'
                f" (256 bytes, begin and end): set model.vocab to {MIN_VOCAB} or more"
            )
        return _byte_tokenizer() if config.tokenizer == "bytes" else _train_bpe(vocab, documents)
    tokenizer = Tokenizer.load(config.tokenizer)
    if tokenizer.vocab_size > vocab:
        raise ValueError(
            f"model.vocab ({vocab}) must hold the {tokenizer.vocab_size} ids of data.tokenizer ({config.tokenizer}):"
            f" set model.vocab to {tokenizer.vocab_size} or more"
        )
    return tokenizer


def _byte_tokenizer() -> Tokenizer:
    """Make the tokenizer whose id is the byte's value; begin and end follow."""
    # the library writes byte b as a printable character: itself, or the next free one from U+0100 on
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    vocab = {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
    assert set(vocab) == set(pre_tokenizers.ByteLevel.alphabet())
    backend = _byte_level(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return Tokenizer(backend, "bytes")


def _train_bpe(vocab: int, documents: Sequence[str]) -> Tokenizer:
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte, seen or not: nothing is unknown
        show_progress=False,
    )
    _allow_threads()
    backend.train_from_iterator(_sample(documents), trainer)
    return Tokenizer(backend, "bpe")


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sample(documents: Sequence[str]) -> list[str]:
    """Take all of a small corpus, and pieces from everywhere of a large one."""
    if sum(map(len, documents)) <= _TRAINING_CHARS:
        return list(documents)
    starts = [(n, start) for n, text in enumerate(documents) for start in range(0, len(text), _PIECE_CHARS)]
    order = np.argsort(np.random.PCG64(0).random_raw(len(starts)), kind="stable")
    pieces, total = [], 0
    for n, start in (starts[i] for i in order):
        if total >= _TRAINING_CHARS:
            break
        pieces.append(documents[n][start : start + _PIECE_CHARS])
        total += len(pieces[-1])
    return pieces


def _batches(texts: Sequence[str], num_chars: int) -> Iterable[list[str]]:
    batch, total = [], 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= num_chars:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _spelled_bytes(token: str) -> int:
    """Count the bytes of a SentencePiece token: <0x0A> is one byte, and a word's mark is a space."""
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace("▁", " ").encode())


def _allow_threads() -> None:
    # said outright, because unsaid the library warns at every later fork; no forked process of ours encodes in bulk
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
