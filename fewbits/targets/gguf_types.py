r"""The table of GGUF tensor types, and the checks and bit helpers that every block format shares.

A row of a tensor is cut into blocks of ``block`` consecutive values; a block is ``bytes_per_block`` bytes. Everywhere
in this package a *code* is the signed integer that multiplies the scale, not the unsigned number in the bytes:
``Q4_0`` has codes -8..7, ``TQ2_0`` -1..2, ``Q1_0`` -1 and +1. All numbers are little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
I8 = NDArray[np.int8]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class GGUFType:
    """One way to store a row of numbers.

    Args:
        name: as ggml spells it.
        type_id: the number in the file.
        block: values that share a scale (1 for floats); a row must be a whole number of blocks.
        bytes_per_block: size of one block.
        codes: the codes a value can have, as a range; None for floats.
        stored: what one value decodes to.
        scale_block: values under one scale of its own; smaller than ``block`` where scales are quantized too.
    """

    name: str
    type_id: int
    block: int
    bytes_per_block: int
    codes: range | None
    stored: str
    scale_block: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """Storage cost of one value, scales counted."""
        return 8 * self.bytes_per_block / self.block

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of ``cols`` values.

        Raises:
            ValueError: if the row is not a whole number of blocks.
        """
        if cols < 1 or cols % self.block:
            raise ValueError(
                f"a row of {cols} values cannot be {self.name}: it must be a multiple of its block of {self.block}; "
                "use a type with a smaller block (Q4_0: 32, Q2_0: 64)"
            )
        return cols // self.block * self.bytes_per_block


_TYPES = (
    GGUFType(name="F32", type_id=0, block=1, bytes_per_block=4, codes=None, stored="the number"),
    GGUFType(name="F16", type_id=1, block=1, bytes_per_block=2, codes=None, stored="the number"),
    GGUFType(name="Q4_0", type_id=2, block=32, bytes_per_block=18, codes=range(-8, 8), stored="d * q"),
    GGUFType(name="Q4_1", type_id=3, block=32, bytes_per_block=20, codes=range(16), stored="d * q + m"),
    GGUFType(name="Q5_0", type_id=6, block=32, bytes_per_block=22, codes=range(-16, 16), stored="d * q"),
    GGUFType(name="Q8_0", type_id=8, block=32, bytes_per_block=34, codes=range(-128, 128), stored="d * q"),
    GGUFType(name="Q2_K", type_id=10, block=256, bytes_per_block=84, codes=range(4), scale_block=16,
             stored="d * sub_scale * q - dmin * sub_min"),
    GGUFType(name="Q3_K", type_id=11, block=256, bytes_per_block=110, codes=range(-4, 4), scale_block=16,
             stored="d * sub_scale * q"),
    GGUFType(name="BF16", type_id=30, block=1, bytes_per_block=2, codes=None, stored="the number"),
    GGUFType(name="TQ1_0", type_id=34, block=256, bytes_per_block=54, codes=range(-1, 2), stored="d * q"),
    GGUFType(name="TQ2_0", type_id=35, block=256, bytes_per_block=66, codes=range(-1, 3), stored="d * q"),
    GGUFType(name="Q1_0", type_id=41, block=128, bytes_per_block=18, codes=range(-1, 2, 2), stored="d * q"),
    GGUFType(name="Q2_0", type_id=42, block=64, bytes_per_block=18, codes=range(-1, 3), stored="d * q"),
)  # fmt: skip
GGUF_TYPES: dict[str, GGUFType] = {t.name: t for t in _TYPES}
"""Every type this package writes and reads, by name."""


def gguf_type(name: str) -> GGUFType:
    """The type of this name, in any case.

    Raises:
        ValueError: for an unknown name, listing the known ones.

    Example:
        >>> gguf_type("q2_0").bits_per_weight
        2.25
    """
    found = GGUF_TYPES.get(str(name).upper())
    if found is None:
        raise ValueError(f"GGUF type {name!r} is unknown; use one of {', '.join(GGUF_TYPES)}")
    return found


