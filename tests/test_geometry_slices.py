"""Profiles, widths, noise floors and planes against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.geometry import (
    Profile,
    combine,
    gradient,
    noise_floor,
    norm,
    plane_through,
    profile,
    quadratic_width,
    slice_2d,
    width,
)

F64 = torch.float64


def test_profile_samples_the_line_and_restores() -> None:
    w = torch.tensor([1.0, 2.0], dtype=F64)
    found = profile(lambda: (w * w).sum(), [w], [torch.tensor([1.0, 0.0], dtype=F64)], [2.0, -1.0, 0.0])
    assert found.losses == (13.0, 4.0, 5.0)
    assert found.ts == (2.0, -1.0, 0.0)
    assert found.origin_loss == 5.0
    assert w.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="empty"):
        profile(lambda: w.sum(), [w], [w], [])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(curvature=st.floats(1e-4, 1e4), tol=st.floats(1e-3, 1.0), slope=st.floats(-1.0, 1.0), start=st.floats(1e-3, 1e3))
def test_width_of_a_quadratic_is_the_closed_form(curvature: float, tol: float, slope: float, start: float) -> None:
    w = torch.zeros(1, dtype=F64)
    d = [torch.ones(1, dtype=F64)]

    def loss() -> torch.Tensor:
        return (slope * w + 0.5 * curvature * w * w).sum()

    plain = width(loss, [w], d, tol=tol, start=start, max_distance=1e6, num_bisections=30)
    assert plain.plus.t == pytest.approx(quadratic_width(tol, curvature, slope=slope), rel=1e-7)
    assert plain.minus.t == pytest.approx(quadratic_width(tol, curvature, slope=-slope), rel=1e-7)
    curved = width(loss, [w], d, tol=tol, start=start, max_distance=1e6, num_bisections=30, slope=slope)
    assert curved.plus.t == pytest.approx(quadratic_width(tol, curvature), rel=1e-7)
    assert curved.minus.t == pytest.approx(curved.plus.t, rel=1e-7)


def test_twelve_bisections_bracket_the_wall_to_four_digits_in_about_twenty_forwards() -> None:
    w = torch.zeros(3, dtype=F64)
    calls = 0

    def loss() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (w.norm() > 0.7351).to(F64)

    found = width(loss, [w], [torch.ones(3, dtype=F64)], tol=0.5)
    assert found.plus.below < 0.7351 < found.plus.above
    assert (found.plus.above - found.plus.below) / found.plus.t < 2**-11
    assert found.plus.num_evaluations <= 20
    assert calls == 1 + found.plus.num_evaluations + found.minus.num_evaluations
    assert w.tolist() == [0, 0, 0]


def test_the_two_sides_may_differ_and_the_nearer_wall_comes_first() -> None:
    w = torch.zeros(1, dtype=F64)
    found = width(lambda: torch.where(w > 0, w * 10, -w).sum(), [w], [torch.ones(1, dtype=F64)], tol=1.0)
    assert found.plus.t == pytest.approx(0.1, rel=1e-3)
    assert found.minus.t == pytest.approx(1.0, rel=1e-3)
    assert found.first == found.plus.t


def test_the_direction_is_normalized() -> None:
    w = torch.zeros(4, dtype=F64)
    found = width(lambda: (w.norm() > 3).to(F64), [w], [torch.full((4,), 0.01, dtype=F64)], tol=0.5)
    assert found.first == pytest.approx(3, rel=1e-3)


def test_a_flat_direction_has_infinite_width_up_to_the_limit() -> None:
    w = torch.zeros(2)
    found = width(lambda: w[0] * w[0], [w], [torch.tensor([0.0, 1.0])], tol=0.1, max_distance=10.0)
    assert found.first == math.inf
    assert found.plus.below == 10.0


def test_nan_and_inf_count_as_outside() -> None:
    w = torch.zeros(1)
    for value in (math.nan, math.inf):
        found = width(
            lambda value=value: torch.where(w.abs() > 1, torch.tensor(value), w * 0).sum(),
            [w],
            [torch.ones(1)],
            tol=0.1,
        )
        assert found.plus.t == pytest.approx(1, rel=1e-3)
    with pytest.raises(ValueError, match="start is nan"):
        width(lambda: w.sum() * math.nan, [w], [torch.ones(1)], tol=0.1)


def test_a_wall_at_the_origin_gives_a_width_near_zero() -> None:
    w = torch.zeros(1, dtype=F64)
    found = width(lambda: (w != 0).to(F64).sum(), [w], [torch.ones(1, dtype=F64)], tol=0.5)
    assert 0 < found.first < 1e-10
    assert found.plus.below == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"tol": 0.0}, "tol"), ({"tol": 0.1, "start": 0.0}, "start"), ({"tol": 0.1, "num_bisections": -1}, "bisections")],
)
def test_wrong_width_arguments_are_refused(kwargs: dict, message: str) -> None:
    w = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        width(lambda: w.sum(), [w], [torch.ones(1)], **kwargs)


def test_a_dense_profile_sees_the_bump_that_doubling_jumps_over() -> None:
    w = torch.zeros(1, dtype=F64)
    d = [torch.ones(1, dtype=F64)]

    def loss() -> torch.Tensor:
        return ((w - 1.5).abs() < 0.1).to(F64).sum() + (w > 4).to(F64).sum()

    assert width(loss, [w], d, tol=0.5, start=1.0).plus.t == pytest.approx(4, rel=1e-3)
    crossing = profile(loss, [w], d, [i / 50 for i in range(300)]).first_crossing(0.5)
    assert crossing == pytest.approx(1.4, abs=0.03)


def test_first_crossing_is_linear_between_samples_and_infinite_without_one() -> None:
    curve = Profile(ts=(-1.0, 0.0, 1.0, 2.0), losses=(9.0, 1.0, 1.5, 3.5), origin_loss=1.0)
    assert curve.first_crossing(1.5) == pytest.approx(1.5)
    assert curve.first_crossing(9.0) == math.inf
    assert Profile(ts=(1.0, 2.0), losses=(0.0, math.nan), origin_loss=0.0).first_crossing(1.0) == 2.0


def test_noise_floor_of_two_halves() -> None:
    # Half a and half b of a quadratic differ by a known linear term, so the differences are known exactly.
    w = torch.zeros(2, dtype=F64)
    tilt = torch.tensor([0.01, -0.02], dtype=F64)
    moves = [[torch.tensor(v, dtype=F64)] for v in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0])]
    found = noise_floor(lambda: (w * w).sum() + w @ tilt + 5, lambda: (w * w).sum() - w @ tilt, [w], moves)
    assert found.differences == pytest.approx((0.02, -0.04, -0.02))
    assert found.half_to_half_sd == pytest.approx(math.sqrt((4 + 16 + 4) / 3) * 1e-2)
    assert found.full_set_sd == found.half_to_half_sd / 2
    assert found.tolerance() == pytest.approx(3 * found.half_to_half_sd)
    assert found.tolerance(minimum=1.0) == 1.0
    with pytest.raises(ValueError, match="at least one"):
        noise_floor(lambda: w.sum(), lambda: w.sum(), [w], [])


def test_noise_of_the_full_set_is_half_the_half_to_half_noise() -> None:
    # Monte Carlo of the claim: per-sample rises are iid, a half is a mean of n of them.
    rises = torch.randn(4000, 2, 25, generator=torch.Generator().manual_seed(0), dtype=F64).mean(2)
    half_to_half = (rises[:, 0] - rises[:, 1]).square().mean().sqrt()
    assert rises.mean(1).std().item() == pytest.approx(half_to_half.item() / 2, rel=0.05)


def three_points() -> tuple[list[torch.Tensor], ...]:
    g = torch.Generator().manual_seed(3)
    return tuple([torch.randn(4, 3, generator=g, dtype=F64), torch.randn(2, generator=g, dtype=F64)] for _ in range(3))


def test_the_plane_holds_its_points_at_their_distances() -> None:
    p0, p1, p2 = three_points()
    plane = plane_through(p0, p1, p2)
    (a, b, c) = plane.points
    assert (a.x, a.y) == (0, 0)
    assert b.x == pytest.approx(norm(combine((1.0, p1), (-1.0, p0))))
    assert b.y == pytest.approx(0, abs=1e-12)
    assert c.y > 0
    assert math.hypot(c.x - b.x, c.y - b.y) == pytest.approx(norm(combine((1.0, p2), (-1.0, p1))))
    for point, mark in zip((p0, p1, p2), plane.points, strict=True):
        assert mark.residual < 1e-12
        assert norm(combine((1.0, plane.at(mark.x, mark.y)), (-1.0, point))) < 1e-12


def test_projection_is_the_nearest_point_of_the_plane() -> None:
    plane = plane_through(*three_points())
    outside = three_points()[0]
    outside[0][0, 0] += 5
    mark = plane.project(outside)

    def distance(x: float, y: float) -> float:
        return norm(combine((1.0, plane.at(x, y)), (-1.0, outside)))

    assert distance(mark.x, mark.y) == pytest.approx(mark.residual)
    assert all(distance(mark.x + dx, mark.y + dy) > mark.residual for dx in (-0.1, 0.1) for dy in (-0.1, 0.1))


def test_a_line_is_not_a_plane() -> None:
    p0, p1, _ = three_points()
    with pytest.raises(ValueError, match="span"):
        plane_through(p0, p1, combine((2.0, p1), (-1.0, p0)))


def test_a_slice_has_the_losses_of_its_points_and_draws_the_trajectory() -> None:
    p0, p1, p2 = three_points()
    w = [torch.zeros_like(x) for x in p0]

    def loss() -> torch.Tensor:
        return sum((x * x).sum() for x in w)

    plane = plane_through(p0, p1, p2)
    track = [plane.project(combine((1 - s, p0), (s, p2))) for s in (0.0, 0.5, 3.0)]
    seen: list[tuple[int, int, float]] = []
    found = slice_2d(
        loss, w, plane, num_x=5, num_y=4, trajectory=track, on_value=lambda i, j, v: seen.append((i, j, v))
    )
    assert (len(found.losses), len(found.losses[0])) == (4, 5)
    assert found.xs[0] < min(p.x for p in (*plane.points, *track))
    assert found.ys[-1] > track[-1].y
    for j, y in enumerate(found.ys):
        for i, x in enumerate(found.xs):
            assert found.losses[j][i] == pytest.approx(norm(plane.at(x, y)) ** 2, rel=1e-12)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in w)
    assert len(seen) == 20

    again: list[tuple[int, int, float]] = []
    resumed = slice_2d(
        loss,
        w,
        plane,
        num_x=5,
        num_y=4,
        trajectory=track,
        known={(i, j): v for i, j, v in seen[:13]},
        on_value=lambda i, j, v: again.append((i, j, v)),
    )
    assert resumed == found
    assert again == seen[13:]


def test_wrong_slices_are_refused() -> None:
    plane = plane_through(*three_points())
    w = three_points()[0]
    with pytest.raises(ValueError, match="at least 2"):
        slice_2d(lambda: w[0].sum(), w, plane, num_x=1)
    with pytest.raises(ValueError, match="margin"):
        slice_2d(lambda: w[0].sum(), w, plane, margin=-0.1)
    far = plane.project([w[0] * math.inf, w[1]])
    with pytest.raises(ValueError, match="finite"):
        slice_2d(lambda: w[0].sum(), w, plane, trajectory=[far])


def test_width_along_the_gradient_uses_the_curved_part_only() -> None:
    w = torch.tensor([1.0, -2.0], dtype=F64)
    curvature = torch.tensor([3.0, 0.5], dtype=F64)

    def loss() -> torch.Tensor:
        return 0.5 * (curvature * w * w).sum()

    g = gradient(loss, [w])
    slope = norm(g)
    unit = g[0] / slope
    found = width(loss, [w], g, tol=0.01, slope=slope)
    assert found.first == pytest.approx(quadratic_width(0.01, float(unit @ (curvature * unit))), rel=1e-3)
