"""DSQ: differentiable soft quantization, one tanh per cell, aligned to any grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.surrogates._base import Edge, ElementwiseSurrogate, check_edge, inside


def soft_step(t: Tensor, alpha: float) -> Tensor:
    r"""Curve between two levels: :math:`\varphi(t) = \frac{\tanh(K t)}{1 - \alpha}`, :math:`K = \log(2/\alpha - 1)`.

    Args:
        t: distance to the decision boundary in cells, in [-1/2, 1/2].
        alpha: in (0, 1).

    Returns:
        -1 on the lower level, 0 on the boundary, 1 on the upper level; half a cell times it is the soft level.

    Example:
        >>> soft_step(torch.tensor([-0.5, -0.25, 0.0, 0.25]), 0.2)
        tensor([-1.0000, -0.6250,  0.0000,  0.6250])
    """
    return torch.tanh(sharpness(alpha) * t) / (1 - alpha)


def sharpness(alpha: float) -> float:
    r""":math:`K = \log(2/\alpha - 1)`, per cell; accurate for alpha near 1, where it vanishes."""
    return math.log1p(2 * (1 - alpha) / alpha)


@dataclass(frozen=True, kw_only=True)
class DSQ(ElementwiseSurrogate):
    r"""Gain :math:`g = \frac{K}{2(1 - \alpha)}\,\mathrm{sech}^2(K t)`, the slope of :func:`soft_step`, times the mask.

    ``t`` is the distance to the nearest decision boundary in cells. The gain is largest on the boundary, smallest on a
    level, and its mean over the interval between two levels is exactly 1 for every alpha. ``alpha -> 1`` is
    :class:`ClippedSTE`, ``alpha -> 0`` the true derivative: spikes on the boundaries. Beyond the outermost level there
    is no further boundary, so with ``edge="bin"`` or wider the gain keeps falling there.

    Args:
        alpha: in (0, 1), dimensionless: the distance of the curve from the staircase on a level, in half cells before
            it is normalised. The paper learns it from 0.2; here it is fixed.
        edge: where the mask clips, see :class:`ClippedSTE`. DSQ itself clips at the outermost levels.

    Raises:
        ValueError: for alpha outside (0, 1).

    Example:
        >>> from fewbits.grids import Int
        >>> DSQ(alpha=0.2).gain(torch.tensor([0.0, 0.5, 1.0]), Int(3))
        tensor([0.4944, 1.3733, 0.4944])

    Reference: arXiv:1908.05033.
    """

    name: ClassVar[str] = "dsq"
    alpha: float = 0.2
    edge: Edge = "level"

    def __post_init__(self) -> None:
        check_edge(self.edge)
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} is outside (0, 1); towards 1 the gain is clipped STE")

    def gain(self, v: Tensor, grid: AnyGrid) -> Tensor:
        """Positive inside the mask, 0 outside."""
        u = grid.cell_coordinate(v)
        low, high = grid.cell_coordinate(torch.tensor(grid.level_edge, dtype=v.dtype)).tolist()
        t = u - (u.floor().clamp(low, high - 1) + 0.5)
        k = sharpness(self.alpha)
        slope = k / (2 * (1 - self.alpha)) * (1 - torch.tanh(k * t).square())
        return slope * inside(v, grid, self.edge).to(v.dtype)
