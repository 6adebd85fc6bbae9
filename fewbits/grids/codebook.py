"""Codebooks: any few levels, and the Lloyd-Max quantizer of a Gaussian."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.grids._base import MAX_BITS, LevelSet


@dataclass(frozen=True)
class Codebook(LevelSet):
    """Any 2 to 256 distinct levels (k-means, Lloyd-Max); codes count from 0; ties go to the even code.

    Args:
        codebook: ascending distinct levels in steps, each exactly representable in fp32 (they are stored so).

    Raises:
        ValueError: for too few, too many, unsorted, repeated, non-finite or not fp32-exact levels.

    Example:
        >>> Codebook((-3.0, -1.0, 1.0, 7.0)).encode(torch.tensor([-9.0, 0.0, 3.9, 4.1]))
        tensor([0, 2, 2, 3], dtype=torch.uint8)
    """

    codebook: tuple[float, ...]
    kind: ClassVar[str] = "codebook"
    scale_gradient: ClassVar[str] = "lsq"

    def __post_init__(self) -> None:
        table = tuple(float(x) for x in self.codebook)
        object.__setattr__(self, "codebook", table)
        if not 2 <= len(table) <= 2**MAX_BITS:
            raise ValueError(f"codebook has {len(table)} levels; use 2 to {2**MAX_BITS}")
        if not all(math.isfinite(x) for x in table):
            raise ValueError(f"codebook {table} has a level that is not finite")
        if any(a >= b for a, b in pairwise(table)):
            raise ValueError(f"codebook {table} must be strictly ascending; sort it and drop repeated levels")
        if torch.tensor(table, dtype=torch.float32).tolist() != list(table):
            raise ValueError("codebook levels must be exact in fp32; pass torch.tensor(levels).float().tolist()")

    @classmethod
    def lloyd_max(cls, num_levels: int) -> Codebook:
        """The Lloyd-Max quantizer of N(0, 1): for K=4, levels -1.51, -0.4528, 0.4528, 1.51 (distortion .11748).

        Example:
            >>> [round(x, 4) for x in Codebook.lloyd_max(4).levels]
            [-1.5104, -0.4528, 0.4528, 1.5104]
        """
        return cls(_lloyd_max_levels(num_levels))

    @property
    def num_bits(self) -> int:
        """Bits that hold every code."""
        return max(1, (len(self.codebook) - 1).bit_length())

    @property
    def storage_bits(self) -> float:
        """The code's bits."""
        return float(self.num_bits)

    @property
    def levels(self) -> tuple[float, ...]:
        """The table."""
        return self.codebook

    @property
    def qmin(self) -> int:
        """0."""
        return 0

    @property
    def step(self) -> float:
        """Mean distance of neighbouring levels."""
        return (self.codebook[-1] - self.codebook[0]) / (len(self.codebook) - 1)

    @property
    def bin_edge(self) -> tuple[float, float]:
        """Half the outermost gap beyond the outermost levels."""
        t = self.codebook
        return t[0] - (t[1] - t[0]) / 2, t[-1] + (t[-1] - t[-2]) / 2

    @property
    def scale_edge(self) -> tuple[float, float]:
        """Inside between the outermost levels."""
        return self.level_edge

    @property
    def code_dtype(self) -> torch.dtype:
        """Unsigned, since codes run to 255."""
        return torch.uint8

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        table = torch.tensor(self.codebook, dtype=dtype, device=like.device)
        return table, (table[1:] + table[:-1]) / 2

    def _index(self, v: Tensor) -> tuple[Tensor, Tensor]:
        table, middle = self._tables(v)
        index = torch.bucketize(v.to(table.dtype).contiguous(), middle)
        tie = (index < len(middle)) & (v == middle[index.clamp(max=len(middle) - 1)])
        return index + (tie & (index % 2 == 1)).to(index.dtype), table

    def project_(self, v: Tensor) -> Tensor:
        """Look up the nearest level in place."""
        index, table = self._index(v)
        return v.copy_(torch.where(v.isnan(), v, table[index].to(v.dtype)))  # a diverged run is seen, not hidden

    def encode(self, v: Tensor) -> Tensor:
        """Index of the nearest level."""
        return self._index(v)[0].to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Table look-up."""
        return torch.tensor(self.codebook, dtype=torch.float32, device=codes.device)[codes.long()]

    def cell_coordinate(self, v: Tensor) -> Tensor:
        """Piecewise linear: integers on levels, half-integers on midpoints, unit slope in outermost gaps outside."""
        table, _ = self._tables(v)
        lower = (torch.bucketize(v.to(table.dtype).contiguous(), table, right=True) - 1).clamp(0, len(table) - 2)
        return lower + (v - table[lower]) / (table[lower + 1] - table[lower])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": self.kind, "codebook": list(self.codebook)}


@functools.lru_cache(maxsize=16)
def _lloyd_max_levels(num_levels: int) -> tuple[float, ...]:
    """Fixed point of Lloyd's iteration on N(0, 1), by closed-form cell means."""
    if not 2 <= num_levels <= 2**MAX_BITS:
        raise ValueError(f"lloyd_max with {num_levels} levels; use 2 to {2**MAX_BITS}")

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2))) if math.isfinite(x) else (1.0 if x > 0 else 0.0)

    levels = [4 * (i + 0.5) / num_levels - 2 for i in range(num_levels)]
    for _ in range(20_000):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        new = [(density(a) - density(b)) / max(below(b) - below(a), 1e-300) for a, b in pairwise(edges)]
        moved = max(abs(a - b) for a, b in zip(new, levels, strict=True))
        levels = new
        if moved < 1e-10:
            break
    # symmetrise before rounding to fp32: N(0, 1) is even
    levels = [(levels[i] - levels[-1 - i]) / 2 for i in range(num_levels)]
    return tuple(torch.tensor(levels, dtype=torch.float32).tolist())
