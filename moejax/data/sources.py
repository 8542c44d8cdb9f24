"""Which files does a source name, and which documents does each of them hold?"""

import ast
import glob
import inspect
import io
import json
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STDLIB_SOURCES = ("stdlib-prose", "stdlib-code")
SUFFIXES = (".txt", ".jsonl", ".parquet")
_KNOWN = ", ".join(SUFFIXES)
_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus, under a name that does not change when the corpus is moved."""

    name: str
    path: Path


@dataclass(frozen=True)
class RawDocument:
    """A document as read, the unit that the split keeps together, and the stratum that both sides draw from."""

    name: str
    unit: str
    text: str
    stratum: str = ""


def list_files(source: str) -> list[SourceFile]:
    """List the files of a source, sorted by name.

    Raises FileNotFoundError where nothing matches, ValueError where a file is of no known kind.
    """
    if source in STDLIB_SOURCES:
        return _stdlib_files(source)
    paths = _matching_paths(source)
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"data.source has a file of unknown kind: {path} must end in one of {_KNOWN}")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return sorted((SourceFile(path.relative_to(root).as_posix(), path) for path in paths), key=lambda file: file.name)


def read_documents(source: str, file: SourceFile, text_field: str) -> Iterator[RawDocument]:
    """Read the documents of one file, in order.

    Raises ValueError, naming file and line, for what cannot be read as text.
    """
    if source == "stdlib-prose" and file.name == _TOPICS:
        yield from _topics()
    elif source == "stdlib-prose":
        yield RawDocument(file.name, file.name, _docstrings(file.path), stratum="docstrings")
    elif source == "stdlib-code":
        yield RawDocument(file.name, file.name, _python_source(file.path))
    elif file.path.suffix.lower() == ".txt":
        yield RawDocument(file.name, file.name, _decode(file.path.read_bytes(), str(file.path)))
    else:
        rows = _jsonl_texts if file.path.suffix.lower() == ".jsonl" else _parquet_texts
        for number, text in rows(file.path, text_field):
            yield RawDocument(f"{file.name}:{number}", file.name, text)


def _matching_paths(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path.absolute()]
    if path.is_dir():
        root = path.absolute()
        inside = (child for child in root.rglob("*") if child.suffix.lower() in SUFFIXES and child.is_file())
        found = [child for child in inside if not any(part[0] == "." for part in child.relative_to(root).parts)]
        if not found:
            raise FileNotFoundError(
                f"data.source ({source}) is a folder without files that end in {_KNOWN}: give another"
            )
        return found
    found = [Path(match).absolute() for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
    if not found:
        named = ", ".join(STDLIB_SOURCES)
        raise FileNotFoundError(f"data.source ({source}) matches no file: give {named}, or a path or glob of {_KNOWN}")
    return found


def _stdlib_files(source: str) -> list[SourceFile]:
    """List the standard library's sources, without tests and without what the build wrote for this machine alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        paths = [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
        files += [SourceFile(path.relative_to(root).as_posix(), path) for path in paths]
    # the topics are prose in one literal: as code they would be one document of half a megabyte
    files = [file for file in files if not (source == "stdlib-code" and file.name == _TOPICS)]
    if not files:
        raise FileNotFoundError(f"data.source ({source}) needs Python's sources, none under {root}: give a path")
    return sorted(files, key=lambda file: file.name)


def _topics() -> Iterator[RawDocument]:
    from pydoc_data.topics import topics  # here: half a megabyte that no other source needs

    for name, text in sorted(topics.items()):
        yield RawDocument(f"topics/{name}", f"topics/{name}", text, stratum="topics")


def _python_source(path: Path) -> str:
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as Python ({error}): set data.source to a path") from None


def _docstrings(path: Path) -> str:
    """Join the docstrings of a module, its classes and its functions, in the order in which they stand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes of sources that are not ours
        try:
            module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path}: not readable as Python ({error}): set data.source to a path") from None
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in _statements(module) if isinstance(node, holders))
    return "\n\n".join(inspect.cleandoc(text) for text in found if text)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Walk statements alone, in source order: ast.walk would visit every expression, and breadth first."""
    yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, block, ())
        if isinstance(children, list):  # the body of a lambda or a conditional expression is no list
            for child in children:
                yield from _statements(child)


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: invalid UTF-8 at byte {error.start}: convert the file to UTF-8") from None


def jsonl_rows(path: Path, field: str, setting: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a .jsonl file, each with its line's number; blank lines are passed over.

    Raises ValueError, naming file and line, for a line that is no object with the key `field`, of data.`setting`.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            text = _decode(line, f"{path}, line {number}")
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}): write one object a line") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: a {type(row).__name__}, must be an object with the key {field!r}"
                )
            if field not in row:
                keys = ", ".join(map(repr, row)) or "none"
                raise ValueError(f"{path}, line {number}: no key {field!r} among {keys}: set data.{setting}")
            yield number, row


def _jsonl_texts(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    for number, row in jsonl_rows(path, text_field, "text_field"):
        yield number, _checked(row[text_field], text_field, f"{path}, line {number}")


def _parquet_texts(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    import pyarrow.lib  # here: most corpora need no pyarrow, and its import takes longer than reading them
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                columns = ", ".join(map(repr, table.schema_arrow.names)) or "none"
                raise ValueError(f"{path}: no column {text_field!r} among {columns}: set data.text_field")
            number = 0
            for batch in table.iter_batches(columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, _checked(value, text_field, f"{path}, row {number}")
    except pyarrow.lib.ArrowException as error:
        raise ValueError(f"{path}: not readable as parquet ({' '.join(str(error).split())}): write it again") from None


def _checked(value: object, text_field: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {text_field!r} is a {type(value).__name__}, must be a string: set data.text_field")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair; no UTF-8 says it
        raise ValueError(f"{place}: {text_field!r} has a lone surrogate at {error.start}: replace it") from None
    return value
