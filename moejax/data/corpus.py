"""Which documents does a run train on, and which are held out?"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from moejax.config.run import DataConfig
from moejax.data.chat import ChatFormat
from moejax.data.sources import STDLIB_SOURCES, RawDocument, SourceFile, list_files, read_documents

_FORMAT = "1"  # counts up when the same files begin to give other documents or another split

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """The documents of a corpus, sorted by name, each on one side of the split; what was left out is counted."""

    source: str
    train: list[str]
    val: list[str]
    fingerprint: str
    num_duplicates: int = 0
    num_empty: int = 0

    def describe(self) -> str:
        """Say in one line what the corpus is."""
        train, val = (f"{len(side)} documents, {_num_bytes(side) / 1e6:.2f} MB" for side in (self.train, self.val))
        left_out = f"{self.num_duplicates} duplicates and {self.num_empty} empty left out"
        return f"{self.source}: train {train}; validation {val}; {left_out}; sha256 {self.fingerprint[:12]}"


def fingerprint_files(config: DataConfig, files: Sequence[SourceFile], chat: ChatFormat | None = None) -> str:
    """Hash what decides the documents and their split, parsing nothing: the files' names and bytes, the settings."""
    kind = config.source if config.source in STDLIB_SOURCES else "files"
    digest = hashlib.sha256(repr((_FORMAT, kind, config.text_field, config.val_fraction)).encode())
    if chat is not None:
        digest.update(repr(("chat", chat.hash())).encode())
    for file in files:
        with file.path.open("rb") as data:
            digest.update(repr((file.name, hashlib.file_digest(data, "sha256").hexdigest())).encode())
    return digest.hexdigest()


def load_documents(config: DataConfig, chat: ChatFormat | None = None) -> Documents:
    """Read a corpus, drop exact duplicates and empty documents, and hold out about val_fraction of its bytes.

    All documents of a file are on one side; a single file is split by rows, a single document by position. The choice
    goes by the hash of the names, so that it does not change with order or place. The corpus is held in memory. With
    `chat`, documents are conversations as marked texts, one a row.

    Raises:
        FileNotFoundError: nothing matches the source.
        ValueError: a file cannot be read, or one side of the split would be empty.
    """
    files = list_files(config.source)
    raw = [
        document
        for file in files
        for document in (chat.read(file) if chat else read_documents(config.source, file, config.text_field))
    ]
    filled = [document for document in raw if document.text.strip()]
    if chat and len(filled) < len(raw):
        skipped = len(raw) - len(filled)
        _log.warning("%s: %d of %d conversations have no assistant's turn: skipped", config.source, skipped, len(raw))
    unique: dict[str, RawDocument] = {}
    for document in filled:
        unique.setdefault(document.text, document)
    if not unique:
        what = "conversation that an assistant speaks in" if chat else "text"
        raise ValueError(f"data.source ({config.source}) has no {what} in its {len(files)} files: give others")
    if chat and len(unique) == 1:
        raise ValueError(f"data.source ({config.source}) has one conversation, must have two: one of them is held out")
    train, val = split(list(unique.values()), config.val_fraction)
    return Documents(
        source=config.source,
        train=train,
        val=val,
        fingerprint=fingerprint_files(config, files, chat),
        num_duplicates=len(filled) - len(unique),
        num_empty=len(raw) - len(filled),
    )


def split(documents: Sequence[RawDocument], val_fraction: float) -> tuple[list[str], list[str]]:
    """Split unique documents into train and validation texts, each in the given order.

    Raises ValueError where one side would be empty.
    """
    if len(documents) == 1:
        return _split_text(documents[0], val_fraction)
    if len({document.unit for document in documents}) == 1:
        documents = [replace(document, unit=document.name) for document in documents]
    sizes: dict[str, dict[str, int]] = {}
    for document in documents:
        stratum = sizes.setdefault(document.stratum, {})
        stratum[document.unit] = stratum.get(document.unit, 0) + len(document.text.encode())
    held_out = set[str]().union(*(_choose(stratum, val_fraction) for stratum in sizes.values()))
    train = [document.text for document in documents if document.unit not in held_out]
    val = [document.text for document in documents if document.unit in held_out]
    return train, val


def _choose(sizes: dict[str, int], val_fraction: float) -> set[str]:
    """Walk the units in the order of their names' hashes and take each that brings the sum closer to its share.

    At least one is taken and at least one is left, so that one file that holds most of the bytes does no harm.
    """
    by_hash = sorted(sizes, key=lambda unit: hashlib.sha256(unit.encode("utf-8", "surrogateescape")).digest())
    missing = val_fraction * sum(sizes.values())
    chosen: list[str] = []
    for unit in by_hash:
        if sizes[unit] < 2 * missing:
            chosen.append(unit)
            missing -= sizes[unit]
    chosen = chosen or [min(by_hash, key=sizes.__getitem__)]
    return set(chosen[:-1] if len(chosen) == len(sizes) else chosen)


def _split_text(document: RawDocument, val_fraction: float) -> tuple[list[str], list[str]]:
    """Hold out the end of the only document, from the paragraph, line or word on that begins near its share."""
    text = document.text
    cut = min(max(round(len(text) * (1 - val_fraction)), 1), len(text) - 1)
    near = cut - (len(text) - cut) // 2
    for boundary in ("\n\n", "\n", " "):
        start = text.rfind(boundary, near, cut)
        if start >= 0:
            cut = start + len(boundary)
            break
    train, val = text[:cut], text[cut:]
    if not train.strip() or not val.strip():
        raise ValueError(
            f"{document.name}: the corpus's only document ({len(text)} characters) must leave text on both sides of"
            f" data.val_fraction ({val_fraction}): give more text"
        )
    return [train], [val]


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)
