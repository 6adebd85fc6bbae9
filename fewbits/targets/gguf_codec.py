"""Every GGUF type by name: its pack and unpack functions, and what packed rows decode to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.targets import gguf_blocks as flat
from fewbits.targets import gguf_blocks_k as k_quants
from fewbits.targets.gguf_types import F32, U8, gguf_type

PACK: dict[str, Callable[..., U8]] = {
    "F32": flat.pack_f32,
    "F16": flat.pack_f16,
    "BF16": flat.pack_bf16,
    "Q1_0": flat.pack_q1_0,
    "TQ1_0": flat.pack_tq1_0,
    "TQ2_0": flat.pack_tq2_0,
    "Q2_0": flat.pack_q2_0,
    "Q4_0": flat.pack_q4_0,
    "Q4_1": flat.pack_q4_1,
    "Q5_0": flat.pack_q5_0,
    "Q8_0": flat.pack_q8_0,
    "Q2_K": k_quants.pack_q2_k,
    "Q3_K": k_quants.pack_q3_k,
}
UNPACK: dict[str, Callable[[U8], tuple[NDArray[Any], ...]]] = {
    "F32": flat.unpack_f32,
    "F16": flat.unpack_f16,
    "BF16": flat.unpack_bf16,
    "Q1_0": flat.unpack_q1_0,
    "TQ1_0": flat.unpack_tq1_0,
    "TQ2_0": flat.unpack_tq2_0,
    "Q2_0": flat.unpack_q2_0,
    "Q4_0": flat.unpack_q4_0,
    "Q4_1": flat.unpack_q4_1,
    "Q5_0": flat.unpack_q5_0,
    "Q8_0": flat.unpack_q8_0,
    "Q2_K": k_quants.unpack_q2_k,
    "Q3_K": k_quants.unpack_q3_k,
}


def dequantize(gguf_type_name: str, data: U8) -> F32:
    """The values of packed rows, in the order of operations of ggml.

    Args:
        gguf_type_name: for example ``"Q4_0"``.
        data: uint8 ``(rows, bytes per row)``.

    Returns:
        fp32 ``(rows, cols)``.

    Raises:
        ValueError: for an unknown type, or rows that are not whole blocks.
    """
    kind = gguf_type(gguf_type_name)
    q, *parts = UNPACK[kind.name](data)
    if kind.codes is None:
        return q
    d = parts[0].astype(np.float32).repeat(kind.block, axis=1)
    if kind.scale_block is not None:
        d *= parts[1].repeat(kind.scale_block, axis=1)
    values = d * q
    if kind.name == "Q4_1":
        values += parts[1].astype(np.float32).repeat(kind.block, axis=1)
    if kind.name == "Q2_K":
        values -= parts[2].astype(np.float32).repeat(256, axis=1) * parts[3].repeat(16, axis=1)
    return values
