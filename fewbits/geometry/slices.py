r"""Losses along lines of weight space: profiles, widths of the low-loss basin, the noise floor of the loss itself.

The *width* along a unit direction :math:`d` is the distance at which the loss has risen by more than ``tol``,

.. math:: R_d = \inf\{t > 0 : L(w + t d) - L(w) > \mathrm{tol}\},

in units of ``w``. Reference: arXiv:2606.09012 (its tube radius, measured on slices). Planes are in ``planes.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.geometry._result import Result
from fewbits.geometry.directions import Loss, Vector, loss_value, moving, norm, normalized

MAX_DOUBLINGS = 40
"""Halvings or doublings from the first probe; 2**40 spans every length that fp32 weights can express."""


@dataclass(frozen=True, kw_only=True)
class Profile(Result):
    """Loss along a line ``w + t * direction``; ``ts`` in units of the direction, ``losses`` in nats."""

    ts: tuple[float, ...]
    losses: tuple[float, ...]
    origin_loss: float

    def first_crossing(self, tol: float) -> float:
        """Smallest sampled ``t > 0`` at which the rise exceeds ``tol``, refined linearly; ``inf`` if it never does.

        Unlike :func:`width` it sees every bump that the sampling resolves.

        Example:
            >>> Profile(ts=(0.0, 1.0, 2.0), losses=(0.0, 1.0, 0.0), origin_loss=0.0).first_crossing(0.5)
            0.5
        """
        before_t, before_rise = 0.0, 0.0
        for t, value in sorted(zip(self.ts, self.losses, strict=True)):
            if t <= 0:
                continue
            rise = value - self.origin_loss
            if not rise <= tol:
                if not math.isfinite(rise):
                    return t
                return before_t + (t - before_t) * (tol - before_rise) / (rise - before_rise)
            before_t, before_rise = t, rise
        return math.inf


@dataclass(frozen=True, kw_only=True)
class Crossing(Result):
    """Where the loss first leaves the band on one side of a line; distances in units of ``w``.

    ``t`` is the middle of the last bracket ``(below, above)``: inside at ``below``, outside at ``above``. All of ``t``
    and ``above`` are ``inf`` if the loss was still inside at the largest distance tried, which is then ``below``.
    """

    t: float
    below: float
    above: float
    num_evaluations: int


@dataclass(frozen=True, kw_only=True)
class Width(Result):
    """Widths along ``+d`` and ``-d``; ``first`` is the smaller one, the distance to the nearer wall."""

    plus: Crossing
    minus: Crossing
    tol: float
    _derived: ClassVar[tuple[str, ...]] = ("first",)

    @property
    def first(self) -> float:
        """The smaller of the two widths, in units of ``w``."""
        return min(self.plus.t, self.minus.t)


@dataclass(frozen=True, kw_only=True)
class NoiseFloor(Result):
    """How far two disjoint halves of the data disagree about a rise in loss; all in nats.

    ``differences`` holds rise on half a minus rise on half b at each displacement, ``half_to_half_sd`` their root mean
    square (the true mean is zero), ``full_set_sd`` the standard error of the rise on both halves together, half of it.
    """

    differences: tuple[float, ...]
    half_to_half_sd: float
    full_set_sd: float

    def tolerance(self, *, minimum: float = 0.02, num_sd: float = 3.0) -> float:
        """Default ``tol``: the larger of ``minimum`` and ``num_sd`` half-to-half standard deviations, in nats.

        Example:
            >>> NoiseFloor(differences=(0.01, -0.01), half_to_half_sd=0.01, full_set_sd=0.005).tolerance()
            0.03
        """
        return max(minimum, num_sd * self.half_to_half_sd)


def profile(loss: Loss, params: Sequence[Tensor], direction: Sequence[Tensor], ts: Sequence[float]) -> Profile:
    r"""Sample :math:`L(w + t d)` at given ``ts``.

    Args:
        loss: loss closure, nats.
        params: parameter tensors; restored bit for bit.
        direction: :math:`d`, used as given (not normalized), so ``t = 1`` along a rounding error is the rounded model.
        ts: positions, dimensionless, any order and sign.

    Raises:
        ValueError: if ``ts`` is empty.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0])
        >>> profile(lambda: (w * w).sum(), [w], [torch.tensor([1.0])], [-1.0, 0.0, 1.0]).losses
        (0.0, 1.0, 4.0)

    Reference: arXiv:2606.09012.
    """
    if not ts:
        raise ValueError("ts is empty; give at least one position")
    origin = loss_value(loss)
    losses = []
    with moving(params) as move:
        for t in ts:
            move((float(t), direction))
            losses.append(loss_value(loss))
    return Profile(ts=tuple(float(t) for t in ts), losses=tuple(losses), origin_loss=origin)


def width(
    loss: Loss,
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    tol: float,
    start: float | None = None,
    max_distance: float | None = None,
    num_bisections: int = 12,
    slope: float = 0.0,
) -> Width:
    r"""Width of the basin along :math:`\pm d / \|d\|`: a geometric search, then bisection.

    From ``start`` the distance is doubled until the rise exceeds ``tol`` (or halved until it no longer does), and the
    bracket, whose ends differ by a factor 2, is bisected ``num_bisections`` times: relative precision
    :math:`2^{-\text{num\_bisections}-1}`. A bump that lies wholly between two doublings is missed; where that matters,
    sample a :func:`profile` and ask its ``first_crossing``. A loss that is not finite counts as outside.

    Args:
        loss: loss closure, nats; about 20 evaluations per side.
        params: parameter tensors; restored bit for bit.
        direction: any nonzero vector; normalized here, so widths are Euclidean lengths.
        tol: allowed rise, nats, positive.
        start: first distance, units of ``w``; default: an eighth of the norm of ``direction``.
        max_distance: give up beyond it; default: 1024 norms of ``direction``.
        num_bisections: 12 gives four digits.
        slope: :math:`\langle \nabla L(w), d / \|d\| \rangle`; subtracted as :math:`t \cdot` slope, so that at a point
            with a gradient only the curved part of the rise counts. 0 measures the plain rise.

    Returns:
        Both sides; ``inf`` where the loss never leaves the band.

    Raises:
        ValueError: for a ``tol``, ``start`` or ``max_distance`` that is not positive, a negative number of bisections,
            a direction without length, or a loss that is not finite at the start.

    Example:
        >>> import torch
        >>> w = torch.zeros(2, dtype=torch.float64)
        >>> found = width(lambda: 0.5 * (w * w).sum(), [w], [torch.ones(2, dtype=torch.float64)], tol=0.5)
        >>> round(found.plus.t, 3), round(found.first, 3)
        (1.0, 1.0)

    Reference: arXiv:2606.09012.
    """
    if not tol > 0:
        raise ValueError(f"tol={tol} nats must be positive; it is the rise in loss that still counts as the basin")
    if num_bisections < 0:
        raise ValueError(f"num_bisections={num_bisections} must not be negative")
    length = norm(direction)
    unit = normalized(direction)
    start = length / 8 if start is None else start
    max_distance = 1024 * length if max_distance is None else max_distance
    if not 0 < start <= max_distance:
        raise ValueError(f"start={start} must be positive and at most max_distance={max_distance}")
    origin = loss_value(loss)
    if not math.isfinite(origin):
        raise ValueError(f"the loss at the start is {origin}; a width needs a finite one")

    with moving(params) as move:

        def outside(signed: float) -> bool:
            move((signed, unit))
            # Written with "not <=" so that NaN is outside.
            return not loss_value(loss) - origin - signed * slope <= tol

        plus = _crossing(lambda t: outside(t), start, max_distance, num_bisections)
        minus = _crossing(lambda t: outside(-t), start, max_distance, num_bisections)
    return Width(plus=plus, minus=minus, tol=tol)


def _crossing(outside: Callable[[float], bool], start: float, max_distance: float, num_bisections: int) -> Crossing:
    below, above, count = 0.0, math.inf, 1
    if outside(start):
        above = start
        for _ in range(MAX_DOUBLINGS):
            count += 1
            if not outside(above / 2):
                below = above / 2
                break
            above /= 2
    else:
        below = start
        while below < max_distance and above == math.inf:
            t = min(2 * below, max_distance)
            count += 1
            if outside(t):
                above = t
            else:
                below = t
        if above == math.inf:
            return Crossing(t=math.inf, below=below, above=math.inf, num_evaluations=count)
    for _ in range(num_bisections):
        middle = (below + above) / 2
        count += 1
        if outside(middle):
            above = middle
        else:
            below = middle
    return Crossing(t=(below + above) / 2, below=below, above=above, num_evaluations=count)


def noise_floor(
    loss_a: Loss, loss_b: Loss, params: Sequence[Tensor], displacements: Sequence[Vector | Sequence[Tensor]]
) -> NoiseFloor:
    r"""Noise of a rise in loss, from two disjoint halves of the data.

    At each displacement :math:`\delta_i` both halves report their rise :math:`L(w + \delta_i) - L(w)`; the differences
    :math:`x_i` have mean zero, so the half-to-half standard deviation is :math:`\sqrt{\mathrm{mean}\, x_i^2}`. The rise
    on the full set, the mean of two halves, has a standard error of half that.

    Args:
        loss_a: loss on one half, nats.
        loss_b: loss on the other half, equally large.
        params: parameter tensors; restored bit for bit.
        displacements: vectors of the size that will be measured, e.g. the rounding error and a few random directions.

    Returns:
        The differences and their spread.

    Raises:
        ValueError: without displacements.

    Example:
        >>> import torch
        >>> w = torch.zeros(1)
        >>> floor = noise_floor(lambda: w.sum(), lambda: 2 * w.sum(), [w], [[torch.ones(1)], [-torch.ones(1)]])
        >>> floor.half_to_half_sd, floor.full_set_sd, floor.tolerance()
        (1.0, 0.5, 3.0)
    """
    if not displacements:
        raise ValueError("displacements is empty; the noise of a rise needs at least one")
    origin = loss_value(loss_a) - loss_value(loss_b)
    differences = []
    with moving(params) as move:
        for delta in displacements:
            move((1.0, delta))
            differences.append(loss_value(loss_a) - loss_value(loss_b) - origin)
    sd = math.sqrt(sum(x * x for x in differences) / len(differences))
    return NoiseFloor(differences=tuple(differences), half_to_half_sd=sd, full_set_sd=sd / 2)
