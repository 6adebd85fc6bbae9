"""Forms of JacQuant beyond the paper: relative gains, saturated weights only, a power, refresh by flips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.convert import Rule, owned_layers, prepare
from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.nn import QATLayer
from fewbits.rotations import Rotation
from fewbits.scheme import Scheme
from fewbits.surrogates import ClippedSTE, JacQuant, surrogate_from_dict
from fewbits.surrogates._base import inside
from fewbits.surrogates.jacquant import codes_of
from fewbits.testing.contracts import check_surrogate
from fewbits.training.callback import scale_update_
from fewbits.training.windows import calibration

FORMS = [
    JacQuant(relative="time"),
    JacQuant(relative="layer", apply="update", group_size=7),
    JacQuant(where="saturated"),
    JacQuant(where="saturated", granularity="element", apply="update"),
    JacQuant(power=0.5, gain_min=0.1),
    JacQuant(power=-1.0, gain_min=0.25, control="shuffled"),
    JacQuant(refresh="flips", flip_share=0.1, check_interval=5),
]
GRIDS: list[AnyGrid] = [Binary(), Ternary(), Int(2), HalfShifted(2), Codebook((-3.0, -1.0, 1.0, 7.0))]
SCHEME = Scheme.parse("W2H", dtype="fp32")
SCALE = torch.ones(6, 1)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 + seed)


def weights(k: int) -> Tensor:
    """Groups of 32 that differ in how many of their weights lie outside, anew for each k."""
    return 2 * torch.randn(6, 128, generator=stream(k)) * torch.linspace(0.2, 1.5, 4).repeat_interleave(32)


def refreshed(surrogate: JacQuant, rounds: int = 4) -> list[dict[str, Tensor]]:
    """Copies of the state after each refresh."""
    state = surrogate.init_state((6, 128))
    states = []
    for k in range(rounds):
        surrogate.refresh_(state, weights(k), SCALE, SCHEME, stream(k))
        states.append({key: value.clone() for key, value in state.items()})
    return states


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.kind)
@pytest.mark.parametrize("surrogate", FORMS, ids=str)
def test_the_contract_holds(surrogate: JacQuant, grid: AnyGrid) -> None:
    check_surrogate(surrogate, grid)


def test_the_time_relative_gain_is_the_gain_over_its_mean_over_refreshes() -> None:
    plain = [JacQuant().gain(state) for state in refreshed(JacQuant(group_size=32, beta=0.5))]
    found = refreshed(JacQuant(group_size=32, beta=0.5, relative="time"))
    surrogate = JacQuant(group_size=32, relative="time")
    assert torch.equal(surrogate.gain(found[0]), torch.ones(6, 4)), "the first refresh gives 1"
    for n, state in enumerate(found, start=1):
        mean = torch.stack(plain[:n]).mean(0)
        torch.testing.assert_close(surrogate.gain(state), plain[n - 1] / mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(state["measured"], plain[n - 1], rtol=0, atol=0)
        assert int(state["num_refreshes"]) == n
        assert bool((surrogate.gain(state) <= n).all())
    assert float(surrogate.gain(found[-1]).max()) > 1


def test_a_gain_that_stays_is_one_and_zero_over_zero_is_one() -> None:
    surrogate = JacQuant(group_size=32, beta=1.0, relative="time")
    outside = 100 * torch.ones(6, 128)
    for w in (weights(0), outside):
        state = surrogate.init_state(w.shape)
        for k in range(5):
            surrogate.refresh_(state, w, SCALE, SCHEME, stream(k))
        torch.testing.assert_close(state["gain"], torch.ones(6, 4), rtol=1e-6, atol=0)
    layer = JacQuant(group_size=32, beta=1.0, relative="layer")
    state = layer.init_state(outside.shape)
    layer.refresh_(state, outside, SCALE, SCHEME, stream())
    assert torch.equal(state["gain"], torch.ones(6, 4))


def test_the_layer_relative_gain_keeps_the_place_and_has_mean_one() -> None:
    (plain,) = refreshed(JacQuant(group_size=32, beta=0.5), rounds=1)
    (state,) = refreshed(JacQuant(group_size=32, beta=0.5, relative="layer"), rounds=1)
    gain = JacQuant().gain(plain)
    torch.testing.assert_close(state["gain"], gain / gain.mean(), rtol=1e-6, atol=0)
    assert float(state["gain"].mean()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("power", [0.5, 2.0, -1.0])
def test_the_power_acts_on_the_clamped_gain(power: float) -> None:
    plain = refreshed(JacQuant(group_size=32, beta=0.5))[-1]
    state = refreshed(JacQuant(group_size=32, beta=0.5, power=power, gain_min=0.25))[-1]
    expected = plain["gain"].clamp(0.25, 1.0) ** power
    torch.testing.assert_close(JacQuant(power=power, gain_min=0.25).gain(state), expected, rtol=1e-6, atol=0)


def test_controls_act_on_the_gain_in_use() -> None:
    options: dict[str, Any] = {"group_size": 32, "beta": 0.5, "relative": "time", "power": 0.5}
    used = refreshed(JacQuant(**options))[-1]["gain"]
    shuffled = refreshed(JacQuant(**options, control="shuffled"))[-1]["gain"]
    constant = refreshed(JacQuant(**options, control="constant"))[-1]["gain"]
    assert torch.equal(used.flatten().sort().values, shuffled.flatten().sort().values)
    assert not torch.equal(used, shuffled)
    torch.testing.assert_close(constant, used.mean().expand(6, 4), rtol=0, atol=0)


@pytest.mark.parametrize("granularity", ["group", "element"])
def test_saturated_only_leaves_the_weights_inside_alone(granularity: Any) -> None:
    """Gain 0 is then the clipped STE bit for bit, gain 1 the identity, and nothing inside depends on the gain."""
    surrogate = JacQuant(where="saturated", granularity=granularity, group_size=32)
    v, grad = weights(0), torch.randn(6, 128)
    mask = inside(v, HalfShifted(2), "level")
    assert 0.1 < mask.float().mean() < 0.9
    state = surrogate.init_state(v.shape)
    assert torch.equal(surrogate.pullback(grad, v, HalfShifted(2), state), grad)
    zero = {"gain": torch.zeros_like(state["gain"])}
    assert torch.equal(
        surrogate.pullback(grad, v, HalfShifted(2), zero), ClippedSTE().pullback(grad, v, HalfShifted(2), {})
    )
    some = {"gain": torch.rand_like(state["gain"])}
    found = surrogate.pullback(grad, v, HalfShifted(2), some)
    assert torch.equal(found[mask], grad[mask])
    everywhere = JacQuant(granularity=granularity, group_size=32).pullback(grad, v, HalfShifted(2), some)
    assert torch.equal(found[~mask], everywhere[~mask])
    assert (surrogate.needs_v, JacQuant(where="saturated", apply="update").needs_v) == (True, False)


@pytest.mark.parametrize("transposed", [False, True])
def test_saturated_only_on_the_update(transposed: bool) -> None:
    plain = Conv1D(8, 64) if transposed else nn.Linear(64, 8)
    rule = Rule(scheme=SCHEME, surrogate=JacQuant(where="saturated", apply="update", group_size=32))
    layer = prepare(nn.Sequential(plain), rule)[0]  # type: ignore[index]
    assert isinstance(layer, QATLayer)
    assert layer.weight_scale is not None
    layer.weight_scale.data.fill_(float(layer.weight.detach().abs().mean()))
    layer.state()["gain"].fill_(0.25)
    before = layer.weight.detach().clone()
    step = 0.01 * torch.randn(before.shape)
    with torch.no_grad():
        layer.weight += step
    made = layer.weight.detach() - before
    scale_update_(layer, before)
    mask = inside(before / layer.weight_scale.detach()[0, 0], layer.scheme.grid, "level")
    assert 0.2 < mask.float().mean() < 0.95
    assert torch.equal(layer.weight, before + torch.where(mask, made, 0.25 * made))


def test_the_gain_of_an_update_belongs_to_the_rotated_coordinates() -> None:
    scheme = Scheme.parse("W2A16G32", rotation=Rotation(kind="hadamard", block_size=16))
    rule = Rule(scheme=scheme, surrogate=JacQuant(apply="update", granularity="element"))
    layer = prepare(nn.Sequential(nn.Linear(64, 8)), rule)[0]  # type: ignore[index]
    assert isinstance(layer, QATLayer)
    layer.state()["gain"].uniform_()
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 0.01 * torch.randn(8, 64)
    moved = scheme.rotation.apply(layer.weight.detach() - before)
    scale_update_(layer, before)
    found = scheme.rotation.apply(layer.weight.detach() - before)
    torch.testing.assert_close(found, layer.state()["gain"] * moved, rtol=0, atol=1e-7)


@pytest.mark.parametrize("grid", [*GRIDS, Int(8), Codebook.lloyd_max(8)], ids=str)
def test_flips_refresh_when_enough_codes_have_changed(grid: AnyGrid) -> None:
    """Every code is a byte of its own, so that the share is that of the codes themselves."""
    scheme = Scheme(grid=grid)
    surrogate = JacQuant(refresh="flips", flip_share=0.25, check_interval=5)
    w, scale = torch.randn(4, 64, generator=stream()), torch.full((4, 1), 0.7)
    state = surrogate.init_state(w.shape)
    assert not surrogate.is_due(4, state, w, scale, scheme)
    assert surrogate.is_due(5, state, w, scale, scheme), "the first check always refreshes"
    surrogate.refresh_(state, w, scale, scheme, stream())
    assert torch.equal(state["codes_last"], codes_of(w, scale, scheme))
    assert not surrogate.is_due(10, state, w, scale, scheme)
    for columns, due in ((16, False), (17, True)):  # 25 %, and more
        moved = w.clone()
        moved[:, :columns] = -torch.sign(w[:, :columns]) * 0.7 * max(grid.max_level, 1.5)
        codes = scheme.grid.encode(moved / 0.7)
        assert (codes != scheme.grid.encode(w / 0.7)).float().mean() == columns / 64
        assert surrogate.is_due(10, state, moved, scale, scheme) is due
        assert not surrogate.is_due(11, state, moved, scale, scheme)


def test_the_states_of_all_forms() -> None:
    keys = [set(surrogate.init_state((6, 128))) for surrogate in FORMS]
    assert keys == [
        {"gain", "measured", "mean", "num_refreshes"},
        {"gain", "measured"},
        {"gain"},
        {"gain"},
        {"gain", "measured"},
        {"gain", "measured"},
        {"gain", "codes_last", "num_refreshes"},
    ]
    for surrogate in FORMS:
        assert surrogate_from_dict(surrogate.to_dict()) == surrogate


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"relative": "place"}, "relative='place' is unknown; use one of none, time, layer"),
        ({"where": "outside"}, "where='outside' is unknown; use one of all, saturated"),
        ({"flip_share": 1.0}, "flip_share=1.0 is outside"),
        ({"power": 0.0}, "power=0.0 must be finite and not 0"),
        ({"power": -1.0}, "positive unless gain_min > 0"),
        ({"power": float("inf")}, "power=inf"),
        ({"where": "saturated", "compose_mask": True}, "the mask zeroes the saturated weights"),
    ):
        with pytest.raises(ValueError, match=message):
            JacQuant(**options)


def test_calibration_of_saturated_gains_is_by_weight() -> None:
    """With gain 0 outside, the prediction is that of the clipped STE: exact for moves that stay outside."""
    rule = Rule(scheme=SCHEME, surrogate=JacQuant(where="saturated", group_size=32))
    layer = prepare(nn.Sequential(nn.Linear(64, 8)), rule)[0]  # type: ignore[index]
    assert isinstance(layer, QATLayer)
    assert layer.weight_scale is not None
    layer.weight_scale.data.fill_(1e-6)  # everything is saturated
    old = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight *= 1.01
    layer.state()["gain"].zero_()
    found = calibration(layer, old)
    assert found["cal"] == pytest.approx(0.0, abs=1e-12)
    assert found["cal_identity"] == pytest.approx(1.0)


@pytest.mark.parametrize("surrogate", [FORMS[0], FORMS[-1]], ids=["time", "flips"])
def test_resume_is_bit_identical(tmp_path: Path, surrogate: JacQuant) -> None:
    from dataclasses import replace

    from test_training import Interrupt, make_trainer

    surrogate = replace(surrogate, interval=2, check_interval=1, flip_share=0.01, beta=0.5, group_size=32)
    options: dict[str, Any] = {"learning_rate": 3e-3}
    whole = make_trainer(tmp_path / "whole", surrogate, **options)
    whole.train()
    broken = make_trainer(tmp_path / "broken", surrogate, callbacks=[Interrupt(6)], **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", surrogate, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert whole.model is not None
    assert resumed.model is not None
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    counts = {int(layer.state()["num_refreshes"]) for _, layer in owned_layers(whole.model)}
    assert min(counts) >= 2
    assert (tmp_path / "broken/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
