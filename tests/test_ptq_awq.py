"""AWQ: factors that leave the function as it was, exponents, clip search by the output error."""

from __future__ import annotations

import copy

import pytest
import torch
from ptq_common import over
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.convert import Rule, prepare, qat_layers
from fewbits.nn import QATLayer
from fewbits.ptq import apply_ptq, awq, clip_scale, gptq, hessian_of, output_error, rtn, scale_factors, search_scale
from fewbits.ptq.calibration import run_model
from fewbits.ptq.capture import walk
from fewbits.ptq.folding import Fold, gain_offset, multiply_columns_, producer_channels
from fewbits.ptq.plan import weight_of
from fewbits.ptq.stages import find_fold
from fewbits.qtensor import initial_scale, quantize
from fewbits.scheme import Scheme
from fewbits.testing.tiny import TINY_MODELS, tiny_gemma, tiny_llama, tiny_qwen3, toy_blocks

SCHEMES = [
    Scheme.parse(text, **options)
    for text, options in [
        ("W4", {}),
        ("W2G32", {}),
        ("W3", {"granularity": "per_tensor"}),
        ("W2HG32", {}),
        ("W1.58G32", {}),
        ("W1G32", {}),
        ("W2KG32", {}),
        ("W2G32", {"superblock": 64}),
    ]
]
every_scheme = over(SCHEMES)


def data(rows: int = 8, width: int = 80) -> tuple[Tensor, Tensor]:
    """A weight, and inputs with a few large channels."""
    x = torch.randn(300, width) * torch.linspace(0.3, 2, width)
    x[:, ::17] *= 12
    return torch.randn(rows, width) * 0.05, x


def test_factors_by_hand() -> None:
    assert scale_factors(torch.tensor([1.0, 4.0]), 0.0).tolist() == [1.0, 1.0]
    s = scale_factors(torch.tensor([0.0, 1.0, 9.0]), 0.5)
    torch.testing.assert_close(s, torch.tensor([1e-4, 1.0, 3.0]) / (3e-4**0.5))
    assert float(s.max() * s.min()) == pytest.approx(1.0)


@every_scheme
def test_ratio_zero_without_clip_is_rtn(scheme: Scheme) -> None:
    w, x = data()
    found = search_scale([w], [scheme], x.abs().mean(0), inputs=x, num_ratios=1, clip=False)
    assert found.ratio == 0
    assert found.factors.tolist() == [1.0] * 80
    plain = rtn(w, scheme)
    assert found.error == found.plain_error
    assert found.error == pytest.approx(output_error(w, plain.qtensor.dequantize(), hessian_of(x)), rel=1e-5)
    assert torch.equal(awq(w, scheme, inputs=x, clip=False).qtensor.codes, plain.qtensor.codes)


@pytest.mark.parametrize("clip", [False, True])
def test_large_inputs_get_large_factors_and_less_error(clip: bool) -> None:
    w, x = data(rows=32)
    scheme = Scheme.parse("W2HG32", rule="absmax")
    found = search_scale([w, 2 * w[:4]], [scheme, scheme], x.abs().mean(0), inputs=x, clip=clip)
    assert 0 < found.ratio < 1
    assert found.error < (0.95 if clip else 0.8) * found.plain_error
    assert found.factors[::17].min() > found.factors[torch.arange(80) % 17 != 0].max()
    h, f = hessian_of(x), found.factors
    scaled = h / torch.outer(f, f)
    by_hand = sum(
        output_error(m, awq(m * f, scheme, hessian=scaled, clip=clip).qtensor.dequantize() / f, h)
        for m in (w, 2 * w[:4])
    )
    assert found.error == pytest.approx(by_hand, rel=1e-4)


