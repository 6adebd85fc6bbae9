"""What inspection counts is what lies in the file, before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fewbits import Rule, Scheme, convert, prepare
from fewbits.export import export
from fewbits.grids import Codebook
from fewbits.inspection import ModelReport, inspect_model, packed_bytes
from fewbits.surrogates import JacQuant
from fewbits.testing.tiny import TINY_MODELS, tiny_gemma, tiny_gpt2, tiny_llama

RULES = [
    Rule(pattern="*mlp*", scheme=Scheme.parse("W1.58A16G32"), surrogate=JacQuant(group_size=32)),
    Rule(scheme=Scheme.parse("W2A16G64"), embeddings=True),
]


def plain_report(report: ModelReport) -> Any:
    return [layer.model_copy(update={"surrogate": None, "kind": "any"}) for layer in report.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_counts_are_those_of_the_file_and_of_every_stage(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    rules = RULES[1:] if name == "gpt2" else RULES
    model = TINY_MODELS[name](dtype=dtype)
    num_parameters = sum(p.numel() for p in model.parameters())
    planned = inspect_model(model, rules, ignore=[])
    prepared = inspect_model(prepare(model, rules, ignore=[]))
    assert planned == prepared
    tensors = load_file(export(model, "hf", tmp_path / "hf") / "model.safetensors")
    assert prepared.total_bytes == sum(value.nbytes for value in tensors.values())
    assert prepared.num_quantized + prepared.num_other == num_parameters
    converted = inspect_model(convert(model))
    assert plain_report(converted) == plain_report(prepared)
    assert converted.model_copy(update={"layers": prepared.layers}) == prepared


def test_a_layer_by_hand() -> None:
    model = nn.Sequential(nn.Linear(96, 8), nn.Linear(8, 8))
    report = inspect_model(model, Rule(pattern="0", scheme=Scheme.parse("W3A16G64")))
    (layer,) = report.layers
    assert (layer.name, layer.kind, layer.shape, layer.scheme) == ("0", "linear", (8, 96), "W3A16G64")
    assert layer.bits_per_weight == 3 + 16 * 2 / 96  # two scales a row: the second group is short
    assert layer.num_bytes == 8 * (96 * 3 // 8) + 8 * 2 * 2
    assert report.num_quantized == 8 * 96
    assert report.num_other == 8 + 8 * 8 + 8
    assert report.total_bytes == layer.num_bytes + 4 * report.num_other
    assert report.model_bits_per_weight == 8 * report.total_bytes / (8 * 96 + report.num_other)
    half = inspect_model(model, Rule(pattern="0", scheme=Scheme.parse("W3A16G64")), dtype=torch.float16)
    assert half.other_bytes == 2 * report.num_other


def test_mean_bits_are_weighted_by_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 1, bias=False), nn.Linear(64, 3, bias=False))
    rules = [Rule(pattern="0", scheme=Scheme.parse("W4")), Rule(pattern="1", scheme=Scheme.parse("W2"))]
    assert inspect_model(model, rules).quantized_bits_per_weight == (1 * 4.25 + 3 * 2.25) / 4


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (Scheme.parse("W1.58"), 4 * 13 + 4 * 2),  # 64 trits in 13 bytes
        (Scheme.parse("W1A16G32", dtype="fp32"), 4 * 8 + 4 * 2 * 4),
        (Scheme.parse("W2A16G32", superblock=64), 4 * 16 + 4 * 2 + 4 * 2),  # one super scale and two bytes a row
        (Scheme.parse("W2", grid=Codebook.lloyd_max(4)), 4 * 16 + 4 * 2 + 4 * 4),  # and the table
    ],
)
def test_packed_bytes_by_hand(scheme: Scheme, expected: int) -> None:
    assert packed_bytes(scheme, (4, 64)) == expected


def test_tied_layers_count_once() -> None:
    model = prepare(tiny_gemma(), Rule(pattern="*embed_tokens", scheme=Scheme.parse("W4"), embeddings=True))
    report = inspect_model(model)
    rows = {layer.name: layer for layer in report.layers}
    assert rows["lm_head"].tied_to == "model.embed_tokens"
    assert rows["lm_head"].num_bytes == 0
    assert report.num_quantized == 256 * 64
    assert report.quantized_bytes == rows["model.embed_tokens"].num_bytes
    assert "tied to model.embed_tokens" in report.to_text()


def test_a_plain_model_is_all_other() -> None:
    report = inspect_model(tiny_llama(tie=True))
    assert report.layers == []
    assert report.quantized_bits_per_weight is None
    assert report.model_bits_per_weight == 32
    assert report.num_other == sum(p.numel() for p in tiny_llama(tie=True).parameters())
    assert "no layer is quantized" in report.to_text()
    assert ModelReport(**report.model_dump()) == report


def test_the_model_is_left_alone_and_bad_rules_are_refused() -> None:
    model = tiny_gpt2()
    names = [(name, type(module)) for name, module in model.named_modules()]
    report = inspect_model(model, Rule(scheme=Scheme.parse("W2")))
    assert {layer.kind for layer in report.layers} == {"conv1d"}
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    with pytest.raises(ValueError, match="chooses no layer"):
        inspect_model(model, Rule(pattern="nothing", scheme=Scheme.parse("W2")))
    with pytest.raises(ValueError, match="larger than its in_features=64"):
        inspect_model(model, Rule(scheme=Scheme.parse("W2A16G128")))
    with pytest.raises(ValueError, match="already prepared"):
        inspect_model(prepare(model, Rule(scheme=Scheme.parse("W2"))), Rule(scheme=Scheme.parse("W2")))


def test_the_table_folds_equal_layers() -> None:
    text = inspect_model(tiny_llama(), RULES).to_text()
    lines = text.splitlines()
    assert lines[0].split() == ["layers", "number", "shape", "scheme", "bits", "bytes"]
    down = next(line for line in lines if "down_proj" in line).split()
    assert down == ["model.layers.*.mlp.down_proj", "2", "64x96", "W1.58A16G32", "2.100", "3,328", "jacquant"]
    assert any(line.startswith("bits per quantized weight: ") for line in lines)
    assert lines[-1].startswith("bits per parameter: ")
