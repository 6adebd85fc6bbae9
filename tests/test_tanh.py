"""DoReFa as a parametrization: the published vector, gradients in closed form, what trains is what ships."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits import Rule, Scheme, convert, fake_quantize, prepare, quantize
from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.convert import owned_layers
from fewbits.export import export
from fewbits.optim.codebooks import refit_codebooks_
from fewbits.parametrizations import Tanh, parametrization_from_dict
from fewbits.ptq import apply_ptq
from fewbits.recipe import Recipe
from fewbits.surrogates import JacQuant
from fewbits.testing.tiny import TINY_MODELS, VOCAB_SIZE
from fewbits.verify import verify

W = torch.tensor([[-1.3, -0.6, -0.2, 0.05, 0.12, 0.45, 0.9, 2.0]])
IDS = torch.arange(48).view(2, 24) % VOCAB_SIZE


def dorefa(bits: int, mode: str = "frozen", **options: Any) -> Scheme:
    return Scheme.parse(f"W{bits}H", granularity="per_tensor", rule="absmax", mode=mode, **options)


def literal(w: Tensor, bits: int) -> Tensor:
    """The paper's formula, in float64."""
    top = 2**bits - 1
    t = w.double().tanh()
    y = t / (2 * t.abs().max()) + 0.5
    return 2 * (y * top).round() / top - 1


def layer_of(w: Tensor, scheme: Scheme, how: Tanh | None = None) -> Any:
    model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(w)
    return prepare(model, Rule(scheme=scheme, parametrization=Tanh() if how is None else how))[0]


# ------------------------------------------------------------------------------------------------------------- forward


