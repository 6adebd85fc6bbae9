r"""Slow, readable twins of the fast paths: loops over single numbers, written from the definitions alone.

Nothing here calls the code that it checks: groups are found by index arithmetic, nearest levels by trying all of them
in exact rational arithmetic, packed bytes by one big integer per row, rotations by a dense matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fewbits.grids import AnyGrid, Binary

Layout = Literal["per_tensor", "per_channel", "per_group"]


def nearest_code(v: float, grid: AnyGrid) -> int:
    """The code whose level is nearest to ``v``, by trying all levels; ties go to the even code (binary: to +1).

    Example:
        >>> from fewbits.grids import HalfShifted, Int
        >>> nearest_code(0.5, Int(2)), nearest_code(1.0, HalfShifted(2)), nearest_code(0.0, Binary())
        (0, 0, 1)
    """
    distances = [abs(Fraction(v) - Fraction(level)) for level in grid.levels]
    best = min(distances)
    tied = [grid.qmin + i for i, distance in enumerate(distances) if distance == best]
    if len(tied) == 1:
        return tied[0]
    return max(tied) if isinstance(grid, Binary) else next(code for code in tied if code % 2 == 0)


def level_of(code: int, grid: AnyGrid) -> float:
    """The level of a code, in steps."""
    return grid.levels[code - grid.qmin]


def scale_index(row: int, column: int, layout: Layout, group_size: int | None) -> tuple[int, int]:
    """Which scale belongs to an entry of the weight."""
    if layout == "per_tensor":
        return 0, 0
    return (row, 0) if group_size is None else (row, column // group_size)


def quantize_loop(
    w: Tensor, scale: Tensor, grid: AnyGrid, layout: Layout, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and dequantized values of ``w`` at given scales ``(R, G)``, entry by entry.

    The quotient and the product are rounded to fp32, as the canonical order says; everything else is exact.

    Example:
        >>> from fewbits.grids import Int
        >>> codes, values = quantize_loop(torch.tensor([[-1.3, 2.0]]), torch.tensor([[0.5]]), Int(2), "per_channel")
        >>> codes.tolist(), values.tolist()
        ([[-2, 1]], [[-1.0, 0.5]])
    """
    codes = torch.zeros(w.shape, dtype=torch.int64)
    values = torch.zeros(w.shape, dtype=torch.float32)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            s = scale[scale_index(i, j, layout, group_size)]
            code = nearest_code((w[i, j].float() / s).item(), grid)
            codes[i, j] = code
            values[i, j] = s * torch.tensor(level_of(code, grid))
    return codes, values


def scale_gradient_loop(
    w: Tensor, grad: Tensor, scale: Tensor, grid: AnyGrid, layout: Layout, group_size: int | None = None
) -> Tensor:
    r"""LSQ's gradient of the scale, :math:`\frac{1}{\sqrt{n q_p}} \sum_j G_j (\ell_j - v_j 1\{v_j \text{ inside}\})`.

    Binary grids have no second term. Returned in float64, shape of ``scale``.

    Reference: arXiv:1902.08153.
    """
    low, high = grid.scale_edge
    total = torch.zeros(scale.shape, dtype=torch.float64)
    count = torch.zeros(scale.shape, dtype=torch.float64)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            at = scale_index(i, j, layout, group_size)
            v = (w[i, j].float() / scale[at].float()).item()
            slope = level_of(nearest_code(v, grid), grid)
            if grid.scale_gradient == "lsq" and low <= v <= high:
                slope -= v
            total[at] += grad[i, j].item() * slope
            count[at] += 1
    qp = max(1, math.floor(grid.levels[-1]))
    return total / (count * qp).sqrt()


def pack_loop(row: Sequence[int], num_bits: int, qmin: int) -> bytes:
    """One row as dense words of ``num_bits``: one big integer, least significant code first, little-endian.

    Example:
        >>> list(pack_loop([-2, -1, 0, 1], num_bits=2, qmin=-2))
        [228]
    """
    number = sum((code - qmin) << (i * num_bits) for i, code in enumerate(row))
    return number.to_bytes(-(-len(row) * num_bits // 8), "little")


def unpack_loop(data: bytes, width: int, num_bits: int, qmin: int) -> list[int]:
    """Inverse of :func:`pack_loop`."""
    number = int.from_bytes(data, "little")
    return [((number >> (i * num_bits)) & (2**num_bits - 1)) + qmin for i in range(width)]


def pack_trits_loop(row: Sequence[int]) -> bytes:
    """One ternary row, five trits a byte, first trit least significant; missing trits of the last byte are 0.

    Example:
        >>> list(pack_trits_loop([1, 1, 1, 1, 1, -1]))
        [242, 0]
    """
    return bytes(sum((code + 1) * 3**i for i, code in enumerate(row[at : at + 5])) for at in range(0, len(row), 5))


def dense_hadamard(n: int) -> Tensor:
    r"""Orthonormal Hadamard matrix :math:`H_{ij} = (-1)^{\mathrm{popcount}(i \wedge j)} / \sqrt n`, float64.

    Example:
        >>> (dense_hadamard(2) * 2**0.5).tolist()
        [[1.0, 1.0], [1.0, -1.0]]
    """
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(n)


def gaussian_distortion(levels: Sequence[float], scale: float) -> float:
    r""":math:`E (x - s\,q(x/s))^2` for x ~ N(0, 1), cell by cell in closed form.

    Example:
        >>> round(gaussian_distortion([-1.0, 1.0], math.sqrt(2 / math.pi)), 5)
        0.36338
    """
    points = [scale * level for level in levels]
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(points)), math.inf]
    total = 0.0
    for q, (a, b) in zip(points, pairwise(edges), strict=True):
        mass = _below(b) - _below(a)
        first = _density(a) - _density(b)
        second = mass - (_times_density(b) - _times_density(a))
        total += second - 2 * q * first + q * q * mass
    return total


