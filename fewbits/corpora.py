r"""Text that every Python installation carries, and the embedded model that was trained on it.

Nothing here is downloaded.  Two sources become one corpus: the language reference that ``help()`` prints
(``pydoc_data.topics``), and the docstrings and comments of the standard library's own source.  The extraction is
deterministic: files in sorted order, documents in source order, the first of two equal documents kept.

A tenth of the documents is held out by a hash of the text alone, so one document is on the same side in every process
and every Python version.  The texts differ a little between Python versions; therefore the evaluation text is a fixed
file, ``assets/pydoc-llama/valid.txt``, and training text that shares a paragraph with it is dropped.

Example:
    >>> docs = ["The first document.", "The second one.", "And a third."]
    >>> train, valid = split_documents(docs, holdout=0.5)
    >>> sorted(train + valid) == sorted(docs)
    True
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import io
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal

__all__ = [
    "embedded_model_path",
    "embedded_texts",
    "pydoc_corpus",
    "split_documents",
    "stdlib_documents",
    "topic_documents",
    "without_shared_paragraphs",
]

DOCUMENT_SEPARATOR = "\n\f\n"
"""Stands between two documents in ``valid.txt``; no document contains a form feed."""

MIN_CHARS = 60
"""Documents and shared paragraphs shorter than this are not counted: a one-line remark teaches and leaks nothing."""

MAX_CHARS = 6000
"""Longer documents are cut at a paragraph, so that no single one decides what the held-out tenth looks like."""

_MODEL_FOLDER = "pydoc-llama"

# Left out: installed packages, tests, tools with a source tree of their own, generated tables and build leftovers.
_SKIPPED = re.compile(
    r"(?:site-packages|dist-packages|tests?|idlelib|idle_test|lib2to3|turtledemo|encodings|pydoc_data|ensurepip"
    r"|lib-dynload|__phello__|__pycache__|config-.*|_sysconfigdata.*)"
)
_BOILERPLATE = re.compile(
    r"copyright|\(c\) (?:19|20)\d\d|all rights reserved|licen[cs]ed? (?:under|to|agreement)|without warranty"
    r"|permission (?:is hereby|to use)|-\*- *coding",
    re.IGNORECASE,
)
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_UNDERLINE = re.compile(r"([*=\-~^\"])\1{2,}\s*")
_RULER = re.compile(r"[\s#*=\-_~+/.]*")


def topic_documents() -> list[str]:
    r"""The sections of the language reference behind ``help("topic")``.

    Topics repeat each other (``specialnames`` contains ``customization``), at another heading level.  Every topic is
    therefore cut at its headings and the underlines are removed, after which a repeated section is an equal string.

    Returns:
        Sections in the order of the sorted topic names; each at least ``MIN_CHARS`` and mostly below ``MAX_CHARS``.

    Raises:
        RuntimeError: if this Python was installed without ``pydoc_data`` (some minimal system packages leave it out).

    Example:
        >>> any("assert" in text for text in topic_documents())
        True
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise RuntimeError(
            "this Python has no pydoc_data.topics, the text the corpus is made of; install the full standard library "
            "(Debian and Ubuntu: the package libpython3-stdlib, not python3-minimal)."
        ) from error
    sections = (section for _, text in sorted(topics.items()) for section in _sections(str(text)))
    return _finish(sections)


