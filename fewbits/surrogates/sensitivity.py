r"""Estimators of the mean sensitivity of a quantizer, the quantity that JacQuant's gain follows.

The mean-field quantizer is :math:`m(w) = E_r[Q(w + r) - r]` and its Jacobian, for uniform dither one step wide, is
exactly :math:`1\{q_{min} \le w \le q_{max}\}`: a hard step at the outermost *levels*. All functions work on one weight
matrix at a frozen scale and return sums per entry, which the caller averages over its groups.

Reference: JacQuant, arXiv:2605.25469; the closed forms are derived in ``docs/jacquant.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.grids import AnyGrid, Codebook


def cell_width(v: Tensor, grid: AnyGrid) -> Tensor | float:
    """Local distance of the two levels around ``v`` in units of the scale (the step of a uniform grid)."""
    if not isinstance(grid, Codebook):
        return grid.step
    table = torch.tensor(grid.codebook, dtype=v.dtype, device=v.device)
    lower = (torch.bucketize(v, table, right=True) - 1).clamp(0, len(table) - 2)
    return table[lower + 1] - table[lower]


def dither_exact(v: Tensor, grid: AnyGrid) -> Tensor:
    r"""Expectation of the uniform-dither Jacobian, without noise: :math:`[Q(v + h/2) - Q(v - h/2)]/h`, per entry.

    On a uniform grid this is :math:`1\{q_{min} \le v \le q_{max}\}`, and is computed as such: for a weight exactly on
    a level (a zero weight, say) both terms sit on ties, and half-to-even would make the difference 0 or 2. On a
    codebook it is the secant slope over the local cell of width h, a tie counting half for either side.

    Example:
        >>> from fewbits.grids import HalfShifted
        >>> dither_exact(torch.tensor([0.5, 1.4, 1.6]), HalfShifted(2))
        tensor([1., 1., 0.])
    """
    if not isinstance(grid, Codebook):
        low, high = grid.level_edge
        return ((v >= low) & (v <= high)).to(v.dtype)
    table = torch.tensor(grid.codebook, dtype=v.dtype, device=v.device)
    middle = (table[1:] + table[:-1]) / 2

    def nearest(x: Tensor) -> Tensor:
        return (table[torch.bucketize(x, middle)] + table[torch.bucketize(x, middle, right=True)]) / 2

    h = cell_width(v, grid)
    return (nearest(v + h / 2) - nearest(v - h / 2)) / h


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
