"""Files: written whole or not at all, read strictly.

Everything that fewbits writes goes to a temporary name beside its place and is renamed when complete, so that an
interrupt or a full disk leaves the old file or folder as it was. Everything it reads from others is checked first, and
what is truncated or foreign is a :class:`ValueError` that says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

QAT_FILE = "fewbits_qat.json"
EXPORT_FILE = "fewbits_export.json"
ADAPTER_FILE = "fewbits_adapter.json"
MARKERS = (QAT_FILE, EXPORT_FILE, ADAPTER_FILE)
"""A folder that holds one of these was written whole by fewbits; only such a folder is ever replaced."""


def _sync(path: Path) -> None:
    """Push a file to the disk: some file systems report a full disk only here."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on a failed write into one OSError that says what is left."""
    try:
        yield
    except (OSError, SafetensorError) as raised:
        error: BaseException = raised
        while isinstance(error.__cause__, OSError | SafetensorError):  # a file inside a folder: report the root
            error = error.__cause__
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        code = error.errno if isinstance(error, OSError) else None
        message = f"cannot write {path}: {text}; nothing was changed there"
        raise (OSError(code, message) if code is not None else OSError(message)) from raised


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed over it when the block ends well and removed when it does not.

    Raises:
        OSError: if the file cannot be written; whatever stood at ``path`` before is unharmed.
    """
    path = Path(path)
    partial = _partial(path)
    try:
        with _os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _sync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_occupied(folder: str | Path) -> bool:
    """Whether something stands at this path (an empty folder is nothing)."""
    folder = Path(folder)
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def atomic_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder``, renamed to it when the block ends well and removed when it does not.

    A block that moves the temporary folder elsewhere leaves ``folder`` as it was.

    Args:
        folder: where the finished folder will stand; missing parents are made.
        overwrite: replace a folder that fewbits wrote before. Any other folder is never replaced.

    Raises:
        ValueError: if the place is taken.
        OSError: if a file cannot be written; whatever stood there before is unharmed.
    """
    folder = Path(folder)
    if is_occupied(folder):
        ours = any((folder / name).is_file() for name in MARKERS)
        if not ours:
            raise ValueError(f"{folder} exists and was not written by fewbits, so it is never replaced; choose another")
        if not overwrite:
            raise ValueError(
                f"{folder} exists already; pass overwrite=True (--overwrite) to replace it, or choose another folder"
            )
    partial, old = _partial(folder), _partial(folder)
    try:
        with _os_errors(folder):
            partial.mkdir(parents=True)
            yield partial
            if not partial.exists():
                return
            for path in partial.rglob("*"):
                if path.is_file():
                    _sync(path)
            if folder.exists():
                folder.rename(old)
            try:
                partial.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def check_place(folder: str | Path) -> None:
    """Refuse, before any work is done for it, a folder that could not be made or written.

    Raises:
        ValueError: naming what stands in the way, a file or a folder without permission.
    """
    folder = Path(folder)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{there} is a file, and {folder} is to be a folder; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written: no permission in {there}; choose another folder")


@contextmanager
def begun(folder: str | Path, marker: str) -> Iterator[None]:
    """A block that begins a folder: if it raises an error, what it put there is removed again.

    A folder that held the marker before was begun earlier and keeps all. An interrupt is no error: what it leaves can
    be resumed.

    Args:
        folder: to begin; made if it is missing.
        marker: name of the file that says that the folder was begun.
    """
    folder = Path(folder)
    check_place(folder)
    before = set(folder.iterdir()) if folder.exists() else None
    known = (folder / marker).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except Exception:
        if not known:
            for path in set(folder.iterdir()) - (before or set()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if before is None:
                folder.rmdir()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write readable JSON, whole or not at all; NaN and infinity become strings, which JSON lacks."""
    write_text(path, json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return str(data)
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def write_yaml(path: str | Path, data: Any) -> None:
    """Write YAML with the keys in the order given, whole or not at all."""
    write_text(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        ValueError: for a missing file, a folder, or other bytes.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: for a missing, foreign or truncated file.
    """
    path = Path(path)
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """JSON from text.

    Args:
        text: of one value.
        where: named in the error.

    Raises:
        ValueError: for anything else, values nested too deeply and numbers with too many digits included.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON (truncated or damaged?): {error}") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read JSON that must be an object.

    Raises:
        ValueError: for anything else.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}; an object is needed")
    return data


def read_yaml(path: str | Path) -> Any:
    """Read YAML (plain data only).

    Raises:
        ValueError: for a missing or malformed file.
    """
    path = Path(path)
    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
