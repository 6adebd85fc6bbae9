"""Recovery times, half-times, displacements, the river split and the theorem's constants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.geometry import (
    RecoveryTheorem,
    Valley,
    combine,
    compare_displacements,
    dot,
    flip_rate,
    half_time,
    nearest,
    norm,
    random_vector,
    recovery_report,
    recovery_time,
    river_direction,
    split_displacement,
    straight_through,
)

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_recovery_is_the_first_entry_into_twice_the_tolerance() -> None:
    steps, losses = [0, 5, 7, 9], [3.0, 1.21, 1.19, 5.0]
    assert recovery_time(steps, losses, reference=1.0, tol=0.1) == 7
    assert recovery_time(steps, losses, reference=1.0, tol=0.01) is None
    assert recovery_time(steps, losses, reference=3.0, tol=0.0) == 0
    assert recovery_time([0, 1], [math.nan, math.nan], reference=3.0, tol=1.0) is None


@settings(deadline=None, derandomize=True, max_examples=100)
@given(rate=st.floats(0.01, 1.0), floor=st.floats(-5, 5), height=st.floats(0.1, 10))
def test_half_time_of_an_exponential_is_log_two_over_the_rate(rate: float, floor: float, height: float) -> None:
    steps = list(range(2001))
    losses = [floor + height * math.exp(-rate * k) for k in steps]
    found = half_time(steps, losses)
    assert found is not None
    # Linear interpolation inside one step of a convex curve errs by less than rate / 8 steps.
    assert found == pytest.approx(math.log(2) / rate, abs=0.13 * rate + 1e-6)


def test_half_time_edge_cases() -> None:
    assert half_time([0, 1, 2], [1.0, 1.0, 1.0]) is None
    assert half_time([3], [1.0]) is None
    assert half_time([0, 100], [4.0, 0.0]) == 50
    assert half_time([0, 1, 2, 3], [4.0, 8.0, 0.0, 4.0]) == pytest.approx(1 + 6 / 8)
    for steps, losses, message in (([0, 1], [1.0], "equally many"), ([0, 0], [1.0, 1.0], "ascend"), ([], [], "least")):
        with pytest.raises(ValueError, match=message):
            half_time(steps, losses)


def test_the_report_on_a_real_recovery_deployed_first_in_the_valley() -> None:
    # Start on the river floor far up the valley: rounding is over the wall, and the latent loss has a long way to go.
    valley = Valley()
    start = valley.w_fp - 0.49 * valley.nu
    run = straight_through(
        valley.gradient, nearest, valley.inside, start, eta=1e-3, num_steps=60, stop_when_inside=False
    )
    deployed = valley(nearest(run.trajectory)).tolist()
    latent = valley(run.trajectory).tolist()
    found = recovery_report(list(range(61)), deployed, latent, reference=0.0, tol=valley.eps)
    assert found.recovery_step == 19 == int(run.steps)
    assert found.best_step == 19
    assert found.deployed_half_time == pytest.approx(18.5, abs=0.6)
    assert found.deployed_first is None  # the latent loss starts at its minimum and can only rise
    assert found.latent_half_time is None
    assert found.to_dict()["best_deployed"] == pytest.approx(0.0377, abs=5e-5)


def test_the_best_iterate_is_kept_beside_the_last() -> None:
    found = recovery_report([0, 1, 2, 3], [5.0, 1.0, 2.0, 3.0], [4.0, 4.0, 3.0, 0.0], reference=0.9, tol=0.1)
    assert (found.best_step, found.best_deployed, found.last_deployed) == (1, 1.0, 3.0)
    assert found.deployed_first is True
    assert found.recovery_step == 1


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 150.0, 180.0])
def test_angles_between_displacements(angle: float) -> None:
    radians = math.radians(angle)
    a = [torch.tensor([1.0], dtype=F64), torch.tensor([[0.0]], dtype=F64)]
    b = [torch.tensor([4 * math.cos(radians)], dtype=F64), torch.tensor([[4 * math.sin(radians)]], dtype=F64)]
    found = compare_displacements(a, b)
    assert found.angle_deg == pytest.approx(angle, abs=1e-6)
    assert found.norm_ratio == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no angle"):
        compare_displacements(a, combine((0.0, b)))


def test_random_directions_are_orthogonal_within_the_null_spread() -> None:
    size = [torch.zeros(20, 20, dtype=F64)]
    angles = []
    for seed in range(300):
        pair = compare_displacements(random_vector(size, generator(seed)), random_vector(size, generator(seed + 999)))
        angles.append(pair.angle_deg)
    spread = torch.tensor(angles, dtype=F64)
    assert spread.mean().item() == pytest.approx(90, abs=0.6)
    assert spread.std().item() == pytest.approx(pair.null_sd_deg, rel=0.1)
    assert pair.null_sd_deg == pytest.approx(57.2958 / 20, rel=1e-5)


def test_flip_rate_counts_codes() -> None:
    a, b = [torch.zeros(4, dtype=torch.int8), torch.ones(6, dtype=torch.int8)], [torch.ones(4), torch.ones(6)]
    assert flip_rate(a, b) == 0.4
    assert flip_rate(a, a) == 0.0
    with pytest.raises(ValueError, match="no codes"):
        flip_rate([], [])


def test_the_split_is_an_orthogonal_decomposition() -> None:
    shapes = [torch.zeros(5, 4, dtype=F64), torch.zeros(3, dtype=F64)]
    tangents = [random_vector(shapes, generator(i)) for i in range(3)]
    delta = random_vector(shapes, generator(9))
    found = split_displacement(delta, tangents)
    total = combine((1.0, found.river), (1.0, found.normal))
    assert norm(combine((1.0, total), (-1.0, delta))) < 1e-12
    assert all(abs(dot(found.normal, t)) < 1e-12 for t in tangents)
    assert found.river_norm**2 + found.normal_norm**2 == pytest.approx(norm(delta) ** 2)
    assert found.river_share == pytest.approx(found.river_norm**2 / norm(delta) ** 2)
    assert split_displacement(tangents[1], tangents).river_share == pytest.approx(1)
    assert set(found.to_dict()) == {"river_norm", "normal_norm", "river_share"}


def test_the_river_direction_is_the_gradient_without_its_normal_part() -> None:
    curvature = torch.tensor([100.0, 50.0, 0.3, 0.1], dtype=F64)
    axes = [[row] for row in torch.eye(4, dtype=F64)]
    grad = [torch.tensor([3.0, -4.0, 1.0, 1.0], dtype=F64)]
    found = river_direction(grad, axes[:2], lambda v: [curvature * v[0]], largest_eigenvalue=100.0)
    torch.testing.assert_close(found.tangent[0], torch.tensor([0, 0, 1, 1], dtype=F64) / math.sqrt(2))
    assert found.curvature == pytest.approx(0.2)
    assert found.accepted
    assert found.gradient_share == pytest.approx(math.sqrt(2 / 27))
    half = river_direction(grad, axes[:1], lambda v: [curvature * v[0]], largest_eigenvalue=100.0)
    assert not half.accepted
    with pytest.raises(ValueError, match="span of the normals"):
        river_direction([axes[0][0] * 2], axes[:2], lambda v: v, largest_eigenvalue=1.0)
    with pytest.raises(ValueError, match="positive"):
        river_direction(grad, axes[:2], lambda v: v, largest_eigenvalue=0.0)


def test_the_theorem_in_formulas() -> None:
    t = RecoveryTheorem(c_perp=2.0, radius=3.0, rho=0.1, grad_bound=4.0, h_max=1.5, h_min=0.5, lipschitz_projection=1.0)
    assert t.margin == pytest.approx(2 * math.sqrt(0.5) * 3 - 1.5 * 2 * 0.1 * 4)
    assert t.max_eta == pytest.approx(min(t.margin / (1.5 * 2 * 16), 0.1 / 4))
    inner = 3 - math.sqrt(1.5) * 0.1 * 2
    assert t.bound(2.9, 0.01) == pytest.approx(1 + (2.9**2 - inner**2) / (0.01 * t.margin))
    assert t.bound(0.0, 0.01) == 1
    assert t.to_dict()["guaranteed"] is True


def test_a_margin_below_zero_means_no_guarantee_not_no_recovery() -> None:
    coarse = RecoveryTheorem(c_perp=1.0, radius=2.0, rho=5.0, grad_bound=6.0)
    assert coarse.margin < 0
    assert not coarse.guaranteed
    assert coarse.max_eta == 0
    with pytest.raises(ValueError, match="guarantees nothing"):
        coarse.bound(1.0, 0.01)
    # The valley of the paper's own PTQ failure is outside its theorem, and recovers all the same (B-T4).
    valley = Valley()
    rho = math.sqrt(0.5)
    assert not RecoveryTheorem(c_perp=valley.c_perp, radius=valley.radius, rho=rho, grad_bound=9.0).guaranteed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c_perp": 0.0}, "c_perp"),
        ({"rho": math.inf}, "rho"),
        ({"h_min": 2.0}, "h_min"),
        ({"lipschitz_projection": -1.0}, "lip"),
    ],
)
def test_wrong_constants_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecoveryTheorem(**{"c_perp": 1.0, "radius": 2.0, "rho": 0.1, "grad_bound": 1.0, **change})


def test_the_bound_refuses_what_the_theorem_does_not_cover() -> None:
    t = RecoveryTheorem(c_perp=1.0, radius=2.0, rho=0.3, grad_bound=1.3)
    with pytest.raises(ValueError, match="eta"):
        t.bound(1.0, 1.0)
    with pytest.raises(ValueError, match="start_distance"):
        t.bound(2.5, 0.01)
