"""From codes and scales to the bytes of a GGUF tensor and back, never with loss.

:func:`pack_tensor` unpacks what it packed with the slow twins and compares with ``fp32(scale) * level``; a block that
differs in one value raises, so that no lossy block can leave this module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.targets.gguf_blocks_k import Q2_K_SUB, Q3_K_SUB
from fewbits.targets.gguf_codec import PACK, UNPACK, dequantize
from fewbits.targets.gguf_plan import HasLevels, Plan, integer_levels, plan
from fewbits.targets.gguf_types import F32, U8, GGUFType, gguf_type

_CHUNK = 2**20
"""Values packed at a time: the working copies then stay in the cache and small beside the tensor."""


def _spread(values: NDArray[Any], size: int, unit: int, cols: int) -> NDArray[Any]:
    """Of values given per ``size`` columns (the last may be short), the one that rules each ``unit`` columns."""
    return values[:, np.arange(0, cols, unit) // size]


def _level_indices(grid: HasLevels, codes: NDArray[Any]) -> NDArray[np.int32]:
    if codes.ndim != 2 or codes.dtype.kind not in "iu" or not codes.size:
        raise ValueError(f"codes are {codes.dtype} {codes.shape}; a nonempty integer matrix (rows, cols) is needed")
    index = codes.astype(np.int32) - grid.qmin
    if index.min() < 0 or index.max() >= len(grid.levels):
        last = grid.qmin + len(grid.levels) - 1
        raise ValueError(f"codes run from {codes.min()} to {codes.max()}; the grid has {grid.qmin}..{last}")
    return index


def _stored_codes(grid: HasLevels, found: Plan) -> NDArray[np.int8]:
    """The type's code of every level, in the order of the grid."""
    fitted = integer_levels(grid.levels)
    assert fitted is not None
    return ((np.array(fitted[0]) - found.offset) // found.slope).astype(np.int8)


def encode_levels(
    grid: HasLevels,
    codes: NDArray[Any],
    scale: NDArray[Any],
    group_size: int,
    gguf_type_name: str,
    *,
    superblock: int | None = None,
    super_scale: NDArray[Any] | None = None,
    multipliers: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], ...]:
    """The arguments of the type's ``pack_*`` function; see :func:`pack_tensor` for ours."""
    kind = gguf_type(gguf_type_name)
    index = _level_indices(grid, codes)
    rows, cols = codes.shape
    _check_scales(scale, rows, cols, group_size, superblock, super_scale, multipliers)
    found = plan(grid, group_size, cols, kind.name, superblock=superblock, scale_dtype="fp32")
    if found.verdict == "cannot":
        raise ValueError(f"{kind.name} cannot hold this tensor: {found.reason}")
    if kind.codes is None:
        levels = np.array(grid.levels, dtype=np.float32)
        return (_spread(scale, group_size, 1, cols) * levels[index],)
    q = _stored_codes(grid, found)[index]
    unit = 1.0 / found.divisor
    if kind.scale_block is None:
        s = _spread(scale, group_size, kind.block, cols).astype(np.float64) * unit
        return (q, s * found.slope, s * found.offset) if kind.name == "Q4_1" else (q, s * found.slope)
    if super_scale is None or multipliers is None or superblock is None:
        s = _spread(scale, group_size, kind.block, cols).astype(np.float64) * unit
        k = np.ones((rows, cols // kind.scale_block), dtype=np.int64)
    else:
        s = _spread(super_scale, superblock, kind.block, cols).astype(np.float64) * unit
        k = _spread(multipliers, group_size, kind.scale_block, cols).astype(np.int64)
    return _encode_k(kind, found, q, s, k)


def _encode_k(
    kind: GGUFType, found: Plan, q: NDArray[Any], s: NDArray[Any], k: NDArray[Any]
) -> tuple[NDArray[Any], ...]:
    """Put slope and offset into the sub-scales where that fits (any fp16 scale then goes), else into d and dmin."""
    sub = Q2_K_SUB if kind.name == "Q2_K" else Q3_K_SUB
    slope, offset = found.slope, found.offset
    reach = max(abs(slope), abs(offset)) * k.reshape(*s.shape, -1).max(axis=2)
    with np.errstate(over="ignore"):
        spread = (reach <= sub[-1]) & (s.astype(np.float16) == s)
    per_sub = spread.repeat(k.shape[1] // s.shape[1], axis=1)
    d, sub_scale = np.where(spread, s, s * slope), np.where(per_sub, k * slope, k)
    if kind.name == "Q3_K":
        return q, d, sub_scale
    # w = d a q - dmin b: a positive offset makes dmin negative, because b is unsigned
    dmin = np.where(spread, -np.sign(offset), -offset) * s
    return q, d, sub_scale, dmin, np.where(per_sub, k * abs(offset), k)


def _check_scales(
    scale: NDArray[Any],
    rows: int,
    cols: int,
    group_size: int,
    superblock: int | None,
    super_scale: NDArray[Any] | None,
    multipliers: NDArray[Any] | None,
) -> None:
    groups = -(-cols // group_size)
    if scale.shape != (rows, groups) or scale.dtype != np.float32 or not np.isfinite(scale).all():
        raise ValueError(
            f"scale is {scale.dtype} {scale.shape}; finite float32 {(rows, groups)} is needed "
            f"({groups} groups of {group_size} in {cols} columns)"
        )
    given = [x is not None for x in (superblock, super_scale, multipliers)]
    if any(given) != all(given):
        raise ValueError("superblock, super_scale and multipliers belong together; give all three or none")
    if superblock is not None and super_scale is not None and multipliers is not None:
        supers = -(-cols // superblock)
        if super_scale.shape != (rows, supers) or multipliers.shape != (rows, groups):
            raise ValueError(
                f"super_scale {super_scale.shape} and multipliers {multipliers.shape} must be {(rows, supers)} "
                f"and {(rows, groups)} for superblock={superblock}, group_size={group_size}"
            )
        if multipliers.dtype.kind not in "iu" or multipliers.min() < 0:
            raise ValueError(f"multipliers are {multipliers.dtype} from {multipliers.min()}; integers >= 0 are needed")


def pack_tensor(
    grid: HasLevels,
    codes: NDArray[Any],
    scale: NDArray[Any],
    group_size: int,
    gguf_type_name: str,
    *,
    superblock: int | None = None,
    super_scale: NDArray[Any] | None = None,
    multipliers: NDArray[Any] | None = None,
) -> U8:
    r"""Pack a quantized matrix into a GGUF type, exactly.

    What the bytes decode to equals :math:`\mathrm{fp32}(s) \cdot \mathrm{level}(\mathrm{code})` in every value; this is
    checked by unpacking, before anything is returned.

    Args:
        grid: the level set; code ``qmin + i`` means ``levels[i]``.
        codes: integers ``(rows, cols)``.
        scale: fp32 ``(rows, groups)``, units of ``w`` per step; with a superblock the products
            ``super_scale * multiplier``.
        group_size: weights of a row under one scale (the last group may be short); ``cols`` for one scale a row.
        gguf_type_name: for example ``"Q2_0"``, in any case.
        superblock: weights under one super scale, for double-quantized scales; else None, as the next two.
        super_scale: fp32 ``(rows, superblocks)``.
        multipliers: integers ``(rows, groups)``.

    Returns:
        uint8 ``(rows, bytes per row)``.

    Raises:
        ValueError: if the type cannot hold the tensor, naming the condition that fails; if a scale is not finite or a
            number that the type must store is not exact in fp16; for wrong shapes, dtypes and codes.

    Example:
        >>> from fewbits.grids import Ternary
        >>> codes = np.tile(np.array([-1, 0, 1, 1]), (1, 16))
        >>> data = pack_tensor(Ternary(), codes, np.array([[0.5]], dtype=np.float32), 64, "Q2_0")
        >>> data.shape, dequantize("Q2_0", data)[0, :4].tolist()
        ((1, 18), [-0.5, 0.0, 0.5, 0.5])
    """
    kind = gguf_type(gguf_type_name)
    _level_indices(grid, codes)
    rows, cols = codes.shape
    _check_scales(scale, rows, cols, group_size, superblock, super_scale, multipliers)
    levels = np.array(grid.levels, dtype=np.float32)
    packed = np.empty((rows, kind.row_bytes(cols)), dtype=np.uint8)
    step = max(1, _CHUNK // cols)
    for start in range(0, rows, step):
        r = slice(start, start + step)
        parts = encode_levels(
            grid,
            codes[r],
            scale[r],
            group_size,
            kind.name,
            superblock=superblock,
            super_scale=None if super_scale is None else super_scale[r],
            multipliers=None if multipliers is None else multipliers[r],
        )
        packed[r] = PACK[kind.name](*parts)
        wanted = _spread(scale[r], group_size, 1, cols) * levels[_level_indices(grid, codes[r])]
        wrong = dequantize(kind.name, packed[r]) != wanted
        if wrong.any():
            row, col = (int(x) for x in np.argwhere(wrong)[0])
            raise ValueError(
                f"{kind.name} does not hold {int(wrong.sum())} of {wrong.size} weights exactly, first "
                f"[{start + row}, {col}] = {wanted[row, col]}; give scale = super_scale * multiplier, exact in fp16"
            )
    return packed


def unpack_tensor(
    grid: HasLevels, data: U8, group_size: int, gguf_type_name: str, *, superblock: int | None = None
) -> tuple[NDArray[np.int16], F32]:
    """Codes and scales from the bytes of :func:`pack_tensor`: its inverse, for reading back.

    Args:
        grid: the level set that was packed.
        data: uint8 ``(rows, bytes per row)`` of a type with codes (not F32, F16, BF16).
        group_size: as in :func:`pack_tensor`.
        gguf_type_name: as in :func:`pack_tensor`.
        superblock: as in :func:`pack_tensor`; the scale returned is ``super_scale * multiplier``.

    Returns:
        ``(codes, scale)``: int16 ``(rows, cols)`` and fp32 ``(rows, groups)``.

    Raises:
        ValueError: if the data is not what this grid, group and type give: a stored code that is no level, scales that
            differ inside a group, or a minimum that does not belong to the scale.
    """
    kind = gguf_type(gguf_type_name)
    if kind.codes is None:
        raise ValueError(f"{kind.name} stores weights, not codes; use dequantize")
    q, *parts = UNPACK[kind.name](data)
    cols = q.shape[1]
    found = plan(grid, group_size, cols, kind.name, superblock=superblock, scale_dtype="fp32")
    if found.verdict == "cannot":
        raise ValueError(f"{kind.name} cannot hold this grid: {found.reason}")
    code_of = np.full(256, -1, dtype=np.int16)
    code_of[_stored_codes(grid, found).view(np.uint8)] = range(len(grid.levels))
    index = code_of[q.view(np.uint8)]
    if (index < 0).any():
        raise ValueError(f"stored code {int(q[index < 0][0])} of {kind.name} is not a level of the grid")
    step = parts[0].astype(np.float64)
    minimum = parts[1].astype(np.float64) if kind.name == "Q4_1" else None
    if kind.scale_block is not None:
        step = step.repeat(16, axis=1) * parts[1]
        minimum = -parts[2].astype(np.float64).repeat(16, axis=1) * parts[3] if kind.name == "Q2_K" else None
    if minimum is not None and (minimum * found.slope != step * found.offset).any():
        raise ValueError(f"a minimum in the {kind.name} data does not belong to its scale and this grid")
    scale = (step * found.divisor / found.slope).astype(np.float32)
    unit = kind.scale_block or kind.block
    first = np.arange(0, cols, group_size) // unit
    groups = scale[:, first]
    if (_spread(groups, group_size, unit, cols) != scale).any():
        raise ValueError(f"scales in the {kind.name} data differ inside a group of {group_size}")
    return index + np.int16(grid.qmin), groups
