"""A strict reader for GGUF files that nobody vouches for.

Nothing is allocated on the word of a header: every count and length is first compared with the bytes that are left.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fewbits.targets.gguf_file import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    DTYPES,
    MAGIC,
    MAX_DIMS,
    MAX_KEY,
    MAX_NAME,
    STRING,
    VERSION,
    MetaValue,
    padding,
)
from fewbits.targets.gguf_types import GGUF_TYPES, U8

_TYPE_BY_ID = {kind.type_id: kind for kind in GGUF_TYPES.values()}
_SMALLEST_ENTRY = 8 + 1 + 4 + 1
_SMALLEST_INFO = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor in a file: ``offset`` is absolute, ``shape`` has the row length last."""

    name: str
    shape: tuple[int, ...]
    gguf_type: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """Metadata and tensor infos of a file whose every claim about itself has been checked; data are read on demand."""

    path: Path
    metadata: dict[str, MetaValue]
    tensors: dict[str, TensorInfo]
    alignment: int

    def read(self, name: str) -> U8:
        """The packed bytes of a tensor, ``(rows, bytes per row)``; axes before the last are flattened.

        Raises:
            ValueError: if the file has no such tensor, or has become shorter since it was opened.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ValueError(f"{self.path} has no tensor {name!r}; it has {len(self.tensors)} others")
        with open(self.path, "rb") as file:
            file.seek(info.offset)
            raw = np.fromfile(file, dtype=np.uint8, count=info.num_bytes)
        if raw.size != info.num_bytes:
            raise ValueError(f"{self.path} ends inside tensor {name!r}: the file changed after it was opened")
        return raw.reshape(prod(info.shape[:-1]), -1)


class _Cursor:
    """Reads a header front to back; refuses to read, or to make room for, what the file does not have."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.position = file, size, 0

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        raw = self.file.read(count)
        if len(raw) != count:
            raise ValueError(f"the file ends inside {what}")
        self.position += count
        return raw

    def need(self, count: int, what: str) -> None:
        left = self.size - self.position
        if count > left:
            raise ValueError(f"{what} needs {count} bytes at position {self.position}, but the file has {left} left")

    def number(self, code: str, what: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0])

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q", f"the length of {what}")
        if limit is not None and not 1 <= length <= limit:
            raise ValueError(f"{what} has {length} bytes; 1..{limit} are allowed")
        raw = self.take(length, what)
        if limit is not None and b"\0" in raw:
            raise ValueError(f"{what} holds a zero byte, where ggml would cut it: {raw!r}")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8: {error}") from None


def _read_value(cursor: _Cursor, key: str) -> MetaValue:
    what = f"metadata {key!r}"
    number = cursor.number("i", what)
    if number == STRING:
        return cursor.text(what)
    if number != ARRAY:
        value = _read_numbers(cursor, number, 1, what)[0]
        return bool(value) if number == BOOL else value
    number, count = cursor.number("i", what), cursor.number("Q", what)
    if number != STRING:
        return _read_numbers(cursor, number, count, what)
    cursor.need(8 * count, what)
    return [cursor.text(what) for _ in range(count)]


def _read_numbers(cursor: _Cursor, number: int, count: int, what: str) -> NDArray[Any]:
    dtype = DTYPES.get(number)
    if dtype is None:
        raise ValueError(f"{what} has the value type {number}, which GGUF does not know in this place")
    raw = cursor.take(count * dtype.itemsize, what)
    if number == BOOL and raw.strip(b"\x00\x01"):
        raise ValueError(f"{what} holds a byte that is neither 0 nor 1 as a bool")
    return np.frombuffer(raw, dtype=dtype)


def _read_alignment(metadata: Mapping[str, MetaValue]) -> int:
    value = metadata.get("general.alignment", np.uint32(ALIGNMENT))
    if not isinstance(value, np.uint32) or value == 0 or int(value) & (int(value) - 1):
        raise ValueError(f"general.alignment={value!r}; it must be a uint32 power of two")
    return int(value)


