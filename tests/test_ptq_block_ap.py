"""Block-AP: blocks trained for their output, then all scales for the task with every code fixed."""

from __future__ import annotations

import math

import pytest
import torch
from ptq_common import SCHEMES, data, every_scheme
from torch import Tensor, nn

from fewbits.convert import Rule, prepare, qat_layers
from fewbits.ptq import apply_ptq, block_ap, gptq, hessian_of, output_error, rtn
from fewbits.ptq.block_ap import FixedCodes, TrainedWeight, descend
from fewbits.ptq.blockwise import batch_order
from fewbits.ptq.calibration import Calibration, run_model
from fewbits.qtensor import initial_scale, quantize
from fewbits.scheme import Scheme
from fewbits.testing.tiny import tiny_llama, toy_blocks


@every_scheme
def test_it_lowers_the_output_error_and_holds_its_codes(scheme: Scheme) -> None:
    w, x = data()
    h = hessian_of(x)
    result = block_ap(w, scheme, hessian=h, learning_rate=1e-2, iterations=100)
    assert output_error(w, result.qtensor.dequantize(), h) < 0.9 * output_error(
        w, rtn(w, scheme).qtensor.dequantize(), h
    )
    again = quantize(result.latent, scheme, result.scale)
    assert torch.equal(again.codes, result.qtensor.codes)
    assert torch.equal(again.scale, result.qtensor.scale)


@every_scheme
def test_trained_weights_start_at_rtn(scheme: Scheme) -> None:
    w, _ = data()
    trained = TrainedWeight(w, scheme, initial_scale(w, scheme))
    torch.testing.assert_close(trained.weight(), quantize(w, scheme).dequantize(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(trained.result().latent, w, rtol=1e-5, atol=1e-7)


@every_scheme
def test_fixed_codes_start_where_they_are_and_stay(scheme: Scheme) -> None:
    w, x = data()
    before = gptq(w, scheme, inputs=x)
    fixed = FixedCodes(before)
    assert torch.equal(fixed.weight(), before.qtensor.dequantize())
    with torch.no_grad():
        fixed.multiplier.uniform_(0.8, 1.2)
    after = fixed.result()
    assert torch.equal(after.qtensor.codes, before.qtensor.codes)
    assert not torch.equal(after.qtensor.scale, before.qtensor.scale)
    torch.testing.assert_close(fixed.weight(), after.qtensor.dequantize(), rtol=1e-6, atol=1e-8)
    assert torch.equal(quantize(after.latent, scheme, after.scale).codes, before.qtensor.codes)


def test_the_gradient_of_a_scale_with_fixed_codes_is_the_level() -> None:
    scheme = Scheme.parse("W2G32", dtype="fp32")
    w, _ = data(width=64)
    fixed = FixedCodes(rtn(w, scheme))
    g = torch.randn(8, 64)
    (gradient,) = torch.autograd.grad((fixed.weight() * g).sum(), [fixed.multiplier])
    expected = (g * fixed.levels).view(8, 2, 32).sum(-1) * fixed.result_before.scale
    torch.testing.assert_close(gradient, expected)


def test_scales_alone_solve_least_squares() -> None:
    """With codes fixed the best scale of a row is <w, q> / <q, q>."""
    scheme = Scheme.parse("W3", dtype="fp32")
    w, _ = data(rows=4)
    start = rtn(w, scheme, scale=1.3 * initial_scale(w, scheme))
    fixed, q = FixedCodes(start), start.qtensor.levels()
    best = (w * q).sum(1, keepdim=True) / q.square().sum(1, keepdim=True)
    unit = float(w.square().mean())

    def loss(step: int) -> Tensor:
        del step
        return (fixed.weight() - w).square().mean() / unit

    def score() -> float:
        return float(loss(0).detach())

    descend([fixed], loss, score, iterations=400, learning_rate=0.0, scale_learning_rate=0.02, num_scores=400)
    torch.testing.assert_close(fixed.result().scale, best, rtol=1e-3, atol=0)


def test_the_best_state_is_kept_and_the_start_counts() -> None:
    w, _ = data()
    scheme = Scheme.parse("W2")
    trained = TrainedWeight(w, scheme, initial_scale(w, scheme))
    scores = iter([1.0, 2.0, 3.0, 4.0])
    best = descend(
        [trained],
        lambda step: trained.weight().square().sum(),
        lambda: next(scores),
        iterations=3,
        learning_rate=0.1,
        scale_learning_rate=0.1,
        num_scores=3,
    )
    assert best == 1.0
    assert torch.equal(trained.result().qtensor.codes, rtn(w, scheme).qtensor.codes)


def test_batches_come_once_each_before_any_comes_again() -> None:
    order = batch_order(4, 10, seed=3)
    assert sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert order == batch_order(4, 10, seed=3)
    assert order != batch_order(4, 10, seed=4)


def test_the_loss_of_a_model_is_next_token_cross_entropy() -> None:
    model, blocks = tiny_llama(), toy_blocks(4)
    data = Calibration.of(model, [blocks])
    with torch.no_grad():
        expected = model(input_ids=blocks, labels=blocks).loss
    assert data.mean_loss() == pytest.approx(float(expected), rel=1e-5)
    plain = nn.Linear(4, 2)
    x = torch.randn(6, 4)
    targets = Calibration.of(plain, [x])
    assert targets.mean_loss() == 0
    with torch.no_grad():
        plain.bias += 3.0
    assert targets.mean_loss() == pytest.approx(9.0, rel=1e-5)


def outputs(model: nn.Module, blocks: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(f"model.layers.{i}").register_forward_hook(lambda _, a, out: seen.append(out))
        for i in range(2)
    ]
    with torch.no_grad():
        run_model(model, blocks)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("mode", ["learned", "frozen"])
def test_blocks_of_a_model_come_nearer_to_full_precision(mode: str) -> None:
    blocks, rule = toy_blocks(8), Rule(scheme=Scheme.parse("W2G32", mode=mode))
    teacher, plain = tiny_llama(), prepare(tiny_llama(), rule)
    options = {"iterations": 40, "learning_rate": 1e-2, "batch_size": 4}
    model = apply_ptq(tiny_llama(), rule, "block_ap", blocks, end_iterations=0, **options)
    for mine, theirs, exact in zip(*(outputs(m, blocks) for m in (model, plain, teacher)), strict=True):
        assert (mine - exact).square().mean() < 0.9 * (theirs - exact).square().mean()
    tuned = apply_ptq(tiny_llama(), rule, "block_ap", blocks, end_iterations=20, end_learning_rate=1e-2, **options)
    layers = dict(qat_layers(model))
    for name, layer in qat_layers(tuned):
        assert torch.equal(layer.qtensor().codes, layers[name].qtensor().codes)
        assert "quantized_weight" not in vars(layer)
    assert any(not torch.equal(layer.qtensor().scale, layers[n].qtensor().scale) for n, layer in qat_layers(tuned))
    losses = [Calibration.of(m, [blocks]).mean_loss() for m in (tuned, model)]
    assert math.isfinite(losses[0])
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning rates -1.0 and"),
        ({"hessian": None}, "exactly one of hessian"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    w, x = data()
    with pytest.raises(ValueError, match=message):
        block_ap(w, SCHEMES[0], **{"hessian": hessian_of(x), **options})  # type: ignore[arg-type]
