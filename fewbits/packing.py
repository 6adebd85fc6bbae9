"""Codes to bytes and back: dense words of any width 1 to 8, and five trits a byte.

Each row is packed on its own and starts on a byte, so that a row can be read alone; within a row code i occupies bits
``i * num_bits`` and following, least significant bit first. A row of n codes takes ``ceil(n * num_bits / 8)`` bytes, a
ternary row ``ceil(n / 5)``: byte value ``sum (code_i + 1) * 3**i``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.grids import AnyGrid, Codebook, Ternary
from fewbits.numerics import STORED_DTYPE
from fewbits.scheme import Scheme

_TRITS = 5


def packed_width(width: int, grid: AnyGrid) -> int:
    """Bytes of one packed row of ``width`` codes.

    Example:
        >>> from fewbits.grids import Int
        >>> packed_width(33, Int(3)), packed_width(33, Ternary())
        (13, 7)
    """
    return -(-width // _TRITS) if isinstance(grid, Ternary) else -(-width * grid.num_bits // 8)


def pack_codes(codes: Tensor, grid: AnyGrid) -> Tensor:
    """Pack ``(rows, width)`` codes to uint8 ``(rows, packed_width)``.

    Raises:
        ValueError: if a code lies outside the grid.

    Example:
        >>> from fewbits.grids import Int
        >>> pack_codes(torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8), Int(2)).tolist()
        [[228]]
    """
    low, high = grid.qmin, grid.qmin + grid.num_levels - 1
    offset = codes.to(torch.int16) - low
    if codes.numel() and (int(offset.min()) < 0 or int(offset.max()) > high - low):
        raise ValueError(f"codes run from {int(codes.min())} to {int(codes.max())}; {grid} allows {low} to {high}")
    rows, width = codes.shape
    if isinstance(grid, Ternary):
        padded = torch.nn.functional.pad(offset, (0, -width % _TRITS)).view(rows, -1, _TRITS)
        powers = torch.tensor([3**i for i in range(_TRITS)], dtype=torch.int16, device=codes.device)
        return (padded * powers).sum(-1).to(torch.uint8)
    bits = grid.num_bits
    shifts = torch.arange(bits, dtype=torch.int16, device=codes.device)
    stream = ((offset[..., None] >> shifts) & 1).view(rows, width * bits)
    stream = torch.nn.functional.pad(stream, (0, -(width * bits) % 8)).view(rows, -1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.int16, device=codes.device)
    return (stream * weights).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, width: int, grid: AnyGrid) -> Tensor:
    """Inverse of :func:`pack_codes`.

    Raises:
        ValueError: if the bytes do not match the width, or hold a code outside the grid (a damaged file).

    Example:
        >>> from fewbits.grids import Int
        >>> unpack_codes(torch.tensor([[228]], dtype=torch.uint8), 4, Int(2)).tolist()
        [[-2, -1, 0, 1]]
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != packed_width(width, grid):
        raise ValueError(
            f"packed codes are {packed.dtype} {tuple(packed.shape)}; "
            f"uint8 (rows, {packed_width(width, grid)}) is needed for {width} codes of {grid}"
        )
    rows = len(packed)
    if isinstance(grid, Ternary):
        powers = torch.tensor([3**i for i in range(_TRITS)], dtype=torch.int16, device=packed.device)
        if packed.numel() and int(packed.max()) >= 3**_TRITS:
            raise ValueError(f"packed byte {int(packed.max())} is not five trits (it must be below {3**_TRITS})")
        trits = (packed.to(torch.int16)[..., None] // powers) % 3
        return (trits.view(rows, -1)[:, :width] - 1).to(grid.code_dtype)
    bits = grid.num_bits
    shifts = torch.arange(8, dtype=torch.int16, device=packed.device)
    stream = ((packed.to(torch.int16)[..., None] >> shifts) & 1).view(rows, -1)[:, : width * bits]
    weights = 2 ** torch.arange(bits, dtype=torch.int16, device=packed.device)
    offset = (stream.reshape(rows, width, bits) * weights).sum(-1)
    if packed.numel() and int(offset.max()) >= grid.num_levels:
        raise ValueError(f"packed codes hold {int(offset.max())}; {grid} has {grid.num_levels} levels")
    return (offset + grid.qmin).to(grid.code_dtype)


def empty_packed(scheme: Scheme, shape: tuple[int, int], device: Any = None) -> dict[str, Tensor]:
    """Buffers of a packed weight ``(out_features, in_features)`` by name, of the right shapes and dtypes, zeros.

    Example:
        >>> {key: tuple(value.shape) for key, value in empty_packed(Scheme.parse("W2G64"), (8, 128)).items()}
        {'weight_packed': (8, 32), 'weight_scale': (8, 2)}
    """
    spec = scheme.scale
    rows, groups = spec.view(shape).scale_shape

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    found = {"weight_packed": empty(shape[0], packed_width(shape[1], scheme.grid), dtype=torch.uint8)}
    stored = STORED_DTYPE[spec.dtype]
    if spec.superblock is None:
        found["weight_scale"] = empty(rows, groups, dtype=stored)
    else:
        num_super = -(-shape[1] // spec.superblock)
        found["weight_super_scale"] = empty(rows, num_super, dtype=stored)
        found["weight_multipliers"] = empty(rows, groups, dtype=torch.uint8)
    if isinstance(scheme.grid, Codebook):
        found["weight_codebook"] = torch.tensor(scheme.grid.codebook, device=device)
    return found
