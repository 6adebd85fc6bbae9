"""JacQuant: the tests A-T1 to A-T6 and A-T8 of the specification, its closed forms, and its state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.convert import Rule, prepare, qat_layers
from fewbits.fake_quant import fake_quantize
from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.scales import ScaleSpec
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, ClippedSTE, JacQuant
from fewbits.surrogates.sensitivity import dither_exact
from fewbits.testing.oracles import smoothed_inside, smoothed_sensitivity

# sign, SEQ ternary, SEQ 2, LSQ 2, 3, 4 (papers.md 3.1)
BASE: list[AnyGrid] = [Binary(), Ternary(), HalfShifted(2), Int(2), Int(3), Int(4)]
base_grid = pytest.mark.parametrize("grid", BASE, ids=str)
ALPHA, STD = 0.06, 0.03
SEQ2 = Scheme(grid=HalfShifted(2), scale=ScaleSpec(granularity="per_tensor", dtype="fp32"))


def stream(seed: int = 0) -> torch.Generator:
    """Far from seed 0, from which the weights are drawn: equal streams would make the probes parallel to them."""
    return torch.Generator().manual_seed(10_000 + seed)


def spread(grid: AnyGrid, rows: int = 8, width: int = 256) -> Tensor:
    """Gaussian weights of which about a third lie outside the outermost levels."""
    return torch.randn(rows, width) * max(abs(grid.min_level), abs(grid.max_level))


def estimate(surrogate: JacQuant, w: Tensor, scheme: Scheme, scale: float | Tensor = 1.0, seed: int = 0) -> Tensor:
    shape = scheme.scale.view(w.shape).scale_shape
    s = torch.full(shape, scale) if isinstance(scale, float) else scale
    return surrogate.estimate(w, s, scheme, stream(seed))


# A-T1: the dither identity ------------------------------------------------------------------------------------------


@base_grid
def test_dither_exact_is_the_share_inside_the_outermost_levels(grid: AnyGrid) -> None:
    w = spread(grid)
    found = estimate(JacQuant(group_size=64), w, Scheme(grid=grid, scale=ScaleSpec(dtype="fp32")))
    inside = ((w >= grid.min_level) & (w <= grid.max_level)).double().view(8, 4, 64).mean(-1)
    torch.testing.assert_close(found.double(), inside, rtol=0, atol=1e-9)
    assert 0.3 < found.mean() < 0.95


@base_grid
def test_dither_exact_is_the_difference_quotient_over_one_step_away_from_ties(grid: AnyGrid) -> None:
    v = spread(grid).double()
    q = [grid.project_(v + sign * grid.step / 2) for sign in (1, -1)]
    torch.testing.assert_close(dither_exact(v, grid), (q[0] - q[1]) / grid.step, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [*BASE, Codebook.lloyd_max(3)], ids=str)
def test_weights_exactly_on_a_level_are_no_special_case(grid: AnyGrid) -> None:
    """Zero weights, or weights pulled onto the grid: half-to-even ties must not make their sensitivity 0 or 2."""
    inner = torch.tensor(grid.levels[1:-1] if isinstance(grid, Codebook) else grid.levels)
    assert torch.equal(dither_exact(inner, grid), torch.ones_like(inner))


@base_grid
def test_the_mean_of_the_dithered_quantizer_is_the_clipped_weight(grid: AnyGrid) -> None:
    n = 4096
    v = torch.linspace(1.5 * grid.min_level, 1.5 * max(1.0, grid.max_level), 301, dtype=torch.float64)
    dither = ((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5) * grid.step
    mean = grid.project_(v[:, None] + dither).mean(1)
    torch.testing.assert_close(mean, v.clamp(grid.min_level, grid.max_level), rtol=0, atol=2e-4 * grid.step)


@base_grid
def test_common_dither_estimates_the_smoothed_share(grid: AnyGrid) -> None:
    w = spread(grid, 64, 256)
    surrogate = JacQuant(mode="dither_crn", sigma=0.2, num_probes=40, group_size=256)
    scheme = Scheme(grid=grid, scale=ScaleSpec(dtype="fp32"))
    found = estimate(surrogate, w, scheme).mean().item()
    expected = sum(smoothed_inside(v, grid, 0.2 * grid.step) for v in w.flatten().tolist()) / w.numel()
    assert found == pytest.approx(expected, abs=0.01)


# A-T2: the probe's target -------------------------------------------------------------------------------------------


def test_the_probe_estimates_the_gaussian_smoothed_slope() -> None:
    w = STD * torch.randn(1, 128)
    scale = ALPHA / 2
    surrogate = JacQuant(mode="probe", sigma=0.5, num_probes=2000)
    found = estimate(surrogate, w, SEQ2, scale).item()
    expected = sum(smoothed_sensitivity(v / scale, HalfShifted(2), 0.5) for v in w.flatten().tolist()) / 128
    assert found == pytest.approx(expected, abs=0.01)
    assert 0.75 < expected < 0.92  # the specification's draw has .8359


@pytest.mark.parametrize("grid", [Codebook((-3.0, -1.0, 1.0, 7.0)), Int(3), Binary()], ids=str)
def test_the_probe_uses_the_jump_at_each_threshold(grid: AnyGrid) -> None:
    w = 2 * torch.randn(1, 64)
    surrogate = JacQuant(mode="probe", sigma=0.8, sigma_unit="absolute", num_probes=4000)
    found = estimate(surrogate, w, Scheme(grid=grid, scale=ScaleSpec(dtype="fp32"))).item()
    expected = sum(smoothed_sensitivity(v, grid, 0.8) for v in w.flatten().tolist()) / 64
    assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("law", "expected"),
    [  # origin: papers.md 3.3, SEQ-2 with alpha = 1 (step .5) at w = .25 .. 1.25
        (0.5, [0.977, 0.906, 0.595, 0.472, 0.223, 0.108, 0.009]),
        (0.1, [0.0, 3.99, 0.001, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_the_table_of_smoothing_laws(law: float, expected: list[float]) -> None:
    w = [0.25, 0.5, 0.7, 0.76, 0.9, 1.0, 1.25]
    assert [smoothed_sensitivity(x / 0.5, HalfShifted(2), law) for x in w] == pytest.approx(expected, abs=6e-4)
    uniform = dither_exact(torch.tensor(w) / 0.5, HalfShifted(2)).tolist()
    assert uniform == [1, 1, 1, 0, 0, 0, 0]


# A-T3: saturation and interior --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dither_exact", "dither_crn", "probe"])
def test_saturated_groups_lose_their_gain_geometrically(mode: Any) -> None:
    surrogate = JacQuant(mode=mode, group_size=32, beta=0.25, sigma=0.1)
    w = 100 * torch.randn(4, 64).sign()
    state = surrogate.init_state(w.shape)
    for k in range(1, 6):
        statistics = surrogate.refresh_(state, w, torch.ones(4, 1), Scheme.parse("W2H"), stream(k))
        assert torch.equal(state["gain"], torch.full((4, 2), 0.75**k))
        assert statistics["zero_share"] == 1.0


@base_grid
def test_groups_inside_the_outermost_levels_keep_gain_one(grid: AnyGrid) -> None:
    w = (torch.rand(4, 64) * (grid.max_level - grid.min_level) + grid.min_level) * 0.999
    surrogate = JacQuant(group_size=32, beta=0.25)
    state = surrogate.init_state(w.shape)
    assert torch.equal(estimate(surrogate, w, Scheme(grid=grid)), torch.ones(4, 2))
    surrogate.refresh_(state, w, torch.ones(4, 1), Scheme(grid=grid), stream())
    assert torch.equal(state["gain"], torch.ones(4, 2))


# A-T4: the backward contract ----------------------------------------------------------------------------------------


def backward(w: Tensor, scheme: Scheme, scale: Tensor, surrogate: Any, state: Any, upstream: Tensor) -> list[Tensor]:
    w, scale = w.clone().requires_grad_(), scale.clone().requires_grad_()
    out = fake_quantize(w, scheme, scale, surrogate, state)
    return [out.detach(), *torch.autograd.grad(out, (w, scale), upstream)]


@pytest.mark.parametrize("group_size", [1, 7, 32, 100, 128])
def test_the_gradient_is_the_repeated_gain_times_the_upstream_one(group_size: int) -> None:
    """Also where the group size does not divide the 100 columns; forward and scale gradient are those of the base."""
    surrogate = JacQuant(group_size=group_size)
    scheme = Scheme.parse("W2A16G32")
    w, upstream, scale = torch.randn(3, 100), torch.randn(3, 100), torch.rand(3, 4) + 0.3
    gain = torch.rand(3, -(-100 // group_size))
    out, grad_w, grad_scale = backward(w, scheme, scale, surrogate, {"gain": gain}, upstream)
    base = backward(w, scheme, scale, STE(), {}, upstream)
    assert torch.equal(out, base[0])
    assert torch.equal(grad_w, upstream * gain.repeat_interleave(group_size, dim=1)[:, :100])
    assert torch.equal(grad_scale, base[2])
    assert surrogate.init_state(w.shape)["gain"].shape == gain.shape


def test_gain_one_is_identity_ste_bit_for_bit() -> None:
    w, upstream = torch.randn(3, 100), torch.randn(3, 100)
    for granularity in ("group", "element"):
        surrogate = JacQuant(granularity=granularity, group_size=32)  # type: ignore[arg-type]
        found = backward(w, Scheme.parse("W2"), torch.ones(3, 1), surrogate, None, upstream)
        assert torch.equal(found[1], upstream)


def test_the_gain_is_clamped_on_use_only() -> None:
    surrogate = JacQuant(group_size=2, gain_min=0.25)
    state = {"gain": torch.tensor([[-0.5, 0.1, 0.5, 3.0]])}
    assert surrogate.gain(state).tolist() == [[0.25, 0.25, 0.5, 1.0]]
    assert state["gain"].tolist() == [pytest.approx([-0.5, 0.1, 0.5, 3.0])]
    found = surrogate.pullback(torch.ones(1, 8), None, Int(2), state)
    assert found.tolist() == [[0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0]]


def test_compose_mask_multiplies_by_clipped_ste() -> None:
    w, upstream, scale = torch.randn(3, 96), torch.randn(3, 96), torch.full((3, 1), 0.4)
    state = {"gain": torch.rand(3, 3)}
    plain = JacQuant(group_size=32)
    composed = JacQuant(group_size=32, compose_mask=True)
    scheme = Scheme.parse("W2", dtype="fp32")
    mask = ClippedSTE().gain(w / scale, Int(2))
    assert 0.2 < mask.mean() < 0.9
    expected = backward(w, scheme, scale, plain, state, upstream)[1] * mask
    assert torch.equal(backward(w, scheme, scale, composed, state, upstream)[1], expected)
    assert (plain.needs_v, composed.needs_v) == (False, True)


def test_element_gains_are_clipped_ste() -> None:
    """At element granularity with beta = 1 the exact dither estimate is the mask itself."""
    surrogate = JacQuant(granularity="element", beta=1.0)
    scheme = Scheme.parse("W2H", dtype="fp32")
    w, upstream, scale = torch.randn(3, 100), torch.randn(3, 100), torch.full((3, 1), 0.4)
    state = surrogate.init_state(w.shape)
    surrogate.refresh_(state, w, scale, scheme, stream())
    found = backward(w, scheme, scale, surrogate, state, upstream)
    assert torch.equal(found[1], backward(w, scheme, scale, ClippedSTE(), {}, upstream)[1])


def test_update_mode_leaves_the_gradient_alone_and_offers_the_gain() -> None:
    surrogate = JacQuant(apply="update", group_size=2)
    state = {"gain": torch.tensor([[0.5, 0.0]])}
    grad = torch.randn(1, 4)
    assert torch.equal(surrogate.pullback(grad, None, Int(2), state), grad)
    assert torch.equal(surrogate.scale_by_gain(grad, state), grad * torch.tensor([0.5, 0.5, 0.0, 0.0]))


def test_the_state_is_a_buffer_that_survives_saving_and_loading(tmp_path: Any) -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return prepare(nn.Sequential(nn.Linear(100, 8)), Rule(scheme="W2", surrogate=JacQuant(group_size=32)))

    trained = model()
    ((_, layer),) = qat_layers(trained)
    layer.state()["gain"].copy_(torch.rand(8, 4))
    assert "0.weight_state_gain" in trained.state_dict()
    assert "0.weight_state_gain" not in dict(trained.named_parameters())
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    fresh = model()
    assert torch.equal(next(qat_layers(fresh))[1].state()["gain"], torch.ones(8, 4))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(next(qat_layers(fresh))[1].state()["gain"], layer.state()["gain"])
    x = torch.randn(2, 100)
    for each in (trained, fresh):
        each(x).sum().backward()
    grads = [next(qat_layers(each))[1].weight.grad for each in (trained, fresh)]
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


# A-T5: amortisation and the estimator's own stream ------------------------------------------------------------------


def test_the_moving_average_of_a_frozen_weight_has_its_closed_form() -> None:
    surrogate = JacQuant(group_size=64, beta=0.3)
    w = spread(Int(2))
    scheme = Scheme.parse("W2", dtype="fp32")
    target = estimate(surrogate, w, scheme)
    state = surrogate.init_state(w.shape)
    for _ in range(10):
        surrogate.refresh_(state, w, torch.ones(8, 1), scheme, stream())
    torch.testing.assert_close(state["gain"], target + (1 - target) * 0.7**10, rtol=2e-6, atol=0)


@pytest.mark.parametrize("mode", ["dither_exact", "dither_crn", "probe"])
def test_refreshing_leaves_the_training_stream_alone(mode: Any) -> None:
    surrogate = JacQuant(mode=mode)
    w = torch.randn(4, 64)
    state = surrogate.init_state(w.shape)
    before = torch.get_rng_state()
    surrogate.refresh_(state, w, torch.ones(4, 1), Scheme.parse("W2"), stream(3))
    assert torch.equal(torch.get_rng_state(), before)
    again = surrogate.init_state(w.shape)
    torch.manual_seed(99)  # another rank, with another training stream
    surrogate.refresh_(again, w, torch.ones(4, 1), Scheme.parse("W2"), stream(3))
    assert torch.equal(again["gain"], state["gain"])


def test_beta_zero_never_changes_the_gain() -> None:
    surrogate = JacQuant(beta=0.0, mode="probe")
    state = surrogate.init_state((4, 64))
    surrogate.refresh_(state, torch.randn(4, 64), torch.ones(4, 1), Scheme.parse("W2"), stream())
    assert torch.equal(state["gain"], torch.ones(4, 1))


def test_different_streams_give_different_probes() -> None:
    surrogate = JacQuant(mode="probe")
    w = torch.randn(4, 64)
    found = [estimate(surrogate, w, Scheme.parse("W2"), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# A-T6: the literal preset is a lottery ------------------------------------------------------------------------------


@pytest.mark.parametrize(("group_size", "zero_share"), [(32, 0.97), (128, 0.84)])
def test_the_bias_of_the_literal_preset(group_size: int, zero_share: float) -> None:
    """Any code flip overshoots 1 and is clipped: E clip = 1 - exp(-expected flips), though the raw mean is about 1."""
    std, alpha = STD, 4 * STD
    w = std * torch.randn(6000, group_size)
    surrogate = JacQuant.preset("paper_literal", group_size=group_size)
    raw = estimate(surrogate, w, SEQ2, alpha / 2)
    density = sum(math.exp(-((t / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi)) for t in (-alpha / 2, 0, alpha / 2))
    flips = group_size * surrogate.sigma * math.sqrt(2 / math.pi) * density
    clipped = raw.clamp(0, 1).mean().item()
    assert raw.mean().item() == pytest.approx(1.0, abs=0.15)
    assert (raw == 0).float().mean().item() == pytest.approx(zero_share, abs=0.02)
    assert clipped == pytest.approx(1 - math.exp(-flips), abs=0.01)


def test_the_literal_preset_clips_before_it_averages() -> None:
    w = STD * torch.randn(6000, 128)
    literal, decay = JacQuant.preset("paper_literal"), JacQuant.preset("paper_decay")
    for surrogate in (literal, decay):
        state = surrogate.init_state(w.shape)
        surrogate.refresh_(state, w, torch.full((1, 1), 2 * STD), SEQ2, stream())
        expected = 1 - surrogate.beta + surrogate.beta * 0.159
        assert state["gain"].mean().item() == pytest.approx(expected, abs=0.03)


def test_other_presets_average_the_raw_estimate() -> None:
    """Clipping first would be biased; raw estimates above 1 must enter the average."""
    w = STD * torch.randn(200, 128)
    surrogate = JacQuant.preset("probe_rel", beta=1.0)
    state = surrogate.init_state(w.shape)
    surrogate.refresh_(state, w, torch.full((1, 1), 2 * STD), SEQ2, stream())
    assert state["gain"].max() > 1
    assert torch.equal(state["gain"], estimate(surrogate, w, SEQ2, 2 * STD))
    assert surrogate.gain(state).max() == 1


def test_the_stationary_gain_of_the_literal_preset() -> None:
    """Mean .16 with quartiles 0, 0, .09 (papers.md 3.4), though every true sensitivity is about 1."""
    w = STD * torch.randn(4000, 128)
    surrogate = JacQuant.preset("paper_literal")
    state = surrogate.init_state(w.shape)
    for k in range(12):
        statistics = surrogate.refresh_(state, w, torch.full((1, 1), 2 * STD), SEQ2, stream(k))
    assert statistics["gain_mean"] == pytest.approx(0.16, abs=0.02)
    assert statistics["gain_q25"] == pytest.approx(0.0, abs=1e-3)
    assert statistics["gain_q50"] == pytest.approx(0.0, abs=0.01)
    assert statistics["gain_q75"] == pytest.approx(0.09, abs=0.03)
    assert statistics["gain_q95"] == pytest.approx(0.99, abs=0.02)


def test_the_recommended_estimator_is_right_where_the_literal_one_is_not() -> None:
    w = STD * torch.randn(500, 128)
    exact = estimate(JacQuant(), w, SEQ2, 2 * STD)
    assert exact.mean() > 0.99
    relative = estimate(JacQuant.preset("probe_rel"), w, SEQ2, 2 * STD)
    assert relative.mean().item() == pytest.approx(1.0, abs=0.03)
    assert relative.std().item() == pytest.approx(0.08, abs=0.03)
