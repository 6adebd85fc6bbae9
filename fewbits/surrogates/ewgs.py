"""EWGS: element-wise gradient scaling by the rounding error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.surrogates._base import Edge, State, Surrogate, check_edge, inside


@dataclass(frozen=True, kw_only=True)
class EWGS(Surrogate):
    r"""Gradient :math:`g\,\big(1 + \delta\,\mathrm{sign}(g)\,(u - q)\big)`, times the clip mask.

    ``u - q`` is the rounding error in cells, within [-1/2, 1/2] (0 beyond the outermost levels, where the paper has
    clipped the weight already). A step of gradient descent moves the weight against g: the gradient grows where the
    weight still has to cross its level and shrinks where it has passed it. ``delta = 0`` equals :class:`ClippedSTE` bit
    for bit (with ``edge="none"``: :class:`STE`); ``delta < 2`` keeps the sign of every entry.

    Delta lives in the state, so that :meth:`set_delta_` can follow the curvature during training
    (:func:`curvature_delta`); the field is where it starts.

    Args:
        delta: >= 0, per cell. The paper measures the error with the whole range as unit: ``delta_paper`` on a grid of N
            levels is ``delta = delta_paper / (N - 1)`` here.
        edge: where the mask clips, see :class:`ClippedSTE`.

    Raises:
        ValueError: for a delta that is negative or not finite.

    Example:
        >>> from fewbits.grids import Int
        >>> s = EWGS(delta=0.5)
        >>> s.pullback(torch.ones(3), torch.tensor([0.0, 0.4, 0.6]), Int(3), s.init_state((3,)))
        tensor([1.0000, 1.2000, 0.8000])

    Reference: arXiv:2104.00903.
    """

    name: ClassVar[str] = "ewgs"
    delta: float = 1e-3
    edge: Edge = "level"

    def __post_init__(self) -> None:
        check_edge(self.edge)
        _check_delta(self.delta)

    def init_state(self, shape: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """``delta``, an fp32 scalar."""
        del shape
        return {"delta": torch.tensor(float(self.delta), device=device)}

    def pullback(self, grad: Tensor, v: Tensor | None, grid: AnyGrid, state: State) -> Tensor:
        """The scaled gradient; not linear in ``grad``, but positively homogeneous."""
        assert v is not None
        clipped = v.clamp(*grid.level_edge)
        error = (clipped - grid.project_(clipped.clone())) / grid.step
        factor = 1 + state["delta"].to(grad.dtype) * grad.sign() * error
        return grad * factor * inside(v, grid, self.edge).to(grad.dtype)

    def set_delta_(self, state: Mapping[str, Tensor], delta: float) -> None:
        """Put another delta into the state, in place.

        Raises:
            ValueError: as the constructor does.
        """
        _check_delta(delta)
        state["delta"].fill_(delta)


def curvature_delta(trace: float, num_weights: int, gradient_std: float) -> float:
    r"""The paper's delta, :math:`\max\big(0, \frac{\mathrm{tr} H / N}{3\,\mathrm{std}(g)}\big)`.

    A second-order model of the loss at the quantized weight: the mean curvature over a large gradient. Estimate the
    trace of one layer with :func:`fewbits.geometry.hutchinson` now and then. For a delta per cell, take H and g with
    respect to the weight in cells: trace times the squared pitch, gradient times the pitch.

    Args:
        trace: of the Hessian block of the layer.
        num_weights: N >= 1.
        gradient_std: standard deviation of the gradient's entries, > 0.

    Raises:
        ValueError: for no weights or a gradient without spread.

    Example:
        >>> curvature_delta(6.0, 4, 0.5)
        1.0
    """
    if num_weights < 1 or not gradient_std > 0:
        raise ValueError(
            f"num_weights={num_weights} must be at least 1 and gradient_std={gradient_std} positive; "
            "a layer without gradient has no delta"
        )
    return max(0.0, trace / num_weights / (3 * gradient_std))


def _check_delta(delta: float) -> None:
    if not (math.isfinite(delta) and delta >= 0):
        raise ValueError(f"delta={delta} must be finite and at least 0; 0 is the straight-through estimator")