@every_scheme
def test_clip_search_is_the_best_multiple_of_every_group(scheme: Scheme) -> None:
    w, x = data(rows=3)
    h, start = hessian_of(x), initial_scale(w, scheme)
    found = clip_scale(w, scheme, h, start, num=5)
    rows, groups = start.shape
    if scheme.scale.superblock is None:
        view = scheme.scale.view(w.shape)
        for r in range(rows):
            for g in range(groups):
                errors = {}
                for factor in (1.0, 0.5, 2**-0.5, 2**0.5, 2.0):
                    scale = start.clone()
                    scale[r, g] *= factor
                    delta = quantize(w, scheme, scale).dequantize() - w
                    mask = torch.zeros_like(start)
                    mask[r, g] = 1
                    errors[factor] = output_error(torch.zeros_like(w), delta * view.expand(mask), h)
                best = min(errors, key=errors.__getitem__)
                assert found[r, g] == start[r, g] * best
    else:  # of the row as a whole at least
        view, blocks = scheme.scale.view(w.shape), torch.zeros_like(h)
        for g in range(groups):
            part = slice(32 * g, 32 * g + 32)
            blocks[part, part] = h[part, part]
        after, before = (
            (((delta := quantize(w, scheme, s).dequantize().double() - w) @ blocks) * delta).sum(1)
            for s in (found, start)
        )
        assert bool((after <= before).all())
        assert bool((after < 0.9 * before).any())


def test_clip_lowers_the_error_of_rtn_and_of_gptq() -> None:
    w, x = data(rows=32)
    h = hessian_of(x)
    for scheme in (Scheme.parse("W2G32"), Scheme.parse("W2HG32"), Scheme.parse("W2G32", superblock=64)):
        plain = output_error(w, rtn(w, scheme).qtensor.dequantize(), h)
        assert output_error(w, awq(w, scheme, hessian=h).qtensor.dequantize(), h) < 0.9 * plain
        loose, tight = (gptq(w, scheme, hessian=h, clip=clip).qtensor.dequantize() for clip in (False, True))
        assert output_error(w, tight, h) < output_error(w, loose, h)
        static = gptq(w, scheme, hessian=h, clip=True, static_groups=True)
        assert torch.equal(static.scale, clip_scale(w, scheme, h, initial_scale(w, scheme)))


def test_norm_gains_are_probed() -> None:
    llama, gemma = tiny_llama(), tiny_gemma()
    norms = [m.model.layers[0].input_layernorm for m in (llama, gemma)]  # type: ignore[union-attr]
    before = [n.weight.clone() for n in norms]
    assert [gain_offset(n) for n in norms] == [0.0, 1.0]
    assert gain_offset(nn.LayerNorm(16)) == 0.0
    assert all(torch.equal(n.weight, w) for n, w in zip(norms, before, strict=True))

    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.exp()

    assert gain_offset(Strange()) is None


@pytest.mark.parametrize("kind", list(TINY_MODELS))
def test_folds_leave_the_function_exactly_as_it_was(kind: str) -> None:
    model = TINY_MODELS[kind](dtype=torch.float64)
    with torch.no_grad():  # gains and biases that a wrong fold would not get right by luck
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape, dtype=p.dtype)
    blocks = toy_blocks(2)
    with torch.no_grad():
        before = run_model(model, blocks)
    names = [name for name, _ in qat_layers(prepare(copy.deepcopy(model), Rule(scheme="W2A16")))]
    names = [name for name in names if "layers." in name or ".h." in name]
    folded = []
    for stage in walk(model, names, [blocks]):
        for group in stage.groups():
            fold = find_fold(stage, group)
            if fold is None:
                continue
            width = weight_of(stage.module(group.names[0])).shape[1]
            factors = fold.shared_mean(torch.rand(width, dtype=torch.float64) + 0.5)
            for name in (*group.names, *group.others):
                multiply_columns_(stage.module(name), factors)
            fold.divide_(factors)
            folded += [name.rpartition(".")[2] for name in group.names]
    with torch.no_grad():
        after = run_model(model, blocks)
    exact = 1e-6 if "gemma" in kind else 1e-12  # Gemma's norms multiply by their gain in fp32
    assert (after - before).abs().max() < exact * before.abs().max()
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(folded) == ({"c_attn", "c_fc"} if kind == "gpt2" else expected)


