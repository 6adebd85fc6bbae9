"""Figures of a run as SVG text: curves, bars, histograms. Matplotlib without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

_COLORS = ("#1b6ca8", "#d1495b", "#3a7d44", "#edae49", "#6f4e7c", "#00798c", "#7f7f7f")


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element, ready to be put into HTML."""
    buffer = io.StringIO()
    # text as text, not as outlines: smaller, and it can be searched; equal figures are equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fewbits"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float = 6.4, height: float = 3.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str, log_y: bool = False
) -> str:
    """Lines by name; several lines of one name (``name#1``, ``name#2``: seeds) share a colour and a legend entry."""
    figure, axes = _axes()
    colors: dict[str, str] = {}
    for key, points in series.items():
        name = key.split("#")[0]
        label = None if name in colors else name
        colors.setdefault(name, _COLORS[len(colors) % len(_COLORS)])
        axes.plot([p[0] for p in points], [p[1] for p in points], color=colors[name], label=label, lw=1.4, alpha=0.85)
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    return to_svg(figure)


def bars(values: Mapping[str, Sequence[float]], *, y_label: str, log_y: bool = False) -> str:
    """One bar per name at the mean of its values; the values themselves as dots."""
    figure, axes = _axes()
    for i, (_, points) in enumerate(values.items()):
        mean = sum(points) / len(points)
        axes.bar(i, mean, color=_COLORS[i % len(_COLORS)], alpha=0.8)
        if len(points) > 1:
            axes.plot([i] * len(points), points, "k.", ms=5)
        axes.annotate(f"{mean:.4g}", (i, mean), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(values)), [name.replace(", ", ",\n") for name in values])
    axes.set_ylabel(y_label)
    if log_y:
        axes.set_yscale("log")
    return to_svg(figure)


def weight_histograms(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> str:
    """Density of ``v = w / scale`` with the levels as dashed lines, before and after training."""
    figure, axes = _axes()
    for data, label, color in ((before, "before", "#999999"), (after, "after", _COLORS[0])):
        if data is not None:
            axes.stairs(data["density"], data["edges"], fill=True, alpha=0.45, color=color, label=label)
    for level in before["levels"]:
        axes.axvline(level, color="k", ls="--", lw=0.7)
    axes.set_xlabel("latent weight in steps, v = w / scale (dashed: levels)")
    axes.set_ylabel("density")
    axes.legend(frameon=False)
    return to_svg(figure)
