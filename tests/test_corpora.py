"""The text that every Python carries: extraction, split, and the fixed held-out file."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits import corpora
from fewbits.corpora import (
    DOCUMENT_SEPARATOR,
    MAX_CHARS,
    MIN_CHARS,
    embedded_texts,
    pydoc_corpus,
    split_documents,
    stdlib_documents,
    topic_documents,
    without_shared_paragraphs,
)

LONG = "This paragraph is longer than sixty characters, so it is counted when two texts are compared."


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return pydoc_corpus()


@pytest.fixture(scope="module")
def topics() -> list[str]:
    return topic_documents()


def write(folder: Path, name: str, source: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


# the corpus of the running Python --------------------------------------------------------------------------------


def test_extraction_is_the_same_in_another_process(corpus: list[str]) -> None:
    # another hash seed: an order that leans on a set would differ
    package = Path(corpora.__file__).parents[1]
    code = (
        "import hashlib as h, fewbits.corpora as c; print(h.sha256('\\0'.join(c.pydoc_corpus()).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(package)}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert other.stdout.strip() == hashlib.sha256("\0".join(corpus).encode()).hexdigest()


def test_the_corpus_is_large_unique_and_clean(corpus: list[str]) -> None:
    assert sum(map(len, corpus)) > 1_500_000
    assert len(set(corpus)) == len(corpus)
    assert all(len(text) >= MIN_CHARS and "\f" not in text and text == text.strip("\n") for text in corpus)
    assert all(sum(not char.isascii() for char in text) <= len(text) / 100 for text in corpus)


def test_topics_come_first_and_the_standard_library_after_them(corpus: list[str], topics: list[str]) -> None:
    assert topics == topic_documents()
    assert corpus[: len(topics)] == topics
    assert any(text.startswith('The "assert" statement\n') for text in topics)
    library = corpus[len(topics) :]
    assert sum(map(len, library)) > 1_000_000
    assert not any(re.search(r"all rights reserved|permission is hereby", text, re.IGNORECASE) for text in library)


# one source tree -------------------------------------------------------------------------------------------------


def test_documents_of_a_file_follow_its_definitions(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a.py",
        f'"""Module. {LONG}"""\n'
        "x = 1  # a trailing remark is not a document\n"
        "# ==========\n"
        f"# Before.\n# {LONG}\n"
        "\n"
        "class A:\n"
        f'    """Class. {LONG}"""\n'
        "    def f(self):\n"
        '        """Method.\n\n        Indented."""\n'
        "        # Inside.\n"
        "        return 1\n"
        "\n"
        "async def g():\n"
        f"    '''Function. {LONG}'''\n",
    )
    assert stdlib_documents(tmp_path) == [
        f"Module. {LONG}\n\nBefore.\n{LONG}",
        f"Class. {LONG}\n\nMethod.\n\nIndented.\n\nInside.",
        f"Function. {LONG}",
    ]


def test_boilerplate_tests_foreign_and_broken_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.py", f"# Copyright 2001 Somebody. All rights reserved. {LONG}\n\n# Kept. {LONG}\n")
    write(tmp_path, "test/b.py", f'"""Of a test. {LONG}"""\n')
    write(tmp_path, "site-packages/c.py", f'"""Installed. {LONG}"""\n')
    write(tmp_path, "_sysconfigdata_x.py", f'"""Generated. {LONG}"""\n')
    write(tmp_path, "d.py", f'"""Broken. {LONG}"""\nclass\n')
    write(tmp_path, "e.py", f'"""Foreign. {"é" * 40} {LONG}"""\n')
    (tmp_path / "f.py").write_bytes(b'# not the declared encoding: \xff\xfe\n"""x"""\n')
    write(tmp_path, "g.py", f"# Kept. {LONG}\n")
    write(tmp_path, "h.py", '"""Short."""\n')
    assert stdlib_documents(tmp_path) == [f"Kept. {LONG}"]


def test_files_come_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "c.py", "a.py"):
        write(tmp_path, name, f'"""{name} {LONG}"""\n')
    assert [text.split()[0] for text in stdlib_documents(tmp_path)] == ["a.py", "a/z.py", "b.py", "c.py"]


def test_a_folder_without_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \.py file"):
        stdlib_documents(tmp_path)


def test_long_documents_are_cut_between_paragraphs_without_loss(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. {LONG}" for number in range(200)]
    write(tmp_path, "a.py", '"""' + "\n\n".join(paragraphs) + '"""\n')
    documents = stdlib_documents(tmp_path)
    assert len(documents) > 1
    assert max(map(len, documents)) <= MAX_CHARS
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)


@pytest.mark.parametrize("below", ["*" * 7, "=" * 7, "-" * 9])
def test_topics_are_cut_at_headings_and_repeated_sections_are_dropped(
    monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    topics = {
        "b": f"Section\n{below}\n\nBody of b. {LONG}\n\n   indented\n   -------\n",
        "a": f"Preface of a. {LONG}\n\nSection\n=======\n\nBody of b. {LONG}\n\n   indented\n   -------\n",
    }
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    assert topic_documents() == [
        f"Preface of a. {LONG}",
        f"Section\n\nBody of b. {LONG}\n\n   indented\n   -------",
    ]


def test_a_python_without_topics_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="libpython3-stdlib"):
        topic_documents()


# the split -------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(docs=st.lists(st.text(), unique=True), extra=st.lists(st.text()), holdout=st.floats(0, 1))
def test_the_side_of_a_document_depends_on_its_text_alone(docs: list[str], extra: list[str], holdout: float) -> None:
    train, valid = split_documents(docs, holdout=holdout)
    assert sorted(train + valid) == sorted(docs)
    assert not set(train) & set(valid)
    more_train, more_valid = split_documents(extra + docs[::-1], holdout=holdout)
    assert set(train) <= set(more_train)
    assert set(valid) <= set(more_valid)


@settings(max_examples=50)
@given(docs=st.lists(st.text(), max_size=20), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_holdout_holds_out_more_of_the_same(docs: list[str], low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert set(split_documents(docs, holdout=low)[1]) <= set(split_documents(docs, holdout=high)[1])


def test_the_ends_of_the_range() -> None:
    docs = [str(number) for number in range(100)]
    assert split_documents(docs, holdout=0) == (docs, [])
    assert split_documents(docs, holdout=1) == ([], docs)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="0 <= holdout <= 1"):
            split_documents(docs, holdout=wrong)


def test_a_tenth_is_a_tenth() -> None:
    # 20000 independent draws: four standard deviations of the share are 4 * sqrt(.1 * .9 / 20000) = 0.0085
    _, valid = split_documents([f"document {number}" for number in range(20_000)])
    assert abs(len(valid) / 20_000 - 0.1) < 0.0085


def test_a_shared_paragraph_is_found_whatever_its_line_breaks() -> None:
    broken = LONG.replace(" ", "\n   ", 5)
    docs = [f"a\n\n{broken}", "b", LONG + " More."]
    assert without_shared_paragraphs(docs, [f"{LONG}\n\nb"]) == docs[1:]


# the texts of the embedded model ---------------------------------------------------------------------------------


def test_the_held_out_text_is_a_fixed_file_of_held_out_documents() -> None:
    valid = embedded_texts("valid")
    raw = (corpora.embedded_model_path() / "valid.txt").read_bytes()
    assert DOCUMENT_SEPARATOR.join(valid).encode() == raw
    assert 200_000 < len(raw) <= 300_000
    assert split_documents(valid) == ([], valid)


def test_training_text_shares_no_document_and_no_paragraph_with_the_held_out_text(
    corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "pydoc_corpus", lambda: corpus)  # extracted once for this file
    train, valid = embedded_texts("train"), embedded_texts("valid")
    assert sum(map(len, train)) > 1_000_000
    assert not set(train) & set(valid)
    assert without_shared_paragraphs(train, valid) == train
    assert set(train) <= set(corpus)
    assert split_documents(train) == (train, [])


def test_another_part_is_an_error() -> None:
    with pytest.raises(ValueError, match='"train" or "valid"'):
        embedded_texts("test")  # type: ignore[arg-type]
