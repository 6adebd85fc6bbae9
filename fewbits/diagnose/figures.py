"""The figures of a diagnosis: bars, profiles, a heat map of layers by schemes, the plane of three models."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation

from fewbits.diagnose.after import AfterReport
from fewbits.diagnose.diagnosis import Diagnosis
from fewbits.diagnose.words import BROKEN, FREE, LEAVES

VERDICT_COLORS = {FREE: "#3a7d44", LEAVES: "#edae49", BROKEN: "#d1495b"}
"""Colour of each verdict, the same in every figure and table."""


def _figure(width: float = 6.4, height: float = 3.4) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def scheme_bars(found: Diagnosis) -> Figure:
    """Loss of the rounded model per scheme, with the basin as a band; clipped at the top where rounding diverged."""
    figure = _figure()
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
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
    figure = _figure()
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
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
    figure = _figure(6.4, 1.2 + 0.24 * len(layers))
    axes = figure.add_subplot()
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


def plane_map(after: AfterReport) -> Figure:
    """Loss in the plane through fp, PTQ and the deployed QAT model; colours are log10 of the rise."""
    figure = _figure(5.6, 4.4)
    axes = figure.add_subplot()
    lowest = min(v for row in after.slice.losses for v in row if math.isfinite(v))
    highest = max(v for row in after.slice.losses for v in row if math.isfinite(v))
    rises = [
        [math.log10((v if math.isfinite(v) else highest) - lowest + 1e-3) for v in row] for row in after.slice.losses
    ]
    filled = axes.contourf(after.slice.xs, after.slice.ys, rises, levels=16, cmap="viridis")
    labels = ("fp", "PTQ", "QAT, deployed")
    for label, point in [*zip(labels, after.slice.points, strict=True), ("QAT, latent", after.latent_point)]:
        axes.plot(point.x, point.y, "o", color="w", mec="k")
        axes.annotate(label, (point.x, point.y), xytext=(5, 5), textcoords="offset points", color="w", fontsize=9)
    axes.set_xlabel("distance from fp toward PTQ (units of w)")
    axes.set_ylabel("distance across (units of w)")
    figure.colorbar(filled, ax=axes, label="log10 rise above the lowest loss shown (nats)")
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
    if found.after is not None:
        made["plane"] = (
            plane_map(found.after),
            "The three models in the plane through them. The latent weights are projected: they lie "
            f"{found.after.latent_point.residual:.3g} off it.",
        )
    return made