def stdlib_documents(folder: Path | None = None) -> list[str]:
    r"""Docstrings and comments of the Python files below ``folder``, one document per top-level definition.

    A class with the docstrings of its methods and the comments between them is one document; what stands outside of
    every definition forms documents of its own.  Only comments that have a line for themselves count.  Licence
    boilerplate, tests, generated tables and files that this Python cannot parse are left out.

    Args:
        folder: root of the source tree; the running Python's standard library by default.

    Returns:
        Documents in sorted file order, then source order.

    Raises:
        FileNotFoundError: if ``folder`` holds no ``.py`` file (a Python that ships compiled files only).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else Path(folder)
    files = _source_files(root)
    if not files:
        raise FileNotFoundError(f"{str(root)!r} holds no .py file to take docstrings from; pass another source tree.")
    return _finish(document for path in files for document in _file_documents(path))


def pydoc_corpus() -> list[str]:
    r"""Both sources after each other, equal documents once.

    Returns:
        ``topic_documents()`` followed by ``stdlib_documents()``; two calls in one Python give equal lists.
    """
    return list(dict.fromkeys([*topic_documents(), *stdlib_documents()]))


def split_documents(docs: Iterable[str], *, holdout: float = 0.1) -> tuple[list[str], list[str]]:
    r"""Split into a training and a held-out part by the text of each document alone.

    A document :math:`d` is held out when :math:`h(d) < \text{holdout}`, where :math:`h \in [0, 1)` is the first eight
    bytes of ``sha256(d)`` read as a fraction.  The side of one document depends on no other document.

    Args:
        docs: documents in any order.
        holdout: expected share held out, ``0 <= holdout <= 1``; 0 holds out nothing, 1 everything.

    Returns:
        ``(train, valid)``, each in the order of ``docs``.

    Raises:
        ValueError: if ``holdout`` is outside of its range.

    Example:
        >>> split_documents(["a", "b"], holdout=0.0)
        (['a', 'b'], [])
    """
    if not 0 <= holdout <= 1:
        raise ValueError(f"holdout={holdout} is not a share of the documents; use 0 <= holdout <= 1, e.g. 0.1.")
    train: list[str] = []
    valid: list[str] = []
    for text in docs:
        (valid if _fraction(text) < holdout else train).append(text)
    return train, valid


def embedded_texts(split: Literal["train", "valid"]) -> list[str]:
    r"""Documents of the embedded model: the same held-out bytes everywhere, training text from the running Python.

    ``"valid"`` reads the fixed file beside the model.  ``"train"`` takes the other nine tenths of ``pydoc_corpus()``
    and drops each document that shares a paragraph of at least ``MIN_CHARS`` characters with the fixed file, since
    another Python version may hold an edited copy of a held-out document.

    Args:
        split: ``"train"`` or ``"valid"``.

    Returns:
        A list of documents.

    Raises:
        ValueError: for any other ``split``.

    Example:
        >>> sum(len(text.encode()) for text in embedded_texts("valid")) <= 300_000
        True
    """
    if split == "valid":
        return (embedded_model_path() / "valid.txt").read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)
    if split == "train":
        return list(_training_texts())
    raise ValueError(f'split={split!r} is not a part of the embedded text; use "train" or "valid".')


@functools.cache
def _training_texts() -> tuple[str, ...]:
    """Parsing the standard library takes seconds: once a process is enough."""
    return tuple(without_shared_paragraphs(split_documents(pydoc_corpus())[0], embedded_texts("valid")))


def without_shared_paragraphs(docs: Iterable[str], held_out: Iterable[str]) -> list[str]:
    r"""Drop the documents that repeat a paragraph of ``held_out``.

    Paragraphs are compared with white space collapsed; those below ``MIN_CHARS`` characters do not count.

    Args:
        docs: candidates.
        held_out: documents whose text must not be trained on.

    Returns:
        The documents of ``docs`` that share no paragraph, in order.

    Example:
        >>> shared = "A paragraph of more than sixty characters, which stands in both of the documents."
        >>> without_shared_paragraphs(["Intro.\n\n" + shared, "Something else."], [shared])
        ['Something else.']
    """
    known = {paragraph for text in held_out for paragraph in _paragraphs(text)}
    return [text for text in docs if known.isdisjoint(_paragraphs(text))]


def embedded_model_path() -> Path:
    r"""Folder of the embedded model: config, safetensors, tokenizer, model card, held-out text.

    Returns:
        A path that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` take, offline.

    Raises:
        FileNotFoundError: if the package was installed without its assets or runs from inside an archive.

    Example:
        >>> (embedded_model_path() / "config.json").is_file()
        True
    """
    folder = Path(str(resources.files("fewbits"))) / "assets" / _MODEL_FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is missing; reinstall fewbits unpacked, with its package data.")
    return folder


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        collapsed = " ".join(paragraph.split())
        if len(collapsed) >= MIN_CHARS:
            yield collapsed


def _sections(text: str) -> Iterator[str]:
    """Cut at underlined headings; the heading stays as the first line, its underline goes."""
    lines = text.expandtabs().split("\n")
    starts = [
        row
        for row, (line, below) in enumerate(pairwise(lines))
        if not _RULER.fullmatch(line) and line[0] != " " and _UNDERLINE.fullmatch(below) and len(below) >= len(line)
    ]
    yield "\n".join(lines[: min(starts, default=len(lines))])
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield "\n".join([lines[start], *lines[start + 2 : stop]])


def _source_files(root: Path) -> list[Path]:
    found = [
        path
        for path in root.rglob("*.py")
        if not any(_SKIPPED.fullmatch(part) for part in path.relative_to(root).parts)
    ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _file_documents(path: Path) -> Iterator[str]:
    try:
        with tokenize.open(path) as stream:
            source = stream.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the standard library's own strings
            tree = ast.parse(source)
        pieces = sorted([*_docstrings(tree), *_comments(source)])
    except (SyntaxError, ValueError, tokenize.TokenError):
        return  # a template or a file for another Python: nothing of the corpus depends on it
    spans = [(node.lineno, node.end_lineno or node.lineno) for node in tree.body if isinstance(node, _DEFINITIONS)]

    def owner(piece: tuple[int, str]) -> int:
        """Odd inside of the k-th definition, even between two: a number that grows with the line."""
        line = piece[0]
        return sum((line >= start) + (line > stop) for start, stop in spans)

    for _, group in groupby((piece for piece in pieces if not _BOILERPLATE.search(piece[1])), key=owner):
        yield "\n\n".join(text for _, text in group)


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        nodes.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
        if isinstance(node, (ast.Module, *_DEFINITIONS)) and (text := ast.get_docstring(node, clean=True)):
            yield node.body[0].lineno, text


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Blocks of comment lines without code between or before them."""
    rows: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            rows.append((token.start[0], token.string.lstrip("#!:").removeprefix(" ").rstrip()))
    for _, block in groupby(enumerate(rows), key=lambda entry: entry[1][0] - entry[0]):
        lines = [row for _, row in block]
        text = "\n".join(line for _, line in lines if not _RULER.fullmatch(line) or not line).strip("\n")
        if text:
            yield lines[0][0], text


def _finish(texts: Iterable[str]) -> list[str]:
    """Trim, cut, drop what is short, foreign or seen before."""
    kept: dict[str, None] = {}
    for text in texts:
        clean = "\n".join(line.rstrip() for line in text.replace("\f", "\n").expandtabs().split("\n")).strip("\n")
        for document in _cut(re.sub(r"\n{3,}", "\n\n", clean)):
            if len(document) >= MIN_CHARS and len(document.encode("ascii", "ignore")) >= 0.99 * len(document):
                kept[document] = None
    return list(kept)


def _cut(text: str) -> Iterator[str]:
    """Yield runs of paragraphs of at most ``MAX_CHARS`` characters; one paragraph is never divided."""
    run: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        if run and size + len(paragraph) > MAX_CHARS:
            yield "\n\n".join(run).strip("\n")
            run, size = [], 0
        run.append(paragraph)
        size += len(paragraph) + 2
    yield "\n\n".join(run).strip("\n")
