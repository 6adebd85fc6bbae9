r"""Does rounding leave the low-loss basin? Predictions from widths, curvature and grid pitch.

The basin is a tube :math:`\|w - P(w)\|_H \le R` around the *river*. A grid of pitch :math:`\Delta` moves every weight
by an error uniform in :math:`[-\Delta/2, \Delta/2]`, so the energy :math:`\|e\|_H^2 = e^\top H e` of the error has
mean :math:`\Delta^2 \mathrm{tr} H / 12`; rounding fails where that passes :math:`R^2`. ``H`` is any metric on the
normal directions and ``R`` the radius in it: with the loss Hessian, :math:`R = \sqrt{2\,\mathrm{tol}}`; with the
identity, ``R`` is a Euclidean width and :math:`\mathrm{tr} H` the number of normal directions.
Reference: arXiv:2606.09012.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.geometry._result import Result
from fewbits.geometry.curvature import TraceEstimate


def normal_cdf(x: float) -> float:
    r"""Standard normal distribution function :math:`\Phi(x)`, in ``[0, 1]``; accurate in both tails."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def quadratic_width(tol: float, curvature: float, *, slope: float = 0.0) -> float:
    r"""Width that a pure quadratic would have: the first :math:`t > 0` with :math:`s t + c t^2 / 2 = \mathrm{tol}`.

    Without slope it is :math:`\sqrt{2\,\mathrm{tol} / c}`, :math:`c = d^\top H d` for a unit ``d``. A measured width
    far above it means a flat floor and then a wall; a ratio near 1 means a plain bowl.

    Args:
        tol: allowed rise, nats, positive.
        curvature: :math:`c`, nats per squared unit of ``w``.
        slope: :math:`s = \langle \nabla L, d\rangle`, nats per unit; 0 for a width measured with the slope subtracted.

    Returns:
        The width in units of ``w``; ``inf`` where the quadratic never rises by ``tol``.

    Raises:
        ValueError: for a ``tol`` that is not positive.

    Example:
        >>> quadratic_width(0.5, 4.0)
        0.5
        >>> quadratic_width(0.02, -1.0)
        inf

    Reference: arXiv:2606.09012.
    """
    if not tol > 0:
        raise ValueError(f"tol={tol} nats must be positive")
    discriminant = slope * slope + 2 * curvature * tol
    if discriminant < 0 or (curvature <= 0 and slope <= 0):
        return math.inf
    # Of the two forms of the root the one that adds numbers of equal sign: the other cancels for small curvature.
    root = math.sqrt(discriminant)
    return 2 * tol / (slope + root) if slope >= 0 else (root - slope) / curvature


def kappa(error_norm: float, width: float) -> float:
    r"""How many basin widths the rounding error spans, :math:`\kappa = \|e\| / R_{e/\|e\|}`; dimensionless, ``>= 0``.

    Along the error itself :math:`\kappa > 1` merely restates that PTQ raised the loss by more than ``tol`` (for a
    monotone profile). The predictor that does not look at the answer is :func:`kappa_rand`.

    Raises:
        ValueError: for a negative norm or a width that is not positive.

    Example:
        >>> kappa(3.0, 2.0), kappa(3.0, float("inf"))
        (1.5, 0.0)

    Reference: arXiv:2606.09012.
    """
    if not error_norm >= 0 or not width > 0:
        raise ValueError(f"error_norm={error_norm} must not be negative and width={width} must be positive")
    return error_norm / width


def kappa_rand(error_norm: float, widths: Sequence[float]) -> float:
    r"""Error in units of the median width along random directions, :math:`\|e\| / \mathrm{median}_d R_d`.

    Args:
        error_norm: :math:`\|e\|`, units of ``w``.
        widths: widths along about 10 directions from :func:`~fewbits.geometry.directions.random_like`, same units.

    Returns:
        Dimensionless; rounding is expected to leave the basin above about 1.

    Raises:
        ValueError: without widths.

    Example:
        >>> kappa_rand(3.0, [1.0, 2.0, 6.0])
        1.5

    Reference: arXiv:2606.09012.
    """
    if not widths:
        raise ValueError("widths is empty; measure at least one random direction")
    return kappa(error_norm, statistics.median(widths))


