"""BitNet: packed ternary codes and one exact scale; Transformers' layer makes the trained weights of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from targets_common import IDS, exported, logits, scheme, trained
from torch import nn

from fewbits import Rule, Scheme, convert, prepare
from fewbits.comparison import compare_logits
from fewbits.convert import qat_layers
from fewbits.export import export
from fewbits.grids import Codebook
from fewbits.io import read_json, write_json
from fewbits.pretrained import from_pretrained
from fewbits.targets.base import model_codes
from fewbits.targets.bitnet import BitNet, pack_rows, unpack_rows
from fewbits.testing.tiny import TINY_MODELS, tiny_gpt2, tiny_llama
from fewbits.verify import verify

# Transformers' file compiles functions when it is imported, and torch then warns of itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

TARGET = BitNet()
TERNARY = scheme("W1.58", "per_tensor")
SCHEMES = {
    "ternary": TERNARY,
    "binary": scheme("W1", "per_tensor"),
    "absmean": scheme("W1.58", "per_tensor", rule="absmean", mode="dynamic"),
    "fp32 scales": scheme("W1.58", "per_tensor", dtype="fp32"),
    "codebook": scheme("W1.58", "per_tensor", grid=Codebook((-2.0, 0.0, 2.0))),
}
NAME = "model.layers.0.self_attn.q_proj"
ROUNDED = 1e-4
"""Largest logit difference with BitNet's rounding of activations repeated; about 2e-7 is seen."""


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("key", SCHEMES)
def test_every_scheme_is_unpacked_by_transformers_bit_for_bit(tmp_path: Path, key: str, kind: str) -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    model = trained(SCHEMES[key], kind)
    folder = exported(model, TARGET, tmp_path / "bitnet")
    with torch.compiler.set_stance("force_eager"):
        loaded, _ = from_pretrained(folder, dtype="auto")
    layers = {name: m for name, m in loaded.named_modules() if isinstance(m, AutoBitLinear)}
    codes = model_codes(model)
    assert set(layers) == set(codes)
    for name, layer in layers.items():
        assert torch.equal(layer.weight * layer.weight_scale, codes[name].dequantize())
    report = verify(model, folder)
    assert report.passed, report.to_text()
    exported(convert(prepare(TINY_MODELS[kind](), Rule(scheme=SCHEMES[key]))), TARGET, tmp_path / "converted")


def round_input(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """BitNet's rounding of activations: 8 bits, one scale a token."""
    (x,) = inputs
    step = 127 / x.abs().amax(-1, keepdim=True).clamp_min(1e-5)
    return ((x * step).round().clamp(-128, 127) / step,)


def test_the_engine_differs_by_its_rounding_of_activations_only(tmp_path: Path) -> None:
    model: Any = prepare(tiny_llama(), Rule(scheme=TERNARY))
    found = TARGET.engine_logits(exported(model, TARGET, tmp_path / "bitnet"), IDS)
    plain = logits(model)
    apart = compare_logits(lambda _: plain[:1], lambda _: found[:1], IDS[:1])
    assert apart.max_abs_diff > 10 * ROUNDED, "without the rounding the engine would be equal"
    assert apart.kl < 5e-3
    hooks = [layer.register_forward_pre_hook(round_input) for _, layer in qat_layers(model)]
    assert (logits(model) - found).abs().max() < ROUNDED
    for hook in hooks:
        hook.remove()


def test_bfloat16_models_need_scales_of_8_bits(tmp_path: Path) -> None:
    model = trained(TERNARY, dtype=torch.bfloat16)
    folder = exported(model, TARGET, tmp_path / "x")
    assert load_file(folder / "model.safetensors")[f"{NAME}.weight_scale"].dtype == torch.bfloat16
    what = scheme("W1.58", "per_tensor", dtype="fp32")
    assert TARGET.judge(what, (64, 64)).verdict == "lossless if"
    with pytest.raises(ValueError, match="q_proj: 1 times the scale is not exact in bfloat16"):
        export(trained(what, dtype=torch.bfloat16), TARGET, tmp_path / "y")


def test_packing_is_the_one_of_transformers() -> None:
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    stored = torch.randint(0, 3, (24, 7), dtype=torch.uint8)
    packed = pack_rows(stored)
    assert torch.equal(packed, pack_weights(stored.to(torch.int8) - 1))
    assert torch.equal(unpack_rows(packed), stored)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(unpack_weights(packed, torch.float32), stored.float() - 1)


@pytest.mark.parametrize(
    ("what", "shape", "reason"),
    [
        (scheme("W2", "per_tensor"), (64, 64), "the 4 levels -2..1 are not ternary"),
        (scheme("W2H", "per_tensor"), (64, 64), "the 4 levels -1.5..1.5 are not ternary"),
        (scheme("W1.58"), (64, 64), "one scale for a whole matrix; train with granularity='per_tensor'"),
        (scheme("W1.58A16G32"), (64, 64), "one scale for a whole matrix"),
        (TERNARY, (30, 64), "out_features=30 is not a multiple of 4"),
        (scheme("W2K", "per_tensor"), (64, 64), "not multiples of 1/1024"),
    ],
)
def test_refusals_name_the_condition(what: Scheme, shape: tuple[int, int], reason: str) -> None:
    assert reason in (TARGET.holds(what, shape) or "")
    assert TARGET.judge(what, shape).verdict == "cannot"


def test_only_linear_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a Conv1D"):
        export(prepare(tiny_gpt2(), Rule(scheme=TERNARY)), TARGET, tmp_path / "x")
    with pytest.raises(ValueError, match="is a quantized embedding"):
        export(prepare(tiny_llama(), Rule(scheme=TERNARY, embeddings=True)), TARGET, tmp_path / "x")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(trained(TERNARY), TARGET, tmp_path / "bitnet")


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("weight", lambda v: None, "weight is missing"),
        ("weight", lambda v: torch.full_like(v, 255), "stored code 3 is no level"),
        ("weight", lambda v: v.float(), "weight is torch.float32"),
        ("weight", lambda v: v[:-1].contiguous(), r"weight is torch.uint8 \(15, 64\)"),
        ("weight_scale", lambda v: -v, "not finite, not positive"),
        ("weight_scale", lambda v: v.repeat(2), r"weight_scale is torch.float32 \(2,\)"),
    ],
)
def test_damaged_tensors_are_clear_errors(folder: Path, leaf: str, change: Any, message: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(f"{NAME}.{leaf}"))
    save_file(tensors if changed is None else {**tensors, f"{NAME}.{leaf}": changed}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        TARGET.read_codes(folder)
    assert not verify(trained(TERNARY), folder).passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "describes no packed weights of BitNet"),
        ({"linear_class": "bitlinear"}, "describes no packed weights of BitNet"),
        ({"quantization_mode": "online"}, "describes no packed weights of BitNet"),
        ({"modules_to_not_convert": [NAME]}, "q_proj: config.json says that it is not packed"),
    ],
)
def test_a_foreign_config_is_a_clear_error(folder: Path, change: dict[str, Any], message: str) -> None:
    config = read_json(folder / "config.json")
    config["quantization_config"].update(change)
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match=message):
        TARGET.read_codes(folder)
