"""StableQAT: the rotated-Fourier surrogate, aligned to any grid."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.surrogates._base import Edge, ElementwiseSurrogate, check_edge, inside


def harmonic_sum(delta: Tensor, amplitude: float, num_harmonics: int) -> Tensor:
    r"""The Fourier derivative :math:`S(\delta) = \sum_m \frac{(-1)^m}{2m+1}\sqrt2\pi A \cos((2m+1)\pi\delta)`.

    ``delta`` is the distance to the nearest level in cells, in [-1/2, 1/2]; S = 0 on every decision boundary.
    """
    total = torch.zeros_like(delta)
    for m in range(num_harmonics):
        k = 2 * m + 1
        total += (-1) ** m / k * math.sqrt(2) * math.pi * amplitude * torch.cos(k * math.pi * delta)
    return total


@functools.lru_cache(maxsize=32)
def _shape_constants(num_harmonics: int) -> float:
    """Largest abs(S) at amplitude 1, by a fine midpoint grid (exact at the level for one harmonic)."""
    delta = torch.linspace(-0.5, 0.5, 200_001, dtype=torch.float64)
    return float(harmonic_sum(delta, 1.0, num_harmonics).abs().max())


@functools.lru_cache(maxsize=64)
def mean_gain(amplitude: float, num_harmonics: int) -> float:
    r"""Mean of the gain over one cell; one harmonic: :math:`\frac{8}{\pi\sqrt{1-c^2}}\arctan\sqrt{\frac{1-c}{1+c}}-1`.

    Example:
        >>> round(mean_gain(0.21, 1), 5)
        0.30246
    """
    if num_harmonics == 1:
        c = math.sqrt(2) * math.pi * amplitude
        return 8 / (math.pi * math.sqrt(1 - c * c)) * math.atan(math.sqrt((1 - c) / (1 + c))) - 1
    n = 200_000
    delta = (torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5
    s = harmonic_sum(delta, amplitude, num_harmonics)
    return float(((1 - s) / (1 + s)).mean())


@dataclass(frozen=True, kw_only=True)
class StableQAT(ElementwiseSurrogate):
    r"""Gain :math:`g = (1 - S)/(1 + S)` with the Fourier derivative S of :func:`harmonic_sum`, times the clip mask.

    The gain is 1 on a decision boundary and smallest on a level. It is aligned to the real levels of *every* grid: the
    cell coordinate of the half-shifted grid is ``v - 1/2``, of the binary one ``(v - 1)/2`` (the published code uses
    ``round(v)`` there, which puts the minimum on the flip point).

    Args:
        amplitude: A >= 0, dimensionless; ``A = 0`` equals :class:`ClippedSTE` bit for bit. The bound is
            ``1/(sqrt(2) pi) = .225079`` for one harmonic and slightly larger for more.
        num_harmonics: number of Fourier terms, M + 1 of the paper, 1 to 16.
        normalize: divide by the mean gain over a cell (.30246 at A = .21), so that the mean is 1.
        edge: where the mask clips, see :class:`ClippedSTE`.

    Raises:
        ValueError: for an amplitude that would make the gain zero or negative somewhere.

    Example:
        >>> from fewbits.grids import Int
        >>> StableQAT().gain(torch.tensor([0.0, 0.25, 0.5]), Int(3))
        tensor([0.0347, 0.2050, 1.0000])

    Reference: arXiv:2601.19320.
    """

    name: ClassVar[str] = "stableqat"
    amplitude: float = 0.21
    num_harmonics: int = 1
    normalize: bool = False
    edge: Edge = "level"

    def __post_init__(self) -> None:
        check_edge(self.edge)
        if not 1 <= self.num_harmonics <= 16:
            raise ValueError(f"num_harmonics={self.num_harmonics} is outside 1..16")
        limit = math.floor(1e6 / _shape_constants(self.num_harmonics)) / 1e6  # what the message says is what holds
        if not 0 <= self.amplitude < limit:
            raise ValueError(
                f"amplitude={self.amplitude} makes the gain zero or negative on a level, or its denominator vanish; "
                f"use 0 <= amplitude < {limit:.6f} for num_harmonics={self.num_harmonics}"
            )

    def gain(self, v: Tensor, grid: AnyGrid) -> Tensor:
        """Gain in (0, 1] inside the mask (over the mean if ``normalize``), 0 outside."""
        mask = inside(v, grid, self.edge).to(v.dtype)
        if self.amplitude == 0:
            return mask
        u = grid.cell_coordinate(v)
        s = harmonic_sum(u - u.round(), self.amplitude, self.num_harmonics)
        gain = (1 - s) / (1 + s) * mask
        return gain / mean_gain(self.amplitude, self.num_harmonics) if self.normalize else gain
