"""Unsigned codes in 32-bit words, as compressed-tensors, GPTQ and MLX store them alike.

Code i of a row occupies bits ``i * num_bits`` and following of the row, least significant bit first, across the borders
of words: the bytes of :func:`fewbits.packing.pack_codes` on a little-endian machine, padded to whole words.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from fewbits.grids import Int
from fewbits.packing import pack_codes, packed_width, unpack_codes


def num_words(width: int, num_bits: int) -> int:
    """Words of one row.

    Example:
        >>> num_words(96, 3), num_words(33, 4)
        (9, 5)
    """
    return -(-width * num_bits // 32)


def pack_words(codes: Tensor, num_bits: int) -> Tensor:
    """Unsigned codes ``(rows, width)`` as int32 ``(rows, num_words)``.

    Raises:
        ValueError: for a code outside ``0..2**num_bits - 1``.

    Example:
        >>> pack_words(torch.tensor([[1, 2, 3]]), 4).tolist()
        [[801]]
    """
    grid = Int(num_bits)
    packed = pack_codes(codes.to(torch.int16) + grid.qmin, grid)
    return _native(nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32))


def unpack_words(words: Tensor, width: int, num_bits: int) -> Tensor:
    """Inverse of :func:`pack_words`, int16 ``(rows, width)``.

    Raises:
        ValueError: for words of another dtype or number.
    """
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != num_words(width, num_bits):
        needed = f"int32 (rows, {num_words(width, num_bits)})"
        raise ValueError(f"packed words are {words.dtype} {tuple(words.shape)}; {needed} is needed")
    grid = Int(num_bits)
    packed = _native(words.contiguous()).view(torch.uint8)[:, : packed_width(width, grid)]
    return unpack_codes(packed, width, grid).to(torch.int16) - grid.qmin


def _native(words: Tensor) -> Tensor:
    """Swap the bytes of every word on a big-endian machine."""
    if sys.byteorder == "little":
        return words
    return words.view(torch.uint8).view(*words.shape, 4).flip(-1).contiguous().view(torch.int32).squeeze(-1)
