r"""GGUF blocks with one scale per block: bytes of a block from its parts, and back.

.. math:: w = d\,q \qquad\text{or, for Q4\_1,}\qquad w = d\,q + m

with an fp16 scale ``d`` (and fp16 minimum ``m``) per block and one integer code ``q`` per value.

Each type is a pair. ``pack_*`` shuffles bits over whole arrays; ``unpack_*`` is its slow, readable twin: for the j-th
value of a block it says which byte and which bits hold it. The twins share no bit arithmetic, so that their agreement
means something. K-quants, whose scales are quantized too, are in :mod:`fewbits.targets.gguf_blocks_k`.

Arguments of every ``pack_*``: ``codes`` is an integer matrix ``(rows, cols)``, ``scale`` holds fp16 numbers (of any
float dtype) of shape ``(rows, cols / block)``. The result is uint8 ``(rows, bytes per row)``. Every ``unpack_*`` takes
that and gives the arguments back, codes as int8 and scales as fp16. All raise ValueError, naming value, limit and fix,
for another shape or dtype, a code outside the type's range and a scale that is not a finite fp16 number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.targets.gguf_types import (
    F16,
    F32,
    GGUF_TYPES,
    I8,
    U8,
    as_codes,
    as_fp16,
    join,
    pack_neighbours,
    pack_strided,
    per_block,
    read_fp16,
    rows_of,
    split,
)

_TRIT_WEIGHTS = np.array([81, 27, 9, 3, 1], dtype=np.int32)


def _checked(name: str, codes: NDArray[Any], *scales: NDArray[Any]) -> tuple[I8, list[F16]]:
    kind = GGUF_TYPES[name]
    q = as_codes(kind, codes)
    rows, num = len(codes), codes.shape[1] // kind.block
    return q, [as_fp16("scale", per_block("scale", scale, rows, num)) for scale in scales]


def pack_q1_0(codes: NDArray[Any], scale: NDArray[Any]) -> U8:
    """Signs, 128 a block: d, then 16 bytes; value j is bit ``j % 8`` of byte ``j // 8``, set for +1.

    Example:
        >>> pack_q1_0(np.ones((1, 128), dtype=int), np.array([[1.0]]))[0, :4].tolist()
        [0, 60, 255, 255]
    """
    q, (d,) = _checked("Q1_0", codes, scale)
    return join(len(codes), d, pack_neighbours((q > 0).astype(np.uint8), 1))


def unpack_q1_0(data: U8) -> tuple[I8, F16]:
    """Twin of :func:`pack_q1_0`."""
    byte = split(GGUF_TYPES["Q1_0"], data)
    bits = [byte[2 + j // 8] >> (j % 8) & 1 for j in range(128)]
    return rows_of([2 * b.astype(np.int8) - 1 for b in bits], len(data)), read_fp16(byte[0], byte[1], len(data))


def pack_q2_0(codes: NDArray[Any], scale: NDArray[Any]) -> U8:
    """Codes -1..2, 64 a block: d, then 16 bytes; value j is in byte ``j // 4`` at bit ``2 (j % 4)``, plus 1."""
    q, (d,) = _checked("Q2_0", codes, scale)
    return join(len(codes), d, pack_neighbours((q + 1).astype(np.uint8), 2))


