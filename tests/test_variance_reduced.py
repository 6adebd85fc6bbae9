"""A-T7, the optimizer contract: exact at the anchor, unbiased, less noise near it, and nothing at all when off."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.convert import Rule, owned_layers, prepare
from fewbits.grids import HalfShifted
from fewbits.objectives import Objective
from fewbits.optim import VarianceReduced, VarianceReduction
from fewbits.surrogates import JacQuant
from fewbits.testing.tiny import tiny_llama, toy_blocks

NUM_BATCHES, IN, OUT = 12, 16, 3
ANCHORED = ("l_svrg", "svrg", "sarah")


class Batches(list[tuple[Tensor, Tensor]]):
    """A fixed set of minibatches of a noisy linear problem."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        truth = torch.randn(IN, OUT, dtype=dtype)
        x = torch.randn(NUM_BATCHES, 4, IN, dtype=dtype)
        super().__init__((a, a @ truth + torch.randn(4, OUT, dtype=dtype)) for a in x)


def small_model(dropout: float = 0.0, scheme: str | None = "W3") -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(IN, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, OUT))
    if scheme is not None:
        prepare(model, Rule(scheme=scheme, surrogate=JacQuant(group_size=8)), ignore=[])
        for _, layer in owned_layers(model):
            layer.state()["gain"].uniform_(0.2, 1.0)
    return model


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: (model(batch[0]) - batch[1]).square().mean()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def plain_gradients(model: nn.Module, batches: Any) -> list[Tensor]:
    """Mean gradient of some batches, by backward passes of our own."""
    found = [torch.zeros_like(p) for p in model.parameters()]
    for batch in batches:
        for total, g in zip(found, torch.autograd.grad(loss_of(model)(batch), list(model.parameters())), strict=True):
            total += g
    return [total / len(batches) for total in found]


def wrapped(model: nn.Module, reference: Any, form: Any, lr: float = 0.05, **more: Any) -> VarianceReduced:
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    return VarianceReduced(sgd, model, reference, VarianceReduction(form=form, **more))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# off ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_off_is_the_base_optimizer_bit_for_bit(cls: Any) -> None:
    batches = Batches()
    base, off = small_model(0.3), small_model(0.3)
    optimizer, vr = cls(base.parameters(), lr=0.01), VarianceReduced(cls(off.parameters(), lr=0.01), off)
    streams = []
    for model, run in ((base, None), (off, vr)):
        torch.manual_seed(5)
        for batch in batches:
            if run is None:
                optimizer.zero_grad()
                loss_of(model)(batch).backward()
                optimizer.step()
            else:
                run.step(loss_of(model), batch)
        streams.append(torch.get_rng_state())
    assert equal(list(base.parameters()), list(off.parameters()))
    assert torch.equal(*streams)
    assert (vr.extra_bytes, vr.num_passes) == (0, len(batches))


# at the anchor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ANCHORED)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_at_the_anchor_the_estimate_is_the_reference_gradient(form: Any, dropout: float) -> None:
    """With dropout too: both terms see the same masks, and the training stream goes on as if there were one term."""
    batches, model = Batches(), small_model(dropout)
    vr = wrapped(model, batches, form, lr=0.0, interval=1000)
    torch.manual_seed(9)
    loss_of(model)(batches[0])
    stream = torch.get_rng_state()
    torch.manual_seed(9)
    vr.step(loss_of(model), batches[0])
    assert torch.equal(torch.get_rng_state(), stream)
    first = gradients(model)
    for batch in batches[1:4]:
        vr.step(loss_of(model), batch)
        assert equal(gradients(model), first)
    if dropout == 0:
        assert equal(first, plain_gradients(model, batches))


def test_in_a_code_preserving_window_the_estimate_is_the_reference_gradient() -> None:
    """The latent weights move, the codes do not: there is no minibatch noise in their gradient at all.

    LSQ's scale gradient reads the latent weight itself, so that of the scales follows it.
    """
    batches, model = Batches(), small_model()
    vr = wrapped(model, batches, "l_svrg", lr=0.0, probability=1e-9)
    vr.step(loss_of(model), batches[0])
    first, codes = gradients(model), [layer.qtensor().codes for _, layer in owned_layers(model)]
    with torch.no_grad():
        for _, layer in owned_layers(model):
            layer.weight.mul_(1 + 1e-5)
    assert equal(codes, [layer.qtensor().codes for _, layer in owned_layers(model)])
    vr.step(loss_of(model), batches[1])
    for (name, _), found, old in zip(model.named_parameters(), gradients(model), first, strict=True):
        assert torch.equal(found, old) is ("scale" not in name)


# away from it -------------------------------------------------------------------------------------------------------


