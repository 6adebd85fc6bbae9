"""Will these cells leave the basin? A forecast from curvature and pitch, and the same asked of random errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.diagnose.losses import TokenLoss, batched_hessian
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.diagnose.sites import Cells
from fewbits.geometry import (
    TraceEstimate,
    critical_pitch,
    dot,
    energy_from_trace,
    hutchinson,
    loss_value,
    perturbed,
)
from fewbits.geometry._result import Result


@dataclass(frozen=True, kw_only=True)
class PitchForecast(Result):
    r"""Forecast from curvature and cell size alone, :math:`E\,e^\top H e = \sum_j h_{jj} \Delta_j^2 / 12 + c^\top H c`.

    ``energy`` is that mean, ``clip_energy`` its second part (``c``: error of the clipped weights), ``limit`` the energy
    ``2 tol`` that fills the basin. ``pitch`` is the root mean square pitch of the unclipped weights and
    ``critical_pitch`` the one at which the cells alone would fill the basin. ``monte_carlo`` is the share of random
    errors, uniform in the cells, that raised the measured loss by more than ``tol``.
    """

    trace: TraceEstimate
    pitch: float
    critical_pitch: float
    energy: float
    clip_energy: float
    limit: float
    failure_probability: float
    monte_carlo: float | None
    num_monte_carlo: int


def forecast_failure(
    loss: TokenLoss,
    params: Sequence[Tensor],
    cells: Cells,
    base_loss: float,
    tol: float,
    settings: DiagnosisSettings,
) -> PitchForecast:
    """Forecast from the trace of the Hessian, weighted with the cells; the parameters are restored bit for bit.

    Args:
        loss: of the plain model.
        params: the weights that are rounded.
        cells: from :func:`~fewbits.diagnose.round_cells`.
        base_loss: loss at ``params``, nats.
        tol: band of the basin, nats, positive.
        settings: ``num_probes`` at least 2.

    Raises:
        ValueError: from :func:`~fewbits.geometry.hutchinson` for too few probes.

    Reference: arXiv:2606.09012.
    """
    hessian = batched_hessian(loss, params)
    generator = torch.Generator().manual_seed(settings.seed + 2)
    trace = hutchinson(hessian, params, num_samples=settings.num_probes, generator=generator, weights=cells.pitch)
    # Known errors of clipped weights enter with their full quadratic form, cross terms included.
    clip = dot(cells.clip_error, hessian(cells.clip_error)) if cells.clipped_share > 0 else 0.0
    energy = energy_from_trace(trace, clip_energy=clip)
    radius = math.sqrt(2 * tol)
    inside = sum(int((p > 0).sum()) for p in cells.pitch)
    pitch = math.sqrt(sum(float(p.double().square().sum()) for p in cells.pitch) / max(inside, 1))
    share = None
    if settings.num_monte_carlo:
        failures = 0
        for _ in range(settings.num_monte_carlo):
            draws = [torch.rand(p.shape, generator=generator).to(p) - 0.5 for p in cells.pitch]
            error = [d * p + c for d, p, c in zip(draws, cells.pitch, cells.clip_error, strict=True)]
            with perturbed(params, error):
                failures += not loss_value(loss) - base_loss <= tol
        share = failures / settings.num_monte_carlo
    return PitchForecast(
        trace=trace,
        pitch=pitch,
        critical_pitch=pitch * critical_pitch(radius, trace.trace),
        energy=energy.mean,
        clip_energy=clip,
        limit=radius**2,
        failure_probability=energy.failure_probability(radius),
        monte_carlo=share,
        num_monte_carlo=settings.num_monte_carlo,
    )
