r"""Which way does the gradient point after rounding? The inward slope, with the two controls that give it meaning.

Reference: arXiv:2606.09012.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.geometry._result import Result
from fewbits.geometry.curvature import Operator
from fewbits.geometry.directions import Loss, check_like, combine, difference, dot, gradient, norm, placed


@dataclass(frozen=True, kw_only=True)
class InwardSlope(Result):
    r"""Pull toward the anchor at one point: ``slope`` in nats per unit of ``w``, ``cosine`` in ``[-1, 1]``."""

    slope: float
    cosine: float
    gradient_norm: float


@dataclass(frozen=True, kw_only=True)
class InwardReport(Result):
    r"""Inward slope at the rounded point with both controls.

    ``at_rounded`` is the measurement; ``at_latent`` the same direction at ``w``, where the theory expects none;
    ``quadratic_slope`` and ``quadratic_cosine`` what a pure quadratic with the Hessian at ``w`` would show at ``q``.
    """

    at_rounded: InwardSlope
    at_latent: InwardSlope
    quadratic_slope: float
    quadratic_cosine: float
    _derived: ClassVar[tuple[str, ...]] = ("wall_ratio",)

    @property
    def wall_ratio(self) -> float:
        """Measured slope over the quadratic one; far above 1 is evidence of a wall, about 1 is a plain bowl."""
        if self.quadratic_slope == 0:
            return math.inf if self.at_rounded.slope > 0 else 0.0
        return self.at_rounded.slope / self.quadratic_slope


def inward_slope(loss: Loss, params: Sequence[Tensor], at: Sequence[Tensor], outward: Sequence[Tensor]) -> InwardSlope:
    r"""Slope :math:`\langle \nabla L(p), n\rangle` and cosine of a descent step with :math:`-n`, at a point ``p``.

    Args:
        loss: loss closure of the *plain* model, nats; evaluated with the parameters placed at ``at``.
        params: parameter tensors; restored bit for bit.
        at: the point, e.g. the rounded weights ``q``.
        outward: direction away from the basin, e.g. ``q - w``; normalized here.

    Raises:
        ValueError: for an outward direction of norm 0.

    Example:
        >>> import torch
        >>> w = torch.zeros(2)
        >>> found = inward_slope(lambda: (w * w).sum(), [w], [torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])])
        >>> round(found.slope, 5), round(found.cosine, 5)
        (6.0, 0.6)

    Reference: arXiv:2606.09012 (compare the slope with ``c_perp``).
    """
    length = norm(outward)
    if not length > 0:
        raise ValueError("the outward direction is zero: the point is its own anchor, so nothing points inward")
    with placed(params, at):
        grad = gradient(loss, params)
    size = norm(grad)
    slope = dot(grad, outward) / length
    return InwardSlope(slope=slope, cosine=slope / size if size > 0 else 0.0, gradient_norm=size)


def inward_report(
    loss: Loss,
    params: Sequence[Tensor],
    rounded: Sequence[Tensor],
    hessian: Operator,
    *,
    anchor: Sequence[Tensor] | None = None,
) -> InwardReport:
    r"""Inward slope at the rounded weights with the two controls without which it proves nothing.

    A pure quadratic also pulls back: at :math:`q = w + e` its gradient is :math:`H e`, so
    :math:`s_{quad} = e^\top H e / \|e\|` and :math:`c_{quad} = e^\top H e / (\|e\| \|H e\|)`; for isotropic ``e`` the
    latter is about :math:`\mathrm{tr} H / \sqrt{n\, \mathrm{tr} H^2}` (:func:`isotropic_cosine`). Only
    :math:`s_{in} \gg s_{quad}` speaks for a wall.

    Args:
        loss: loss closure of the plain model, nats; the parameters hold ``w``.
        params: parameter tensors; restored bit for bit.
        rounded: the rounded weights ``q``.
        hessian: Hessian operator at ``w`` (one product).
        anchor: :math:`p` in :math:`n = (q - p) / \|q - p\|`; default ``w``; a river projection is sharper. The
            quadratic control is always about ``w``: :math:`\langle H e, n\rangle`.

    Raises:
        ValueError: if the rounded weights equal ``w``, or the anchor equals ``rounded``.

    Example:
        >>> import torch
        >>> from fewbits.geometry.curvature import hessian_operator
        >>> w = torch.zeros(1, dtype=torch.float64)
        >>> loss = lambda: (w * w).sum() + 50 * torch.relu(w.abs() - 0.5).square().sum()
        >>> found = inward_report(loss, [w], [torch.ones(1, dtype=torch.float64)], hessian_operator(loss, [w]))
        >>> found.at_rounded.slope, found.quadratic_slope, found.wall_ratio
        (52.0, 2.0, 26.0)

    Reference: arXiv:2606.09012.
    """
    check_like(params, rounded)
    error = difference(rounded, params)
    if norm(error) == 0:
        raise ValueError("the rounded weights equal the latent ones; there is no error to measure a slope along")
    outward = error if anchor is None else difference(rounded, anchor)
    at_rounded = inward_slope(loss, params, rounded, outward)
    at_latent = inward_slope(loss, params, combine((1.0, params)), outward)
    pull = hessian(error)
    pull_norm = norm(pull)
    quadratic = dot(pull, outward) / norm(outward)
    return InwardReport(
        at_rounded=at_rounded,
        at_latent=at_latent,
        quadratic_slope=quadratic,
        quadratic_cosine=quadratic / pull_norm if pull_norm > 0 else 0.0,
    )


def isotropic_cosine(trace: float, square_trace: float, dim: int) -> float:
    r"""Inward cosine of a pure quadratic for isotropic errors, :math:`\mathrm{tr} H / \sqrt{n\,\mathrm{tr} H^2}`.

    Exact for :math:`H = c I` (value 1); within about 16% for spectra with spikes or heavy tails.

    Example:
        >>> isotropic_cosine(8.0, 16.0, 4)
        1.0
    """
    if dim < 1 or not square_trace > 0:
        raise ValueError(f"dim={dim} must be at least 1 and square_trace={square_trace} positive")
    return trace / math.sqrt(dim * square_trace)
