import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config.run import DataConfig
from moejax.data import Documents, load_documents
from moejax.data.corpus import split
from moejax.data.sources import RawDocument


def load(source: Path | str, val_fraction: float = 0.2, **settings: str) -> Documents:
    return load_documents(DataConfig(source=str(source), val_fraction=val_fraction, **settings))


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_file_is_on_one_side_of_the_split(corpus):
    documents = load(corpus)
    texts = {path.read_text(encoding="utf-8") for path in corpus.iterdir()}
    assert set(documents.train) | set(documents.val) == texts
    assert not set(documents.train) & set(documents.val)
    assert len(documents.val) == 4


def test_split_and_fingerprint_do_not_change_with_place_or_order(corpus, tmp_path):
    moved = tmp_path / "elsewhere" / "again"
    moved.mkdir(parents=True)
    for path in sorted(corpus.iterdir(), reverse=True):
        shutil.copy(path, moved)
    here, there, globbed = load(corpus), load(moved), load(moved / "**" / "*.txt")
    assert here.train == there.train == globbed.train
    assert here.val == there.val == globbed.val
    assert here.fingerprint == there.fingerprint == globbed.fingerprint


def test_fingerprint_changes_with_content_and_with_the_split(corpus):
    before = load(corpus).fingerprint
    assert load(corpus, val_fraction=0.3).fingerprint != before
    (corpus / "00.txt").write_text("edited")
    assert load(corpus).fingerprint != before


def test_adding_a_file_moves_few_others(corpus):
    before = set(load(corpus, val_fraction=0.3).val)
    (corpus / "new.txt").write_text("a new document of the usual size, " * 3)
    assert len(before - set(load(corpus, val_fraction=0.3).val)) <= 1


def test_duplicates_and_empty_documents_are_left_out_and_counted(corpus):
    shutil.copy(corpus / "03.txt", corpus / "copy.txt")
    (corpus / "empty.txt").write_text(" \n")
    documents = load(corpus)
    assert len(documents.train) + len(documents.val) == 20
    assert (documents.num_duplicates, documents.num_empty) == (1, 1)
    assert "1 duplicates and 1 empty left out" in documents.describe()


def test_rows_of_one_file_stay_together(tmp_path):
    for n in range(10):
        write_jsonl(tmp_path / f"{n}.jsonl", [f"file {n} row {row}" for row in range(5)])
    documents = load(tmp_path)
    files_of = [{text.split()[1] for text in side} for side in (documents.train, documents.val)]
    assert not files_of[0] & files_of[1]
    assert len(documents.val) == 10


def test_a_single_file_is_split_by_rows(tmp_path):
    texts = [f"row number {n:03}" for n in range(100)]
    jsonl = load(write_jsonl(tmp_path / "a.jsonl", texts, field="body"), text_field="body")
    parquet = load(write_parquet(tmp_path / "a.parquet", {"text": texts, "id": list(range(100))}))
    for documents in (jsonl, parquet):
        assert sorted(documents.train + documents.val) == texts
        assert len(documents.val) == 20
        assert documents.val != texts[-20:]


def test_a_single_text_is_cut_at_a_paragraph(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"paragraph {n} of the book" for n in range(50)))
    documents = load(path, val_fraction=0.1)
    assert documents.train[0] + documents.val[0] == path.read_text()
    assert documents.val[0].startswith("paragraph 4")


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 500), min_size=2, max_size=40), fraction=st.floats(0.01, 0.99))
def test_split_keeps_every_document_once_and_neither_side_is_empty(sizes, fraction):
    documents = [RawDocument(f"{n}.txt", f"{n}.txt", f"{n}" + "x" * size) for n, size in enumerate(sizes)]
    train, val = split(documents, fraction)
    assert sorted(train + val) == sorted(document.text for document in documents)
    assert train
    assert val


def test_val_fraction_of_the_bytes_is_held_out_even_where_one_file_is_large():
    documents = [RawDocument(f"{n}", f"{n}", f"{n}" + "x" * (5000 if n == 7 else 100)) for n in range(50)]
    _, val = split(documents, 0.05)
    total = sum(len(document.text) for document in documents)
    assert sum(map(len, val)) / total == pytest.approx(0.05, abs=0.01)


def test_stdlib_code_is_the_interpreters_sources_without_tests():
    documents = load("stdlib-code", val_fraction=0.05)
    size, held_out = (sum(map(len, side)) for side in (documents.train + documents.val, documents.val))
    assert 8e6 < size < 14e6
    assert held_out / size == pytest.approx(0.05, abs=0.01)
    assert not any("class TestRunner" in text[:50] for text in documents.train)


def test_stdlib_prose_is_topics_and_docstrings_in_source_order(tmp_path, monkeypatch):
    from pydoc_data.topics import topics

    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text('"""A test."""')
    for n in range(20):
        source = f'''"""Source {n}."""
if True:
    class A:
        """Class."""
        def f(self):
            r"""Method.

            plain
              indented \\d
            """
            def inner(): "Inner."
def g(): "Function."; return (lambda: 1)
'''
        (tmp_path / f"m{n}.py").write_text(source)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = load("stdlib-prose")
    assert any(text.startswith("Source ") for text in documents.val)
    assert any(not text.startswith("Source ") for text in documents.val)
    found = {text for text in documents.train + documents.val if text.startswith("Source ")}
    assert len(found) == 20
    assert "Source 4.\n\nClass.\n\nMethod.\n\nplain\n  indented \\d\n\nInner.\n\nFunction." in found
    assert len(documents.train + documents.val) == 20 + len(set(topics.values()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\xff", r"a\.txt: invalid UTF-8 at byte 4"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            r"a\.jsonl, line 2: no key 'text' among 'body': set data\.text_field",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: 'text' is a int, must be a string"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: a list, must be an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: 'text' has a lone surrogate"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: invalid UTF-8"),
        ("a.parquet", b"not parquet", r"a\.parquet: not readable as parquet"),
        ("a.csv", b"x,y", r"unknown kind: .*a\.csv must end in one of \.txt, \.jsonl, \.parquet"),
        ("a.txt", b" \n", r"has no text in its 1 files"),
        ("a.jsonl", b"", r"has no text in its 1 files"),
        ("a.txt", b"x", r"a\.txt: the corpus's only document \(1 characters\) must leave text on both sides"),
    ],
)
def test_a_bad_file_is_named_with_its_line_and_the_rule(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_bad_parquet_column_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"b\.parquet: no column 'text' among 'body': set data\.text_field"):
        load(write_parquet(tmp_path / "b.parquet", {"body": ["x"]}))
    with pytest.raises(ValueError, match=r"c\.parquet, row 2: 'text' is a NoneType, must be a string"):
        load(write_parquet(tmp_path / "c.parquet", {"text": ["x", None]}))


def test_a_source_that_matches_nothing_says_what_would(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no-such\.txt\) matches no file: give stdlib-prose, stdlib-code, or a path"
    ):
        load(tmp_path / "no-such.txt")
    with pytest.raises(FileNotFoundError, match="is a folder without files that end in"):
        load(tmp_path)