def unpack_q2_0(data: U8) -> tuple[I8, F16]:
    """Twin of :func:`pack_q2_0`."""
    byte = split(GGUF_TYPES["Q2_0"], data)
    fields = [byte[2 + j // 4] >> (2 * (j % 4)) & 3 for j in range(64)]
    return rows_of([f.astype(np.int8) - 1 for f in fields], len(data)), read_fp16(byte[0], byte[1], len(data))


def pack_tq1_0(codes: NDArray[Any], scale: NDArray[Any]) -> U8:
    r"""Ternary codes, 256 a block: 48 + 4 bytes of base-3 digits, then d.

    Five digits (trits, ``code + 1``), the first the most significant, make :math:`v = \sum_n t_n 3^{4-n} < 243`, and
    the byte is :math:`\lceil 256 v / 243 \rceil`: a fixed-point fraction whose leading base-3 digits can be read by
    multiplying alone. Values 32 apart share one of the first 32 bytes, values 16 apart one of the next 16, and the
    last 16 values, 4 apart, share 4 bytes of four digits each.
    """
    q, (d,) = _checked("TQ1_0", codes, scale)
    trits = (q + 1).astype(np.int32)
    first = trits[:, :160].reshape(-1, 5, 32)
    second = trits[:, 160:240].reshape(-1, 5, 16)
    last = np.pad(trits[:, 240:].reshape(-1, 4, 4), ((0, 0), (0, 1), (0, 0)))
    numbers = [np.tensordot(part, _TRIT_WEIGHTS, axes=(1, 0)) for part in (first, second, last)]
    fractions = (np.concatenate(numbers, axis=1) * 256 + 242) // 243
    return join(len(codes), fractions.astype(np.uint8), d)


def unpack_tq1_0(data: U8) -> tuple[I8, F16]:
    """Twin of :func:`pack_tq1_0`: digit n of a byte b is the n-th base-3 digit of ``b / 256`` after the point."""
    byte = split(GGUF_TYPES["TQ1_0"], data)

    def code(k: int, n: int) -> I8:
        return (byte[k].astype(np.int32) * 3 ** (n + 1) // 256 % 3 - 1).astype(np.int8)

    values = [code(m, n) for n in range(5) for m in range(32)]
    values += [code(32 + m, n) for n in range(5) for m in range(16)]
    values += [code(48 + m, n) for n in range(4) for m in range(4)]
    return rows_of(values, len(data)), read_fp16(byte[52], byte[53], len(data))


def pack_tq2_0(codes: NDArray[Any], scale: NDArray[Any]) -> U8:
    """Codes -1..2, 256 a block: two halves of 32 bytes, then d; values 32 apart share a byte, each plus 1.

    ggml's own quantizer never makes the code 2, but the bits hold it and ggml decodes it.
    """
    q, (d,) = _checked("TQ2_0", codes, scale)
    halves = pack_strided((q + 1).astype(np.uint8).reshape(-1, 128), 2, 32)
    return join(len(codes), halves.reshape(-1, 64), d)


def unpack_tq2_0(data: U8) -> tuple[I8, F16]:
    """Twin of :func:`pack_tq2_0`."""
    byte = split(GGUF_TYPES["TQ2_0"], data)
    fields = [byte[32 * (j // 128) + j % 32] >> (2 * (j % 128 // 32)) & 3 for j in range(256)]
    return rows_of([f.astype(np.int8) - 1 for f in fields], len(data)), read_fp16(byte[64], byte[65], len(data))


def pack_q4_0(codes: NDArray[Any], scale: NDArray[Any]) -> U8:
    """Codes -8..7, 32 a block: d, then 16 bytes; byte j holds value j low and value j + 16 high, each plus 8."""
    q, (d,) = _checked("Q4_0", codes, scale)
    return join(len(codes), d, pack_strided((q + 8).astype(np.uint8), 4, 16))


def unpack_q4_0(data: U8) -> tuple[I8, F16]:
    """Twin of :func:`pack_q4_0`."""
    byte = split(GGUF_TYPES["Q4_0"], data)
    nibbles = [byte[2 + j] & 15 for j in range(16)] + [byte[2 + j] >> 4 for j in range(16)]
    return rows_of([f.astype(np.int8) - 8 for f in nibbles], len(data)), read_fp16(byte[0], byte[1], len(data))


def pack_q4_1(codes: NDArray[Any], scale: NDArray[Any], minimum: NDArray[Any]) -> U8:
    """Codes 0..15, 32 a block: d, m, then 16 bytes as in Q4_0, without an offset."""
    q, (d, m) = _checked("Q4_1", codes, scale, minimum)
    return join(len(codes), d, m, pack_strided(q.view(np.uint8), 4, 16))


def unpack_q4_1(data: U8) -> tuple[I8, F16, F16]:
    """Twin of :func:`pack_q4_1`."""
    byte = split(GGUF_TYPES["Q4_1"], data)
    nibbles = [byte[4 + j] & 15 for j in range(16)] + [byte[4 + j] >> 4 for j in range(16)]
    d, m = (read_fp16(byte[k], byte[k + 1], len(data)) for k in (0, 2))
    return rows_of(nibbles, len(data)), d, m


def pack_q5_0(codes: NDArray[Any], scale: NDArray[Any]) -> U8:
    """Codes -16..15, 32 a block: d, 4 bytes of fifth bits (value j is bit j), 16 bytes as in Q4_0; each plus 16."""
    q, (d,) = _checked("Q5_0", codes, scale)
    unsigned = (q + 16).astype(np.uint8)
    return join(len(codes), d, pack_neighbours(unsigned >> 4, 1), pack_strided(unsigned & 15, 4, 16))


def unpack_q5_0(data: U8) -> tuple[I8, F16]:
    """Twin of :func:`pack_q5_0`."""
    byte = split(GGUF_TYPES["Q5_0"], data)
    low = [byte[6 + j] & 15 for j in range(16)] + [byte[6 + j] >> 4 for j in range(16)]
    high = [byte[2 + j // 8] >> (j % 8) & 1 for j in range(32)]
    values = [a.astype(np.int8) + 16 * b.astype(np.int8) - 16 for a, b in zip(low, high, strict=True)]
    return rows_of(values, len(data)), read_fp16(byte[0], byte[1], len(data))


def pack_q8_0(codes: NDArray[Any], scale: NDArray[Any]) -> U8:
    """Codes -128..127, 32 a block: d, then the codes as int8."""
    q, (d,) = _checked("Q8_0", codes, scale)
    return join(len(codes), d, q)


def unpack_q8_0(data: U8) -> tuple[I8, F16]:
    """Twin of :func:`pack_q8_0`."""
    byte = split(GGUF_TYPES["Q8_0"], data)
    return rows_of([byte[2 + j].view(np.int8) for j in range(32)], len(data)), read_fp16(byte[0], byte[1], len(data))


def _finite(values: NDArray[Any]) -> F32:
    x = np.asarray(values)
    if x.ndim != 2 or x.dtype.kind != "f":
        raise ValueError(f"values are {x.dtype} {x.shape}; a float matrix (rows, cols) is needed")
    exact = x.astype(np.float32)
    if not np.isfinite(exact).all() or (exact != x).any():
        raise ValueError("a value is not finite or not exact in fp32; check the weights, or cast them first")
    return exact


def pack_f32(values: NDArray[Any]) -> U8:
    """fp32 numbers as they are."""
    x = _finite(values)
    return join(len(x), x.reshape(-1))


def unpack_f32(data: U8) -> tuple[F32]:
    """Twin of :func:`pack_f32`."""
    split(GGUF_TYPES["F32"], data)
    return (np.ascontiguousarray(data).view(np.float32),)


def pack_f16(values: NDArray[Any]) -> U8:
    """fp16 numbers; a value that fp16 does not hold exactly is refused, so round first if rounding is meant."""
    x = _finite(values)
    return join(len(x), as_fp16("value", x).reshape(-1))


def unpack_f16(data: U8) -> tuple[F32]:
    """Twin of :func:`pack_f16`."""
    split(GGUF_TYPES["F16"], data)
    return (np.ascontiguousarray(data).view(np.float16).astype(np.float32),)


def pack_bf16(values: NDArray[Any]) -> U8:
    """bf16 numbers, the upper halves of fp32; a value with bits in the lower half is refused.

    Example:
        >>> pack_bf16(np.array([[1.0, -2.0]], dtype=np.float32)).tolist()
        [[128, 63, 0, 192]]
    """
    x = _finite(values)
    bits = x.view(np.uint32)
    if (bits & 0xFFFF).any():
        value = float(x[(bits & 0xFFFF) != 0][0])
        raise ValueError(f"value={value!r} is not a bf16 number; use F32 or F16, or round the weights first")
    return join(len(x), (bits >> 16).astype(np.uint16).reshape(-1))


def unpack_bf16(data: U8) -> tuple[F32]:
    """Twin of :func:`pack_bf16`."""
    split(GGUF_TYPES["BF16"], data)
    return ((np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32),)
