"""JacQuant: the dither-averaged loss and its finite differences, the descent rate A-T8, estimates, options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.fake_quant import fake_quantize
from fewbits.grids import HalfShifted, Int
from fewbits.rotations import Rotation
from fewbits.scales import ScaleSpec
from fewbits.scheme import Scheme
from fewbits.surrogates import JacQuant
from fewbits.surrogates.sensitivity import dither_exact

STD = 0.03
SEQ2 = Scheme(grid=HalfShifted(2), scale=ScaleSpec(granularity="per_tensor", dtype="fp32"))


def stream(seed: int = 0) -> torch.Generator:
    """Far from seed 0, from which the weights are drawn: equal streams would make the probes parallel to them."""
    return torch.Generator().manual_seed(10_000 + seed)


def estimate(surrogate: JacQuant, w: Tensor, scheme: Scheme, scale: float | Tensor = 1.0) -> Tensor:
    shape = scheme.scale.view(w.shape).scale_shape
    s = torch.full(shape, scale) if isinstance(scale, float) else scale
    return surrogate.estimate(w, s, scheme, stream())


# the dither-averaged loss -------------------------------------------------------------------------------------------

POINTS = 64
STEP = 0.5


def dithers() -> Tensor:
    return ((torch.arange(POINTS) + 0.5) / POINTS - 0.5) * STEP


def dithered_loss(w: Tensor, curvature: Tensor, target: Tensor) -> Tensor:
    """Per weight: E_r h/2 (Q(w + r) - r - a)^2, by a midpoint rule; float64, dyadic numbers only."""
    scheme, scale = Scheme.parse("W2H", dtype="fp32"), torch.full((1, 1), STEP)
    losses = [
        curvature / 2 * (fake_quantize(w + r, scheme, scale).double() - r.double() - target).square() for r in dithers()
    ]
    return torch.stack(losses).mean(0)


def dithered_gradient(w: Tensor, surrogate: JacQuant, state: Any, curvature: Tensor, target: Tensor) -> Tensor:
    scheme, scale = Scheme.parse("W2H", dtype="fp32"), torch.full((1, 1), STEP)
    w = w.clone().requires_grad_()
    for r in dithers():
        q = fake_quantize(w + r, scheme, scale, surrogate, state).double() - r.double()
        ((curvature / 2 * (q - target).square()).sum() / POINTS).backward()
    assert w.grad is not None
    return w.grad


def dyadic_weights(n: int = 256) -> Tensor:
    """Multiples of 1/1024 plus 1/4096, so no dithered weight meets a tie; a step from both outermost levels (.75)."""
    w = torch.randint(-1400, 1400, (4 * n,)) / 1024 + 1 / 4096
    distance = (w.abs() - 0.75).abs()
    return w[distance > STEP / 2 + 2 / POINTS][:n][None]


def test_the_gradient_is_the_derivative_of_the_dither_averaged_loss() -> None:
    """Subtractive dither makes the error independent of w, so a quadratic's finite difference has no remainder."""
    w = dyadic_weights()
    curvature, target = torch.rand(w.shape).double() + 0.5, torch.randn(w.shape).double()
    surrogate = JacQuant(granularity="element", beta=1.0)
    state = surrogate.init_state(w.shape)
    surrogate.refresh_(state, w, torch.full((1, 1), STEP), Scheme.parse("W2H"), stream())
    assert 0.2 < state["gain"].mean() < 0.8
    h = STEP / POINTS  # one dither spacing: the midpoint rule is then exact in the difference
    difference = (dithered_loss(w + h, curvature, target) - dithered_loss(w - h, curvature, target)) / (2 * h)
    found = dithered_gradient(w, surrogate, state, curvature, target).double()
    torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-6)


def test_the_group_gradient_is_the_directional_derivative_along_the_group() -> None:
    """One scalar per group is exact for moves and upstream gradients that are constant on the group."""
    w = dyadic_weights(256)
    surrogate = JacQuant(group_size=32, beta=1.0)
    state = surrogate.init_state(w.shape)
    surrogate.refresh_(state, w, torch.full((1, 1), STEP), Scheme.parse("W2H"), stream())
    slope = torch.randn(8).repeat_interleave(32)[None].double()

    def loss(x: Tensor) -> Tensor:
        scheme, scale = Scheme.parse("W2H", dtype="fp32"), torch.full((1, 1), STEP)
        values = [slope * (fake_quantize(x + r, scheme, scale).double() - r.double()) for r in dithers()]
        return torch.stack(values).mean(0).view(8, 32).sum(1)

    h = STEP / POINTS
    difference = (loss(w + h) - loss(w - h)) / (2 * h)
    gradient = surrogate.pullback(slope.float(), None, HalfShifted(2), state).view(8, 32).sum(1)
    torch.testing.assert_close(gradient.double(), difference, rtol=1e-5, atol=1e-6)


def test_what_one_scalar_per_group_removes_of_the_bias() -> None:
    """||J - b I||^2 / ||J - I||^2 = b exactly, for 0/1 sensitivities with share b (papers.md 3.5)."""
    v = 1.5 * torch.randn(16, 128).double()
    j = dither_exact(v, HalfShifted(2))
    b = j.mean(1, keepdim=True)
    ratio = (j - b).square().sum(1) / (j - 1).square().sum(1)
    torch.testing.assert_close(ratio, b.flatten(), rtol=1e-12, atol=0)


