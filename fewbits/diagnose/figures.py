"""The figures of a diagnosis before training: bars, profiles, a heat map of layers by schemes, and their order."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation

from fewbits.diagnose.canvas import canvas
from fewbits.diagnose.diagnosis import Diagnosis
from fewbits.diagnose.figures_after import arm_bars, line_profiles, plane_map
from fewbits.diagnose.figures_terrain import layer_scatter, pitch_curves, spectra, width_bars
from fewbits.diagnose.words import BROKEN, FREE, LEAVES

VERDICT_COLORS = {FREE: "#3a7d44", LEAVES: "#edae49", BROKEN: "#d1495b"}
"""Colour of each verdict, the same in every figure and table."""


def scheme_bars(found: Diagnosis) -> Figure:
    """Loss of the rounded model per scheme, with the basin as a band; clipped at the top where rounding diverged."""
    figure, axes = canvas()
    base = found.baseline
    for i, report in enumerate(found.schemes):
        axes.bar(i, report.loss, color=VERDICT_COLORS[report.verdict], alpha=0.85)
        axes.annotate(f"{report.loss:.3g}", (i, report.loss), ha="center", va="bottom", fontsize=9)
    axes.axhspan(base.loss, base.loss + base.tol, color="#1b6ca8", alpha=0.6, label="low-loss basin")
    axes.set_xticks(range(len(found.schemes)), [r.scheme for r in found.schemes])
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def error_profiles(found: Diagnosis) -> Figure:
    """Rise of the loss on the way from the model to its rounding; 1 is the rounded model."""
    figure, axes = canvas()
    for report in found.schemes:
        rises = [value - report.profile.origin_loss for value in report.profile.losses]
        axes.plot(report.profile.ts, rises, marker=".", lw=1.4, label=report.scheme)
    axes.axhspan(-found.baseline.tol, found.baseline.tol, color="#1b6ca8", alpha=0.25)
    axes.axvline(1.0, color="k", ls="--", lw=0.7)
    axes.set_yscale("symlog", linthresh=found.baseline.tol)
    axes.set_xlabel("share of the rounding error (dashed: the rounded model)")
    axes.set_ylabel("rise of the loss (nats)")
    axes.legend(frameon=False)
    return figure


def layer_heat_map(found: Diagnosis) -> Figure:
    """Rise of the loss when one layer alone is rounded; colours are logarithmic, layers in model order."""
    from matplotlib.colors import LogNorm

    layers, names = list(found.layers.rises), [r.scheme for r in found.schemes]
    values = [[found.layers.rises[layer][name] for name in names] for layer in layers]
    finite = [v for row in values for v in row if math.isfinite(v)]
    top = max([*finite, 1e-3])
    floor = min(max(min([v for v in finite if v > 0], default=1e-4), 1e-4), top / 2)
    figure, axes = canvas(6.4, 1.2 + 0.24 * len(layers), frame=True)
    shown = [[min(max(v, floor), top) if math.isfinite(v) else top for v in row] for row in values]
    image = axes.imshow(shown, norm=LogNorm(floor, top), cmap="viridis", aspect="auto")
    for j, row in enumerate(values):
        for i, v in enumerate(row):
            axes.text(i, j, f"{v:.2g}", ha="center", va="center", fontsize=7, color="w" if v < top / 10 else "k")
    if found.proposal is not None:
        for j, layer in enumerate(layers):
            i = names.index(found.proposal.allocation.choices[layer])
            axes.plot([i - 0.45], [j], marker=">", color="#ff5a5f", ms=5)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    figure.colorbar(image, ax=axes, label="rise (nats)", format=LogFormatterSciNotation())
    return figure


def figures_of(found: Diagnosis) -> dict[str, tuple[Figure, str]]:
    """Figure and caption by file name, in reading order."""
    made = {
        "schemes": (scheme_bars(found), "Loss after plain rounding. The blue band is as good as the original."),
        "profiles": (
            error_profiles(found),
            "Walking from the original (0) to its rounded copy (1). A curve that leaves the blue band has left the "
            "basin; flat and then steep is a wall, steadily rising is a bowl.",
        ),
        "layers": (
            layer_heat_map(found),
            "Loss rise when only this layer is rounded. A red mark is the choice of the proposed recipe.",
        ),
    }
    if found.layer_forecast is not None:
        made["layer-forecast"] = (
            layer_scatter(found.layers, found.layer_forecast, tol=found.baseline.tol),
            "Every dot is a layer at one scheme: the forecast without rounding it (error in random basin widths) "
            "against the measured rise. The line is what a plain bowl promises.",
        )
    if found.pitch is not None:
        made["pitch"] = (
            pitch_curves(found.pitch),
            f"Uniform errors on grids of nearly critical pitch, {found.pitch.num_draws} draws each: share that left "
            "the basin (dots) and both forecasts.",
        )
    if found.terrain.spectra:
        made["spectrum"] = (
            spectra(found.terrain),
            "Distribution of the curvature over all directions, by stochastic Lanczos quadrature, for the model and "
            "for its quantized versions. Far right: steep walls. Left of 0: directions in which the loss curves down.",
        )
    if found.river is not None:
        made["river"] = (
            width_bars(found.baseline, found.schemes, found.river),
            "How far one can walk in each direction before the loss leaves the basin (the shorter side).",
        )
    if found.after is not None:
        path = " The dots are the recorded training." if found.after.path_steps else ""
        made["plane"] = (
            plane_map(found.after),
            f"The three models in the plane through them.{path} The latent weights are projected: they lie "
            f"{found.after.latent_point.residual:.3g} off it.",
        )
        made["lines"] = (
            line_profiles(found.after),
            "Loss on the straight line between two models: 0 is the first, 1 the second. A hump is a wall between.",
        )
    if found.arms is not None:
        made["arms"] = (
            arm_bars(found.arms, found.baseline),
            "Three ways to the same bits with the same budget: loss of the latent weights (light) and of the rounded "
            "ones (dark). The blue band is as good as the original.",
        )
    return made
