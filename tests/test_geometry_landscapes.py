"""B-T1 to B-T5, B-T7 and B-T8 of the specification, and the exact recovery times in one dimension."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.geometry import (
    FactorizationRun,
    RadialWall,
    RecoveryTheorem,
    Valley,
    factorization_run,
    gradient,
    has_level_inside,
    hessian_operator,
    hvp,
    inward_slope,
    nearest,
    river_direction,
    smoothed_operator,
    staircase_level,
    staircase_recovery,
    straight_through,
    top_eigenpairs,
    width,
)
from fewbits.geometry.synthetic import factorization_gradient, factorization_loss

F64 = torch.float64
X = Valley()  # instance X of the specification


def point(*xs: float) -> torch.Tensor:
    return torch.tensor(xs, dtype=F64)


def square_grid(low: int, high: int) -> torch.Tensor:
    axis = torch.arange(low, high + 1, dtype=F64)
    return torch.cartesian_prod(axis, axis)


def test_the_constants_of_instance_x() -> None:
    assert X.radius == pytest.approx(0.6, abs=1e-12)
    assert X.c_perp == pytest.approx(1.0, abs=1e-12)
    assert X.alpha == pytest.approx(0.3660, abs=5e-5)
    assert X.delta == pytest.approx(1.3660, abs=5e-5)
    assert float(X(X.w_fp)) == pytest.approx(0, abs=1e-30)
    assert float(X.tau @ X.nu) == pytest.approx(0, abs=1e-16)


@pytest.mark.parametrize("landscape", [X, RadialWall(r=0.7, radius=1.5, mu=3.0)])
def test_closed_form_gradients_match_autograd(landscape: Valley | RadialWall) -> None:
    w = (2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=F64)).requires_grad_()
    (wanted,) = torch.autograd.grad(landscape(w).sum(), w)
    torch.testing.assert_close(landscape.gradient(w.detach()), wanted, rtol=0, atol=1e-13)


def test_the_tube_is_flat_and_the_wall_outside_pushes_in() -> None:
    w = 1.5 * torch.randn(4000, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    t, z = X.coordinates(w)
    on_river = w - z[:, None] * X.nu
    inside = X.inside(w)
    assert 0.2 < inside.double().mean() < 0.9
    assert ((X(w) - X(on_river)).abs()[inside] <= X.eps + 1e-12).all()
    push = (X.gradient(w) @ X.nu) * z.sign()
    assert (push[~inside] >= X.c_perp - 1e-12).all()
    assert t.shape == z.shape == inside.shape


def test_bt1_widths_across_and_along_the_river() -> None:
    w = X.w_fp
    across = width(lambda: X(w), [w], [X.nu], tol=X.eps, num_bisections=45)
    along = width(lambda: X(w), [w], [X.tau], tol=X.eps, num_bisections=45)
    for side in (across.plus, across.minus):
        assert side.t == pytest.approx(0.6, abs=1e-9)
    for side in (along.plus, along.minus):
        assert side.t == pytest.approx(math.sqrt(2 * X.eps), abs=1e-9)
    assert along.first == pytest.approx(0.316228, abs=1e-6)


@pytest.mark.parametrize(("mu", "gap"), [(10.0, 3.7165), (20.0, 7.4665), (40.0, 14.9665)])
def test_bt2_the_hessian_proxy_picks_a_codeword_beyond_the_wall(mu: float, gap: float) -> None:
    valley = Valley(mu=mu)
    grid = square_grid(-1, 1)
    picked = grid[valley.proxy(grid).argmin()]
    assert picked.tolist() == [0, 1]
    assert not valley.inside(picked)
    assert valley.inside(point(1, 0))
    found = float(valley(picked) - valley(point(1, 0)))
    assert found == pytest.approx(gap, abs=1e-4)
    closed = 0.5 * (valley.alpha - valley.u) ** 2 + mu / 2 * (valley.delta - valley.r) ** 2 - valley.u**2 / 2
    assert found == pytest.approx(closed, abs=1e-12)


def test_bt2_the_proxy_is_the_quadratic_form_of_the_hessian_at_the_minimum() -> None:
    w = X.w_fp
    for q in square_grid(-1, 1):
        e = [q - w]
        (image,) = hvp(lambda: X(w), [w], e)
        assert float(X.proxy(q)) == pytest.approx(0.5 * float(image @ e[0]), abs=1e-12)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    theta=st.floats(math.pi / 6, math.pi / 4 - 0.02),
    share=st.floats(0.05, 0.95),
    mu=st.floats(1.0, 50.0),
    reach=st.integers(1, 8),
)
def test_every_proxy_minimiser_is_far_outside_at_all_bit_widths(
    theta: float, share: float, mu: float, reach: int
) -> None:
    alpha = math.cos(theta) - math.sin(theta)
    valley = Valley(theta=theta, u=alpha * (1 + share) / 2, mu=mu, r=0.3, eps=0.01)
    grid = square_grid(-reach, reach)
    values = valley.proxy(grid)
    best = grid[values <= values.min() + 1e-12]
    z = valley.coordinates(best)[1].abs()
    assert (z >= (valley.radius + valley.delta) / 2 - 1e-9).all()
    assert valley.inside(point(1, 0))


@pytest.mark.parametrize(
    ("code", "cosine", "slope"), [((0, 1), 0.999944, 8.660), ((1, -1), 0.9981, 3.660), ((2, 1), 0.0, 0.0)]
)
def test_bt3_the_inward_slope_outside_and_inside(code: tuple[int, int], cosine: float, slope: float) -> None:
    w, q = X.w_fp, point(*code)
    _, z = X.coordinates(q)
    # Away from the river: q minus its projection.
    found = inward_slope(lambda: X(w), [w], [q], [z * X.nu])
    assert found.slope == pytest.approx(slope, abs=5e-4)
    assert found.cosine == pytest.approx(cosine, abs=5e-5)
    assert bool(X.inside(q)) == (slope == 0)
    assert (found.slope >= X.c_perp) != bool(X.inside(q))


@pytest.mark.parametrize(("eta", "steps"), [(1e-3, 19), (1e-2, 2)])
def test_bt4_straight_through_recovers_and_full_precision_does_not(eta: float, steps: int) -> None:
    start = X.w_fp - 0.49 * X.nu
    assert nearest(start).tolist() == [1, -1]
    assert float(X(nearest(start))) == pytest.approx(0.6953, abs=5e-5)
    run = straight_through(X.gradient, nearest, X.inside, start, eta=eta, num_steps=1000)
    assert int(run.steps) == steps
    assert run.trajectory.shape == (steps + 1, 2)
    assert float(X(nearest(run.final))) == pytest.approx(0.0377, abs=5e-5)
    # The control: as much full-precision training as you like, then the same rounding.
    control = straight_through(X.gradient, lambda w: w, lambda w: torch.tensor(False), start, eta=eta, num_steps=3000)
    assert float(X(nearest(control.final))) == pytest.approx(0.6953, abs=5e-5)
    assert float(X(control.final)) < 1e-6


@pytest.mark.parametrize(("dim", "pitch"), [(4, 0.3), (16, 0.1)])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_bt5_the_recovery_bound_holds_and_the_distance_falls(dim: int, pitch: float, share: float) -> None:
    wall = RadialWall(r=1.0, radius=2.0, mu=1.0)
    exact = wall.theorem(pitch=pitch, dim=dim)
    generic = RecoveryTheorem(
        c_perp=exact.c_perp, radius=exact.radius, rho=exact.rho, grad_bound=exact.grad_bound, lipschitz_projection=1.0
    )
    g = torch.Generator().manual_seed(dim)
    y = torch.randn(8000, dim, generator=g, dtype=F64)
    y = y / y.norm(dim=1, keepdim=True) * (2 - 0.3 * torch.rand(8000, 1, generator=g, dtype=F64) ** 2)
    y = y[~wall.inside(nearest(y, pitch))]
    assert len(y) > 500
    for theorem, tightest in ((exact, 0.6), (generic, 0.25)):
        eta = share * theorem.max_eta
        run = straight_through(
            wall.gradient, lambda w: nearest(w, pitch), wall.inside, y, eta=eta, num_steps=int(200 / share)
        )
        assert (run.steps > 0).all()
        bound = torch.tensor([theorem.bound(min(size, 2.0), eta) for size in y.norm(dim=1).tolist()])
        ratio = run.steps / bound
        assert (ratio <= 1).all()
        assert ratio.max() < tightest  # loose, and looser with the generic Lipschitz constant 1
        sizes = run.trajectory.norm(dim=-1)
        before = torch.arange(len(sizes) - 1)[:, None] < run.steps
        assert (sizes[1:] < sizes[:-1])[before].all()


def stratified_deltas(s: float, num: int) -> list[list[torch.Tensor]]:
    """Gaussian displacements across and along the river at mid-quantiles: an integral, not a sample."""
    quantiles = torch.special.ndtri((torch.arange(num, dtype=F64) + 0.5) / num) * s
    return [[z * X.nu + t * X.tau] for z, t in zip(quantiles, quantiles.flip(0).roll(num // 3), strict=True)]


@pytest.mark.parametrize(("s", "normal"), [(0.1, 0.0), (0.3, 0.96), (0.6, 4.05), (1.0, 6.17)])
def test_bt7_smoothing_sees_the_wall_that_the_raw_hessian_misses(s: float, normal: float) -> None:
    w = X.w_fp
    operator = smoothed_operator(lambda: X(w), [w], stratified_deltas(s, 300))
    river, wall = float(operator([X.tau])[0] @ X.tau), float(operator([X.nu])[0] @ X.nu)
    assert wall == pytest.approx(normal, abs=0.05)
    assert river == pytest.approx(1, abs=1e-9)
    assert X.smoothed_curvature(s) == pytest.approx((1.0, normal), abs=0.006)
    assert wall == pytest.approx(X.smoothed_curvature(s)[1], abs=0.05)


def test_bt7_the_raw_hessian_has_the_order_reversed() -> None:
    w = X.w_fp
    (along,), (across,) = hvp(lambda: X(w), [w], [X.tau]), hvp(lambda: X(w), [w], [X.nu])
    torch.testing.assert_close(along, X.tau, rtol=0, atol=1e-12)
    torch.testing.assert_close(across, torch.zeros(2, dtype=F64), rtol=0, atol=1e-12)
    assert X.smoothed_curvature(0.0) == (1.0, 0.0)


@pytest.mark.parametrize(("mu", "accepted"), [(10.0, False), (1000.0, True)])
def test_the_smoothed_split_finds_the_river_of_the_valley(mu: float, accepted: bool) -> None:
    valley = Valley(mu=mu)
    w = valley.w_fp + 0.2 * valley.tau
    operator = smoothed_operator(lambda: valley(w), [w], stratified_deltas(1.0, 200))
    top = top_eigenpairs(operator, [w], 1, generator=torch.Generator().manual_seed(0))
    assert abs(float(top.vectors[0][0] @ valley.nu)) == pytest.approx(1, abs=1e-6)
    found = river_direction(gradient(lambda: valley(w), [w]), top.vectors, operator, largest_eigenvalue=top.values[0])
    assert abs(float(found.tangent[0] @ valley.tau)) == pytest.approx(1, abs=1e-6)
    assert found.curvature == pytest.approx(1, abs=1e-6)
    # The river of instance X has curvature 1 against a wall of 6: a ratio of 1e-2 asks for stiffer walls.
    assert found.accepted is accepted
    # The raw Hessian would have called the river the normal direction.
    raw = top_eigenpairs(hessian_operator(lambda: valley(w), [w]), [w], 1, generator=torch.Generator().manual_seed(0))
    assert abs(float(raw.vectors[0][0] @ valley.tau)) == pytest.approx(1, abs=1e-6)


@pytest.fixture(scope="module")
def twenty_seeds() -> list[FactorizationRun]:
    return [factorization_run(np.random.default_rng(seed)) for seed in range(20)]


def test_bt8_the_published_factorization_run(twenty_seeds: list[FactorizationRun]) -> None:
    # Golden numbers of arXiv:2606.09012, Example 2; numpy default_rng(0) reproduces every digit.
    run = twenty_seeds[0]
    assert run.fp_loss < 1e-20
    assert run.ptq_loss == pytest.approx(0.7502, abs=5e-5)
    assert run.qat_loss == pytest.approx(0.2543, abs=5e-5)
    assert run.ptq_norm == pytest.approx(0.474, abs=5e-4)
    assert run.qat_norm == pytest.approx(0.594, abs=5e-4)
    assert run.angle_deg == pytest.approx(95.3, abs=0.05)


def test_bt8_over_twenty_seeds_the_published_one_is_favourable(twenty_seeds: list[FactorizationRun]) -> None:
    def values(name: str) -> list[float]:
        return [getattr(run, name) for run in twenty_seeds]

    assert np.mean(values("ptq_loss")) == pytest.approx(0.517, abs=0.005)
    assert np.mean(values("qat_loss")) == pytest.approx(0.248, abs=0.005)
    assert np.mean(values("best_qat_loss")) == pytest.approx(0.166, abs=0.005)
    assert np.mean(values("angle_deg")) == pytest.approx(87, abs=1)
    assert np.std(values("ptq_loss")) == pytest.approx(0.18, abs=0.01)
    assert np.std(values("qat_loss")) == pytest.approx(0.064, abs=0.005)
    assert np.mean(values("reduction")) == pytest.approx(0.44, abs=0.01)
    assert twenty_seeds[0].reduction > 0.66
    assert sum(run.reduction < 0 for run in twenty_seeds) == 2
    assert all(run.best_qat_loss < run.ptq_loss for run in twenty_seeds)


def test_the_factorization_gradient_matches_a_difference() -> None:
    rng = np.random.default_rng(3)
    x, v = rng.standard_normal((6, 2)), rng.standard_normal((6, 2))
    target = np.diag([1.0, 1, 0, 0, 0, 0])
    slope = (factorization_loss(x + 1e-6 * v, target) - factorization_loss(x - 1e-6 * v, target)) / 2e-6
    assert float((factorization_gradient(x, target) * v).sum()) == pytest.approx(slope, rel=1e-7)
    with pytest.raises(ValueError, match="rank=7"):
        factorization_run(rng, dim=6, rank=7)


def walk(y: Fraction, *, r: Fraction, radius: Fraction, mu: Fraction, pitch: Fraction, eta: Fraction, offset: Fraction):
    """The recursion step by step, in exact arithmetic: the slow twin of the closed form."""
    for step in range(1500):
        q = (round(y / pitch - offset) + offset) * pitch
        if abs(q) <= radius:
            return step
        y -= eta * mu * (abs(q) - r) * (1 if q > 0 else -1)
    return None


fractions = st.fractions(min_value=Fraction(1, 20), max_value=3, max_denominator=24)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    y=st.fractions(min_value=-8, max_value=8, max_denominator=24),
    r=fractions,
    extra=fractions,
    mu=fractions,
    pitch=fractions,
    eta=st.fractions(min_value=Fraction(1, 20), max_value=Fraction(1, 2), max_denominator=20),
    offset=st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(1, 3)]),
)
def test_the_exact_recovery_time_is_the_number_of_steps(
    y: Fraction, r: Fraction, extra: Fraction, mu: Fraction, pitch: Fraction, eta: Fraction, offset: Fraction
) -> None:
    arguments = {"r": r, "radius": r + extra, "mu": mu, "pitch": pitch, "eta": eta, "offset": offset}
    found = staircase_recovery(y, **arguments, max_cells=1500)
    wanted = walk(y, **arguments)
    if has_level_inside(r + extra, pitch=pitch, offset=offset):
        assert wanted == found or (wanted is None and (found is None or found >= 1500))
    else:
        assert wanted is None
        assert found is None


def test_the_worked_example_and_ties_at_a_cell_edge() -> None:
    example = {"r": 1.0, "radius": 2.0, "mu": 1.0, "pitch": 1.2, "eta": 0.01537, "offset": 0.0}
    assert staircase_recovery(1.95, **example) == 7
    # floor(0.15 / (0.01537 * 1.4)) + 1, by hand.
    assert math.floor((1.95 - 1.8) / (0.01537 * 1.4)) + 1 == 7
    wall = RadialWall(r=1.0, radius=2.0, mu=1.0)
    run = straight_through(
        wall.gradient, lambda y: nearest(y, 1.2), wall.inside, point(1.95), eta=0.01537, num_steps=50
    )
    assert int(run.steps) == 7
    # Landing exactly on an edge: 3 steps of 1/4 from 13/4 reach 5/2, which ties to the even code 2.
    edge = {"r": Fraction(1, 2), "radius": Fraction(2), "mu": Fraction(1), "pitch": Fraction(1), "offset": Fraction(0)}
    assert staircase_recovery(Fraction(13, 4), eta=Fraction(1, 10), **edge) == 3
    assert staircase_level(2.5, pitch=1.0, offset=0.0) == 2.0


def test_a_step_size_that_jumps_over_the_floor_never_recovers() -> None:
    # From 3 the step is 6 and lands on -3, and back.
    args = {"r": 1.0, "radius": 2.0, "mu": 1.0, "pitch": 1.0, "offset": 0.0}
    assert staircase_recovery(3.0, eta=3.0, **args, max_cells=50) is None
    assert staircase_recovery(3.0, eta=0.5, **args) is not None
    assert staircase_recovery(1.0, eta=0.5, **args) == 0
    with pytest.raises(ValueError, match="eta=0"):
        staircase_recovery(3.0, eta=0.0, **args)


def test_the_theorem_bounds_the_exact_time_in_one_dimension() -> None:
    wall = RadialWall(r=1.0, radius=2.0, mu=1.0)
    theorem = wall.theorem(pitch=1.2, dim=1)
    for eta in (0.001, 0.01537, 0.1, theorem.max_eta):
        for y in (1.81, 1.9, 1.95, 2.0):
            exact = staircase_recovery(y, r=1.0, radius=2.0, mu=1.0, pitch=1.2, eta=eta, offset=0.0)
            assert exact is not None
            assert 0 < exact <= theorem.bound(y, eta)
    assert theorem.bound(1.95, 0.01537) == pytest.approx(116.3, abs=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Valley(theta=0.1), "theta"),
        (lambda: Valley(u=0.1), "u=0.1"),
        (lambda: Valley(mu=0.0), "mu"),
        (lambda: Valley(r=2.0), "delta"),
        (lambda: RadialWall(r=2.0, radius=1.0), "radius"),
        (lambda: nearest(point(0.0), 0.0), "pitch"),
        (lambda: X.smoothed_curvature(-1.0), "s=-1"),
        (lambda: straight_through(X.gradient, nearest, X.inside, X.w_fp, eta=0.0, num_steps=1), "positive"),
        (lambda: straight_through(X.gradient, nearest, X.inside, X.w_fp, eta=[0.1], num_steps=2), "got 1"),
    ],
)
def test_constants_outside_the_statements_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
