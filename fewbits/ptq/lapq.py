r"""LAPQ: choose the scales of all layers together by the loss of the task.

Scales that minimise :math:`\sum |w - s\,q(w/s)|^p` clip the less the larger p is. One p for all layers gives a curve of
losses whose lowest point is found by a parabola; from there Powell's method moves one multiplier per layer.

Reference: Nahshan et al., arXiv:1911.07190. Their layers have one scale each; a multiplier per layer on top of scales
per group or channel is reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from fewbits.ptq._base import PTQResult, check_weight, output_error, resolve_hessian
from fewbits.qtensor import quantize
from fewbits.scales import ScaleSpec, find_scale
from fewbits.scheme import Scheme

SEARCH_POINTS = 40
"""Scales tried in each round of the line search of :func:`lp_scale`."""


def lp_scale(x: Tensor, scheme: Scheme, p: float) -> Tensor:
    r"""The scale of every group that minimises :math:`\sum |x - s\,q(x / s)|^p`, by two rounds of a line search.

    Args:
        x: ``(out_features, in_features)`` in the basis in which it is rounded.
        scheme: grid and granularity; its rule is not used.
        p: exponent, >= 1; 2 is the least squared error.

    Returns:
        Raw scales, fp32 ``(R, G)``.

    Raises:
        ValueError: for p below 1.
    """
    if not p >= 1:
        raise ValueError(f"p={p} must be at least 1")
    spec, grid = scheme.scale, scheme.grid
    view = spec.view(x.shape)
    parts = view.split(x.float())
    mask = (torch.arange(parts.shape[-1], device=x.device) < view.counts().to(x.device)[:, None]).float()
    plain = ScaleSpec(granularity=spec.granularity, group_size=spec.group_size, rule="gaussian")
    start = find_scale(x, grid, plain).clamp_min(1e-30)
    low, high = grid.level_edge
    largest = (parts.abs().amax(-1) / max(high, -low) / start).clamp_min(4.0)

    def error(s: Tensor) -> Tensor:
        # in starting units, so that high powers of small weights do not vanish
        v = parts / s[..., None]
        delta = (v - grid.project_(v.clone())) * (s / start)[..., None] * mask
        return (delta.abs() + 1e-20).pow(p).sum(-1)

    def search(center: Tensor, span: Tensor) -> Tensor:
        best, least = center, error(center)
        for mark in torch.linspace(-1, 1, SEARCH_POINTS).tolist():
            candidate = center * span**mark
            value = error(candidate)
            best = torch.where(value < least, candidate, best)
            least = torch.minimum(value, least)
        return best

    rough = search(start, largest)
    return search(rough, largest ** (2 / (SEARCH_POINTS - 1)))


def gaussian_lp_step(scheme: Scheme, p: float, *, size: int = 200_001) -> float:
    """The optimum of :func:`lp_scale` for N(0, 1), from its quantiles.

    Example:
        >>> from fewbits.scales import gaussian_step
        >>> scheme = Scheme.parse("W3H")
        >>> abs(gaussian_lp_step(scheme, 2.0) / gaussian_step(scheme.grid) - 1) < 3e-3
        True
    """
    middle = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    x = torch.special.ndtri(middle).float()[None]
    per_row = scheme.with_scale(granularity="per_channel", group_size=None, superblock=None)
    return float(lp_scale(x, per_row, p))


def quadratic_vertex(x: Sequence[float], y: Sequence[float]) -> float:
    """Where the parabola that fits the points best (least squares) is lowest, kept between the outermost points; the
    lowest point itself if the parabola opens downwards.

    Raises:
        ValueError: for fewer than three points, or losses that are not finite.

    Example:
        >>> round(quadratic_vertex([2.0, 3.0, 4.0, 5.0], [(p - 2.6) ** 2 for p in (2.0, 3.0, 4.0, 5.0)]), 9)
        2.6
    """
    if len(x) < 3 or len(x) != len(y):
        raise ValueError(f"a parabola needs three points or more, got {len(x)} and {len(y)} values")
    if not np.isfinite(y).all():
        raise ValueError(f"the losses {list(y)} are not all finite")
    center = float(np.mean(x))
    a, b, _ = np.polyfit(np.asarray(x) - center, y, 2)
    if a <= 0:
        return float(x[int(np.argmin(y))])
    return float(np.clip(center - b / (2 * a), min(x), max(x)))


def powell(
    loss: Callable[[np.ndarray], float],
    start: Sequence[float],
    *,
    iterations: int = 1,
    low: float,
    high: float,
    tolerance: float = 1e-2,
) -> OptimizeResult:
    """Powell's method within bounds (SciPy's), which on a separable quadratic ends at its minimum after one iteration.

    Args:
        loss: of a point.
        start: ``(n,)``, within the bounds.
        iterations: sweeps over all directions.
        low: bound of every coordinate.
        high: bound of every coordinate.
        tolerance: of a coordinate in one line search.

    Returns:
        SciPy's result with ``x`` and ``fun``.
    """
    options = {"maxiter": iterations, "xtol": tolerance, "ftol": 1e-9}
    return minimize(loss, np.asarray(start), method="Powell", bounds=[(low, high)] * len(start), options=options)


@dataclass(frozen=True)
class LapqTrace:
    """What the search saw.

    Attributes:
        p: the exponents of the curve.
        losses: the loss at each.
        best_p: where the search for multipliers started.
        start_loss: the loss there.
        end_loss: the loss at the end; never above ``start_loss`` and ``losses``.
        evaluations: of the loss in all.
    """

    p: tuple[float, ...]
    losses: tuple[float, ...]
    best_p: float
    start_loss: float
    end_loss: float
    evaluations: int


def search_scales(
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    loss: Callable[[Sequence[Tensor]], float],
    *,
    num_p: int = 10,
    iterations: int = 1,
    max_multiplier: float = 1.5,
) -> tuple[list[Tensor], LapqTrace]:
    """Scales of several weights for a loss that sees them all.

    Args:
        weights: matrices in the basis in which they are rounded.
        schemes: one for each.
        loss: of raw scales ``(R, G)``, one for each weight.
        num_p: exponents tried between 2 and 4, >= 3.
        iterations: sweeps of Powell's method; 0 stops at the best exponent.
        max_multiplier: multipliers stay between its inverse and itself.

    Returns:
        The raw scales with the least loss seen, and a :class:`LapqTrace`.

    Raises:
        ValueError: for a number out of range, or losses that are not finite.
    """
    if num_p < 3 or iterations < 0 or not max_multiplier > 1:
        raise ValueError(
            f"num_p={num_p} must be at least 3, iterations={iterations} at least 0 and "
            f"max_multiplier={max_multiplier} above 1"
        )
    count = 0

    def scales_of(p: float) -> list[Tensor]:
        return [lp_scale(w, scheme, p) for w, scheme in zip(weights, schemes, strict=True)]

    def ask(scales: Sequence[Tensor]) -> float:
        nonlocal count
        count += 1
        return loss(scales)

    exponents = [float(p) for p in np.linspace(2.0, 4.0, num_p)]
    losses = [ask(scales_of(p)) for p in exponents]
    vertex = quadratic_vertex(exponents, losses)
    at_vertex = ask(scales_of(vertex))
    if at_vertex <= min(losses):
        best_p, start_loss = vertex, at_vertex
    else:
        best_p, start_loss = exponents[int(np.argmin(losses))], min(losses)
    base = scales_of(best_p)
    best, least = base, start_loss

    def of_multipliers(log_multipliers: np.ndarray) -> float:
        nonlocal best, least
        scales = [s * float(np.exp(m)) for s, m in zip(base, log_multipliers, strict=True)]
        value = ask(scales)
        if value < least:
            best, least = scales, value
        return value

    if iterations > 0:
        bound = float(np.log(max_multiplier))
        powell(of_multipliers, [0.0] * len(base), iterations=iterations, low=-bound, high=bound)
    trace = LapqTrace(
        p=tuple(exponents),
        losses=tuple(losses),
        best_p=best_p,
        start_loss=start_loss,
        end_loss=least,
        evaluations=count,
    )
    return best, trace


def lapq(
    w: Tensor,
    scheme: Scheme,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    num_p: int = 10,
    iterations: int = 1,
    max_multiplier: float = 1.5,
) -> PTQResult:
    r"""The search for a model of one linear layer, whose loss is its output error.

    On a model the loss is that of the task, with all layers at once: ``apply_ptq(.., "lapq")``.

    Args:
        w: ``(out_features, in_features)``.
        scheme: grid, scale and rotation; the scale's rule is not used.
        hessian: ``(in_features, in_features)`` of the layer's inputs.
        inputs: ``(.., in_features)`` instead of the Hessian.
        num_p: exponents tried between 2 and 4, >= 3.
        iterations: sweeps of Powell's method over the multiplier; 0 for none.
        max_multiplier: the multiplier stays between its inverse and itself.

    Returns:
        :class:`PTQResult` whose latent weight is w.

    Raises:
        ValueError: for a bad option, or a missing or bad Hessian.

    Example:
        >>> w, x = torch.randn(8, 64), torch.randn(100, 64)
        >>> lapq(w, Scheme.parse("W2G32"), inputs=x).qtensor.scale.shape
        torch.Size([8, 2])
    """
    w = check_weight(w, scheme)
    h = resolve_hessian(w, hessian, inputs)

    def loss(scales: Sequence[Tensor]) -> float:
        return output_error(w, quantize(w, scheme, scales[0]).dequantize(), h)

    (scale,), _ = search_scales(
        [scheme.rotation.apply(w.float())],
        [scheme],
        loss,
        num_p=num_p,
        iterations=iterations,
        max_multiplier=max_multiplier,
    )
    return PTQResult(qtensor=quantize(w, scheme, scale), scale=scale, latent=w.clone())