def as_fp16(name: str, values: NDArray[Any]) -> F16:
    """``values`` in fp16, refused unless every one is finite and exactly an fp16 number.

    Raises:
        ValueError: naming the first value that is not.
    """
    x = np.asarray(values)
    with np.errstate(over="ignore", invalid="ignore"):
        half = x.astype(np.float16)
    bad = ~np.isfinite(half) | (half.astype(np.float64) != x.astype(np.float64))
    if bad.any():
        raise ValueError(
            f"{name}={float(x[bad][0])!r} is not a finite fp16 number ({int(bad.sum())} of {x.size} are not); "
            "train with portable scales, whose multiples fp16 holds"
        )
    return half


def as_codes(kind: GGUFType, codes: NDArray[Any]) -> I8:
    """``codes`` as int8 blocks ``(num_blocks, block)`` after checking shape, dtype and range.

    Raises:
        ValueError: naming value, limit and fix.
    """
    if codes.ndim != 2 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes are {codes.dtype} {codes.shape}; {kind.name} needs an integer matrix (rows, cols)")
    kind.row_bytes(codes.shape[1])
    allowed = kind.codes
    assert allowed is not None
    check_range(f"codes of {kind.name}", codes, allowed)
    return codes.astype(np.int8).reshape(-1, kind.block)


def check_range(name: str, values: NDArray[Any], allowed: range) -> None:
    """Raise a ValueError unless every value is in the range."""
    low, high = (int(values.min()), int(values.max())) if values.size else (allowed.start, allowed.start)
    off_step = allowed.step != 1 and bool(((values.astype(np.int64) - allowed.start) % allowed.step).any())
    if low < allowed.start or high > allowed[-1] or off_step:
        choice = f"{allowed.start}..{allowed[-1]}" if allowed.step == 1 else f"one of {list(allowed)}"
        raise ValueError(f"{name} run from {low} to {high}; they must be {choice}: choose a type that holds the grid")


def per_block(name: str, values: NDArray[Any], rows: int, num: int) -> NDArray[Any]:
    """Check the shape ``(rows, num)`` of what is stored once per block, and flatten it.

    Raises:
        ValueError: for another shape.
    """
    if values.shape != (rows, num):
        raise ValueError(f"{name} has shape {values.shape}; one value per block is needed, {(rows, num)}")
    return values.reshape(-1)


def join(rows: int, *fields: NDArray[Any]) -> U8:
    """Concatenate the fields of all blocks, each ``(num_blocks, ...)`` of any dtype, into rows of bytes."""
    parts = [np.ascontiguousarray(f.reshape(len(f), -1)).view(np.uint8) for f in fields]
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def split(kind: GGUFType, data: NDArray[Any]) -> list[U8]:
    """``byte[k]``: the k-th byte of every block, ``bytes_per_block`` arrays of length num_blocks.

    Raises:
        ValueError: for anything but a uint8 matrix whose rows are whole blocks.
    """
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % kind.bytes_per_block or not data.shape[1]:
        raise ValueError(
            f"{kind.name} data is {data.dtype} {data.shape}; uint8 (rows, n * {kind.bytes_per_block}) is needed"
        )
    return list(np.ascontiguousarray(data.reshape(-1, kind.bytes_per_block).T))


def read_fp16(low: U8, high: U8, rows: int) -> F16:
    """The fp16 number whose bytes are ``low`` and ``high``, one per block, as ``(rows, blocks per row)``."""
    return (low | (high.astype(np.uint16) << 8)).view(np.float16).reshape(rows, -1)


def rows_of(values: list[NDArray[Any]], rows: int) -> I8:
    """``values[j]``, the j-th value of every block, as a matrix of codes ``(rows, cols)``."""
    return np.stack(values, axis=1).astype(np.int8).reshape(rows, -1)


def pack_strided(unsigned: NDArray[Any], bits: int, stride: int) -> U8:
    """Pack fields of ``bits`` bits; fields ``stride`` apart share a byte, the first in the lowest bits.

    ``unsigned`` is ``(num, n * stride)`` with ``n = 8 / bits``; the result is ``(num, stride)``.
    """
    fields = unsigned.reshape(len(unsigned), 8 // bits, stride)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(fields << shifts, axis=1)


def pack_neighbours(unsigned: NDArray[Any], bits: int) -> U8:
    """Pack fields of ``bits`` bits; neighbours share a byte, the first in the lowest bits."""
    fields = unsigned.reshape(len(unsigned), -1, 8 // bits)
    return np.bitwise_or.reduce(fields << np.arange(0, 8, bits, dtype=np.uint8), axis=2)