def smoothed_sensitivity(v: float, grid: AnyGrid, sigma: float) -> float:
    r"""Slope of the quantizer after Gaussian smoothing: :math:`\sum_t \mathrm{jump}_t\,\varphi_\sigma(v - t)`.

    The mean of JacQuant's hard-quantizer probe; ``v`` and ``sigma`` in steps.

    Example:
        >>> from fewbits.grids import HalfShifted
        >>> round(smoothed_sensitivity(0.5, HalfShifted(2), 0.5), 3)
        0.977

    Reference: arXiv:2605.25469.
    """
    return sum((b - a) * _density((v - (a + b) / 2) / sigma) / sigma for a, b in pairwise(grid.levels))


def smoothed_inside(v: float, grid: AnyGrid, sigma: float) -> float:
    r""":math:`\Phi((l_{max} - v)/\sigma) - \Phi((l_{min} - v)/\sigma)`: the mean of the probe under common dither."""
    return _below((grid.levels[-1] - v) / sigma) - _below((grid.levels[0] - v) / sigma)


def stableqat_gain(v: float, grid: AnyGrid, amplitude: float, num_harmonics: int = 1) -> float:
    r"""StableQAT's gain inside the range, from the two levels (or the mirror image of the last two) around ``v``.

    :math:`g = (1 - S)/(1 + S)` with :math:`\delta` the distance to the nearest level over the cell's width.

    Example:
        >>> round(stableqat_gain(0.0, Binary(), 0.21), 6)
        1.0

    Reference: arXiv:2601.19320.
    """
    level = level_of(nearest_code(v, grid), grid)
    others = [x for x in grid.levels if (x > level if v > level else x < level)]
    gap = min((abs(x - level) for x in others), default=None)
    if gap is None:  # beyond an outermost level: the cell continues with the width of the last gap
        gap = min(abs(x - level) for x in grid.levels if x != level)
    delta = (v - level) / gap
    s = sum(
        math.sqrt(2) * math.pi * amplitude * (-1) ** m / (2 * m + 1) * math.cos((2 * m + 1) * math.pi * delta)
        for m in range(num_harmonics)
    )
    return (1 - s) / (1 + s)


def best_levels(
    x: Sequence[float], num_levels: int, weights: Sequence[float] | None = None
) -> tuple[list[float], float]:
    r"""The global minimum of one-dimensional k-means, by dynamic programming over all ways to cut the sorted values.

    :math:`D_k(j) = \min_{i < j} D_{k-1}(i) + \mathrm{cost}(i, j)` with the weighted squared distances of the values
    i..j-1 to their mean: the optimal cells are intervals.

    Args:
        x: values, finite.
        num_levels: K, at most as many as there are distinct values.
        weights: > 0, one per value; None is 1.

    Returns:
        Levels, ascending, and the weighted sum of squared distances.

    Example:
        >>> best_levels([0.0, 1.0, 10.0, 12.0], 2)
        ([0.5, 11.0], 2.5)
    """
    pairs = sorted(zip(x, weights or [1.0] * len(x), strict=True))

    def cell(i: int, j: int) -> tuple[float, float]:
        mass = math.fsum(h for _, h in pairs[i:j])
        mean = math.fsum(h * v for v, h in pairs[i:j]) / mass
        return mean, math.fsum(h * (v - mean) ** 2 for v, h in pairs[i:j])

    best: list[tuple[float, list[float]]] = [(0.0, []), *((math.inf, []) for _ in pairs)]
    for _ in range(num_levels):
        now: list[tuple[float, list[float]]] = [(math.inf, [])]
        for j in range(1, len(pairs) + 1):
            options = []
            for i in range(j):
                mean, cost = cell(i, j)
                options.append((best[i][0] + cost, [*best[i][1], mean]))
            now.append(min(options))
        best = now
    return best[-1][1], best[-1][0]


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _times_density(x: float) -> float:
    return x * _density(x) if math.isfinite(x) else 0.0


def _below(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
