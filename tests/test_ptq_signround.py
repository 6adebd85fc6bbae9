"""SignRound: how far it can go, what it keeps, and blocks rounded for their output."""

from __future__ import annotations

import copy

import pytest
import torch
from ptq_common import SCHEMES, data, every_scheme
from torch import Tensor, nn

from fewbits.convert import Rule, prepare, qat_layers
from fewbits.nn import QATLayer
from fewbits.ptq import apply_ptq, hessian_of, output_error, rtn, signround
from fewbits.ptq.calibration import run_model
from fewbits.ptq.signround import SignRoundWeight, default_learning_rate, sign_descent
from fewbits.qtensor import initial_scale, quantize
from fewbits.scheme import Scheme
from fewbits.testing.tiny import tiny_llama, toy_blocks


def test_the_total_travel_is_just_over_one_half() -> None:
    """Sum of the falling learning rate: (n + 1) / (2 n)."""
    weight = SignRoundWeight(torch.full((1, 32), 0.3), Scheme.parse("W4"), torch.ones(1, 1), learn_scale=False)
    free = torch.zeros(())  # an unclamped twin

    def loss(step: int) -> Tensor:
        nonlocal free
        free = free + default_learning_rate(200, weight.scheme) * (1 - step / 200) * (step < 200)
        return -weight.offset.sum()  # always uphill

    sign_descent([weight], loss, iterations=200)
    assert float(free) == pytest.approx(0.5025, abs=1e-5)
    assert weight.offset.max() == 0.5  # clamped
    assert default_learning_rate(200, weight.scheme) == 1 / 200
    assert default_learning_rate(1000, Scheme.parse("W2")) == 2 / 1000
    assert default_learning_rate(1000, Scheme.parse("W4")) == 1 / 1000


@every_scheme
def test_with_fixed_scales_codes_move_to_a_neighbour_at_most(scheme: Scheme) -> None:
    w, x = data()
    plain = rtn(w, scheme).qtensor
    found = signround(w, scheme, inputs=x, learn_scale=False).qtensor
    assert torch.equal(found.scale, plain.scale)
    moved = (found.codes.int() - plain.codes.int()).abs()
    assert moved.max() == 1
    uniform = scheme.grid.kind in ("int", "ternary", "half_shifted")
    if uniform:  # nearest(v + V) with |V| <= 1/2 is a neighbour of v on the grid, clipped at its ends
        rotated = scheme.rotation.apply(w)
        v = rotated / scheme.scale.view(w.shape).expand(found.scale)
        inner = v.clamp(scheme.grid.min_level, scheme.grid.max_level)
        assert (found.levels() - inner).abs().max() <= 1


@every_scheme
def test_it_lowers_the_output_error_and_holds_its_codes(scheme: Scheme) -> None:
    w, x = data()
    h = hessian_of(x)
    plain = output_error(w, rtn(w, scheme).qtensor.dequantize(), h)
    fixed = signround(w, scheme, hessian=h, learn_scale=False, iterations=100)
    free = signround(w, scheme, hessian=h, iterations=100)
    assert output_error(w, fixed.qtensor.dequantize(), h) < 0.8 * plain
    assert output_error(w, free.qtensor.dequantize(), h) < 0.8 * plain
    for result in (fixed, free):
        again = quantize(result.latent, scheme, result.scale)
        assert torch.equal(again.codes, result.qtensor.codes)
        assert torch.equal(again.scale, result.qtensor.scale)


@every_scheme
def test_the_differentiable_weight_is_the_quantized_one(scheme: Scheme) -> None:
    w, _ = data()
    weight = SignRoundWeight(w, scheme, initial_scale(w, scheme))
    assert torch.equal(weight.weight(), quantize(w, scheme).dequantize())
    with torch.no_grad():
        weight.offset.uniform_(-0.5, 0.5)
        weight.multiplier.uniform_(0.7, 1.3)
    torch.testing.assert_close(weight.weight(), weight.result().qtensor.dequantize(), rtol=1e-6, atol=1e-8)


