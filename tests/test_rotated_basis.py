"""QuEST's form that stays rotated: one function with the other form, gradients, what ships, what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits import Rule, prepare
from fewbits.activations import ActivationScheme, calibrate_activations_
from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.convert import convert, owned_layers
from fewbits.export import export, export_verified
from fewbits.fake_quant import fake_quantize
from fewbits.grids import HalfShifted
from fewbits.qtensor import quantize
from fewbits.quantizer import FewbitsConfig
from fewbits.recipe import Recipe
from fewbits.rotations import Rotation
from fewbits.runtime import to_runtime
from fewbits.scales import QUEST_S
from fewbits.scheme import Scheme
from fewbits.surrogates import ClippedSTE
from fewbits.targets import TARGETS
from fewbits.testing.tiny import tiny_gpt2, tiny_llama, toy_blocks
from fewbits.training.curvature import measure_curvature

ORIGINAL = Rotation(kind="hadamard")
ROTATED = Rotation(kind="hadamard", basis="rotated")
KINDS = [
    ROTATED,
    Rotation(kind="hadamard", block_size=8, basis="rotated"),
    Rotation(kind="random_hadamard", seed=3, basis="rotated"),
]
WIDTHS = [64, 96, 10]
"""A power of two; blocks of 32; blocks of 2."""


def original(rotation: Rotation) -> Rotation:
    return Rotation(kind=rotation.kind, block_size=rotation.block_size, seed=rotation.seed)


def quest(rotation: Rotation, bits: int = 4, *, inputs: bool = True) -> Rule:
    """W4A4 of QuEST with the given rotation of both operands."""
    scheme = Scheme.parse(f"W{bits}H", rule="rms", mode="dynamic", rotation=rotation)
    activation = {"num_bits": bits, "preset": "quest", "rotation": rotation}
    return Rule(
        scheme=scheme,
        surrogate=ClippedSTE(edge="bin"),
        activation=ActivationScheme.parse(activation) if inputs else None,
    )


def layer(width: int, rule: Rule, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return prepare(nn.Sequential(nn.Linear(width, 6)), rule).to(dtype)


def dense(rotation: Rotation, width: int) -> Tensor:
    """R as a matrix, x -> R x, from Sylvester's recursion and the drawn signs."""
    block = rotation.block_for(width)
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    matrix = torch.block_diag(*[h / math.sqrt(block)] * (width // block))
    return matrix if rotation.kind == "hadamard" else matrix * rotation._signs(width, matrix)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rotation", KINDS, ids=str)
def test_both_forms_are_one_function_without_rounding_of_inputs(rotation: Rotation, width: int) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1)).double()
    half = layer(width, quest(rotation, inputs=False), torch.float64)
    full = layer(width, quest(original(rotation), inputs=False), torch.float64)
    torch.testing.assert_close(half(x), full(x), rtol=1e-6, atol=1e-6)  # weights are rotated back in fp32
    levels = half[0].operand()
    exact = x @ (levels @ dense(rotation, width)).t() + half[0].bias
    torch.testing.assert_close(half(x), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rotation", KINDS, ids=str)
def test_both_forms_round_inputs_alike(rotation: Rotation, width: int) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1)).double()
    half, full = layer(width, quest(rotation), torch.float64), layer(width, quest(original(rotation)), torch.float64)
    torch.testing.assert_close(half(x), full(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(half(x), layer(width, quest(rotation, inputs=False), torch.float64)(x), atol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_gradients_are_those_of_an_oracle(width: int, bits: int) -> None:
    """QuEST by hand with a dense rotation: both operands rotated, rounded by its table, trust masks of both."""
    rotation = ROTATED
    scheme = Scheme.parse(
        "W1" if bits == 1 else f"W{bits}H", rule="rms", mode="dynamic", dtype="fp32", rotation=rotation
    )
    edge = 1.3 if bits == 1 else "bin"
    activation = ActivationScheme.parse({"num_bits": bits, "preset": "quest", "rotation": rotation})
    half = layer(width, Rule(scheme=scheme, surrogate=ClippedSTE(edge=edge), activation=activation), torch.float64)
    x = (2 * torch.randn(7, width, generator=torch.Generator().manual_seed(1))).double().requires_grad_()
    upstream = torch.randn(7, 6, generator=torch.Generator().manual_seed(2)).double()
    grads = torch.autograd.grad(half(x), (x, half[0].weight), upstream)

    s, num = QUEST_S[2**bits], 2**bits

    def trusted(v: Tensor) -> Tensor:
        """Rounded, with the gradient of QuEST's mask."""
        size = s * v.detach().square().mean(-1, keepdim=True).sqrt()
        step = 2 * size / (num - 1)
        inner = v.detach().clamp(-size, size) / step
        rounded = (((inner - 0.5).round() + 0.5).clamp((1 - num) / 2, (num - 1) / 2)) * step
        mask = v.detach().abs() <= (1.3 * size if bits == 1 else size + step / 2)
        return torch.where(mask, v, v.detach()) + (rounded - v).detach()

    r, w = dense(rotation, width), half[0].weight.detach().clone().requires_grad_()
    y = trusted(x @ r.t()) @ trusted(w @ r.t()).t() + half[0].bias
    torch.testing.assert_close(half(x), y, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(y, (x, w), upstream)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantization_is_codes_times_scales_bit_for_bit(dtype: torch.dtype) -> None:
    scheme = Scheme.parse("W3HG32", rotation=ROTATED)
    w = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = quantize(w, scheme)
    assert torch.equal(fake_quantize(w, scheme, rotated=True), q.dequantize(dtype, rotated=True))
    assert torch.equal(fake_quantize(w, scheme), q.dequantize(dtype))
    on_levels = q.dequantize(rotated=True).view(6, 3, 32) / q.scale[..., None]
    assert torch.equal(on_levels.round(decimals=3).unique(), torch.tensor(HalfShifted(3).levels))


def test_what_trains_is_what_ships(tmp_path: Path) -> None:
    """Converted, saved and packed models have the trained model's logits bit for bit; tied heads too."""
    model: Any = prepare(tiny_llama(tie=True), quest(ROTATED), ignore=[])
    tokens = toy_blocks(2, 12)
    logits = model(input_ids=tokens).logits
    logits.square().mean().backward()
    assert all(bool(layer.weight.grad.any()) for _, layer in owned_layers(model))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        save_prepared(model, None, tmp_path / "prepared")
        loaded, _ = load_prepared(tmp_path / "prepared")
        assert torch.equal(loaded(input_ids=tokens).logits, logits)
        shipped: Any = convert(copy.deepcopy(model))
        assert torch.equal(shipped(input_ids=tokens).logits, logits)
    _, report = export_verified(model, "hf", tmp_path / "hf")
    assert report.passed
    config = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert config["groups"][0]["scheme"]["rotation"]["basis"] == "rotated"
    assert config["activations"][0]["scheme"]["rotation"]["basis"] == "rotated"
    with torch.inference_mode():
        fast: Any = to_runtime(shipped)
        torch.testing.assert_close(fast(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-4)


def test_gpt2_and_full_precision_inputs_and_switched_off_layers() -> None:
    tokens = toy_blocks(2, 12)
    for make in (tiny_gpt2, tiny_llama):
        plain = make()
        with torch.no_grad():
            expected = plain(input_ids=tokens).logits
            half: Any = prepare(make(), quest(ROTATED, inputs=False))
            full: Any = prepare(make(), quest(ORIGINAL, inputs=False))
            a, b = half(input_ids=tokens).logits, full(input_ids=tokens).logits
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert torch.equal(convert(copy.deepcopy(half))(input_ids=tokens).logits, a)
            for _, one in owned_layers(half):
                one.fake_quant_enabled = False
            torch.testing.assert_close(half(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_static_inputs_are_calibrated_in_the_rotated_basis() -> None:
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    found = []
    for rotation in (ROTATED, ORIGINAL):
        activation = ActivationScheme.parse({"num_bits": 4, "preset": "lsq", "rotation": rotation})
        model = layer(96, Rule(scheme=Scheme.parse("W4", rotation=rotation), activation=activation))
        assert calibrate_activations_(model, [x]) == 1
        found.append((model[0].input_quantizer.static_scale().item(), model(x)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_the_curvature_is_that_of_the_other_form() -> None:
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    traces = []
    for rotation in (ROTATED, ORIGINAL):
        model = layer(96, Rule(scheme=Scheme.parse("W4", rotation=rotation)))
        loss = lambda model=model: model(x).square().mean()  # noqa: E731
        generator = torch.Generator().manual_seed(0)
        traces.append(measure_curvature(model, [loss], {"0": model[0]}, num_probes=2, generator=generator)["0"])
    assert traces[0].trace == pytest.approx(traces[1].trace, rel=1e-5)
    assert traces[0].gradient_std == pytest.approx(traces[1].gradient_std, rel=1e-5)


def test_only_the_own_format_holds_it() -> None:
    for rotation in (ROTATED, ORIGINAL):
        scheme = Scheme.parse("W2", granularity="per_tensor", rotation=rotation)
        holders = {name for name, target in TARGETS.items() if target.holds(scheme, (64, 128)) is None}
        expected = (
            {"hf"} if rotation is ROTATED else {"hf", *(n for n in TARGETS if n.startswith("dequantized")), "gguf:f32"}
        )
        assert holders == expected
    model = prepare(tiny_llama(), quest(ROTATED, inputs=False))
    for name in ("dequantized:fp32", "gguf:f32"):
        with pytest.raises(ValueError, match="inputs are rotated at run time"):
            export(model, name, "nowhere")


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"activation": "A4"}, "with basis='rotated' both must be the same"),
        ({"activation": {"num_bits": 4, "preset": "quest"}}, "with basis='rotated' both must be the same"),
        ({"drive": "parq"}, "drive 'parq' changes the forward pass"),
        ({"drive": "winq"}, "drive 'winq' changes the forward pass"),
        ({"parametrization": "low_rank", "scheme": Scheme.parse("W4", rotation=ROTATED)}, "rotates its result back"),
        (
            {"kv_cache": {"num_bits": 4, "rotation": {"kind": "hadamard", "basis": "rotated"}}},
            "keys and values are rotated back",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(rule: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Rule(**{"scheme": Scheme.parse("W4H", rule="rms", mode="dynamic", rotation=ROTATED), **rule})


def test_an_input_alone_cannot_stay_rotated() -> None:
    activation = {"num_bits": 4, "preset": "quest", "rotation": ROTATED}
    with pytest.raises(ValueError, match="with basis='rotated' both must be the same"):
        Rule(scheme=Scheme.parse("W4H"), activation=ActivationScheme.parse(activation))
    with pytest.raises(ValueError, match="basis='rotated' needs a rotation"):
        Rotation(basis="rotated")
    with pytest.raises(ValueError, match="basis='half' is unknown"):
        Rotation(kind="hadamard", basis="half")  # type: ignore[arg-type]


def test_plain_data_names_the_basis_only_where_it_is_not_the_original_one() -> None:
    assert ORIGINAL.to_dict() == {"kind": "hadamard", "block_size": 128, "seed": 0}
    scheme = Scheme.parse("W4H", rotation=ROTATED)
    assert Scheme.from_json(scheme.to_json()) == scheme
    rule = quest(ROTATED)
    assert rule.activation is not None
    assert ActivationScheme.parse(rule.activation.to_dict()) == rule.activation
    assert "basis" not in str(quest(ORIGINAL).to_dict())
    assert rule.activation.summary.endswith("hadamard, left rotated")
    groups = [{"scheme": scheme.to_dict(), "modules": {"a": [8, 64]}}]
    config = FewbitsConfig(groups, activations=[{"scheme": rule.activation.to_dict(), "modules": ["a"]}])
    assert config.packed()["a"][0] == scheme
    assert config.by_module("activations")["a"] == rule.activation


def test_the_recipe_says_so() -> None:
    built = [Recipe.load(name).rules[0].build() for name in ("quest-w4a4-rotated", "quest-w4a4")]
    half, full = built
    assert half.activation is not None
    assert half.activation.rotation == half.scheme.rotation == ROTATED
    assert full.scheme.rotation == ORIGINAL
    assert half.activation.margin == 0.5
