r"""The exact recovery time in one dimension, where the straight-through recursion is a walk down a staircase.

On :math:`f(y) = \tfrac\mu2 \max(|y| - r, 0)^2` the gradient is read at the code, so it is constant while the code
stays: inside the cell of level :math:`q` every step moves ``y`` by :math:`\eta \mu (|q| - r)` toward 0. The number of
steps in a cell is a division, and the recovery time a sum of a few such numbers.
Reference: arXiv:2606.09012 (the recursion); the closed form is this project's.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TypeVar

Number = TypeVar("Number", float, Fraction)


def staircase_level(y: Number, *, pitch: Number, offset: Number) -> Number:
    r"""Nearest level :math:`h (k + \text{offset})` to ``y``, ties to even ``k``; exact for ``Fraction``.

    Example:
        >>> staircase_level(1.95, pitch=1.2, offset=0.0)
        2.4
    """
    return (round(y / pitch - offset) + offset) * pitch


def staircase_recovery(
    y0: Number,
    *,
    r: Number,
    radius: Number,
    mu: Number,
    pitch: Number,
    eta: Number,
    offset: Number,
    max_cells: int = 10_000,
) -> int | None:
    r"""Steps of :math:`y \leftarrow y - \eta f'(Q(y))` until :math:`|Q(y)| \le R`, without running them.

    In the cell of a level :math:`q` with :math:`|q| > R` the iterate passes the inner edge :math:`|q| - h/2` after

    .. math:: N = \Bigl\lfloor \frac{|y| - (|q| - h/2)}{\eta \mu (|q| - r)} \Bigr\rfloor + 1

    steps (``N - 1`` if it lands exactly on the edge and the tie rounds inward); then the next cell is looked up. With
    ``fractions.Fraction`` arguments the count is exact; with floats it may be off by one where a step ends on an edge.

    Args:
        y0: start.
        r: half-width of the flat floor, positive.
        radius: :math:`R > r`; a level within it is recovered.
        mu: wall stiffness, positive.
        pitch: :math:`h`, distance of levels, positive.
        eta: step size, positive.
        offset: phase of the grid in steps; levels are ``pitch * (k + offset)``.
        max_cells: cells visited before the walk counts as an oscillation (a step size so large that it jumps over the
            floor for ever).

    Returns:
        The number of steps, or ``None``: never, because no level lies in ``[-R, R]`` or the walk oscillates.

    Raises:
        ValueError: for arguments outside these ranges.

    Example:
        >>> staircase_recovery(1.95, r=1.0, radius=2.0, mu=1.0, pitch=1.2, eta=0.01537, offset=0.0)
        7
    """
    if not 0 < r < radius or not mu > 0 or not pitch > 0 or not eta > 0:
        raise ValueError(f"need 0 < r={r} < radius={radius} and positive mu={mu}, pitch={pitch}, eta={eta}")
    if not has_level_inside(radius, pitch=pitch, offset=offset):
        return None
    y, steps = y0, 0
    for _ in range(max_cells):
        level = staircase_level(y, pitch=pitch, offset=offset)
        if abs(level) <= radius:
            return steps
        sign = 1 if level > 0 else -1
        stride = eta * mu * (abs(level) - r)
        depth = sign * y - (abs(level) - pitch / 2)
        count = math.floor(depth / stride)
        # Landing exactly on the edge leaves the cell only if the tie rounds to the inner code.
        on_edge = y - sign * count * stride
        if staircase_level(on_edge, pitch=pitch, offset=offset) == level:
            count += 1
        y, steps = y - sign * count * stride, steps + count
    return None


def has_level_inside(radius: Number, *, pitch: Number, offset: Number) -> bool:
    r"""Whether some level :math:`h (k + \text{offset})` lies in :math:`[-R, R]`; else nobody can recover.

    At random phase the probability is :math:`\min(1, 2R/h)` (:func:`~fewbits.geometry.basin.hit_probability`).

    Example:
        >>> has_level_inside(0.4, pitch=1.0, offset=0.5), has_level_inside(0.5, pitch=1.0, offset=0.5)
        (False, True)
    """
    return math.floor(radius / pitch - offset) >= math.ceil(-radius / pitch - offset)