def test_the_vector_of_the_specification() -> None:
    expected = torch.tensor([[-1, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 1 / 3, 1, 1]])
    for mode in ("frozen", "dynamic", "learned"):
        got = layer_of(W, dorefa(2, mode, dtype="fp32")).quantized_weight()
        torch.testing.assert_close(got.detach(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mode", ["frozen", "dynamic"])
def test_it_is_the_published_formula(bits: int, mode: str) -> None:
    """No weight of this draw lies within fp32's error of a tie, so every code is the formula's."""
    w = 0.7 * torch.randn(24, 64, generator=torch.Generator().manual_seed(bits))
    layer = layer_of(w, dorefa(bits, mode, dtype="fp32"))
    torch.testing.assert_close(layer.quantized_weight().detach().double(), literal(w, bits), rtol=2e-7, atol=1e-7)
    assert float(layer.raw_scale()) == pytest.approx(2 / (2**bits - 1), rel=1e-7)


def test_one_bit_is_the_sign_times_the_mean_size() -> None:
    scheme = Scheme.parse("W1", granularity="per_tensor", rule="absmean", mode="dynamic", dtype="fp32")
    torch.testing.assert_close(fake_quantize(W, scheme), W.sign() * W.abs().mean(), rtol=1e-7, atol=0)


def test_without_the_division_it_is_the_maximum_times_dorefa() -> None:
    layer = layer_of(W, dorefa(2, "dynamic", dtype="fp32"), Tanh(normalize=False))
    expected = W.double().tanh().abs().max() * literal(W, 2)
    torch.testing.assert_close(layer.quantized_weight().detach().double(), expected, rtol=2e-7, atol=0)


def test_the_size_of_the_weights_does_not_matter_where_tanh_is_straight() -> None:
    small = 2.0**-12 * W
    for how in (Tanh(), Tanh(detach_max=True)):
        torch.testing.assert_close(how.apply(small), how.apply(small / 4), rtol=1e-5, atol=0)
    assert torch.equal(Tanh().apply(torch.zeros(2, 3)), torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------------------------ gradient


@pytest.mark.parametrize("detach_max", [False, True])
def test_the_gradient_is_that_of_the_formula_straight_through_the_round(detach_max: bool) -> None:
    """With G at the quantized weight, dL/dw_j = (1 - t_j^2)/m (G_j - [j = M] sign(t_M) sum_i G_i z_i)."""
    upstream = torch.randn(1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = layer_of(W, dorefa(2, dtype="fp32"), Tanh(detach_max=detach_max))
    layer.quantized_weight().backward(upstream.float())
    t = W.double().tanh()
    m, largest = t.abs().max(), int(t.abs().argmax())
    expected = (1 - t**2) / m * upstream
    if not detach_max:
        z = t / m
        expected[0, largest] -= (1 - t[0, largest] ** 2) / m * t[0, largest].sign() * (upstream * z).sum()
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("how", [Tanh(), Tanh(normalize=False)], ids=["normalized", "plain"])
def test_the_map_differentiates_as_finite_differences_say(how: Tanh) -> None:
    assert torch.autograd.gradcheck(how.apply, (W.double().requires_grad_(),))


# --------------------------------------------------------------------------------------------- what trains, what ships


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_convert_and_files_change_no_bit(name: str, tmp_path: Path) -> None:
    model = TINY_MODELS[name]()
    model = prepare(model, Rule(scheme=dorefa(2), parametrization=Tanh(), embeddings=name == "gpt2")).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        save_prepared(model, None, tmp_path / "model")
        loaded, _ = load_prepared(tmp_path / "model")
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, logits)
        assert [x.transform for _, x in owned_layers(loaded)] == [x.transform for _, x in owned_layers(model)]
        for _, layer in owned_layers(model):
            assert torch.equal(layer.qtensor().dequantize(), layer.quantized_weight())
        assert torch.equal(convert(copy.deepcopy(model))(input_ids=IDS).logits, logits)


def test_an_export_holds_exactly_the_trained_codes(tmp_path: Path) -> None:
    model = prepare(TINY_MODELS["llama"](), Rule(scheme="W2HG32", parametrization={"name": "tanh", "normalize": False}))
    export(model, "hf", tmp_path / "hf")
    assert verify(model, tmp_path / "hf").passed


def test_a_tied_layer_uses_the_mapped_weight() -> None:
    model = TINY_MODELS["gpt2"]()
    prepare(model, Rule(pattern="*wte", scheme=dorefa(3), parametrization="tanh", embeddings=True), ignore=[])
    assert torch.equal(model.lm_head.quantized_weight(), model.transformer.wte.quantized_weight())
    assert float(model.lm_head.latent().detach().abs().max()) == 1.0


def test_scales_are_those_of_the_mapped_weight_and_ptq_is_no_start() -> None:
    scheme = Scheme.parse("W3G32")
    layer = layer_of(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), scheme)
    assert torch.equal(layer.qtensor().codes, quantize(layer.latent(), scheme).codes)
    rule = Rule(scheme=scheme, parametrization=Tanh())
    model = apply_ptq(nn.Sequential(nn.Linear(64, 8)), rule, "rtn")
    assert model[0].transform == Tanh()
    with pytest.raises(ValueError, match="start from 'rtn'"):
        apply_ptq(nn.Sequential(nn.Linear(64, 8)), rule, "hqq")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_names_options_and_other_parts_are_checked() -> None:
    assert parametrization_from_dict(Tanh(detach_max=True).to_dict()) == Tanh(detach_max=True)
    with pytest.raises(ValueError, match="no option 'rank'"):
        parametrization_from_dict({"name": "tanh", "rank": 3})
    with pytest.raises(ValueError, match="must be true or false"):
        Tanh(normalize=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no maximum"):
        Tanh(normalize=False, detach_max=True)
    with pytest.raises(ValueError, match="drive 'cage' acts"):
        Rule(scheme="W2H", parametrization="tanh", drive="cage")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="apply='update'"):
        Rule(scheme="W2H", parametrization="tanh", surrogate=JacQuant(apply="update"))  # type: ignore[arg-type]
    codebook = prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2KG64", parametrization="tanh"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without weights"):
        refit_codebooks_(codebook, weights={"0": torch.ones(8, 64)})
    assert refit_codebooks_(codebook) == ["0"]


def test_a_recipe_names_it() -> None:
    recipe = Recipe.parse("rules: [{scheme: W2H, options: {granularity: per_tensor}, parametrization: tanh}]")
    assert recipe.rules[0].build().parametrization == Tanh()
