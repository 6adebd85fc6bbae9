"""EWGS: element-wise gradient scaling by the rounding error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.surrogates._base import Edge, State, Surrogate, check_edge, inside


@dataclass(frozen=True, kw_only=True)
class HessianSchedule:
    """When and how finely delta is measured anew from the curvature of the loss; see :func:`curvature_delta`.

    One measurement costs about ``num_batches * (1 + num_probes)`` training steps.

    Args:
        interval: optimizer steps between measurements, >= 1; before the first one delta is the surrogate's own.
        num_probes: random directions of the trace on each batch, >= 1 (the paper: up to 50, until the mean settles).
        num_batches: fixed batches of the training data, spread evenly over it, >= 1; fewer where there are fewer.
        seed: of the directions.

    Raises:
        ValueError: for counts below 1.

    Example:
        >>> HessianSchedule(interval=50).is_due(100)
        True
    """

    interval: int = 100
    num_probes: int = 4
    num_batches: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("interval", "num_probes", "num_batches"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"hessian: {key}={value!r} must be a whole number of at least 1")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"hessian: seed={self.seed!r} must be a whole number of at least 0")

    def is_due(self, step: int) -> bool:
        """Whether delta is measured after this many optimizer steps."""
        return step > 0 and step % self.interval == 0


@dataclass(frozen=True, kw_only=True)
class EWGS(Surrogate):
    r"""Gradient :math:`g\,\big(1 + \delta\,\mathrm{sign}(g)\,(u - q)\big)`, times the clip mask.

    ``u - q`` is the rounding error in cells, within [-1/2, 1/2] (0 beyond the outermost levels, where the paper has
    clipped the weight already). A step of gradient descent moves the weight against g: the gradient grows where the
    weight still has to cross its level and shrinks where it has passed it. ``delta = 0`` equals :class:`ClippedSTE` bit
    for bit (with ``edge="none"``: :class:`STE`); ``delta < 2`` keeps the sign of every entry.

    Delta lives in the state, layer by layer. With ``hessian`` it follows the curvature of the loss during training, as
    in the paper (:func:`curvature_delta`, measured by :class:`fewbits.training.CurvatureRefresh`); the field ``delta``
    is where it starts. A measured delta has no upper bound: above 2 it turns single entries round, as the second-order
    model behind it does.

    Args:
        delta: >= 0, per cell. The paper measures the error with the whole range as unit: ``delta_paper`` on a grid of N
            levels is ``delta = delta_paper / (N - 1)`` here.
        edge: where the mask clips, see :class:`ClippedSTE`.
        hessian: a :class:`HessianSchedule` or its fields as a mapping; None keeps delta as it is.

    Raises:
        ValueError: for a delta that is negative or not finite, or a bad schedule.

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
    hessian: HessianSchedule | None = None

    def __post_init__(self) -> None:
        check_edge(self.edge)
        _check_delta(self.delta)
        given: Any = self.hessian
        if given is not None and not isinstance(given, HessianSchedule):
            known = [field.name for field in fields(HessianSchedule)]
            if not isinstance(given, Mapping) or set(given) - set(known):
                raise ValueError(f"hessian={given!r} must be null or a mapping of {', '.join(known)}")
            object.__setattr__(self, "hessian", HessianSchedule(**given))

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

    A second-order model of the loss at the quantized weight: the mean curvature over a large gradient. H and g are
    those of the loss with respect to the *quantized* weight. For a delta per cell, take both with respect to the weight
    in cells: trace weighted with the squared pitch, gradient times the pitch.

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
