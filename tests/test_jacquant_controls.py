"""JacQuant's control experiments: the same gains in size, without knowing where they belong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbits.convert import Rule, prepare
from fewbits.scheme import Scheme
from fewbits.surrogates import JacQuant, surrogate_from_dict

SCHEME = Scheme.parse("W2H")


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 + seed)


def gains(surrogate: JacQuant, *, rounds: int = 3) -> dict[str, Tensor]:
    """State after some refreshes of weights whose groups differ much in how many lie outside."""
    w = 2 * torch.randn(6, 128) * torch.linspace(0.2, 1.5, 4).repeat_interleave(32)
    state = surrogate.init_state(w.shape)
    for k in range(rounds):
        surrogate.refresh_(state, w, torch.ones(6, 1), SCHEME, stream(k))
    return state


@pytest.fixture
def plain(seed: int) -> dict[str, Tensor]:
    state = gains(JacQuant(group_size=32, beta=0.5))
    torch.manual_seed(seed)  # the same weights again
    return state


def test_shuffled_is_a_permutation_within_the_layer_and_the_average_is_untouched(plain: dict[str, Tensor]) -> None:
    state = gains(JacQuant(group_size=32, beta=0.5, control="shuffled"))
    assert torch.equal(state["measured"], plain["gain"])
    assert torch.equal(state["gain"].flatten().sort().values, plain["gain"].flatten().sort().values)
    assert not torch.equal(state["gain"], plain["gain"])


def test_constant_is_the_layers_mean_gain_in_use(plain: dict[str, Tensor]) -> None:
    surrogate = JacQuant(group_size=32, beta=0.5, gain_min=0.3, control="constant")
    state = gains(surrogate)
    assert torch.equal(state["measured"], plain["gain"])
    assert state["gain"].unique().numel() == 1
    expected = JacQuant(gain_min=0.3).gain(plain).mean()
    torch.testing.assert_close(surrogate.gain(state)[0, 0], expected, rtol=0, atol=0)


def test_the_shuffle_comes_from_the_estimators_own_stream_and_is_anew_each_time() -> None:
    surrogate = JacQuant(group_size=32, control="shuffled")
    w = 2 * torch.randn(6, 128)
    orders = []
    for k in (0, 0, 1):
        state = surrogate.init_state(w.shape)
        before = torch.get_rng_state()
        surrogate.refresh_(state, w, torch.ones(6, 1), SCHEME, stream(k))
        assert torch.equal(torch.get_rng_state(), before), "torch's own stream stays where it was"
        orders.append(state["gain"])
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_without_a_control_nothing_more_is_kept_and_the_option_round_trips() -> None:
    assert set(JacQuant().init_state((2, 128))) == {"gain"}
    surrogate = JacQuant(control="constant")
    assert surrogate_from_dict(surrogate.to_dict()) == surrogate
    layer = prepare(nn.Sequential(nn.Linear(128, 4)), Rule(scheme="W2", surrogate=surrogate))[0]  # type: ignore[index]
    assert {"gain", "measured"} == set(layer.state())
    with pytest.raises(ValueError, match="control='swapped' is unknown; use one of none, constant, shuffled"):
        JacQuant(control="swapped")  # type: ignore[arg-type]
