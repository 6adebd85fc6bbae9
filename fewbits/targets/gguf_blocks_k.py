r"""GGUF K-quants: 256 values a block, whose 16 sub-blocks of 16 values have quantized scales of their own.

.. math:: \text{Q2\_K:}\; w = d\,a_i\,q - d_{min}\,b_i, \qquad \text{Q3\_K:}\; w = d\,a_i\,q

with fp16 :math:`d, d_{min}` per block and integers :math:`a_i, b_i` per sub-block. Pairs of ``pack_*`` and the slow
``unpack_*`` as in :mod:`fewbits.targets.gguf_blocks`; per-block arrays are ``(rows, cols / 256)``, per-sub-block arrays
integer ``(rows, cols / 16)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.targets.gguf_types import (
    F16,
    GGUF_TYPES,
    I8,
    U8,
    as_codes,
    as_fp16,
    check_range,
    join,
    pack_strided,
    per_block,
    read_fp16,
    rows_of,
    split,
)

Q2_K_SUB = range(16)
"""What a sub-scale or sub-minimum of Q2_K can be."""
Q3_K_SUB = range(-32, 32)
"""What a sub-scale of Q3_K can be."""


def _sub(name: str, values: NDArray[Any], allowed: range, codes: NDArray[Any]) -> I8:
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {values.dtype}; integers {allowed.start}..{allowed[-1]} are needed")
    flat = per_block(name, values, len(codes), codes.shape[1] // 16)
    check_range(name, flat, allowed)
    return flat.astype(np.int8).reshape(-1, 16)


def _super(name: str, values: NDArray[Any], codes: NDArray[Any]) -> F16:
    return as_fp16(name, per_block(name, values, len(codes), codes.shape[1] // 256))


def pack_q2_k(
    codes: NDArray[Any],
    scale: NDArray[Any],
    sub_scale: NDArray[Any],
    min_scale: NDArray[Any],
    sub_min: NDArray[Any],
) -> U8:
    """Codes 0..3: 16 bytes (sub-scale low nibble, sub-minimum high), 64 bytes of codes as in TQ2_0, d, dmin.

    Args:
        codes: integers 0..3, ``(rows, cols)``.
        scale: d, fp16 numbers ``(rows, cols / 256)``.
        sub_scale: integers 0..15, ``(rows, cols / 16)``.
        min_scale: dmin, fp16 numbers ``(rows, cols / 256)``.
        sub_min: integers 0..15, ``(rows, cols / 16)``.

    Returns:
        uint8 ``(rows, cols / 256 * 84)``.

    Raises:
        ValueError: for a wrong shape, a value out of range or not exact in fp16.
    """
    q = as_codes(GGUF_TYPES["Q2_K"], codes)
    a, b = _sub("sub_scale", sub_scale, Q2_K_SUB, codes), _sub("sub_min", sub_min, Q2_K_SUB, codes)
    d, dmin = _super("scale", scale, codes), _super("min_scale", min_scale, codes)
    fields = pack_strided(q.view(np.uint8).reshape(-1, 128), 2, 32).reshape(-1, 64)
    return join(len(codes), (a | b << 4).view(np.uint8), fields, d, dmin)


def unpack_q2_k(data: U8) -> tuple[I8, F16, I8, F16, I8]:
    """Twin of :func:`pack_q2_k`."""
    byte = split(GGUF_TYPES["Q2_K"], data)
    sub_scale = rows_of([byte[i] & 15 for i in range(16)], len(data))
    sub_min = rows_of([byte[i] >> 4 for i in range(16)], len(data))
    codes = [byte[16 + 32 * (j // 128) + j % 32] >> (2 * (j % 128 // 32)) & 3 for j in range(256)]
    d, dmin = (read_fp16(byte[k], byte[k + 1], len(data)) for k in (80, 82))
    return rows_of(codes, len(data)), d, sub_scale, dmin, sub_min


def pack_q3_k(codes: NDArray[Any], scale: NDArray[Any], sub_scale: NDArray[Any]) -> U8:
    """Codes -4..3: 32 bytes of high bits, 64 of low bits, 12 of 6-bit sub-scales, d; codes plus 4, sub-scales plus 32.

    The high bits of values 32 apart share a byte. Of the unsigned sub-scales, byte i of the first eight holds the low
    four bits of number i (low nibble) and i + 8 (high nibble); the high two bits of numbers 4 apart share a byte.

    Args:
        codes: integers -4..3, ``(rows, cols)``.
        scale: d, fp16 numbers ``(rows, cols / 256)``.
        sub_scale: integers -32..31, ``(rows, cols / 16)``.

    Returns:
        uint8 ``(rows, cols / 256 * 110)``.

    Raises:
        ValueError: for a wrong shape, a value out of range or not exact in fp16.
    """
    unsigned = (as_codes(GGUF_TYPES["Q3_K"], codes) + 4).astype(np.uint8)
    sub = (_sub("sub_scale", sub_scale, Q3_K_SUB, codes) + 32).astype(np.uint8)
    high = pack_strided(unsigned >> 2, 1, 32)
    low = pack_strided((unsigned & 3).reshape(-1, 128), 2, 32).reshape(-1, 64)
    return join(
        len(codes), high, low, pack_strided(sub & 15, 4, 8), pack_strided(sub >> 4, 2, 4), _super("scale", scale, codes)
    )


def unpack_q3_k(data: U8) -> tuple[I8, F16, I8]:
    """Twin of :func:`pack_q3_k`."""
    byte = split(GGUF_TYPES["Q3_K"], data)
    codes = []
    for j in range(256):
        high = byte[j % 32] >> (j // 32) & 1
        low = byte[32 + 32 * (j // 128) + j % 32] >> (2 * (j % 128 // 32)) & 3
        codes.append((4 * high + low).astype(np.int8) - 4)
    sub = []
    for i in range(16):
        low = byte[96 + i % 8] >> (4 * (i // 8)) & 15
        high = byte[104 + i % 4] >> (2 * (i // 4)) & 3
        sub.append((16 * high + low).astype(np.int8) - 32)
    return rows_of(codes, len(data)), read_fp16(byte[108], byte[109], len(data)), rows_of(sub, len(data))
