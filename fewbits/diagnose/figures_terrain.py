"""Figures of the terrain: spectra, widths by direction, layers forecast and measured, pitches near critical."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fewbits.diagnose.before import Baseline, SchemeReport
from fewbits.diagnose.canvas import COLORS, canvas
from fewbits.diagnose.layer_forecast import LayerForecast
from fewbits.diagnose.layers import SensitivityTable
from fewbits.diagnose.pitch import PitchSweep
from fewbits.diagnose.river import RiverReport
from fewbits.diagnose.terrain import TerrainReport

SHOWN = 400
"""Points of a density curve."""


def spectra(terrain: TerrainReport) -> Figure:
    """Spectral densities on a logarithmic axis, as WinQ draws them, all with one bandwidth so that they compare."""
    figure, axes = canvas()
    reports = terrain.spectra
    low = min(r.spectrum.smallest for r in reports.values())
    high = max(r.spectrum.largest for r in reports.values())
    spread = max(high - low, 1e-12)
    xs = np.linspace(low - 0.05 * spread, high + 0.05 * spread, SHOWN).tolist()
    top, floor = 0.0, math.inf
    for i, (name, report) in enumerate(reports.items()):
        density = report.spectrum.density(xs, bandwidth=spread / 100)
        label = f"{name}: largest {report.max_abs:.3g}"
        axes.plot(xs, density, lw=1.3, color=COLORS[i % len(COLORS)], label=label)
        top = max(top, *density)
        # A single eigenvalue among n is the least that the eye should see.
        floor = min(floor, 0.1 / report.spectrum.dim / (spread / 100))
    axes.set_yscale("log")
    axes.set_ylim(floor, 3 * top)
    axes.axvline(0, color="k", lw=0.6, ls="--")
    axes.set_xlabel("eigenvalue of the Hessian (nats per squared unit of w)")
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize=8)
    return figure


def width_bars(baseline: Baseline, schemes: Sequence[SchemeReport], river: RiverReport) -> Figure:
    """Basin width by direction on a logarithmic axis: gradient, rounding errors, random, river."""
    rows: list[tuple[str, float, str]] = []
    if baseline.gradient_width is not None:
        rows.append(("gradient", baseline.gradient_width.first, COLORS[1]))
    for report in schemes:
        rows.append((f"error of {report.scheme}", report.width.first, COLORS[3]))
    middle = min(schemes, key=lambda r: r.scheme != river.smoothed_at)
    rows.append(("random", float(np.median(middle.random_widths)), COLORS[7]))
    for name, tangent in river.tangents.items():
        rows.append((f"river: {name}", tangent.width.first, COLORS[0]))
    finite = [value for _, value, _ in rows if math.isfinite(value)]
    longest = max(finite, default=1.0)
    figure, axes = canvas(6.4, 1.0 + 0.3 * len(rows))
    for i, (_, value, color) in enumerate(reversed(rows)):
        axes.barh(i, value if math.isfinite(value) else 2 * longest, color=color, alpha=0.85)
        axes.annotate(f" {value:.3g}", (value if math.isfinite(value) else 2 * longest, i), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(finite, default=1.0) / 2, 4 * longest)
    axes.set_xlabel("width of the basin (units of w)")
    return figure


def layer_scatter(table: SensitivityTable, forecast: LayerForecast, *, tol: float) -> Figure:
    """Measured rise against ``kappa_rand`` of every layer, both axes logarithmic; negative rises are left out."""
    figure, axes = canvas()
    names = list(next(iter(forecast.kappa_rand.values())))
    for i, name in enumerate(names):
        points = [(row[name], table.rises[layer][name]) for layer, row in forecast.kappa_rand.items()]
        points = [(x, y) for x, y in points if x > 0 and math.isfinite(y) and y > 0]
        rank = forecast.rank_agreement[name]
        label = name if rank is None else f"{name}: rank correlation {rank:.2f}"
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, "o", ms=4, alpha=0.8, color=COLORS[i % len(COLORS)], label=label)
    # In a bowl the rise is tol * kappa^2: tol nats where the error is one width long.
    shown = [x for row in forecast.kappa_rand.values() for x in row.values() if x > 0]
    ends = [min(shown, default=0.1), max(shown, default=1.0)]
    axes.plot(ends, [tol * x * x for x in ends], color="k", ls="--", lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("kappa_rand of the layer (error in random basin widths)")
    axes.set_ylabel("measured rise (nats)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def pitch_curves(sweep: PitchSweep) -> Figure:
    """P(fail) by pitch: forecast, forecast with the slope, and Monte Carlo with its binomial spread."""
    figure, axes = canvas()
    xs = [row.factor for row in sweep.rows]
    axes.plot(xs, [row.probability for row in sweep.rows], color=COLORS[7], label="forecast, curvature alone")
    axes.plot(xs, [row.probability_with_slope for row in sweep.rows], color=COLORS[0], label="with the gradient")
    shares = [row.monte_carlo for row in sweep.rows]
    spread = [math.sqrt(max(p * (1 - p), 0.0) / sweep.num_draws) for p in shares]
    axes.errorbar(xs, shares, yerr=spread, fmt="o", color=COLORS[1], capsize=3, label="Monte Carlo")
    axes.set_xlabel("pitch / critical pitch")
    axes.set_ylabel("P(fail)")
    axes.legend(frameon=False)
    return figure
