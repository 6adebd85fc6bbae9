"""GPTQ version 1: what is written is what was trained, by a slow reader written from the format's definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from targets_common import FREE_CODEBOOK, GRIDS, INTEGER_CODEBOOK, exported, scheme, trained
from torch import Tensor

from fewbits import Rule, Scheme, convert, prepare
from fewbits.export import export
from fewbits.io import read_json, write_json
from fewbits.targets.base import model_codes
from fewbits.targets.gptq import GPTQ
from fewbits.testing.tiny import tiny_gpt2, tiny_llama
from fewbits.verify import verify

BITS = {"W1": 2, "W1.58": 2, "W2": 2, "W3": 3, "W4": 4, "W8": 8, "W2H": 3, "W3H": 4, "W4H": 8}
SCHEMES = {
    **{f"{grid} channel": scheme(grid) for grid in GRIDS},
    **{f"{grid} group 32": scheme(f"{grid}A16G32") for grid in GRIDS},
    "per tensor": scheme("W1.58", "per_tensor"),
    "fp16 scales": scheme("W3A16G32", dtype="fp16"),
    "double-quantized": scheme("W4A16G32", superblock=64, multiplier_bits=2),
    "integer codebook": scheme("W2A16G32", grid=INTEGER_CODEBOOK),
}
NAME = "model.layers.0.self_attn.q_proj"


def slow_bits(words: list[int], num_bits: int) -> list[int]:
    """Fields of ``num_bits`` bits in a column of 32-bit words, lowest bits first, by one long integer."""
    number = sum((word % 2**32) << (32 * i) for i, word in enumerate(words))
    return [(number >> (num_bits * i)) % 2**num_bits for i in range(32 * len(words) // num_bits)]


def slow_weight(tensors: dict[str, Tensor], name: str, num_bits: int) -> Tensor:
    """The weight of a layer, fp32 ``(out_features, in_features)``: (q - (stored zero + 1)) * scale of the group."""
    get = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    q = torch.tensor([slow_bits(column, num_bits) for column in get["qweight"].t().tolist()])
    zero = torch.tensor([slow_bits(row, num_bits) for row in get["qzeros"].tolist()]) + 1
    group = get["g_idx"].long()
    return (q - zero.t()[:, group]).float() * get["scales"].float().t()[:, group]


@pytest.mark.parametrize("key", SCHEMES)
def test_every_scheme_is_written_and_read_back_exactly(tmp_path: Path, key: str) -> None:
    model = trained(SCHEMES[key])
    folder = exported(model, GPTQ(), tmp_path / "gptq")
    config = read_json(folder / "config.json")["quantization_config"]
    if SCHEMES[key].grid.kind != "codebook":
        assert config["bits"] == BITS[SCHEMES[key].name.partition("A")[0]]
    assert (config["sym"], config["desc_act"], config["checkpoint_format"]) == (True, False, "gptq")
    tensors = load_file(folder / "model.safetensors")
    for name in (NAME, "model.layers.1.mlp.down_proj"):
        assert torch.equal(slow_weight(tensors, name, config["bits"]), model_codes(model)[name].dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_wide_groups(tmp_path: Path, bits: int) -> None:
    model = trained(scheme("W2A16G128"), "wide")
    folder = exported(model, GPTQ(num_bits=bits), tmp_path / "gptq")
    config = read_json(folder / "config.json")["quantization_config"]
    assert config["bits"] == bits
    assert config["dynamic"] == {r"+:^model\.layers\.0\.mlp\.down_proj(\.|$)": {"bits": bits, "group_size": 128}}
    assert config["group_size"] == -1  # rows of 128 have one scale
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(slow_weight(tensors, name, bits), model_codes(model)[name].dequantize())


def test_version_1_stores_one_less_than_the_zero(tmp_path: Path) -> None:
    folder = exported(trained(SCHEMES["W2 channel"]), GPTQ(), tmp_path / "gptq")
    tensors = load_file(folder / "model.safetensors")
    assert set(slow_bits(tensors[f"{NAME}.qzeros"][0].tolist(), 2)) == {1}
    shapes = {key: tuple(tensors[f"{NAME}.{key}"].shape) for key in ("qweight", "qzeros", "scales", "g_idx")}
    assert shapes == {"qweight": (4, 64), "qzeros": (1, 4), "scales": (1, 64), "g_idx": (64,)}


def test_schemes_may_differ_by_layer_and_verify_passes(tmp_path: Path) -> None:
    rules = [Rule(pattern="*mlp*", scheme=scheme("W1.58A16G32")), Rule(pattern="*q_proj", scheme=scheme("W3H"))]
    model = prepare(tiny_llama(), rules)
    folder = exported(model, GPTQ(), tmp_path / "gptq")
    config = read_json(folder / "config.json")["quantization_config"]
    assert (config["bits"], config["group_size"]) == (2, 32)
    assert config["dynamic"][rf"+:^{NAME.replace('.', chr(92) + '.')}(\.|$)"] == {"bits": 4, "group_size": -1}
    assert sum(key.startswith("-:") for key in config["dynamic"]) == 6
    report = verify(model, folder)
    assert report.passed
    assert "no engine of 'gptq' can be installed" in report.notes[0]
    exported(convert(model), GPTQ(), tmp_path / "converted")


@pytest.mark.parametrize(
    ("what", "target", "shape", "reason"),
    [
        (scheme("W2A16G32", grid=FREE_CODEBOOK), GPTQ(), (64, 64), "not multiples of 1/1024"),
        (scheme("W8H"), GPTQ(), (64, 64), "do not fit 2/3/4/8-bit codes with no zero point"),
        (scheme("W2H"), GPTQ(num_bits=2), (64, 64), "4 levels -1.5..1.5 do not fit 2-bit codes"),
        (scheme("W2"), GPTQ(), (60, 64), "out_features=60"),
        (scheme("W3"), GPTQ(), (64, 80), "in_features=80 of 3-bit codes do not fill whole 32-bit words"),
        (scheme("W2A16G40"), GPTQ(), (64, 80), "no group of 16, 32, 64, 128, 256, 512, 1024 divides group_size=40"),
    ],
)
def test_refusals_name_the_condition(what: Scheme, target: GPTQ, shape: tuple[int, int], reason: str) -> None:
    assert reason in (target.holds(what, shape) or "")
    assert target.judge(what, shape).verdict == "cannot"


@pytest.mark.parametrize(
    ("what", "verdict"),
    [
        (scheme("W3H"), "lossless"),
        (scheme("W3H", dtype="fp16"), "lossless if"),
        (scheme("W2", dtype="bf16"), "lossless if"),
        (scheme("W2", dtype="fp32"), "cannot"),
    ],
)
def test_scales_must_be_fp16_numbers(tmp_path: Path, what: Scheme, verdict: str) -> None:
    assert GPTQ().judge(what, (64, 64)).verdict == verdict
    if verdict == "cannot":
        with pytest.raises(
            ValueError, match=r"q_proj .* only if every scale is an fp16 number, but with fp32 scales: "
        ):
            export(trained(what), GPTQ(), tmp_path / "x")
    else:
        exported(trained(what), GPTQ(), tmp_path / "x")


def test_one_scale_beyond_fp16_is_refused_at_export(tmp_path: Path) -> None:
    model = prepare(tiny_llama(), Rule(scheme=scheme("W2", dtype="bf16")))
    scale: Any = model.model.layers[0].self_attn.q_proj.weight_scale
    with torch.no_grad():
        scale[3] = 2.0**-30
    with pytest.raises(ValueError, match=r"q_proj: 1 times the scale is not exact in float16 for 1 of 64 scales"):
        export(model, GPTQ(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_only_linear_layers_and_known_widths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a Conv1D"):
        export(prepare(tiny_gpt2(), Rule(scheme=scheme("W4"))), GPTQ(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"num_bits=5 is unknown to GPTQ; use one of 2, 3, 4, 8"):
        GPTQ(num_bits=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(trained(SCHEMES["W2H group 32"]), GPTQ(), tmp_path / "gptq")


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("qweight", lambda v: None, "qweight is missing"),
        ("qweight", lambda v: torch.zeros_like(v), "stored code 0 is no level"),
        ("qzeros", lambda v: v + 1, "a zero point is not 4, stored as 3"),
        ("scales", lambda v: v.float(), "scales is torch.float32"),
        ("scales", lambda v: -v, "not finite, not positive"),
        ("g_idx", lambda v: v.flip(0), "not the plain order"),
    ],
)
def test_damaged_tensors_are_clear_errors(folder: Path, leaf: str, change: Any, message: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(f"{NAME}.{leaf}"))
    save_file(tensors if changed is None else {**tensors, f"{NAME}.{leaf}": changed}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        GPTQ().read_codes(folder)
    assert not verify(trained(SCHEMES["W2H group 32"]), folder).passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "describes no GPTQ weights"),
        ({"checkpoint_format": "gptq_v2"}, "format 'gptq_v2'; only version 1"),
        ({"bits": 2}, "do not fit 2-bit codes"),
        ({"bits": "3"}, "bits='3'"),
        ({"group_size": 64}, "group_size=64"),
        ({"dynamic": []}, None),
    ],
)
def test_a_foreign_config_is_a_clear_error(folder: Path, change: dict[str, Any], message: str | None) -> None:
    config = read_json(folder / "config.json")
    config["quantization_config"].update(change)
    write_json(folder / "config.json", config)
    if message is None:
        assert GPTQ().read_codes(folder)
        return
    with pytest.raises(ValueError, match=message):
        GPTQ().read_codes(folder)
