"""Figures after training: the plane of three models with the path drawn in, lines between them, the three arms."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from fewbits.diagnose.after import AfterReport
from fewbits.diagnose.arms import ArmsReport
from fewbits.diagnose.before import Baseline
from fewbits.diagnose.canvas import COLORS, canvas


def plane_map(after: AfterReport) -> Figure:
    """Loss in the plane through fp, PTQ and the deployed QAT model, with the recorded training; colours are log10."""
    figure, axes = canvas(5.6, 4.4, frame=True)
    lowest = min(v for row in after.slice.losses for v in row if math.isfinite(v))
    highest = max(v for row in after.slice.losses for v in row if math.isfinite(v))
    rises = [
        [math.log10((v if math.isfinite(v) else highest) - lowest + 1e-3) for v in row] for row in after.slice.losses
    ]
    filled = axes.contourf(after.slice.xs, after.slice.ys, rises, levels=16, cmap="viridis")
    for path, color, label in (
        (after.path_deployed, "#ff8c61", "path, deployed"),
        (after.path_latent, "#f7f7f7", "path, latent"),
    ):
        if path:
            axes.plot([p.x for p in path], [p.y for p in path], ".-", color=color, lw=1.1, ms=4, label=label)
    if after.path_steps:
        axes.legend(fontsize=8, loc="lower right", facecolor="#444444", labelcolor="w")
    labels = ("fp", "PTQ", "QAT, deployed")
    for label, point in [*zip(labels, after.slice.points, strict=True), ("QAT, latent", after.latent_point)]:
        axes.plot(point.x, point.y, "o", color="w", mec="k")
        axes.annotate(label, (point.x, point.y), xytext=(5, 5), textcoords="offset points", color="w", fontsize=9)
    axes.set_xlabel("distance from fp toward PTQ (units of w)")
    axes.set_ylabel("distance across (units of w)")
    figure.colorbar(filled, ax=axes, label="log10 rise above the lowest loss shown (nats)")
    return figure


def line_profiles(after: AfterReport) -> Figure:
    """Rise over the original on the straight lines between the models."""
    figure, axes = canvas()
    for i, (name, line) in enumerate(after.profiles.items()):
        rises = [value - after.loss_fp for value in line.losses]
        axes.plot(line.ts, rises, ".-", lw=1.3, color=COLORS[i % len(COLORS)], label=name)
    axes.axhspan(-after.tol, after.tol, color=COLORS[0], alpha=0.2)
    for x in (0.0, 1.0):
        axes.axvline(x, color="k", ls="--", lw=0.7)
    axes.set_xlabel("share of the way from the first model to the second")
    axes.set_ylabel("rise over the original (nats)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def arm_bars(report: ArmsReport, baseline: Baseline) -> Figure:
    """Loss of latent and deployed weights of the three arms."""
    figure, axes = canvas()
    for i, arm in enumerate(report.arms.values()):
        for shift, value, alpha in ((-0.2, arm.loss_latent, 0.4), (0.2, arm.loss_deployed, 0.9)):
            axes.bar(i + shift, value, width=0.38, color=COLORS[i % len(COLORS)], alpha=alpha)
            axes.annotate(f"{value:.3f}", (i + shift, value), ha="center", va="bottom", fontsize=8)
    axes.axhspan(baseline.loss, baseline.loss + baseline.tol, color=COLORS[0], alpha=0.5)
    values = [x for arm in report.arms.values() for x in (arm.loss_latent, arm.loss_deployed) if math.isfinite(x)]
    low, high = min([*values, baseline.loss]), max([*values, baseline.loss + baseline.tol])
    axes.set_ylim(low - 0.3 * (high - low), high + 0.15 * (high - low))
    axes.set_xticks(
        range(len(report.arms)), [name.replace(", ", ",\n").replace("through", "\nthrough") for name in report.arms]
    )
    axes.set_ylabel("loss (nats per token)")
    return figure
