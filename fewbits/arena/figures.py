"""Two figures a scheme: quality against cost, and the paired differences from a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from fewbits.arena.statistics import Comparison
from fewbits.arena.summary import Row
from fewbits.plots import to_svg

_COLORS = {"better": "#1b6ca8", "worse": "#d1495b"}
_GREY = "#7f7f7f"


def scatter(rows: Sequence[Row]) -> str:
    """Mean loss on the report text against processor seconds of a cell, one dot a method; SVG."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for row in rows:
        axes.errorbar(row.cpu_seconds, row.mean, yerr=row.spread, fmt="o", ms=4, lw=0.8, color="#1b6ca8")
        axes.annotate(row.name, (row.cpu_seconds, row.mean), xytext=(4, 2), textcoords="offset points", fontsize=7)
    if all(row.cpu_seconds > 0 for row in rows):
        axes.set_xscale("log")
    axes.set_xlabel("processor seconds of one cell (median)")
    axes.set_ylabel("loss on the report text (nats per token)")
    return to_svg(figure)


def forest(comparisons: Mapping[str, Comparison], reference: str) -> str:
    """Differences from the reference with their bootstrap intervals (thick) and Student's (thin), best on top; SVG.

    Student's interval is cut at the frame, which shows all means and bootstrap intervals.
    """
    order = sorted(comparisons, key=lambda name: comparisons[name].mean, reverse=True)
    figure = Figure(figsize=(7.2, 1.2 + 0.24 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    ends = [0.0, *(x for c in comparisons.values() for x in (c.low, c.high))]
    margin = 0.05 * (max(ends) - min(ends)) or 1e-3
    left, right = min(ends) - margin, max(ends) + margin
    for y, name in enumerate(order):
        c = comparisons[name]
        color = _COLORS.get(c.verdict, _GREY)
        if math.isfinite(c.t_low):
            axes.plot([max(c.t_low, left), min(c.t_high, right)], [y, y], color=color, lw=0.8)
        axes.plot([c.low, c.high], [y, y], color=color, lw=2.6)
        axes.plot([c.mean], [y], "o", color=color, ms=4)
    axes.axvline(0, color="k", lw=0.7, ls="--")
    axes.set_xlim(left, right)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_xlabel(f"loss minus that of {reference} (nats per token; left is better)")
    return to_svg(figure)
