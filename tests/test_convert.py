"""prepare and convert on real architectures: the converted model gives the same logits, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.convert import Rule, convert, matches, owned_layers, prepare, qat_layers, quantized_layers
from fewbits.nn import QATConv1D, QATEmbedding, QATLinear, QuantizedEmbedding, QuantizedLinear
from fewbits.qtensor import quantize
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, ClippedSTE, JacQuant, StableQAT
from fewbits.testing.tiny import TINY_MODELS, tiny_gpt2, tiny_llama, toy_blocks

every_model = pytest.mark.parametrize("kind", TINY_MODELS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TIED = ("llama_tied", "gemma", "gemma3", "gpt2")


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(toy_blocks(2, 12) if ids is None else ids).logits


def all_layers(name: str = "W2A16G64") -> Rule:
    return Rule(scheme=name, embeddings=True)  # type: ignore[arg-type]


# equality -----------------------------------------------------------------------------------------------------------


@every_model
@every_dtype
@pytest.mark.parametrize("name", ["W2A16G64", "W1", "W1.58A16G32", "W3H", "W2K"])
def test_convert_changes_no_logit(kind: str, dtype: torch.dtype, name: str) -> None:
    """All linear layers, embeddings and the head quantized; groups of 64 are ragged in the 96 columns of the MLP."""
    model = prepare(TINY_MODELS[kind](dtype=dtype), all_layers(name), ignore=[])
    before = logits(model)
    assert bool(torch.isfinite(before).all())
    converted = convert(model)
    assert not list(qat_layers(converted))
    assert torch.equal(logits(converted), before)


@every_model
@every_dtype
def test_the_fake_quantized_model_is_the_plain_model_with_dequantized_weights(kind: str, dtype: torch.dtype) -> None:
    plain = TINY_MODELS[kind](dtype=dtype)
    model = prepare(copy.deepcopy(plain), all_layers(), ignore=[])
    with torch.no_grad():
        for name, layer in owned_layers(model):
            weight = layer.qtensor().dequantize(dtype)
            target = plain.get_submodule(name).weight
            target.copy_(weight.t() if layer.transposed else weight)
    if kind == "gpt2":  # the original layer multiplies by the transposed matrix: another order of the same sums
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=tolerance)
    else:
        assert torch.equal(logits(model), logits(plain))


@every_model
def test_without_fake_quantization_the_model_is_the_original(kind: str) -> None:
    plain = TINY_MODELS[kind]()
    model = prepare(copy.deepcopy(plain), all_layers(), ignore=[])
    assert not torch.equal(logits(model), logits(plain))
    for _, layer in qat_layers(model):
        layer.fake_quant_enabled = False
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5 if kind == "gpt2" else 0)


@pytest.mark.parametrize("mode", ["learned", "frozen", "dynamic"])
@pytest.mark.parametrize("overrides", [{}, {"superblock": 64, "multiplier_bits": 6}, {"dtype": "fp32"}], ids=str)
def test_convert_is_exact_after_training_steps(mode: Any, overrides: dict[str, Any]) -> None:
    scheme = Scheme.parse("W2A16G32", mode=mode, **overrides)
    model = prepare(tiny_llama(tie=True), Rule(scheme=scheme, surrogate=StableQAT(), embeddings=True), ignore=[])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = toy_blocks(2, 12)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    before = logits(model)
    assert torch.equal(logits(convert(model)), before)


@every_model
def test_gradients_reach_every_weight_and_scale(kind: str) -> None:
    model = prepare(TINY_MODELS[kind](), Rule(scheme="W2A16G64", surrogate=ClippedSTE(), embeddings=True), ignore=[])  # type: ignore[arg-type]
    ids = toy_blocks(2, 12)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert parameter.grad.any(), name


# which layers -------------------------------------------------------------------------------------------------------


@every_model
def test_the_default_takes_all_linear_layers_but_the_head(kind: str) -> None:
    model = prepare(TINY_MODELS[kind](), Rule(scheme="W2A16G64"))  # type: ignore[arg-type]
    chosen = dict(qat_layers(model))
    assert len(chosen) == (8 if kind == "gpt2" else 14)
    assert not any("embed" in name or "wte" in name or "lm_head" in name for name in chosen)
    kinds = {type(layer) for layer in chosen.values()}
    assert kinds == ({QATConv1D} if kind == "gpt2" else {QATLinear})


@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_stay_one_tensor(kind: str) -> None:
    """Quantizing the embedding quantizes the head that shares it, by default too."""
    model = prepare(TINY_MODELS[kind](), all_layers())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QATEmbedding)
    assert isinstance(head, QATLinear)
    assert head.weight is table.weight
    assert head.owner is table or table.owner is head
    owned = [name for name, _ in owned_layers(model)]
    assert len(owned) == len(list(qat_layers(model))) - 1
    convert(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    assert head.owner is table or table.owner is head
    assert torch.equal(head.weight, table.weight)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.parametrize("kind", TIED)
def test_a_rule_for_the_head_alone_takes_the_embedding_along(kind: str) -> None:
    """The head owns the weight, though the embedding comes first in the model."""
    model = prepare(TINY_MODELS[kind](), Rule(pattern="lm_head", scheme="W4"), ignore=[])  # type: ignore[arg-type]
    assert model.get_input_embeddings().owner is model.get_output_embeddings()
    before = logits(model)
    assert torch.equal(logits(convert(model)), before)
    assert model.get_input_embeddings().owner is model.get_output_embeddings()


def test_only_the_head_of_an_untied_model() -> None:
    model = prepare(tiny_llama(), Rule(pattern="lm_head", scheme="W4"), ignore=[])  # type: ignore[arg-type]
    assert [name for name, _ in qat_layers(model)] == ["lm_head"]


def test_the_first_matching_rule_wins() -> None:
    rules = [
        Rule(pattern="model.layers.0.*", scheme="W4A16G64"),  # type: ignore[arg-type]
        Rule(pattern=r"re:.*\.(gate|up)_proj", scheme="W2A16G32", surrogate="stableqat"),  # type: ignore[arg-type]
        Rule(scheme="W1.58", surrogate=JacQuant()),  # type: ignore[arg-type]
    ]
    layers = dict(qat_layers(prepare(tiny_llama(), rules)))
    assert {layer.scheme.name for name, layer in layers.items() if "layers.0." in name} == {"W4A16G64"}
    assert layers["model.layers.1.mlp.up_proj"].scheme.name == "W2A16G32"
    assert layers["model.layers.1.mlp.up_proj"].surrogate == StableQAT()
    assert layers["model.layers.1.mlp.down_proj"].scheme.name == "W1.58A16"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "model.layers.0.mlp.up_proj", True),
        ("model.layers.*.mlp.*", "model.layers.10.mlp.up_proj", True),
        ("mlp", "model.layers.0.mlp", False),
        ("re:mlp", "model.layers.0.mlp", False),
        (r"re:.*\.mlp", "model.layers.0.mlp", True),
        ("Lm_Head", "lm_head", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_one_layer_under_two_names_is_one_layer() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(2, 64)
    prepare(model, Rule(scheme="W2"))  # type: ignore[arg-type]
    assert model[0] is model[2]
    assert isinstance(model[0], QATLinear)
    weight = quantize(shared.weight, Scheme.parse("W2")).dequantize()
    expected = nn.functional.linear(nn.functional.linear(x, weight, shared.bias).relu(), weight, shared.bias)
    assert torch.equal(model(x), expected)
    convert(model)
    assert isinstance(model[0], QuantizedLinear)
    assert model[0] is model[2]
    assert torch.equal(model(x), expected)


# names, modes -------------------------------------------------------------------------------------------------------


@every_model
def test_names_of_the_original_state_dict_are_kept(kind: str) -> None:
    plain = TINY_MODELS[kind]()
    original = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    surrogate = JacQuant(group_size=32)
    model = prepare(plain, Rule(scheme="W2A16G64", surrogate=surrogate, embeddings=True), ignore=[])  # type: ignore[arg-type]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())
    extra = {name.rpartition(".")[2] for name in set(state) - set(original)}
    assert extra == {"weight_scale", "weight_state_gain"}
    missing, unexpected = model.load_state_dict(original, strict=False)
    assert not unexpected
    assert {name.rpartition(".")[2] for name in missing} == extra


def test_training_mode_is_kept() -> None:
    for training in (True, False):
        model = prepare(tiny_gpt2().train(training), all_layers(), ignore=[])
        assert all(layer.training is training for _, layer in qat_layers(model))
        assert all(layer.training is training for _, layer in quantized_layers(convert(model)))


def test_frozen_parameters_stay_frozen() -> None:
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    prepare(model, all_layers(), ignore=[])
    weights = {name: p.requires_grad for name, p in model.named_parameters() if name.endswith(".weight")}
    assert not any(grad for name, grad in weights.items() if "layers.0." in name)
    assert all(grad for name, grad in weights.items() if "layers.1." in name)


def test_prepare_takes_any_module_with_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Sequential(Conv1D(16, 32), nn.Linear(16, 4, bias=False)))
    prepare(model, Rule(scheme="W4"))  # type: ignore[arg-type]
    assert [name for name, _ in qat_layers(model)] == ["0", "1.0", "1.1"]
    x = torch.randn(3, 64)
    before = model(x)
    assert torch.equal(convert(model)(x), before)


# refusals -----------------------------------------------------------------------------------------------------------


def test_a_rule_that_matches_nothing_lists_near_names() -> None:
    with pytest.raises(
        ValueError, match=r"rule 'model.layers.0.mlp.down' chooses no layer; near names: .*mlp.down_proj"
    ):
        prepare(tiny_llama(), Rule(pattern="model.layers.0.mlp.down", scheme="W2"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ignore pattern 'lm_heed' matches no layer; near names: lm_head"):
        prepare(tiny_llama(), Rule(scheme="W2"), ignore=["lm_heed"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the model has no linear layer or embedding"):
        prepare(nn.Sequential(nn.ReLU()), Rule(scheme="W2"))  # type: ignore[arg-type]


def test_a_rule_that_chooses_nothing_says_why() -> None:
    for pattern, rules in (
        ("lm_head", []),
        ("model.embed_tokens", []),
        ("*.up_proj", [Rule(scheme="W4")]),  # type: ignore[arg-type]
    ):
        rules = [*rules, Rule(pattern=pattern, scheme="W2")]  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"it matches only .*, which are ignored, taken by an earlier rule, or embed"
        ):
            prepare(tiny_llama(), rules)


def test_a_tied_partner_cannot_be_ignored() -> None:
    message = "lm_head is ignored but its weight is tied to model.embed_tokens, which a rule quantizes"
    with pytest.raises(ValueError, match=message):
        prepare(tiny_llama(tie=True), all_layers(), ignore=["lm_head"])


def test_a_shape_that_does_not_fit_names_the_layer_and_changes_nothing() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"q_proj.weight: group_size=128 is larger than its in_features=64"):
        prepare(model, Rule(scheme="W2A16G128"))  # type: ignore[arg-type]
    assert not list(qat_layers(model))


def test_a_model_is_prepared_once() -> None:
    model = prepare(tiny_llama(), Rule(scheme="W2"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already prepared or converted"):
        prepare(model, Rule(scheme="W2"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already prepared or converted"):
        prepare(convert(model), Rule(scheme="W2"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no prepared layer; call prepare first"):
        convert(model)


def test_weights_that_are_not_finite_cannot_be_converted() -> None:
    model = prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2"))  # type: ignore[arg-type]
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 non-finite"):
        convert(model)


def test_weights_on_the_meta_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0.weight is on the meta device; load the weights before prepare"):
        prepare(nn.Sequential(nn.Linear(64, 8, device="meta")), Rule(scheme="W2"))  # type: ignore[arg-type]


def test_no_rules_and_special_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="no rules: nothing to prepare"):
        prepare(tiny_llama(), [])
    with pytest.raises(ValueError, match="max_norm, sparse or scale_grad_by_freq"):
        prepare(nn.Sequential(nn.Embedding(8, 64, max_norm=1.0)), all_layers())


def test_weights_that_no_rule_can_reach_are_reported() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    model.experts = nn.Parameter(torch.zeros(4, 128, 128))
    with pytest.warns(UserWarning, match="65,536 weights stay in full precision .* e.g. experts"):
        prepare(model, Rule(scheme="W2"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "W9"}, "is not of the form"),
        ({"scheme": 2}, "needs a Scheme and a Surrogate"),
        ({"scheme": "W2", "surrogate": "lsq"}, "unknown surrogate 'lsq'"),
        ({"scheme": "W2", "surrogate": 1}, "needs a Scheme and a Surrogate"),
        ({"scheme": "W2", "pattern": "re:("}, r"pattern 're:\(' is not a regular expression"),
    ],
)
def test_bad_rules_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**fields)


def test_rules_are_plain_data() -> None:
    rule = Rule(pattern="*.mlp.*", scheme="W2HG64", surrogate=JacQuant(group_size=32), embeddings=True)  # type: ignore[arg-type]
    assert Rule(**rule.to_dict()) == rule
    assert Rule(scheme="W2").surrogate == STE()  # type: ignore[arg-type]