def moved(form: Any, size: float, **more: Any) -> tuple[VarianceReduced, nn.Module, Batches]:
    """A wrapper whose anchor lies ``size`` away from the weights, with other gains."""
    batches, model = Batches(), small_model()
    vr = wrapped(model, batches, form, lr=0.0, probability=1e-9, **more)
    vr.step(loss_of(model), batches[0])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn_like(p))
        for _, layer in owned_layers(model):
            layer.state()["gain"].mul_(1 - size)
    return vr, model, batches


@pytest.mark.parametrize("form", ["l_svrg", "saga"])
def test_the_mean_over_all_batches_is_the_full_gradient(form: Any) -> None:
    """Unbiased exactly: every batch of the set once, equal weights."""
    vr, model, batches = moved(form, 0.1)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for batch in batches:
        trial = copy.deepcopy(vr.state_dict())
        vr.gradient_(loss_of(model), batch)
        for t, g in zip(total, gradients(model), strict=True):
            t += g / len(batches)
        vr.load_state_dict(trial)
    expected = plain_gradients(model, batches)
    assert max(g.abs().max().item() for g in expected) > 0.05
    for t, g in zip(total, expected, strict=True):
        torch.testing.assert_close(t, g, rtol=0, atol=2e-6)


def test_unbiased_within_six_standard_errors_for_random_minibatches() -> None:
    vr, model, batches = moved("l_svrg", 0.1)
    expected = torch.cat([g.flatten() for g in plain_gradients(model, batches)])
    draws = []
    for i in torch.randint(NUM_BATCHES, (200,)).tolist():
        vr.gradient_(loss_of(model), batches[i])
        draws.append(torch.cat([g.flatten() for g in gradients(model)]))
    found = torch.stack(draws)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - expected).abs() <= 6 * error + 1e-6).all())
    assert error.max() > 1e-4


def test_the_variance_is_smaller_near_the_anchor_and_grows_with_the_distance() -> None:
    ratios = []
    for size in (0.003, 0.03, 0.3):
        vr, model, batches = moved("l_svrg", size)
        plain, reduced = [], []
        for batch in batches:
            plain.append(torch.cat([g.flatten() for g in plain_gradients(model, [batch])]))
            vr.gradient_(loss_of(model), batch)
            reduced.append(torch.cat([g.flatten() for g in gradients(model)]))
        ratios.append((torch.stack(reduced).var(0).sum() / torch.stack(plain).var(0).sum()).item())
    assert 0 < ratios[0] < 0.041 < 0.5  # the specification's reference has .041
    assert ratios[0] < ratios[1] < ratios[2]


def test_the_anchor_keeps_the_gains_of_its_time() -> None:
    """With the current gains in both terms the estimate would be another one."""
    vr, model, batches = moved("l_svrg", 0.1)
    old = [t.clone() for t in vr.state_dict()["anchor"]]
    now = plain_gradients(model, [batches[3]])
    vr.gradient_(loss_of(model), batches[3])
    found = gradients(model)
    with torch.no_grad():
        live = [*model.parameters(), *(v for _, layer in owned_layers(model) for v in layer.state().values())]
        for t, value in zip(live, old, strict=True):
            t.copy_(value)
    then, mean = plain_gradients(model, [batches[3]]), plain_gradients(model, batches)
    for f, a, b, g in zip(found, now, then, mean, strict=True):
        torch.testing.assert_close(f, (a - b) + g, rtol=0, atol=1e-6)


def test_sarah_is_its_recursion() -> None:
    batches, model = Batches(), small_model()
    vr = wrapped(model, batches, "sarah", interval=3)
    before = estimate = None
    for t, batch in enumerate(batches[:7]):
        twin = copy.deepcopy(model)
        vr.step(loss_of(model), batch)
        if t % 3 == 0:
            estimate = plain_gradients(twin, batches)
        else:
            now, then = plain_gradients(twin, [batch]), plain_gradients(before, [batch])  # type: ignore[arg-type]
            estimate = [(a - b) + v for a, b, v in zip(now, then, estimate, strict=True)]  # type: ignore[arg-type]
        assert equal(gradients(model), estimate)
        before = twin


def test_the_table_of_saga_holds_the_last_gradient_of_each_batch() -> None:
    batches, model = Batches(), small_model()
    vr = wrapped(model, batches, "saga")
    table = [plain_gradients(model, [batch]) for batch in batches]
    for i in (3, 3, 0, 7, 3):
        now = plain_gradients(model, [batches[i]])
        mean = [sum(column) / NUM_BATCHES for column in zip(*table, strict=True)]
        vr.step(loss_of(model), batches[i])
        for found, a, b, m in zip(gradients(model), now, table[i], mean, strict=True):
            torch.testing.assert_close(found, (a - b) + m, rtol=0, atol=1e-6)
        table[i] = now
    assert vr.num_passes == NUM_BATCHES + 5