def test_gradients_are_those_of_straight_through_rounding() -> None:
    scheme = Scheme.parse("W2G32", dtype="fp32")
    w, _ = data(rows=2, width=32)
    weight = SignRoundWeight(w, scheme, initial_scale(w, scheme))
    g = torch.randn(2, 32)
    by_offset, by_scale = torch.autograd.grad((weight.weight() * g).sum(), weight.variables())
    s, v = weight.start, w / weight.start
    inside = (v >= -2.5) & (v <= 1.5)
    torch.testing.assert_close(by_offset, g * s * inside)
    levels = v.round().clamp(-2, 1)
    torch.testing.assert_close(by_scale, (g * s * (levels - v * inside)).sum(1, keepdim=True))


def test_the_best_state_is_kept() -> None:
    w, _ = data()
    weight = SignRoundWeight(w, Scheme.parse("W2"), initial_scale(w, Scheme.parse("W2")))
    scores = iter([5.0, 3.0, 4.0, 9.0])
    seen: list[tuple[Tensor, Tensor]] = []

    def score() -> float:
        seen.append(weight.state())
        return next(scores)

    best = sign_descent([weight], lambda step: weight.weight().sum(), iterations=30, score=score, num_scores=3)
    assert best == 3.0
    assert len(seen) == 4
    assert torch.equal(weight.offset, seen[1][0])
    assert torch.equal(weight.multiplier, seen[1][1])
    assert not torch.equal(seen[1][0], seen[3][0])


def test_a_loss_without_gradient_leaves_rtn() -> None:
    w, _ = data()
    scheme = Scheme.parse("W2G32")
    result = signround(w, scheme, hessian=torch.zeros(80, 80), iterations=5)
    assert torch.equal(result.qtensor.codes, rtn(w, scheme).qtensor.codes)


@pytest.mark.parametrize("mode", ["learned", "frozen"])
def test_blocks_of_a_model_are_rounded_for_their_output(mode: str) -> None:
    blocks, held_out = toy_blocks(8), toy_blocks(8, seed=9)
    rule = Rule(scheme=Scheme.parse("W2G32", mode=mode), surrogate="jacquant")
    teacher = tiny_llama()
    model = apply_ptq(tiny_llama(), rule, "signround", blocks, batch_size=4, iterations=40)
    plain = prepare(tiny_llama(), rule)

    def first_block(m: nn.Module, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = m.get_submodule("model.layers.0").register_forward_hook(lambda _, a, out: seen.append(out))
        with torch.no_grad():
            run_model(m, x)
        handle.remove()
        return seen[0]

    def error(m: nn.Module, x: Tensor) -> float:
        return float((first_block(m, x) - first_block(teacher, x)).square().mean())

    assert error(model, blocks) < 0.8 * error(plain, blocks)
    assert error(model, held_out) < 0.9 * error(plain, held_out)
    for name, layer in qat_layers(model):
        assert layer.surrogate == rule.surrogate
        assert "quantized_weight" not in vars(layer)
        other = plain.get_submodule(name)
        assert isinstance(other, QATLayer)
        assert not torch.equal(layer.qtensor().codes, other.qtensor().codes)
    again = apply_ptq(tiny_llama(), rule, "signround", blocks, batch_size=4, iterations=40)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_model_without_blocks_is_one_block() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x, before = torch.randn(128, 64), copy.deepcopy(model)
    plain = prepare(copy.deepcopy(model), Rule(scheme="W2"))
    apply_ptq(model, Rule(scheme="W2"), "signround", x, batch_size=64, iterations=60)
    with torch.no_grad():
        target = before(x)
        assert (model(x) - target).square().mean() < 0.8 * (plain(x) - target).square().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"iterations": 0}, "iterations=0 must be at least 1"), ({"hessian": None}, "exactly one of hessian")],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    w, x = data()
    with pytest.raises(ValueError, match=message):
        signround(w, SCHEMES[0], **{"hessian": hessian_of(x), **options})  # type: ignore[arg-type]
