r"""Two-dimensional loss slices through three points of weight space, e.g. (fp, PTQ, QAT), with a trajectory drawn in.

With points :math:`p_0, p_1, p_2` the plane is :math:`p_0 + x e_1 + y e_2`, where :math:`e_1` points from :math:`p_0`
to :math:`p_1` and :math:`e_2` is the part of :math:`p_2 - p_0` orthogonal to it, both of length 1: distances on the
picture are Euclidean distances between models. Reference: arXiv:2606.09012.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fewbits.geometry._result import HIDDEN, Result
from fewbits.geometry.directions import (
    Loss,
    Vector,
    combine,
    copy_of,
    difference,
    dot,
    loss_value,
    moving,
    norm,
    orthonormal,
    placed,
)


@dataclass(frozen=True, kw_only=True)
class PlanePoint(Result):
    """Coordinates in the plane and the distance ``residual`` to it, all in units of ``w``."""

    x: float
    y: float
    residual: float


@dataclass(frozen=True, kw_only=True)
class Plane(Result):
    """An orthonormal frame: ``origin``, ``e1``, ``e2`` are weight-sized; ``points`` are the three points in it."""

    origin: Vector = field(repr=False, metadata=HIDDEN)
    e1: Vector = field(repr=False, metadata=HIDDEN)
    e2: Vector = field(repr=False, metadata=HIDDEN)
    points: tuple[PlanePoint, ...]

    def project(self, point: Sequence[Tensor]) -> PlanePoint:
        r"""Orthogonal projection of a point: :math:`x = \langle p - p_0, e_1\rangle`, likewise ``y``.

        ``residual`` tells how much of the point the picture does not show; it is computed from what is left over, not
        as a difference of squares, so a point of the plane gets a residual near 0.
        """
        offset = difference(point, self.origin)
        x, y = dot(offset, self.e1), dot(offset, self.e2)
        rest = combine((1.0, offset), (-x, self.e1), (-y, self.e2))
        return PlanePoint(x=x, y=y, residual=norm(rest))

    def at(self, x: float, y: float) -> Vector:
        """The weights at plane coordinates ``(x, y)``."""
        return combine((1.0, self.origin), (x, self.e1), (y, self.e2))


@dataclass(frozen=True, kw_only=True)
class Slice2D(Result):
    """``losses[j][i]`` in nats at ``(xs[i], ys[j])``; the three points and the trajectory in the same coordinates."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    points: tuple[PlanePoint, ...]
    trajectory: tuple[PlanePoint, ...]


def plane_through(p0: Sequence[Tensor], p1: Sequence[Tensor], p2: Sequence[Tensor]) -> Plane:
    """The plane spanned by three points of weight space.

    Args:
        p0: origin, e.g. the full-precision weights.
        p1: second point, put on the positive x axis.
        p2: third point, put in the upper half plane.

    Raises:
        ValueError: if two points coincide or all three lie on a line.

    Example:
        >>> import torch
        >>> corner, right, top = ([torch.tensor(v)] for v in ([1.0, 1.0], [4.0, 1.0], [2.0, 5.0]))
        >>> plane = plane_through(corner, right, top)
        >>> [(round(p.x, 6), round(p.y, 6)) for p in plane.points]
        [(0.0, 0.0), (3.0, 0.0), (1.0, 4.0)]

    Reference: arXiv:2606.09012.
    """
    e1, e2 = orthonormal([difference(p1, p0), difference(p2, p0)])
    frame = Plane(origin=copy_of(p0), e1=e1, e2=e2, points=())
    return Plane(origin=frame.origin, e1=e1, e2=e2, points=tuple(frame.project(p) for p in (p0, p1, p2)))


def slice_2d(
    loss: Loss,
    params: Sequence[Tensor],
    plane: Plane,
    *,
    num_x: int = 25,
    num_y: int = 25,
    margin: float = 0.25,
    trajectory: Sequence[PlanePoint] = (),
    known: Mapping[tuple[int, int], float] | None = None,
    on_value: Callable[[int, int, float], None] | None = None,
) -> Slice2D:
    """Loss on a rectangular grid that holds the three points, the trajectory and a margin.

    Args:
        loss: loss closure, nats; called ``num_x * num_y`` times less what is known.
        params: parameter tensors; restored bit for bit.
        plane: from :func:`plane_through`.
        num_x: grid columns, at least 2.
        num_y: grid rows, at least 2.
        margin: blank border, as a share of the extent of the points on each axis, ``>= 0``.
        trajectory: points projected beforehand with ``plane.project``, so that no list of weights is held.
        known: losses of an interrupted run by ``(column, row)``; not computed again.
        on_value: called with ``(column, row, loss)`` after each evaluation, to save or to show progress.

    Raises:
        ValueError: for fewer than two columns or rows, or a negative margin.

    Example:
        >>> import torch
        >>> w = torch.zeros(2)
        >>> plane = plane_through([w], [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])])
        >>> slice_2d(lambda: (w * w).sum(), [w], plane, num_x=2, num_y=2, margin=0.0).losses
        ((0.0, 1.0), (1.0, 2.0))

    Reference: arXiv:2606.09012.
    """
    if num_x < 2 or num_y < 2:
        raise ValueError(f"a slice of {num_x} x {num_y} points is not a plane; use at least 2 x 2")
    if not margin >= 0:
        raise ValueError(f"margin={margin} must not be negative")
    marks = (*plane.points, *trajectory)
    xs = _axis([p.x for p in marks], num_x, margin)
    ys = _axis([p.y for p in marks], num_y, margin)
    rows = []
    with placed(params, plane.origin), moving(params) as move:
        for j, y in enumerate(ys):
            row = []
            for i, x in enumerate(xs):
                value = None if known is None else known.get((i, j))
                if value is None:
                    move((x, plane.e1), (y, plane.e2))
                    value = loss_value(loss)
                    if on_value is not None:
                        on_value(i, j, value)
                row.append(value)
            rows.append(tuple(row))
    return Slice2D(xs=xs, ys=ys, losses=tuple(rows), points=plane.points, trajectory=tuple(trajectory))


def _axis(values: Sequence[float], num: int, margin: float) -> tuple[float, ...]:
    if not all(map(math.isfinite, values)):
        raise ValueError("the trajectory leaves the finite numbers; drop the points after the divergence")
    low, high = min(values), max(values)
    border = margin * (high - low)
    return tuple(float(v) for v in np.linspace(low - border, high + border, num))