def _read_info(cursor: _Cursor, alignment: int) -> TensorInfo:
    name = cursor.text("a tensor name", MAX_NAME)
    num_dims = cursor.number("I", f"tensor {name!r}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {num_dims} axes; 1..{MAX_DIMS} are allowed")
    shape = tuple(cursor.number("Q", f"tensor {name!r}") for _ in range(num_dims))[::-1]
    if min(shape) < 1:
        raise ValueError(f"tensor {name!r} has shape {shape}; every size must be positive")
    type_id = cursor.number("i", f"tensor {name!r}")
    kind = _TYPE_BY_ID.get(type_id)
    if kind is None:
        known = ", ".join(f"{k.type_id} {k.name}" for k in GGUF_TYPES.values())
        raise ValueError(f"tensor {name!r} has type {type_id}; this reader knows {known}")
    offset = cursor.number("Q", f"tensor {name!r}")
    if offset % alignment:
        raise ValueError(f"tensor {name!r} has offset {offset}, which is not a multiple of {alignment}")
    num_bytes = prod(shape[:-1]) * kind.row_bytes(shape[-1])
    return TensorInfo(name=name, shape=shape, gguf_type=kind.name, offset=offset, num_bytes=num_bytes)


def _place(infos: list[TensorInfo], start: int, size: int) -> dict[str, TensorInfo]:
    """Absolute offsets, after checking that the tensors lie inside the file and do not overlap."""
    placed = [replace(info, offset=start + info.offset) for info in infos]
    end, last = start, ""
    for info in sorted(placed, key=lambda info: info.offset):
        if info.offset < end:
            raise ValueError(f"tensors {last!r} and {info.name!r} overlap")
        end, last = info.offset + info.num_bytes, info.name
        if end > size:
            raise ValueError(f"tensor {info.name!r} ends at byte {end}, but the file has {size}")
    return {info.name: info for info in placed}


def read_gguf(path: Path | str) -> GGUFFile:
    """Open a GGUF file and check everything it says about itself.

    Args:
        path: any file.

    Returns:
        A :class:`GGUFFile`.

    Raises:
        ValueError: for a wrong magic or version, truncation, counts or lengths beyond the file, repeated keys or names,
            unknown types, misaligned, overlapping or out-of-file tensors; the message starts with the path.
        OSError: if the file cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as file:
        cursor = _Cursor(file, os.fstat(file.fileno()).st_size)
        try:
            return _read(path, cursor)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _read(path: Path, cursor: _Cursor) -> GGUFFile:
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        raise ValueError(f"not a GGUF file: it starts with {magic!r}")
    version = cursor.number("I", "the version")
    if version != VERSION:
        hint = "; it seems to be big-endian" if version == VERSION << 24 else ""
        raise ValueError(f"GGUF version {version}; only version {VERSION} is read{hint}: convert the file again")
    num_tensors, num_entries = cursor.number("Q", "the header"), cursor.number("Q", "the header")
    cursor.need(num_entries * _SMALLEST_ENTRY + num_tensors * _SMALLEST_INFO, "the header")
    metadata: dict[str, MetaValue] = {}
    for _ in range(num_entries):
        key = cursor.text("a metadata key", MAX_KEY)
        if key in metadata:
            raise ValueError(f"metadata {key!r} occurs twice")
        metadata[key] = _read_value(cursor, key)
    alignment = _read_alignment(metadata)
    infos = [_read_info(cursor, alignment) for _ in range(num_tensors)]
    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            raise ValueError(f"tensor {info.name!r} occurs twice")
        seen.add(info.name)
    start = cursor.position + padding(cursor.position, alignment)
    return GGUFFile(path=path, metadata=metadata, tensors=_place(infos, start, cursor.size), alignment=alignment)