def test_rate_and_floor_of_descent_on_the_dithered_quadratic() -> None:
    """A-T8: mean contracts as (1 - eta b h)^t, variance tends to eta b h D^2 / (12 (2 - eta b h))."""
    grid, gain, rate, steps = Int(8), 0.5, 0.2, 60
    surrogate, state = JacQuant(group_size=1), {"gain": torch.full((40_000, 1), 0.5)}
    w, a = torch.full((40_000, 1), 20.0), 3.0
    for t in range(1, steps + 1):
        r = torch.rand(w.shape) - 0.5
        upstream = grid.project_(w + r) - r - a
        w = w - rate * surrogate.pullback(upstream, None, grid, state)
        if t == 10:
            assert (w.mean() - a).item() == pytest.approx((1 - gain * rate) ** 10 * 17, rel=1e-3)
    floor = gain * rate / (12 * (2 - gain * rate))
    assert w.var().item() == pytest.approx(floor, rel=0.03)


# estimates under other conditions -----------------------------------------------------------------------------------


def test_bf16_weights_are_probed_in_fp32() -> None:
    """At .03 a bf16 step is 1.2e-4, as large as the probe: in bf16 w + d would equal w."""
    w = (STD * torch.randn(50, 128)).bfloat16()
    surrogate = JacQuant.preset("paper_literal")
    rotated = Scheme(grid=SEQ2.grid, scale=SEQ2.scale, rotation=Rotation(kind="hadamard"))
    for scheme in (SEQ2, rotated):
        assert torch.equal(estimate(surrogate, w, scheme, 2 * STD), estimate(surrogate, w.float(), scheme, 2 * STD))


def test_the_estimate_of_a_rotated_weight_is_the_one_of_its_rotation() -> None:
    rotation = Rotation(kind="hadamard", block_size=32)
    w = torch.randn(4, 96)
    scheme, plain = Scheme.parse("W2", rotation=rotation), Scheme.parse("W2")
    surrogate = JacQuant(group_size=32)
    assert torch.equal(estimate(surrogate, w, scheme, 0.4), estimate(surrogate, rotation.apply(w), plain, 0.4))


def test_the_scale_is_frozen_at_its_stored_value() -> None:
    w, raw = torch.randn(4, 96), torch.rand(4, 3) + 0.2
    scheme = Scheme.parse("W2A16G32", mode="dynamic")
    stored = raw.bfloat16().float()
    for mode in ("dither_exact", "probe"):
        surrogate = JacQuant(mode=mode, group_size=16)  # type: ignore[arg-type]
        assert torch.equal(estimate(surrogate, w, scheme, raw), estimate(surrogate, w, scheme, stored))


def test_a_ragged_last_group_averages_over_its_own_count() -> None:
    w = torch.zeros(1, 40)
    w[0, 32:36] = 100.0
    found = estimate(JacQuant(group_size=32), w, Scheme.parse("W2"))
    assert found.tolist() == [[1.0, 0.5]]


def test_statistics_of_a_refresh() -> None:
    surrogate = JacQuant(group_size=32, beta=1.0)
    w = torch.zeros(1, 96)
    w[0, 32:64] = 100.0
    w[0, 64:80] = 100.0
    statistics = surrogate.refresh_(surrogate.init_state(w.shape), w, torch.ones(1, 1), Scheme.parse("W2"), stream())
    assert statistics["gain_mean"] == pytest.approx(0.5)
    assert statistics["gain_std"] == pytest.approx(math.sqrt(1 / 6), rel=1e-6)
    assert statistics["zero_share"] == pytest.approx(1 / 3)
    assert statistics["gain_q50"] == pytest.approx(0.5)
    assert statistics["raw_mean"] == pytest.approx(0.5)


# options ------------------------------------------------------------------------------------------------------------


def test_presets_are_the_ones_of_the_specification() -> None:
    recommended = JacQuant.preset("recommended")
    assert recommended == JacQuant()
    fields = ("mode", "sigma", "sigma_unit", "num_probes", "interval", "beta", "clip_first", "group_size", "gain_min")

    def values(name: str) -> list[Any]:
        return [getattr(JacQuant.preset(name), field) for field in fields]

    assert values("recommended")[0] == "dither_exact"
    assert values("recommended")[4:] == [100, 0.1, False, 128, 0.0]
    assert values("probe_rel") == ["probe", 0.5, "step", 1, 100, 0.1, False, 128, 0.0]
    assert values("paper_literal") == ["probe", 1e-4, "absolute", 1, 100, 0.9, True, 128, 0.0]
    assert values("paper_decay") == ["probe", 1e-4, "absolute", 1, 100, 0.1, True, 128, 0.0]
    assert not any(JacQuant.preset(name).compose_mask for name in ("recommended", "paper_literal"))
    assert JacQuant.preset("paper_literal", group_size=32, interval=200).group_size == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "dither"}, "mode='dither' is unknown; use one of dither_exact, dither_crn, probe"),
        ({"granularity": "row"}, "granularity='row' is unknown"),
        ({"sigma_unit": "rms"}, "sigma_unit='rms' is unknown"),
        ({"apply": "weight"}, "apply='weight' is unknown"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"num_probes": 0}, "num_probes=0 must be at least 1"),
        ({"interval": 0}, "interval=0 must be at least 1"),
        ({"sigma": 0.0}, "sigma=0.0 must be positive"),
        ({"sigma": math.nan}, "sigma=nan must be positive"),
        ({"beta": 1.5}, r"beta=1.5 is outside \[0, 1\]; it is the weight of the new estimate"),
        ({"gain_min": -0.1}, r"gain_min=-0.1 is outside \[0, 1\]"),
    ],
)
def test_bad_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JacQuant(**fields)