def critical_pitch(radius: float, trace: float) -> float:
    r"""Grid pitch at which the mean rounding energy fills the basin, :math:`\Delta^* = R \sqrt{12 / \mathrm{tr} H_N}`.

    Args:
        radius: :math:`R`, in the norm of ``H``: ``sqrt(2 * tol)`` for a loss Hessian.
        trace: :math:`\mathrm{tr} H_N` over the normal directions.

    Returns:
        Pitch in units of ``w``; ``inf`` for a trace that is not positive (no wall is seen).

    Raises:
        ValueError: for a radius that is not positive.

    Example:
        >>> round(critical_pitch(1.0, 12.0), 6)
        1.0

    Reference: arXiv:2606.09012.
    """
    if not radius > 0:
        raise ValueError(f"radius={radius} must be positive")
    return radius * math.sqrt(12 / trace) if trace > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class ErrorEnergy(Result):
    r"""Mean and variance of the rounding energy :math:`\|e\|_H^2`."""

    mean: float
    variance: float

    def failure_probability(self, radius: float, *, law: str = "normal") -> float:
        r"""Chance :math:`P(\|e\|_H^2 > R^2)` that rounding leaves the basin, in ``[0, 1]``.

        ``normal`` is :math:`1 - \Phi((R^2 - \text{mean}) / \text{sd})`, within .02 of the truth for fifty or more
        independent coordinates of equal weight. ``gamma`` has the same mean and variance but is skewed, like a sum of
        few squares: better for a dense Hessian of low effective rank (``mean**2 / variance`` below about 10). For a
        single normal direction use :func:`hit_probability`.

        Raises:
            ValueError: for a radius that is not positive, an unknown law, or ``gamma`` with a mean not above 0.
        """
        if not radius > 0:
            raise ValueError(f"radius={radius} must be positive")
        gap = radius * radius - self.mean
        if self.variance <= 0:
            return float(gap < 0)
        if law == "normal":
            return normal_cdf(-gap / math.sqrt(self.variance))
        if law != "gamma":
            raise ValueError(f"law {law!r} is unknown; use 'normal' or 'gamma'")
        if not self.mean > 0:
            raise ValueError(f"the gamma law needs a positive mean energy, not {self.mean}; use 'normal'")
        shape = torch.tensor(self.mean**2 / self.variance, dtype=torch.float64)
        rate = self.mean / self.variance
        return float(torch.special.gammaincc(shape, torch.tensor(radius * radius * rate, dtype=torch.float64)))


def uniform_energy(
    *, pitch: float, trace: float, square_trace: float, diagonal_square: float, clip_energy: float = 0.0
) -> ErrorEnergy:
    r"""Moments of :math:`e^\top H e`, independent :math:`e_j \sim U[-\Delta/2, \Delta/2]`, for **any** symmetric ``H``.

    .. math:: \text{mean} = \frac{\Delta^2}{12} \mathrm{tr} H, \qquad
              \text{variance} = \Delta^4 \Bigl( \frac{\mathrm{tr} H^2}{72} - \frac{\sum_j h_{jj}^2}{120} \Bigr).

    For a diagonal ``H`` the bracket is :math:`\mathrm{tr} H^2 / 180`. For a dense one, where
    :math:`\sum h_{jj}^2 \ll \mathrm{tr} H^2`, the variance is up to 2.5 times larger, hence the third moment here.

    Args:
        pitch: :math:`\Delta`, units of ``w``; 1 if the pitches are already in the trace (:func:`energy_from_trace`).
        trace: :math:`\mathrm{tr} H_N`.
        square_trace: :math:`\mathrm{tr} H_N^2`.
        diagonal_square: :math:`\sum_j h_{jj}^2`; equal to ``square_trace`` for a diagonal ``H``.
        clip_energy: :math:`\sum_j h_{jj} c_j^2` of the clipped weights, whose error :math:`c_j` is known, not random.

    Raises:
        ValueError: for a negative pitch, or a squared diagonal above the squared trace.

    Example:
        >>> uniform_energy(pitch=1.0, trace=12.0, square_trace=180.0, diagonal_square=180.0)
        ErrorEnergy(mean=1.0, variance=1.0)

    Reference: arXiv:2606.09012.
    """
    if not pitch >= 0:
        raise ValueError(f"pitch={pitch} must not be negative")
    if diagonal_square > square_trace * (1 + 1e-9):
        raise ValueError(f"diagonal_square={diagonal_square} cannot exceed square_trace={square_trace}")
    return ErrorEnergy(
        mean=pitch**2 * trace / 12 + clip_energy,
        variance=pitch**4 * (square_trace / 72 - diagonal_square / 120),
    )