# cost, memory, composition ------------------------------------------------------------------------------------------


def test_cost_and_memory_are_what_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    batches = Batches()
    for form, passes in (("svrg", 2 + NUM_BATCHES / 5), ("sarah", 2 + NUM_BATCHES / 5), ("saga", 1.0)):
        model = small_model()
        with caplog.at_level(logging.INFO, logger="fewbits"):
            vr = wrapped(model, batches, form, interval=5)
        assert f"variance reduction ({form})" in caplog.text
        assert f"{vr.settings.expected_passes(NUM_BATCHES):.2f} passes" in caplog.text
        for i in range(10):
            vr.step(loss_of(model), batches[i])
        start = NUM_BATCHES if form == "saga" else 0
        assert vr.num_passes == pytest.approx(10 * passes + start)
        assert vr.settings.expected_passes(NUM_BATCHES) == pytest.approx(passes)
        state = vr.state_dict()
        kept = [*(state["anchor"] or []), *state["mean"], *(t for row in state["table"] for t in row)]
        assert vr.extra_bytes == sum(t.numel() * t.element_size() for t in kept)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gains = sum(v.numel() * 4 for _, layer in owned_layers(model) for v in layer.state().values())
    assert wrapped(model, batches, "l_svrg").extra_bytes == 2 * weights + gains


def test_the_coin_renews_the_anchor_with_its_probability() -> None:
    batches, model = Batches(), small_model(scheme=None)
    vr = wrapped(model, batches[:2], "l_svrg", probability=0.2)
    for i in range(300):
        vr.step(loss_of(model), batches[i % NUM_BATCHES])
    renewals = (vr.num_passes - 600) / 2
    assert abs(renewals - 60) < 4 * (300 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize("form", ["none", *ANCHORED])
def test_micro_batches_are_one_minibatch(form: Any) -> None:
    batches = Batches(torch.float64)
    whole, parts = small_model(scheme=None).double(), small_model(scheme=None).double()
    pairs = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in itertools.pairwise(batches)]
    one, two = wrapped(whole, pairs, form, interval=2), wrapped(parts, pairs, form, interval=2)
    for i in range(4):
        expected = one.step(loss_of(whole), pairs[i])
        loss = two.step(loss_of(parts), batches[i], batches[i + 1])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_micro_batches_of_saga_each_use_their_own_place_in_the_table() -> None:
    batches, model = Batches(torch.float64), small_model(scheme=None).double()
    start = plain_gradients(model, batches)
    table = [plain_gradients(model, [batch]) for batch in batches]
    vr = wrapped(model, batches, "saga")
    vr.step(loss_of(model), batches[0], batches[1])
    now = [plain_gradients(model, [batches[i]]) for i in (4, 5)]
    vr.step(loss_of(model), batches[4], batches[5])
    for found, a, b, old_a, old_b, mean in zip(gradients(model), *now, table[4], table[5], start, strict=True):
        torch.testing.assert_close(found, ((a - old_a) + (b - old_b)) / 2 + mean, rtol=0, atol=1e-13)


def test_distillation_of_a_language_model_with_tied_weights() -> None:
    """The closure may hold a teacher; the embedding, tied to the head, is anchored once."""
    teacher = tiny_llama(tie=True)
    model = prepare(copy.deepcopy(teacher), Rule(scheme="W2A16G32", surrogate=JacQuant(group_size=32)))
    model.train()
    blocks = list(toy_blocks(6, 16).split(2))
    objective = Objective(cross_entropy=0.5, kl=0.5)

    def loss_fn(ids: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(ids).logits
        return objective(model(ids).logits, ids, target)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    vr = VarianceReduced(optimizer, model, blocks, VarianceReduction(form="svrg", interval=4))
    losses = [vr.step(loss_fn, blocks[i % 3]).item() for i in range(8)]
    assert losses[-1] < losses[0] - 0.1
    weights = sum(p.numel() * 4 for p in model.parameters())
    gains = sum(v.numel() * 4 for _, layer in owned_layers(model) for v in layer.state().values())
    assert vr.extra_bytes == 2 * weights + gains


def test_batch_statistics_are_counted_once_and_unreached_parameters_keep_no_gradient() -> None:
    batches = Batches()
    model = nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT))
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    twin = copy.deepcopy(model)
    vr = wrapped(model, batches, "l_svrg", lr=0.0)
    for batch in batches[:3]:
        vr.step(loss_of(model), batch)
        twin(batch[0])
    assert torch.equal(model[1].running_mean, twin[1].running_mean)  # type: ignore[arg-type]
    assert int(model[1].num_batches_tracked) == 3  # type: ignore[arg-type]
    assert model.unused.grad is None


