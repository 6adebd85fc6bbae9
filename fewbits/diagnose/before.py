r"""Before anyone trains: will rounding to these bits leave the low-loss basin, and could it have been foreseen?

For every scheme the weights ``w`` are rounded to ``q`` (error ``e = q - w``) and the loss is followed along ``e``,
along random directions that move each tensor as far, and along the gradient. Reference: arXiv:2606.09012; the formulas
are those of :mod:`fewbits.geometry`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.diagnose.forecast import PitchForecast, forecast_failure
from fewbits.diagnose.losses import TokenLoss, batched_gradient, batched_hessian
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.diagnose.sites import Site, round_cells
from fewbits.diagnose.stages import Stages
from fewbits.diagnose.words import judge
from fewbits.geometry import (
    NoiseFloor,
    Profile,
    Width,
    difference,
    dot,
    kappa,
    kappa_rand,
    loss_value,
    noise_floor,
    norm,
    placed,
    profile,
    quadratic_width,
    random_like,
    width,
)
from fewbits.geometry._result import Result
from fewbits.geometry.directions import Vector
from fewbits.scheme import Scheme

Say = Callable[[str], None]
"""Takes one line of progress."""


@dataclass(frozen=True, kw_only=True)
class Baseline(Result):
    """The model before rounding; losses in nats per token, lengths in units of ``w``.

    ``gradient_width`` is the basin along the normalized gradient, its slope subtracted; ``num_weights`` counts what
    the schemes quantize.
    """

    loss: float
    tol: float
    noise: NoiseFloor
    gradient_norm: float
    gradient_width: Width | None
    num_tokens: int
    num_weights: int
    weight_norm: float


@dataclass(frozen=True, kw_only=True)
class SchemeReport(Result):
    r"""One scheme; losses in nats per token, lengths in units of ``w``.

    ``width`` is measured along the error, ``kappa`` is the error in units of it (above 1 just restates that the loss
    rose), ``kappa_rand`` in units of the median random width (a forecast). ``quadratic_width`` is what the curvature
    at ``w`` promises along the error; ``flat_ratio`` the measured width over it: far above 1 is a flat floor with a
    wall. ``quadratic_rise`` is :math:`g^\top e + e^\top H e / 2`.
    """

    scheme: str
    bits_per_weight: float
    loss: float
    rise: float
    error_norm: float
    clipped_share: float
    width: Width
    kappa: float
    random_widths: tuple[float, ...]
    kappa_rand: float
    curvature: float
    quadratic_width: float
    flat_ratio: float
    quadratic_rise: float
    gradient_cosine: float
    profile: Profile
    forecast: PitchForecast | None
    verdict: str
    explanation: str


def measure_baseline(
    loss: TokenLoss, sites: Sequence[Site], finest: Sequence[Tensor], settings: DiagnosisSettings
) -> tuple[Baseline, Vector]:
    """Loss, noise floor, tolerance and gradient of the unrounded model.

    Args:
        loss: of the plain model.
        sites: the weights that will be rounded; restored bit for bit.
        finest: the smallest rounding error: noise is measured on moves that are near the edge of the basin.
        settings: see :class:`DiagnosisSettings`.

    Returns:
        The numbers, and the gradient itself.

    Raises:
        ValueError: with fewer than two token blocks.
    """
    params = [site.weight for site in sites]
    generator = torch.Generator().manual_seed(settings.seed)
    moves = [list(finest), *(random_like(finest, generator) for _ in range(2))]
    noise = noise_floor(*loss.halves(), params, moves)
    tol = noise.tolerance() if settings.tol is None else settings.tol
    grad = batched_gradient(loss, params)
    size = norm(grad)
    along = None
    if size > 0:
        reach = 1024 * norm(finest)
        along = width(
            loss,
            params,
            grad,
            tol=tol,
            start=reach / 8192,
            max_distance=reach,
            num_bisections=settings.num_bisections,
            slope=size,
        )
    baseline = Baseline(
        loss=loss_value(loss),
        tol=tol,
        noise=noise,
        gradient_norm=size,
        gradient_width=along,
        num_tokens=loss.num_tokens,
        num_weights=sum(p.numel() for p in params),
        weight_norm=norm(params),
    )
    return baseline, grad


def measure_scheme(
    loss: TokenLoss,
    sites: Sequence[Site],
    name: str,
    scheme: Scheme,
    baseline: Baseline,
    grad: Sequence[Tensor],
    settings: DiagnosisSettings,
) -> SchemeReport:
    """Everything about one scheme; the weights are restored bit for bit.

    Raises:
        ValueError: if the scheme reproduces every weight exactly (there is no error to follow).
    """
    params = [site.weight for site in sites]
    cells = round_cells(sites, scheme)
    error = difference(cells.rounded, params)
    length = norm(error)
    if length == 0:
        raise ValueError(f"{name} reproduces every weight exactly: the model is on this grid already")
    with placed(params, cells.rounded):
        rounded_loss = loss_value(loss)
    tol, steps = baseline.tol, settings.num_bisections
    along = width(loss, params, error, tol=tol, num_bisections=steps)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    random = tuple(
        width(loss, params, random_like(error, generator), tol=tol, num_bisections=steps).first
        for _ in range(settings.num_random)
    )
    hessian = batched_hessian(loss, params)
    slope, bend = dot(grad, error), dot(error, hessian(error))
    promised = quadratic_width(tol, bend / length**2, slope=slope / length)
    measured = along.plus.t
    rise = rounded_loss - baseline.loss
    bits = sum(site.size_in_bits(scheme) for site in sites) / baseline.num_weights
    points = [1.25 * i / (settings.profile_points - 1) for i in range(settings.profile_points)]
    spread = kappa_rand(length, random)
    verdict = judge(rise=rise, tol=tol, loss=rounded_loss, vocab_size=_vocab_size(loss))
    return SchemeReport(
        scheme=name,
        bits_per_weight=bits,
        loss=rounded_loss,
        rise=rise,
        error_norm=length,
        clipped_share=cells.clipped_share,
        width=along,
        kappa=kappa(length, measured),
        random_widths=random,
        kappa_rand=spread,
        curvature=bend / length**2,
        quadratic_width=promised,
        flat_ratio=measured / promised if math.isfinite(promised) else 0.0 if math.isfinite(measured) else math.nan,
        quadratic_rise=slope + bend / 2,
        gradient_cosine=slope / (length * baseline.gradient_norm) if baseline.gradient_norm > 0 else 0.0,
        profile=profile(loss, params, error, points),
        forecast=forecast_failure(loss, params, cells, baseline.loss, baseline.tol, settings)
        if settings.num_probes
        else None,
        verdict=verdict.short,
        explanation=verdict.long(spread),
    )


def _vocab_size(loss: TokenLoss) -> int:
    with torch.no_grad():
        return int(loss.model(input_ids=loss.tokens[:1, :2]).logits.shape[-1])


def before_training(
    loss: TokenLoss,
    sites: Sequence[Site],
    schemes: Mapping[str, Scheme],
    settings: DiagnosisSettings | None = None,
    *,
    say: Say = lambda line: None,
    stages: Stages | None = None,
) -> tuple[Baseline, list[SchemeReport]]:
    """The whole first half of a diagnosis; the model is restored bit for bit.

    Args:
        loss: of the plain model, see :func:`~fewbits.diagnose.token_loss`.
        sites: from :func:`~fewbits.diagnose.find_sites`.
        schemes: by the name that reports use.
        settings: how thorough.
        say: takes a line of progress per scheme.
        stages: keeps baseline and schemes; none keeps nothing.

    Raises:
        ValueError: without schemes, with fewer than two token blocks, or for an exactly representable model.
    """
    settings = settings or DiagnosisSettings()
    if not schemes:
        raise ValueError("no schemes: name at least one, e.g. W2")
    params = [site.weight for site in sites]
    errors = {name: norm(difference(round_cells(sites, s).rounded, params)) for name, s in schemes.items()}
    finest = min(errors, key=errors.__getitem__)
    if errors[finest] == 0:
        raise ValueError(f"{finest} reproduces every weight exactly: the model is on this grid already")
    stages = stages or Stages(None, {})
    gradients: list[Vector] = []

    def first() -> Baseline:
        error = difference(round_cells(sites, schemes[finest]).rounded, params)
        found, grad = measure_baseline(loss, sites, error, settings)
        gradients.append(grad)
        return found

    numbers = [settings.tol, settings.num_bisections, settings.seed]
    baseline = stages.run("baseline", Baseline, first, finest=schemes[finest].to_dict(), numbers=numbers)
    say(f"loss {baseline.loss:.4f} nats, basin within {baseline.tol:.4f} nats of it")
    numbers += [settings.num_random, settings.num_probes, settings.num_monte_carlo, settings.profile_points]
    reports = []
    for index, (name, scheme) in enumerate(schemes.items()):

        def one(name: str = name, scheme: Scheme = scheme) -> SchemeReport:
            if not gradients:
                gradients.append(batched_gradient(loss, params))
            return measure_scheme(loss, sites, name, scheme, baseline, gradients[0], settings)

        found = stages.run(
            f"scheme-{index:02d}", SchemeReport, one, name=name, scheme=scheme.to_dict(), tol=baseline.tol,
            numbers=numbers,
        )  # fmt: skip
        say(f"{name}: loss {found.loss:.4f}, kappa_rand {found.kappa_rand:.2f}: {found.verdict}")
        reports.append(found)
    return baseline, reports
