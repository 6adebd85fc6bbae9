"""An empty figure in the style of all figures of a diagnosis, and their colours."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#1b6ca8", "#d1495b", "#3a7d44", "#edae49", "#5c4d7d", "#8d6a4f", "#00798c", "#999999")


def canvas(width: float = 6.4, height: float = 3.4, *, frame: bool = False) -> tuple[Figure, Axes]:
    """Figure and axes, sizes in inches; without ``frame`` the top and right lines are left out."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    if not frame:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
