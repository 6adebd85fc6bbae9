r"""Estimators of the mean sensitivity of a quantizer, the quantity that JacQuant's gain follows.

The mean-field quantizer is :math:`m(w) = E_r[Q(w + r) - r]` and its Jacobian, for uniform dither one step wide, is
exactly :math:`1\{q_{min} \le w \le q_{max}\}`: a hard step at the outermost *levels*. All functions work on one weight
matrix at a frozen scale and return sums per entry, which the caller averages over its groups.

Reference: JacQuant, arXiv:2605.25469; the closed forms are derived in ``docs/jacquant.md``.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fewbits.grids import AnyGrid, Codebook
from fewbits.surrogates._base import inside

Law = Literal["uniform", "triangular", "gaussian"]
DEFAULT_WIDTH: dict[str, float] = {"uniform": 1.0, "triangular": 2.0, "gaussian": 0.5}
"""Width of the dither in cells, by law: full width, full width, standard deviation."""


def check_law(law: str, law_width: float | None) -> None:
    """Refuse an unknown law or a width that is not positive."""
    if law not in get_args(Law):
        raise ValueError(f"law={law!r} is unknown; use one of {', '.join(get_args(Law))}")
    if law_width is not None and not (math.isfinite(law_width) and law_width > 0):
        raise ValueError(f"law_width={law_width} must be positive and finite; it is in cells")


def cell_width(v: Tensor, grid: AnyGrid) -> Tensor | float:
    """Local distance of the two levels around ``v`` in units of the scale (the step of a uniform grid)."""
    if not isinstance(grid, Codebook):
        return grid.step
    table = torch.tensor(grid.codebook, dtype=v.dtype, device=v.device)
    lower = (torch.bucketize(v.contiguous(), table, right=True) - 1).clamp(0, len(table) - 2)
    return table[lower + 1] - table[lower]


def dither_exact(v: Tensor, grid: AnyGrid, *, law: Law = "uniform", law_width: float | None = None) -> Tensor:
    r"""Expectation of the dither Jacobian, :math:`\frac{d}{dv} E_r Q(v + r)`, in closed form, per entry.

    With thresholds t, jumps :math:`j_t` (the gap of the two levels) and the density p of r it is
    :math:`\sum_t j_t\,p(t - v)`:

    ============== ============================================ =========================================
    ``uniform``    :math:`\sum_t j_t 1\{|t - v| < h/2\}/h`          h = full width; default one cell
    ``triangular`` :math:`\sum_t j_t (1 - |t - v|/h)_+ / h`        2 h = full width; default two cells
    ``gaussian``   :math:`\sum_t j_t\,\phi((t - v)/h)/h`           h = standard deviation; default half a cell
    ============== ============================================ =========================================

    The defaults are the natural ones: uniform gives the hard step :math:`1\{q_{min} \le v \le q_{max}\}` of a uniform
    grid, triangular (the sum of two such uniforms) a line that falls from 1 to 0 between the last threshold and one
    cell beyond it, Gaussian a smooth fall with a ripple of :math:`2 e^{-2\pi^2 h^2}` inside (h in cells: 1.4 % at 1/2,
    58 % at 1/4). On a codebook the cell is the local one.

    Args:
        v: latent weight in steps.
        grid: the level set.
        law: of the dither.
        law_width: width as in the table, in cells (the distance of neighbouring levels); None is the default.

    Raises:
        ValueError: for an unknown law or a width that is not positive.

    Example:
        >>> from fewbits.grids import HalfShifted
        >>> dither_exact(torch.tensor([0.0, 1.4, 1.6]), HalfShifted(2))
        tensor([1., 1., 0.])
        >>> dither_exact(torch.tensor([0.0, 1.4, 1.6]), HalfShifted(2), law="triangular")
        tensor([1.0000, 0.6000, 0.4000])
    """
    check_law(law, law_width)
    width = DEFAULT_WIDTH[law] if law_width is None else law_width
    if law == "uniform" and width == 1 and not isinstance(grid, Codebook):
        return inside(v, grid, "level").to(v.dtype)  # the same number, also where v - h/2 and v + h/2 are ties
    h = cell_width(v, grid) * (width / 2 if law == "triangular" else width)
    total = torch.zeros_like(v)
    for low, high in itertools.pairwise(grid.levels):
        total += (high - low) * _density(law, ((low + high) / 2 - v) / h)
    return total / h


def _density(law: Law, x: Tensor) -> Tensor:
    """Standard densities; an end point of the uniform one counts half, as in the limit of narrow smoothing."""
    if law == "uniform":
        return 0.5 * ((x.abs() < 0.5).to(x.dtype) + (x.abs() <= 0.5).to(x.dtype))
    if law == "triangular":
        return (1 - x.abs()).clamp_min(0)
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def probe_products(
    v: Tensor,
    scale: Tensor,
    grid: AnyGrid,
    *,
    sigma: Tensor | float,
    num_probes: int,
    generator: torch.Generator,
    common_dither: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Numerator and denominator per entry of :math:`\langle Q(w + d + r) - Q(w + r), d\rangle / \|d\|^2`.

    Args:
        v: latent weight in steps, fp32.
        scale: units of ``w`` per step, broadcastable to ``v``.
        grid: the level set.
        sigma: standard deviation of the Gaussian probe d in units of ``w``; broadcastable to ``v``.
        num_probes: how many probes are summed, >= 1.
        generator: a CPU generator of its own, so that the training stream stays untouched and devices agree.
        common_dither: add the same uniform dither r of one step to both terms (Lemma 3 of the paper).

    Returns:
        ``(sum of dq * d, sum of d * d)``, both of the shape of ``v``.
    """
    num, den = torch.zeros_like(v), torch.zeros_like(v)
    base = grid.project_(v.clone())
    for _ in range(num_probes):
        d = torch.randn(v.shape, generator=generator).to(v.device) * sigma
        start = v
        if common_dither:
            start = v + (torch.rand(v.shape, generator=generator).to(v.device) - 0.5) * cell_width(v, grid)
            base = grid.project_(start.clone())
        dq = (grid.project_(start + d / scale) - base) * scale
        num += dq * d
        den += d * d
    return num, den


def drift(w: Tensor, w_last: Tensor, scale: Tensor, grid: AnyGrid) -> float:
    r"""How far the weights moved since the last refresh: mean :math:`|w - w_{last}|` in cells.

    Args:
        w: latent weight now.
        w_last: latent weight at the last refresh, same shape.
        scale: units of ``w`` per step, broadcastable to ``w``, > 0.
        grid: the level set; a cell is its ``step`` times the scale.

    Example:
        >>> from fewbits.grids import Int
        >>> drift(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0]), torch.tensor(0.5), Int(2))
        0.5
    """
    return float(((w.float() - w_last.float()).abs() / (scale * grid.step)).mean())


def needs_refresh(w: Tensor, w_last: Tensor, scale: Tensor, grid: AnyGrid, *, drift_steps: float) -> bool:
    """Whether the mean drift since the last refresh exceeds ``drift_steps`` cells.

    A weight or a reference that is not finite always asks for a refresh (there is nothing to compare with yet).

    Example:
        >>> from fewbits.grids import Int
        >>> w, s = torch.tensor([0.0, 1.0]), torch.tensor(1.0)
        >>> needs_refresh(w + 0.1, w, s, Int(2), drift_steps=0.2), needs_refresh(w + 0.3, w, s, Int(2), drift_steps=0.2)
        (False, True)
    """
    return not drift(w, w_last, scale, grid) <= drift_steps