def test_half_precision_weights_subtract_in_fp32() -> None:
    batches, model = Batches(), small_model(scheme=None).bfloat16()

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0].bfloat16()).float() - batch[1]).square().mean()

    vr = wrapped(model, batches, "l_svrg", lr=0.0)
    vr.step(loss_fn, batches[0])
    assert all(g.dtype == torch.bfloat16 for g in gradients(model))
    assert all(m.dtype == torch.float32 for m in vr.state_dict()["mean"])


@pytest.mark.parametrize("form", ["l_svrg", "sarah", "saga"])
def test_a_resumed_run_goes_on_bit_for_bit(form: Any, tmp_path: Any) -> None:
    batches, model = Batches(), small_model()
    vr = wrapped(model, batches, form, probability=0.3, interval=3)
    for batch in batches[:4]:
        vr.step(loss_of(model), batch)
    torch.save([model.state_dict(), vr.state_dict()], tmp_path / "state.pt")
    for batch in batches[4:]:
        vr.step(loss_of(model), batch)
    again = small_model()
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed = wrapped(again, batches, form, probability=0.3, interval=3)
    resumed.load_state_dict(state)
    for batch in batches[4:]:
        resumed.step(loss_of(again), batch)
    assert equal(list(model.parameters()), list(again.parameters()))
    assert resumed.num_passes == vr.num_passes


def test_a_failing_closure_leaves_the_weights_in_place() -> None:
    vr, model, batches = moved("l_svrg", 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    calls = iter([False, True])

    def loss_fn(batch: Any) -> Tensor:
        if next(calls):
            raise KeyboardInterrupt
        return loss_of(model)(batch)

    with pytest.raises(KeyboardInterrupt):
        vr.step(loss_fn, batches[0])
    assert equal(list(model.parameters()), before)


# a constant gain under Adam and under SGD ---------------------------------------------------------------------------


def trajectory(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], gain: Tensor | None) -> Tensor:
    """A float64 run of 200 steps on a quadratic of the quantized weights, step size alpha = 1e-2."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(4, 32, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randn(4, 32, dtype=torch.float64, generator=generator)
    grid, surrogate = HalfShifted(2), JacQuant(granularity="element")
    steps = optimizer([w])
    for _ in range(200):
        v = grid.project_(w.detach().clone()) - target + 0.1 * torch.randn(4, 32, generator=generator).double()
        w.grad = v if gain is None else surrogate.pullback(v, None, grid, {"gain": gain})
        steps.step()
    return w.detach()


def test_a_constant_gain_is_invisible_to_adam_and_visible_to_sgd() -> None:
    """papers.md 3.6: to 1e-10 alpha as eps -> 0; with a large eps the gain is seen again."""
    alpha = 1e-2
    gain = 0.2 + 0.8 * torch.rand(4, 32)

    def adam(eps: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
        return lambda params: torch.optim.Adam(params, lr=alpha, eps=eps)

    def gap(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> float:
        return (trajectory(optimizer, gain) - trajectory(optimizer, None)).abs().max().item() / alpha

    assert gap(adam(1e-14)) < 1e-10
    assert gap(adam(1e-2)) > 1e-2
    assert gap(lambda params: torch.optim.SGD(params, lr=alpha)) > 0.3


# options ------------------------------------------------------------------------------------------------------------


def test_wrong_setups_are_refused() -> None:
    batches, model = Batches(), small_model()
    for fields, message in (
        ({"form": "storm"}, "form='storm' is unknown; use one of none, l_svrg, svrg, sarah, saga"),
        ({"probability": 0.0}, r"probability=0.0 is outside \(0, 1\]"),
        ({"interval": 0}, "interval=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            VarianceReduction(**fields)
    with pytest.raises(ValueError, match="needs reference batches"):
        wrapped(model, [], "svrg")
    with pytest.raises(ValueError, match="at least one batch"):
        wrapped(model, batches, "svrg").step(loss_of(model))
    saga = wrapped(model, batches[:3], "saga")
    with pytest.raises(ValueError, match="knows the reference batches only"):
        saga.step(loss_of(model), batches[5])
    with pytest.raises(ValueError, match="twice in one step"):
        saga.step(loss_of(model), batches[0], batches[0])
    with pytest.raises(ValueError, match="of form 'saga', the settings say 'svrg'"):
        wrapped(model, batches, "svrg").load_state_dict(saga.state_dict())
    svrg = wrapped(model, batches, "svrg")
    svrg.step(loss_of(model), batches[0])
    other = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="the state has"):
        wrapped(other, batches, "svrg").load_state_dict(svrg.state_dict())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to train"):
        wrapped(model, batches, "none")
