r"""P(fail) against Monte Carlo over a sweep of grid pitches: uniform errors of pitch :math:`\Delta` on every weight.

The schemes of a diagnosis jump over the critical pitch, and then forecast and draw agree for a trivial reason. Around
it they can disagree. Reference: arXiv:2606.09012.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.diagnose.losses import TokenLoss
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.geometry import TraceEstimate, critical_pitch, energy_from_trace, loss_value, perturbed
from fewbits.geometry._result import Result
from fewbits.geometry.basin import normal_cdf

FACTORS = (0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1)
"""Pitches of the sweep, in critical ones."""


@dataclass(frozen=True, kw_only=True)
class PitchRow(Result):
    """One pitch, in critical ones: both forecasts, the share of draws that left the basin, and their mean rise."""

    factor: float
    probability: float
    probability_with_slope: float
    monte_carlo: float
    mean_rise: float
    sd_rise: float


@dataclass(frozen=True, kw_only=True)
class PitchSweep(Result):
    r"""A sweep of pitches; ``critical_pitch`` in units of ``w``, ``slope_sd`` (nats) at the critical pitch.

    ``probability`` is the paper's kind of forecast, from :math:`e^\top H e` alone; ``probability_with_slope`` adds the
    variance of the first order term, :math:`\mathrm{Var}\, g^\top e = \Delta^2 \|g\|^2 / 12`, which a finite token set
    always has.
    """

    critical_pitch: float
    slope_sd: float
    num_draws: int
    rows: tuple[PitchRow, ...]


def failure_with_slope(trace: TraceEstimate, gradient_norm: float, *, pitch: float, tol: float) -> float:
    r"""P(rise > tol) of a uniform error, first and second order, in ``[0, 1]``.

    .. math:: \text{mean} = \tfrac12 E\, e^\top H e, \qquad
              \text{variance} = \tfrac{\Delta^2}{12} \|g\|^2 + \tfrac14 \mathrm{Var}\, e^\top H e;

    the two terms are uncorrelated, as the errors are symmetric. ``gradient_norm=0`` is the forecast without slope.

    Args:
        trace: of the Hessian.
        gradient_norm: :math:`\|g\|`, nats per unit of ``w``.
        pitch: :math:`\Delta`, units of ``w``.
        tol: band of the basin, nats.

    Example:
        >>> trace = TraceEstimate(trace=24.0, standard_error=0.0, square_trace=6.0, diagonal_square=6.0, dim=96,
        ...                       num_samples=2)
        >>> failure_with_slope(trace, 5.0, pitch=1.0, tol=1.0)
        0.5
    """
    energy = energy_from_trace(trace, pitch=pitch)
    variance = pitch**2 / 12 * gradient_norm**2 + energy.variance / 4
    gap = energy.mean / 2 - tol
    return normal_cdf(gap / math.sqrt(variance)) if variance > 0 else float(gap > 0)


def sweep_pitch(
    loss: TokenLoss,
    params: Sequence[Tensor],
    trace: TraceEstimate,
    gradient_norm: float,
    settings: DiagnosisSettings,
    *,
    base_loss: float,
    tol: float,
    factors: Sequence[float] = FACTORS,
) -> PitchSweep:
    """Draw uniform errors at pitches around the critical one; the parameters are restored bit for bit.

    Args:
        loss: of the plain model.
        params: the weights that are rounded.
        trace: of its Hessian, on the same tokens.
        gradient_norm: of its gradient.
        settings: ``num_monte_carlo`` draws per pitch, at least 1; seed.
        base_loss: loss at ``params``, nats.
        tol: band of the basin, nats.
        factors: pitches in critical ones.

    Raises:
        ValueError: without draws, or for a trace that is not positive (there is no critical pitch).
    """
    draws, pitch = settings.num_monte_carlo, critical_pitch(math.sqrt(2 * tol), trace.trace)
    if draws < 1:
        raise ValueError(f"num_monte_carlo={draws} draws nothing; use at least 1")
    if not math.isfinite(pitch):
        raise ValueError(f"a trace of {trace.trace} has no critical pitch; the model curves down on average")
    rows = []
    for index, factor in enumerate(factors):
        # Other draws at every pitch: the rows are independent.
        generator = torch.Generator().manual_seed(settings.seed + 6 + 1000 * index)
        rises = []
        for _ in range(draws):
            error = [factor * pitch * (torch.rand(p.shape, generator=generator).to(p) - 0.5) for p in params]
            with perturbed(params, error):
                rises.append(loss_value(loss) - base_loss)
        mean = sum(rises) / draws
        rows.append(
            PitchRow(
                factor=factor,
                probability=failure_with_slope(trace, 0.0, pitch=factor * pitch, tol=tol),
                probability_with_slope=failure_with_slope(trace, gradient_norm, pitch=factor * pitch, tol=tol),
                monte_carlo=sum(not rise <= tol for rise in rises) / draws,
                mean_rise=mean,
                sd_rise=math.sqrt(sum((rise - mean) ** 2 for rise in rises) / max(draws - 1, 1)),
            )
        )
    return PitchSweep(
        critical_pitch=pitch,
        slope_sd=pitch * gradient_norm / math.sqrt(12),
        num_draws=draws,
        rows=tuple(rows),
    )
