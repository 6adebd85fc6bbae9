"""The GGUF file, version 3: its layout and a writer. The reader is in :mod:`fewbits.targets.gguf_reader`.

Layout, little-endian: ``GGUF``, version, number of tensors, number of metadata entries; the entries (key, type,
value); the tensor infos (name, shape with the row length first, type, offset into the data); padding; the data of each
tensor at a multiple of the alignment.

Metadata keep their width in Python: a value is ``str``, ``bool``, a NumPy scalar (``np.uint32(5)``), a list of ``str``
or a one-dimensional NumPy array. What is written is read back equal, dtype included.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.targets.gguf_types import U8, gguf_type

ALIGNMENT = 32
MAGIC = b"GGUF"
VERSION = 3
MAX_DIMS = 4
MAX_NAME = 63
"""Bytes of a tensor name that ggml holds."""
MAX_KEY = 2**16 - 1
STRING, ARRAY, BOOL = 8, 9, 7
DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_TYPE_OF_DTYPE = {dtype: number for number, dtype in DTYPES.items()}

MetaValue = str | bool | np.generic | list[str] | NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor to write.

    Args:
        name: at most 63 bytes of UTF-8.
        shape: as NumPy has it, row length last; 1 to 4 positive numbers.
        gguf_type: name of the type.
        data: the packed bytes, uint8 of any shape, or a function that makes them when their turn comes.
    """

    name: str
    shape: tuple[int, ...]
    gguf_type: str
    data: U8 | Callable[[], U8]

    def __post_init__(self) -> None:
        length = len(self.name.encode())
        if not 1 <= length <= MAX_NAME or "\0" in self.name:
            raise ValueError(f"tensor name {self.name!r} has {length} bytes; ggml holds 1..{MAX_NAME}, none of them 0")
        if not 1 <= len(self.shape) <= MAX_DIMS or min(self.shape) < 1:
            raise ValueError(f"tensor {self.name!r} has shape {self.shape}; 1 to {MAX_DIMS} positive sizes are needed")
        gguf_type(self.gguf_type).row_bytes(self.shape[-1])

    @property
    def num_bytes(self) -> int:
        """Size of the packed data."""
        return prod(self.shape[:-1]) * gguf_type(self.gguf_type).row_bytes(self.shape[-1])


def padding(position: int, alignment: int) -> int:
    """Bytes from ``position`` to the next multiple of ``alignment``."""
    return -position % alignment


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encode_value(key: str, value: MetaValue) -> bytes:
    if isinstance(value, str):
        return struct.pack("<i", STRING) + _text(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<iiQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, bool):
        value = np.bool_(value)
    if isinstance(value, np.generic | np.ndarray) and value.ndim <= 1:
        number = _TYPE_OF_DTYPE.get(value.dtype.newbyteorder("<"))
        if number is not None:
            head = struct.pack("<i", number) if value.ndim == 0 else struct.pack("<iiQ", ARRAY, number, value.size)
            return head + value.astype(DTYPES[number]).tobytes()
    raise ValueError(
        f"metadata {key!r} is {type(value).__name__}, which has no GGUF type; use str, bool, list of str, a NumPy "
        "scalar such as np.uint32(5) or np.float32(1e-5), or a one-dimensional array of such"
    )


def write_gguf(path: Path | str, metadata: Mapping[str, MetaValue], tensors: Iterable[GGUFTensor]) -> None:
    """Write a GGUF file: to a temporary name beside ``path`` first, renamed when it is whole.

    Args:
        path: where to; an existing file is replaced.
        metadata: see the head of this module for the values. ``general.alignment`` is fixed at 32.
        tensors: written in this order; data given as functions are made one at a time.

    Raises:
        ValueError: for a value without a GGUF type, bad keys, repeated tensor names, or data of the wrong size.
    """
    path, listed = Path(path), list(tensors)
    names = [t.name for t in listed]
    if len(set(names)) != len(names):
        raise ValueError(f"tensor {next(n for n in names if names.count(n) > 1)!r} occurs twice; names must differ")
    if metadata.get("general.alignment", ALIGNMENT) != ALIGNMENT:
        raise ValueError(f"general.alignment={metadata['general.alignment']}; this writer aligns to {ALIGNMENT}")
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(listed), len(metadata))]
    for key, value in metadata.items():
        if not 1 <= len(key.encode()) <= MAX_KEY or "\0" in key:
            raise ValueError(f"metadata key of {len(key.encode())} bytes; GGUF allows 1..{MAX_KEY}, none of them 0")
        head += [_text(key), _encode_value(key, value)]
    offset = 0
    for t in listed:
        shape = t.shape[::-1]
        type_id = gguf_type(t.gguf_type).type_id
        head += [_text(t.name), struct.pack(f"<I{len(shape)}QiQ", len(shape), *shape, type_id, offset)]
        offset += t.num_bytes + padding(t.num_bytes, ALIGNMENT)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            raw = b"".join(head)
            file.write(raw + bytes(padding(len(raw), ALIGNMENT)))
            for t in listed:
                data = t.data() if callable(t.data) else t.data
                if data.dtype != np.uint8 or data.size != t.num_bytes:
                    raise ValueError(
                        f"data of tensor {t.name!r} are {data.dtype} x {data.size}; "
                        f"{t.gguf_type} of shape {t.shape} is uint8 x {t.num_bytes}"
                    )
                file.write(np.ascontiguousarray(data).data)
                # the padding after the last tensor is part of the format: ggml reads it
                file.write(bytes(padding(t.num_bytes, ALIGNMENT)))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
