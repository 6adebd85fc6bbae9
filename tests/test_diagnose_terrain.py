"""Spectra, river and pitches against closed forms and direct computation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch

from fewbits.convert import Rule, owned_layers, prepare
from fewbits.data import TokenBlocks
from fewbits.diagnose import DiagnosisSettings, find_sites, measure_river, sweep_pitch, token_loss
from fewbits.diagnose.layer_forecast import layer_width
from fewbits.diagnose.pitch import failure_with_slope
from fewbits.diagnose.river import SMOOTHED
from fewbits.diagnose.sites import Site
from fewbits.diagnose.terrain import report_spectrum, spectrum_probe
from fewbits.geometry import (
    TraceEstimate,
    Valley,
    difference,
    dot,
    gradient,
    hvp,
    loss_value,
    norm,
    placed,
    random_like,
    random_vector,
)
from fewbits.scheme import Scheme
from fewbits.testing.tiny import tiny_llama, toy_blocks

F64 = torch.float64
QUICK = DiagnosisSettings(num_bisections=20, num_lanczos_steps=6, num_normals=2, curvature_blocks=1)
BLOCKS = TokenBlocks(toy_blocks(4, 16).numpy(), 1.0)


class PlainLoss:
    """Any closure with the two methods that a diagnosis asks of a token loss."""

    def __init__(self, closure: Callable[[], torch.Tensor]) -> None:
        self.closure = closure

    def __call__(self) -> torch.Tensor:
        return self.closure()

    def parts(self) -> Iterator[tuple[float, Callable[[], torch.Tensor]]]:
        yield 0.25, self.closure
        yield 0.75, self.closure


def test_the_second_derivative_through_the_identity_ste_is_the_hessian_at_the_rounded_weights() -> None:
    """So a spectrum at Q(w) is that of the fake-quantized model."""
    model = tiny_llama()
    scheme = Scheme.parse("W2")
    prepared = prepare(copy.deepcopy(model), Rule(scheme=scheme, surrogate="ste"))
    sites = find_sites(model, [scheme])
    params = [s.weight for s in sites]
    trained = [layer.weight for _, layer in owned_layers(prepared)]
    v = random_like(params, torch.Generator().manual_seed(0))
    with placed(params, [s.rounded(scheme) for s in sites]):
        direct = hvp(token_loss(model, BLOCKS), params, v)
    through = hvp(token_loss(prepared, BLOCKS), trained, v)
    assert norm(difference(direct, through)) < 1e-4 * norm(direct)
    plain = hvp(token_loss(model, BLOCKS), params, v)
    assert norm(difference(plain, direct)) > 0.1 * norm(direct)


def test_one_probe_holds_the_hutchinson_trace_of_its_vector() -> None:
    loss = token_loss(tiny_llama(), BLOCKS)
    params = [s.weight for s in find_sites(loss.model, [Scheme.parse("W2")])]
    probe = spectrum_probe(loss, params, QUICK, 3)
    v = random_vector(params, torch.Generator().manual_seed(1003), law="rademacher")
    product = hvp(loss, params, v)
    assert probe.dim * probe.moment(1) == pytest.approx(dot(v, product), rel=1e-3)
    assert probe.dim * probe.moment(2) == pytest.approx(dot(product, product), rel=1e-3)
    report = report_spectrum([probe, spectrum_probe(loss, params, QUICK, 4)])
    assert len(report.spectrum.nodes) == 2
    assert report.max_abs >= probe.max_abs
    assert 0 <= report.zero_share <= 1
    assert 0 <= report.negative_share <= 1


def test_the_river_of_a_quadratic_is_what_its_walls_leave() -> None:
    r"""H = diag(8, 4, .01, ...), gradient (1, 1, 1, 0, ...): walls e0, e1, river e2, width sqrt(2 tol / .01)."""
    h = torch.full((10,), 0.01, dtype=F64)
    h[0], h[1] = 8.0, 4.0
    g = torch.zeros(10, dtype=F64)
    g[:3] = 1.0
    w = torch.zeros(10, dtype=F64, requires_grad=True)
    loss = PlainLoss(lambda: (g * w).sum() + 0.5 * (h * w * w).sum())
    error = torch.zeros(10, dtype=F64)
    error[1], error[2], error[5] = 3.0, 4.0, 12.0
    trip = torch.zeros(10, dtype=F64)
    trip[5] = 2.0
    found = measure_river(loss, [w], "W2", {"W2": [error]}, {"training": [trip]}, QUICK, tol=0.02)  # type: ignore[arg-type]
    assert found.eigenvalues == pytest.approx((8.0, 4.0), rel=1e-6)
    assert found.gradient_in_normals == pytest.approx(2 / 3)
    river = found.tangents[SMOOTHED]
    assert river.accepted
    assert river.curvature == pytest.approx(0.01)
    assert river.width.first == pytest.approx(math.sqrt(2 * 0.02 / 0.01), rel=1e-4)
    assert river.gradient_cosine == pytest.approx(1 / math.sqrt(3))
    split = river.splits["W2"]
    assert (split.along, split.across) == pytest.approx((4.0, math.sqrt(9 + 144)))
    assert split.share == pytest.approx(16 / 169)
    trained = found.tangents["training"]
    assert trained.length == 2.0
    assert trained.splits["W2"].share == pytest.approx(144 / 169)
    assert "training" not in trained.splits
    wall = found.vectors["W2"]
    assert wall.share == pytest.approx(9 / 169)
    assert wall.chance == 0.2
    assert wall.energy == pytest.approx(4 * 9 + 0.01 * (16 + 144))
    assert wall.normal_energy == pytest.approx(36)
    with pytest.raises(ValueError, match="W9"):
        measure_river(loss, [w], "W9", {"W2": [error]}, {}, QUICK, tol=0.02)  # type: ignore[arg-type]


def test_smoothing_finds_the_wall_of_the_papers_valley() -> None:
    """At w the band is flat and its normal has curvature 0; smoothed at a rounding error the wall is the steepest."""
    valley = Valley()
    w = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    loss = PlainLoss(lambda: valley(w))
    error = torch.tensor([0.0, 1.0], dtype=F64) - w.detach()
    settings = DiagnosisSettings(num_lanczos_steps=2, num_normals=1, num_deltas=60)
    found = measure_river(loss, [w], "W2", {"W2": [error]}, {}, settings, tol=0.02)  # type: ignore[arg-type]
    tangent = found.tangents[SMOOTHED].splits["W2"]
    along = abs(float(error @ torch.tensor([math.cos(valley.theta), math.sin(valley.theta)], dtype=F64)))
    assert tangent.along == pytest.approx(along, rel=0.1)
    assert found.eigenvalues[0] > 2.0  # the tangent's curvature is 1
    assert found.smoothing_per_coordinate == pytest.approx(1.0)
    assert not found.tangents[SMOOTHED].accepted  # docs/geometry.md: the rule rejects the paper's own river


@pytest.mark.parametrize("slope", [0.0, 0.6])
def test_p_fail_with_a_slope_agrees_with_brute_force(slope: float) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(400, generator=generator, dtype=F64)
    g = slope * torch.randn(400, generator=generator, dtype=F64) / 20
    trace = TraceEstimate(
        trace=float(h.sum()), standard_error=0.0, square_trace=float(h.square().sum()),
        diagonal_square=float(h.square().sum()), dim=400, num_samples=2,
    )  # fmt: skip
    errors = 0.1 * (torch.rand(20_000, 400, generator=generator, dtype=F64) - 0.5)
    rises = errors @ g + 0.5 * errors.square() @ h
    for tol in (0.075, 0.083, 0.09):
        expected = float((rises > tol).double().mean())
        assert failure_with_slope(trace, float(g.norm()), pitch=0.1, tol=tol) == pytest.approx(expected, abs=0.02)


def test_a_sweep_crosses_one_half_at_the_critical_pitch() -> None:
    w = torch.zeros(5000, dtype=F64)
    loss = PlainLoss(lambda: 0.5 * w.square().sum())
    trace = TraceEstimate(
        trace=5000.0, standard_error=0.0, square_trace=5000.0, diagonal_square=5000.0, dim=5000, num_samples=2
    )
    settings = DiagnosisSettings(num_monte_carlo=30)
    found = sweep_pitch(loss, [w], trace, 0.0, settings, base_loss=0.0, tol=0.5, factors=(0.9, 1.0, 1.1))  # type: ignore[arg-type]
    assert found.critical_pitch == pytest.approx(math.sqrt(12 / 5000))
    low, middle, high = found.rows
    assert (low.monte_carlo, low.probability) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert middle.probability == pytest.approx(0.5)
    assert 0.2 < middle.monte_carlo < 0.8
    assert (high.monte_carlo, high.probability) == pytest.approx((1.0, 1.0), abs=1e-6)
    assert middle.mean_rise == pytest.approx(0.5, rel=0.01)
    with pytest.raises(ValueError, match="num_monte_carlo=0"):
        sweep_pitch(loss, [w], trace, 0.0, DiagnosisSettings(num_monte_carlo=0), base_loss=0.0, tol=0.5)  # type: ignore[arg-type]


def test_the_width_of_a_layer_knows_its_curvature() -> None:
    w = torch.nn.Parameter(torch.zeros(20, 20, dtype=F64))
    loss = PlainLoss(lambda: 0.5 * 3.0 * w.square().sum())
    site = Site(name="a", weight=w)
    for guess in (1e-3, 10.0):
        found = layer_width(loss, site, QUICK, tol=0.06, guess=guess)  # type: ignore[arg-type]
        assert found == pytest.approx(math.sqrt(2 * 0.06 / 3), rel=1e-5)
    assert loss_value(loss) == 0.0
    assert gradient(loss, [w])[0].abs().max() == 0.0


@pytest.mark.parametrize(
    "wrong", [{"num_normals": 13}, {"num_deltas": 3}, {"num_deltas": 0}, {"num_lanczos_steps": 1}, {"slice_points": 1}]
)
def test_settings_say_what_is_wrong(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DiagnosisSettings(**wrong)  # type: ignore[arg-type]
