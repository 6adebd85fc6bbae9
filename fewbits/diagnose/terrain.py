r"""The curvature around a model and around its rounded copies: Hutchinson trace and stochastic Lanczos spectra.

The spectrum of a fake-quantized model is that of the Hessian at its rounded weights :math:`Q(w)`: differentiated twice
through the identity STE, :math:`\nabla_w^2 L(Q(w))` *is* :math:`(\nabla^2 L)(Q(w))`. Reference: arXiv:2606.09012;
spectra as in WinQ, arXiv:2605.17471.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbits.diagnose.losses import TokenLoss, batched_hessian
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.diagnose.stages import Stages, tensor_digest
from fewbits.geometry import Spectrum, TraceEstimate, hutchinson, isotropic_cosine, lanczos_spectrum, placed
from fewbits.geometry._result import Result

PLAIN = "full precision"
"""Name of the spectrum of the model itself."""
ZERO = 1e-3
"""Eigenvalues below it count as zero, as in WinQ."""


@dataclass(frozen=True, kw_only=True)
class SpectrumReport(Result):
    r"""One spectrum; eigenvalues in nats per squared unit of ``w``.

    ``trace`` is :math:`n` times the first moment (a Hutchinson estimate with the same probes), ``negative_share`` the
    spectral weight below ``-ZERO``: downhill curvature, of which a minimum has none.
    """

    spectrum: Spectrum
    trace: float
    zero_share: float
    negative_share: float
    max_abs: float


@dataclass(frozen=True, kw_only=True)
class TerrainReport(Result):
    """``trace`` of the unrounded model (None without probes), with the inward cosine that a pure quadratic with that
    trace shows for isotropic errors; spectra by name, the unrounded model first; tokens that the spectra saw."""

    trace: TraceEstimate | None
    isotropic_cosine: float | None
    spectra: dict[str, SpectrumReport]
    num_tokens: int


def curvature_loss(loss: TokenLoss, settings: DiagnosisSettings) -> TokenLoss:
    """The loss on the first ``curvature_blocks`` blocks, one block at a time: a second derivative needs much memory."""
    return replace(loss, tokens=loss.tokens[: settings.curvature_blocks], batch_size=min(4, loss.batch_size))


def spectrum_probe(loss: TokenLoss, params: Sequence[Tensor], settings: DiagnosisSettings, probe: int) -> Spectrum:
    """One probe of the spectrum at the current parameters; the same probe vector at every point, so that they compare.

    Args:
        loss: of the plain model.
        params: the weights that are rounded.
        settings: number of steps and seed.
        probe: number of the probe.
    """
    generator = torch.Generator().manual_seed(settings.seed + 1000 + probe)
    return lanczos_spectrum(
        batched_hessian(loss, params), params, generator=generator, num_probes=1, num_steps=settings.num_lanczos_steps
    )


def report_spectrum(probes: Sequence[Spectrum]) -> SpectrumReport:
    """Probes of one spectrum put together.

    Example:
        >>> one = Spectrum(nodes=((0.0, 2.0),), weights=((0.75, 0.25),), dim=8)
        >>> found = report_spectrum([one, one])
        >>> found.trace, found.zero_share, found.max_abs
        (4.0, 0.75, 2.0)
    """
    whole = Spectrum(
        nodes=tuple(row for p in probes for row in p.nodes),
        weights=tuple(row for p in probes for row in p.weights),
        dim=probes[0].dim,
    )
    return SpectrumReport(
        spectrum=whole,
        trace=whole.dim * whole.moment(1),
        zero_share=whole.zero_share(ZERO),
        negative_share=whole.mass(-float("inf"), -ZERO),
        max_abs=whole.max_abs,
    )


def measure_terrain(
    loss: TokenLoss,
    params: Sequence[Tensor],
    points: Mapping[str, Sequence[Tensor] | None],
    settings: DiagnosisSettings,
    stages: Stages,
) -> TerrainReport:
    """Trace of the model itself and the spectrum at every point; the parameters are restored bit for bit.

    Args:
        loss: of the plain model; the trace sees all its tokens, the spectra the first ``curvature_blocks``.
        params: the weights that are rounded.
        points: name to weights; None is the model as it stands.
        settings: numbers of probes, steps and blocks.
        stages: every probe is a stage.
    """
    numbers = [settings.num_probes, settings.seed]
    trace = None
    if settings.num_probes:

        def hutchinson_trace() -> TraceEstimate:
            generator = torch.Generator().manual_seed(settings.seed + 3)
            return hutchinson(
                batched_hessian(loss, params), params, num_samples=settings.num_probes, generator=generator
            )

        trace = stages.run("trace", TraceEstimate, hutchinson_trace, numbers=numbers)
    part = curvature_loss(loss, settings)
    digests = {n: "" if p is None else tensor_digest({str(i): x for i, x in enumerate(p)}) for n, p in points.items()}
    spectra = {}
    for index, (name, point) in enumerate(points.items() if settings.num_spectrum_probes else ()):
        probes = []
        for probe in range(settings.num_spectrum_probes):

            def one(point: Sequence[Tensor] | None = point, probe: int = probe) -> Spectrum:
                with placed(params, params if point is None else point):
                    return spectrum_probe(part, params, settings, probe)

            numbers = [settings.curvature_blocks, settings.num_lanczos_steps, settings.seed]
            key = f"spectrum-{index:02d}-probe-{probe:03d}"
            probes.append(stages.run(key, Spectrum, one, point=digests[name], numbers=numbers))
        spectra[name] = report_spectrum(probes)
    quadratic = None
    if trace is not None and trace.square_trace > 0:
        quadratic = isotropic_cosine(trace.trace, trace.square_trace, trace.dim)
    return TerrainReport(trace=trace, isotropic_cosine=quadratic, spectra=spectra, num_tokens=part.num_tokens)


def count_terrain(num_points: int, settings: DiagnosisSettings) -> int:
    """Stages of :func:`measure_terrain`."""
    return (settings.num_probes > 0) + num_points * settings.num_spectrum_probes
