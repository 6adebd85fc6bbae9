"""DSQ: differentiable soft quantization, one tanh per cell, aligned to any grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.surrogates._base import Edge, ElementwiseSurrogate, State, check_edge, inside
from fewbits.surrogates.sensitivity import cell_width

ALPHA_RANGE = (0.01, 0.99)
"""What a learned alpha is clamped to on use: beyond, its curve is a staircase or a line to three digits."""


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

    With ``learned`` every layer has an alpha of its own, which the optimizer trains beside the scales. The forward pass
    rounds hard, so alpha has no gradient there; as the paper takes the sign of the soft curve straight through, the
    gradient is that of the soft weight :math:`s\,(m + \tfrac{c}{2} \varphi_\alpha(t))`, with boundary m and cell c in
    steps and :math:`K' = -\frac{2}{\alpha (2 - \alpha)}`:

    .. math:: \frac{\partial L}{\partial \alpha} = \sum_j G_j\, s\, \frac{c_j}{2}
              \left(\frac{\tanh K t_j}{(1 - \alpha)^2} + \frac{t_j K'}{1 - \alpha}\,\mathrm{sech}^2 K t_j\right)
              \text{ over weights inside the mask.}

    It is 0 on levels and on boundaries. Alpha is taken for at least ``.01`` and at most ``.99``; there a gradient that
    would push it further is dropped.

    Args:
        alpha: in (0, 1), dimensionless: the distance of the curve from the staircase on a level, in half cells before
            it is normalised. With ``learned`` where it starts (the paper's is 0.2), in [.01, .99].
        edge: where the mask clips, see :class:`ClippedSTE`. DSQ itself clips at the outermost levels.
        learned: whether alpha is trained, one number per layer.

    Raises:
        ValueError: for alpha outside its range.

    Example:
        >>> from fewbits.grids import Int
        >>> DSQ(alpha=0.2).gain(torch.tensor([0.0, 0.5, 1.0]), Int(3))
        tensor([0.4944, 1.3733, 0.4944])

    Reference: arXiv:1908.05033.
    """

    name: ClassVar[str] = "dsq"
    alpha: float = 0.2
    edge: Edge = "level"
    learned: bool = False

    def __post_init__(self) -> None:
        check_edge(self.edge)
        if not isinstance(self.learned, bool):
            raise ValueError(f"learned={self.learned!r} must be true or false")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} is outside (0, 1); towards 1 the gain is clipped STE")
        if self.learned and not ALPHA_RANGE[0] <= self.alpha <= ALPHA_RANGE[1]:
            raise ValueError(f"alpha={self.alpha} is outside {list(ALPHA_RANGE)}, the range of a learned one")

    @property
    def trained(self) -> tuple[str, ...]:
        """``alpha``, if it is learned."""
        return ("alpha",) if self.learned else ()

    def init_state(self, shape: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """``alpha``, an fp32 scalar, if it is learned."""
        del shape
        return {"alpha": torch.tensor(self.alpha, device=device)} if self.learned else {}

    def gain(self, v: Tensor, grid: AnyGrid) -> Tensor:
        """Positive inside the mask, 0 outside; of a learned alpha: where it starts."""
        if self.learned:
            return self._learned_gain(v, grid, torch.tensor(self.alpha, device=v.device))
        t = boundary_distance(v, grid)
        k = sharpness(self.alpha)
        slope = k / (2 * (1 - self.alpha)) * (1 - torch.tanh(k * t).square())
        return slope * inside(v, grid, self.edge).to(v.dtype)

    def _learned_gain(self, v: Tensor, grid: AnyGrid, alpha: Tensor) -> Tensor:
        a, k = _in_use(alpha)
        slope = (k / (2 * (1 - a))).to(v.dtype) * (1 - torch.tanh(k.to(v.dtype) * boundary_distance(v, grid)).square())
        return slope * inside(v, grid, self.edge).to(v.dtype)

    def pullback(self, grad: Tensor, v: Tensor | None, grid: AnyGrid, state: State) -> Tensor:
        """``grad * gain(v)``, with the alpha of the state if it is learned."""
        assert v is not None
        return grad * (self._learned_gain(v, grid, state["alpha"].detach()) if self.learned else self.gain(v, grid))

    def state_gradient(self, grad: Tensor, v: Tensor, grid: AnyGrid, state: State) -> tuple[Tensor, ...]:
        """The gradient of alpha; see the class."""
        raw = state["alpha"].detach()
        with torch.no_grad():
            a, k = _in_use(raw)
            t = boundary_distance(v, grid)
            curve = torch.tanh(k.to(v.dtype) * t)
            first, second = (1 - a) ** -2, -2 / (a * (2 - a) * (1 - a))
            slope = first.to(v.dtype) * curve + second.to(v.dtype) * t * (1 - curve.square())
            slope *= 0.5 * cell_width(v, grid) * inside(v, grid, self.edge).to(v.dtype)
        total = (grad * slope).sum()
        with torch.no_grad():
            outward = ((raw <= ALPHA_RANGE[0]) & (total > 0)) | ((raw >= ALPHA_RANGE[1]) & (total < 0))
        return (total.masked_fill(outward, 0.0),)


def boundary_distance(v: Tensor, grid: AnyGrid) -> Tensor:
    """Distance to the nearest decision boundary, in cells; signed, within half a cell between the outermost levels."""
    u = grid.cell_coordinate(v)
    low, high = grid.cell_coordinate(torch.tensor(grid.level_edge, dtype=v.dtype)).tolist()
    return u - (u.floor().clamp(low, high - 1) + 0.5)


def _in_use(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha within its range and its sharpness, float64: near 1 they nearly cancel."""
    a = alpha.double().clamp(*ALPHA_RANGE)
    return a, torch.log1p(2 * (1 - a) / a)