def energy_from_trace(estimate: TraceEstimate, *, pitch: float = 1.0, clip_energy: float = 0.0) -> ErrorEnergy:
    """:func:`uniform_energy` from a Hutchinson estimate.

    With groupwise pitches pass them as ``weights`` to :func:`~fewbits.geometry.curvature.hutchinson` (0 for a clipped
    weight) and leave ``pitch`` at 1.
    """
    return uniform_energy(
        pitch=pitch,
        trace=estimate.trace,
        square_trace=estimate.square_trace,
        diagonal_square=estimate.diagonal_square,
        clip_energy=clip_energy,
    )


def groupwise_energy(
    diagonal: Sequence[Tensor], pitch: Sequence[Tensor], *, clip_error: Sequence[Tensor] | None = None
) -> ErrorEnergy:
    r"""Rounding energy for a diagonal metric and a pitch per group.

    :math:`\Delta^2 \mathrm{tr} H` becomes :math:`\sum_j h_j \Delta_j^2`.

    Args:
        diagonal: :math:`h_j`, shapes of the weights.
        pitch: :math:`\Delta_j` in units of ``w``, broadcastable to ``diagonal`` (e.g. ``(out, 1)`` per channel).
        clip_error: error ``q - w`` of clipped weights, 0 elsewhere; where it is not 0 it replaces the uniform error.

    Returns:
        ``mean = sum h D^2 / 12 + sum h c^2`` and ``variance = sum h^2 D^4 / 180``, the sums over unclipped, clipped
        and unclipped weights.

    Example:
        >>> groupwise_energy([torch.tensor([3.0, 1.0])], [torch.tensor([2.0, 0.0])])
        ErrorEnergy(mean=1.0, variance=0.8)

    Reference: arXiv:2606.09012.
    """
    mean = variance = 0.0
    for index, (h, step) in enumerate(zip(diagonal, pitch, strict=True)):
        h = h.detach().double()
        energy = h * step.detach().double().to(h.device).square()
        if clip_error is not None:
            clipped = clip_error[index].detach().double().to(h.device)
            energy = energy * (clipped == 0)
            mean += float((h * clipped.square()).sum())
        mean += float(energy.sum()) / 12
        variance += float(energy.square().sum()) / 180
    return ErrorEnergy(mean=mean, variance=variance)


def hit_probability(pitch: float, half_width: float) -> float:
    r"""Chance that a grid of random phase has a level inside a band: :math:`\min(1, 2R/\Delta)`, one normal direction.

    Example:
        >>> hit_probability(4.0, 1.0), hit_probability(1.0, 1.0)
        (0.5, 1.0)
    """
    if not pitch > 0 or not half_width >= 0:
        raise ValueError(f"pitch={pitch} must be positive and half_width={half_width} not negative")
    return min(1.0, 2 * half_width / pitch)