def test_grouped_queries_share_the_factors_of_their_values() -> None:
    channels = producer_channels(8, 4, 2)
    assert channels is not None
    fold = Fold(nn.Linear(3, 4), channels, None)
    mean = fold.shared_mean(torch.arange(8.0))
    assert mean.tolist() == [1.0, 2.0, 1.0, 2.0, 5.0, 6.0, 5.0, 6.0]
    assert producer_channels(8, 4, None) is None
    assert producer_channels(9, 4, 2) is None


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """A model with a few large channels in its residual stream, as large models have them."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layernorm" in name:
                p[::11] = p[::11].abs() * 8 + 1
    return model


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3], ids=["llama", "qwen3"])
def test_a_model_is_scaled_and_holds_the_codes(build: type[PreTrainedModel]) -> None:
    blocks, held_out = toy_blocks(8), toy_blocks(6, seed=5)
    teacher, model, partly = loud(build()), loud(build()), loud(build())
    rule = Rule(scheme=Scheme.parse("W3", rule="absmax"))

    def error(m: nn.Module) -> float:
        with torch.no_grad():
            return float((run_model(m, held_out) - run_model(teacher, held_out)).square().mean())

    apply_ptq(model, rule, "awq", blocks, clip=False)
    gain = model.model.layers[0].input_layernorm.weight  # type: ignore[union-attr]
    assert not torch.equal(gain, teacher.model.layers[0].input_layernorm.weight)  # type: ignore[union-attr]
    # the latent weights are those of a model with the same function
    for _, layer in qat_layers(model):
        layer.fake_quant_enabled = False
    with torch.no_grad():
        assert error(model) < 1e-9 * float(run_model(teacher, held_out).square().mean())
    for _, layer in qat_layers(model):
        layer.fake_quant_enabled = True
        assert torch.equal(layer.qtensor().codes, quantize(layer.weight, rule.scheme).codes)
    plain = error(prepare(loud(build()), rule))
    assert error(model) < plain
    # layers that no rule chooses read the same norm: they are scaled too and stay in full precision
    apply_ptq(partly, Rule(pattern="*.k_proj", scheme=rule.scheme), "awq", blocks)
    attention = partly.model.layers[0].self_attn  # type: ignore[union-attr]
    assert isinstance(attention.k_proj, QATLayer)
    assert type(attention.q_proj) is nn.Linear
    assert error(partly) <= error(prepare(loud(build()), Rule(pattern="*.k_proj", scheme=rule.scheme)))


class Leak(nn.Module):
    """A block whose norm is read by something that is no linear layer: folding would change the function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.linear(y) + y


def test_a_fold_that_would_change_the_function_is_undone() -> None:
    model = Leak()
    with torch.no_grad():
        model.norm.weight[::9] = 20.0
    before = copy.deepcopy(model)
    x = torch.randn(64, 64)
    h = hessian_of(before.norm(x))
    scheme = Scheme.parse("W2HG32", rule="absmax")
    assert search_scale([model.linear.weight], [scheme], h.diagonal().sqrt(), hessian=h, clip=False).ratio > 0
    apply_ptq(model, Rule(scheme=scheme), "awq", x, clip=False)
    assert torch.equal(model.norm.weight, before.norm.weight)
    assert torch.equal(model.linear.weight, before.linear.weight)


def test_what_is_refused() -> None:
    w, x = data()
    with pytest.raises(ValueError, match="num_ratios=0"):
        search_scale([w], [SCHEMES[0]], x.abs().mean(0), inputs=x, num_ratios=0)
    with pytest.raises(ValueError, match="exactly one of hessian"):
        awq(w, SCHEMES[0])
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj: num_ratios=-1"):
        apply_ptq(tiny_llama(), Rule(scheme="W3"), "awq", toy_blocks(2), num_ratios=-1)
