"""Predictions from width, curvature and pitch (B-T6) against Monte Carlo; the inward slope and its controls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.geometry import (
    ErrorEnergy,
    combine,
    critical_pitch,
    energy_from_trace,
    groupwise_energy,
    hessian_operator,
    hit_probability,
    hutchinson,
    inward_report,
    inward_slope,
    isotropic_cosine,
    kappa,
    kappa_rand,
    norm,
    quadratic_width,
    random_vector,
    uniform_energy,
)
from fewbits.geometry.basin import normal_cdf

F64 = torch.float64
NORMAL_APPROXIMATION = 0.02  # papers.md, 9.3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform_errors(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num, dim, generator=generator(seed), dtype=F64) - 0.5


def test_normal_cdf_matches_torch_in_both_tails() -> None:
    for x in (-9.0, -1.0, 0.0, 0.3, 4.0):
        assert normal_cdf(x) == pytest.approx(torch.special.ndtr(torch.tensor(x, dtype=F64)).item(), rel=1e-12)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(tol=st.floats(1e-6, 1e2), curvature=st.floats(-1e4, 1e4, allow_subnormal=False), slope=st.floats(-1e2, 1e2))
def test_quadratic_width_is_the_first_root(tol: float, curvature: float, slope: float) -> None:
    t = quadratic_width(tol, curvature, slope=slope)
    if math.isinf(t):
        top = slope * slope / (-2 * curvature) if curvature < 0 and slope > 0 else 0.0
        assert top <= tol * (1 + 1e-9)
        assert curvature <= 0
        return
    rounding = 1e-12 * abs(slope * t)  # two large terms may cancel
    assert slope * t + 0.5 * curvature * t * t == pytest.approx(tol, rel=1e-6, abs=rounding)
    for share in (0.25, 0.5, 0.75, 0.99):
        assert slope * share * t + 0.5 * curvature * (share * t) ** 2 <= tol * (1 + 1e-9) + rounding


def test_kappa_rand_uses_the_median_width() -> None:
    assert kappa(2.0, 4.0) == 0.5
    assert kappa_rand(4.0, [1.0, 2.0, math.inf]) == 2.0
    assert kappa_rand(4.0, [1.0, math.inf, math.inf]) == 0.0
    with pytest.raises(ValueError, match="empty"):
        kappa_rand(1.0, [])
    with pytest.raises(ValueError, match="width=0"):
        kappa(1.0, 0.0)


@pytest.mark.parametrize(("dim", "expected"), [(50, (0.31, 0.50, 0.67)), (200, (0.16, 0.50, 0.82))])
def test_bt6_critical_pitch_and_failure_probability(dim: int, expected: tuple[float, ...]) -> None:
    radius = 0.7
    pitch = critical_pitch(radius, trace=dim)
    assert pitch == pytest.approx(radius * math.sqrt(12 / dim), rel=1e-12)
    energy = uniform_errors(20_000, dim).square().sum(1)
    for factor, wanted in zip((0.97, 1.0, 1.03), expected, strict=True):
        step = factor * pitch
        measured = (step**2 * energy > radius**2).double().mean().item()
        moments = uniform_energy(pitch=step, trace=dim, square_trace=dim, diagonal_square=dim)
        predicted = moments.failure_probability(radius)
        assert predicted == pytest.approx(measured, abs=NORMAL_APPROXIMATION)
        assert predicted == pytest.approx(wanted, abs=0.01)


def test_energy_moments_hold_for_dense_metrics_where_the_diagonal_formula_fails() -> None:
    dim = 60
    factor = torch.randn(dim, 8, generator=generator(1), dtype=F64)
    h = factor @ factor.T
    pitch = 0.3
    sample = (pitch * uniform_errors(100_000, dim) @ factor).square().sum(1)
    square, diagonal = h.square().sum().item(), h.diagonal().square().sum().item()
    moments = uniform_energy(pitch=pitch, trace=h.trace().item(), square_trace=square, diagonal_square=diagonal)
    assert moments.mean == pytest.approx(sample.mean().item(), rel=0.01)
    assert moments.variance == pytest.approx(sample.var().item(), rel=0.03)
    assert sample.var().item() > 2 * pitch**4 * square / 180
    radius = math.sqrt(1.2 * moments.mean)
    measured = (sample > radius**2).double().mean().item()
    # A sum of eight comparable squares is skewed: the normal law is off by .06, the gamma law is not.
    assert moments.failure_probability(radius, law="gamma") == pytest.approx(measured, abs=NORMAL_APPROXIMATION)
    assert abs(moments.failure_probability(radius) - measured) > 2 * NORMAL_APPROXIMATION


def test_a_diagonal_metric_has_variance_trace_over_180() -> None:
    found = uniform_energy(pitch=2.0, trace=3.0, square_trace=5.0, diagonal_square=5.0)
    assert found.variance == pytest.approx(16 * 5 / 180, rel=1e-12)
    assert found.mean == pytest.approx(1.0)


def test_groupwise_pitch_and_clip_error_against_monte_carlo() -> None:
    h = torch.rand(12, 16, generator=generator(2), dtype=F64)
    pitch = torch.linspace(0.1, 1.0, 12, dtype=F64)[:, None]
    clip = torch.zeros(12, 16, dtype=F64)
    clip[:, 0] = 0.8
    sample = uniform_errors(40_000, 12 * 16).reshape(-1, 12, 16) * pitch
    sample = torch.where(clip != 0, clip, sample)
    energy = (h * sample.square()).sum((1, 2))
    found = groupwise_energy([h], [pitch], clip_error=[clip])
    assert found.mean == pytest.approx(energy.mean().item(), rel=0.005)
    assert found.variance == pytest.approx(energy.var().item(), rel=0.03)
    plain = groupwise_energy([h], [pitch])
    assert plain.mean == pytest.approx((h * pitch.square()).sum().item() / 12, rel=1e-12)
    # One pitch for all is the ungrouped formula.
    same = groupwise_energy([h], [torch.tensor(0.3, dtype=F64)])
    square = h.square().sum().item()
    single = uniform_energy(pitch=0.3, trace=h.sum().item(), square_trace=square, diagonal_square=square)
    assert (same.mean, same.variance) == pytest.approx((single.mean, single.variance))


def test_the_groupwise_energy_needs_no_diagonal_when_the_pitches_are_hutchinson_weights() -> None:
    h = torch.rand(12, 16, generator=generator(2), dtype=F64)
    pitch = torch.linspace(0.1, 1.0, 12, dtype=F64)[:, None]
    estimate = hutchinson(lambda v: [h * v[0]], [h], num_samples=2, generator=generator(), weights=[pitch])
    found, wanted = energy_from_trace(estimate, clip_energy=0.5), groupwise_energy([h], [pitch])
    assert found.mean == pytest.approx(wanted.mean + 0.5, rel=1e-12)
    assert found.variance == pytest.approx(wanted.variance, rel=1e-12)


def test_the_critical_pitch_puts_the_mean_energy_on_the_radius() -> None:
    pitch = critical_pitch(0.6, trace=37.0)
    energy = uniform_energy(pitch=pitch, trace=37.0, square_trace=90.0, diagonal_square=80.0)
    assert energy.mean == pytest.approx(0.36, rel=1e-12)
    assert energy.failure_probability(0.6) == pytest.approx(0.5, abs=1e-9)
    assert critical_pitch(1.0, trace=-2.0) == math.inf


def test_certain_outcomes_have_probability_zero_or_one() -> None:
    assert ErrorEnergy(mean=1.0, variance=0.0).failure_probability(2.0) == 0.0
    assert ErrorEnergy(mean=5.0, variance=0.0).failure_probability(2.0) == 1.0
    with pytest.raises(ValueError, match="radius"):
        ErrorEnergy(mean=1.0, variance=1.0).failure_probability(0.0)
    with pytest.raises(ValueError, match="law 'cauchy'"):
        ErrorEnergy(mean=1.0, variance=1.0).failure_probability(1.0, law="cauchy")
    with pytest.raises(ValueError, match="positive mean"):
        ErrorEnergy(mean=-1.0, variance=1.0).failure_probability(1.0, law="gamma")
    with pytest.raises(ValueError, match="cannot exceed"):
        uniform_energy(pitch=1.0, trace=1.0, square_trace=1.0, diagonal_square=2.0)


@pytest.mark.parametrize("half_width", [0.1, 0.4, 0.5, 0.9])
def test_hit_probability_against_random_phases(half_width: float) -> None:
    offset = torch.rand(200_000, generator=generator(), dtype=F64) * 1.0
    nearest_level = torch.minimum(offset, 1.0 - offset)
    measured = (nearest_level <= half_width).double().mean().item()
    assert hit_probability(1.0, half_width) == pytest.approx(measured, abs=0.005)


def bowl(dim: int = 40) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    a = torch.randn(dim, dim, generator=generator(4), dtype=F64)
    h = a @ a.T / dim
    w = [torch.zeros(dim, dtype=F64)]
    return w, h, torch.randn(dim, generator=generator(5), dtype=F64)


def test_a_pure_quadratic_shows_exactly_its_control_and_a_positive_cosine() -> None:
    w, h, e = bowl()
    found = inward_report(lambda: 0.5 * w[0] @ h @ w[0], w, [e], hessian_operator(lambda: 0.5 * w[0] @ h @ w[0], w))
    assert found.at_rounded.slope == pytest.approx(found.quadratic_slope, rel=1e-12)
    assert found.at_rounded.cosine == pytest.approx(found.quadratic_cosine, rel=1e-12)
    assert found.wall_ratio == pytest.approx(1, rel=1e-12)
    assert found.quadratic_slope == pytest.approx((e @ h @ e / e.norm()).item(), rel=1e-12)
    assert found.at_rounded.cosine > 0.5  # so a positive cosine alone proves nothing
    assert found.at_latent.slope == 0
    assert w[0].abs().max() == 0
    assert found.to_dict()["wall_ratio"] == pytest.approx(1)


def test_a_wall_shows_far_more_than_the_quadratic() -> None:
    w, h, e = bowl()

    def loss() -> torch.Tensor:
        return 0.5 * w[0] @ h @ w[0] + 20 * torch.relu(w[0].norm() - 2).square()

    w[0].fill_(1e-3)  # the norm has no derivative at 0
    found = inward_report(loss, w, [w[0] + e], hessian_operator(loss, w))
    assert found.wall_ratio > 10


def test_the_anchor_sets_the_direction() -> None:
    w, h, e = bowl()
    anchor = [torch.randn(40, generator=generator(9), dtype=F64)]

    def loss() -> torch.Tensor:
        return 0.5 * w[0] @ h @ w[0]

    found = inward_report(loss, w, [e], hessian_operator(loss, w), anchor=anchor)
    n = (e - anchor[0]) / (e - anchor[0]).norm()
    assert found.at_rounded.slope == pytest.approx((h @ e @ n).item(), rel=1e-10)
    assert found.quadratic_slope == pytest.approx(found.at_rounded.slope, rel=1e-10)
    direct = inward_slope(loss, w, [e], combine((1.0, [e]), (-1.0, anchor)))
    assert direct == found.at_rounded
    with pytest.raises(ValueError, match="no error"):
        inward_report(loss, w, [w[0].clone()], hessian_operator(loss, w))
    with pytest.raises(ValueError, match="outward"):
        inward_slope(loss, w, [e], [0 * e])


def test_the_isotropic_cosine_predicts_the_control() -> None:
    w, h, _ = bowl()
    predicted = isotropic_cosine(h.trace().item(), h.square().sum().item(), 40)
    cosines = []
    for seed in range(200):
        e = random_vector(w, generator(seed))
        image = h @ e[0]
        cosines.append((e[0] @ image).item() / (norm(e) * image.norm().item()))
    assert predicted == pytest.approx(sum(cosines) / 200, rel=0.16)  # papers.md, 9.4: 2 to 16%
    assert isotropic_cosine(3 * 7.0, 9 * 7.0, 7) == pytest.approx(1)
    with pytest.raises(ValueError, match="dim=0"):
        isotropic_cosine(1.0, 1.0, 0)
