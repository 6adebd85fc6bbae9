"""torchao: codes, scales and zeros in the tensors and the metadata that torchao 0.18 itself writes.

torchao is not among the packages of the test suite: with it, every ``import fewbits`` logs missing GPU libraries.
Loading was compared by hand with torchao 0.18.0 and Transformers 5.24: logits of Llama, Qwen3 and Gemma are equal bit
for bit in fp32, and in bfloat16 with portable scales.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from targets_common import FREE_CODEBOOK, GRIDS, INTEGER_CODEBOOK, SHIFTED_CODEBOOK, exported, scheme, trained

from fewbits import Rule, Scheme, prepare
from fewbits.export import export
from fewbits.io import read_json, write_json
from fewbits.targets.base import model_codes
from fewbits.targets.torchao import TorchAO
from fewbits.testing.tiny import tiny_gpt2, tiny_llama

TARGET = TorchAO()
NAME = "model.layers.0.self_attn.q_proj"
BITS = {"W1": 2, "W1.58": 2, "W2": 2, "W3": 3, "W4": 4, "W8": 8, "W2H": 3, "W3H": 4, "W4H": 5, "W8H": 8}
SCHEMES = {
    **{f"{grid} channel": scheme(grid) for grid in (*GRIDS, "W8H")},
    **{f"{grid} group 32": scheme(f"{grid}A16G32") for grid in GRIDS},
    "per tensor": scheme("W1.58", "per_tensor"),
    "group 64, ragged in rows of 96": scheme("W3A16G64"),
    "fp32 scales": scheme("W3HA16G32", dtype="fp32"),
    "double-quantized": scheme("W4A16G32", superblock=64),
    "integer codebook": scheme("W2A16G32", grid=INTEGER_CODEBOOK),
    "shifted codebook": scheme("W2A16G32", grid=SHIFTED_CODEBOOK),
}
GOLDEN = (
    '{"_type": "IntxUnpackedToInt8Tensor", "_data": {"target_dtype": {"_type": "torch.dtype", "_data": "int3"}, '
    '"block_size": [1, 32], "dtype": {"_type": "torch.dtype", "_data": "float32"}, "activation_quantization": null}, '
    '"_tensor_data_names": ["qdata", "scale", "zero_point"]}'
)
"""``flatten_tensor_state_dict`` of torchao 0.18.0 for int3 codes in groups of 32."""


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("key", SCHEMES)
def test_every_scheme_is_written_and_read_back_exactly(tmp_path: Path, key: str) -> None:
    what = SCHEMES[key]
    model = trained(what)
    folder = exported(model, TARGET, tmp_path / "ao")
    tensors, metadata = load_file(folder / "model.safetensors"), metadata_of(folder)
    for name, q in model_codes(model).items():
        qdata, scale, zero = (tensors[f"{name}._weight_{part}"] for part in ("qdata", "scale", "zero_point"))
        said = json.loads(metadata[f"{name}.weight"])["_data"]
        group = said["block_size"][1]
        steps = qdata.float() - zero.float().repeat_interleave(group, 1)  # the slow twin: torchao's formula
        assert torch.equal(steps * scale.repeat_interleave(group, 1), q.dequantize())
        if what.grid.kind != "codebook":
            assert said["target_dtype"]["_data"] == f"int{BITS[what.name.partition('A')[0]]}"
        assert zero.dtype == (torch.float32 if what.name.startswith("W8H") else torch.int8)


def test_the_metadata_is_what_torchao_writes(tmp_path: Path) -> None:
    folder = exported(trained(SCHEMES["W2H group 32"]), TARGET, tmp_path / "ao")
    metadata = metadata_of(folder)
    assert metadata[f"{NAME}.weight"] == GOLDEN
    assert metadata["model.norm.weight"] == '{"_type": "Tensor"}'
    assert metadata["format"] == "pt"
    names = json.loads(metadata["tensor_names"])
    assert len(names) == len(set(names)) == 7 + 14
    assert set(names) == set(metadata) - {"format", "tensor_names"}
    config = read_json(folder / "config.json")["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert config["quant_type"]["default"]["_data"]["weight_dtype"]["_data"] == "int3"


@pytest.mark.parametrize(("text", "exact"), [("W1.58A16G32", True), ("W3A16G32", False)])
def test_bfloat16_models_need_portable_scales_unless_the_rounding_commutes(
    tmp_path: Path, text: str, exact: bool
) -> None:
    assert exported(trained(scheme(text), dtype=torch.bfloat16), TARGET, tmp_path / "portable")
    what = scheme(text, dtype="fp16")
    assert TARGET.judge(what, (64, 64)).verdict == "lossless if"
    model = trained(what, dtype=torch.bfloat16)
    if exact:
        exported(model, TARGET, tmp_path / "x")
    else:
        with pytest.raises(ValueError, match=r"model is bfloat16 .* changes \d+ of \d+ weights"):
            export(model, TARGET, tmp_path / "x")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (scheme("W2A16G32", grid=FREE_CODEBOOK), "not multiples of 1/1024"),
        (scheme("W2A16G128"), "group_size=128 is larger"),
    ],
)
def test_refusals_name_the_condition(what: Scheme, reason: str) -> None:
    assert reason in (TARGET.holds(what, (64, 64)) or "")
    assert TARGET.judge(what, (64, 64)).verdict == "cannot"


def test_only_linear_layers_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is a Conv1D"):
        export(prepare(tiny_gpt2(), Rule(scheme=scheme("W4"))), TARGET, tmp_path / "x")
    with pytest.raises(ValueError, match="is a quantized embedding"):
        export(prepare(tiny_llama(), Rule(scheme=scheme("W4"), embeddings=True)), TARGET, tmp_path / "x")
    model = trained(SCHEMES["W2 channel"])
    folder = export(model, TARGET, tmp_path / "x")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"pip install 'fewbits\[torchao\]'"):
        TARGET.load(folder, model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(trained(SCHEMES["W2H group 32"]), TARGET, tmp_path / "ao")


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("qdata", lambda v: None, "_weight_qdata is missing"),
        ("qdata", lambda v: torch.zeros_like(v), "stored code 4 is no level"),
        ("qdata", lambda v: torch.full_like(v, 100), "a code does not fit 3 bits"),
        ("scale", lambda v: -v, "not finite, not positive"),
        ("scale", lambda v: v.half(), "_weight_scale is torch.float16"),
        ("zero_point", lambda v: v + 1, "a zero point is not 0"),
    ],
)
def test_damaged_tensors_are_clear_errors(folder: Path, leaf: str, change: Any, message: str) -> None:
    path, key = folder / "model.safetensors", f"{NAME}._weight_{leaf}"
    tensors, metadata = load_file(path), metadata_of(folder)
    changed = change(tensors.pop(key))
    save_file(tensors if changed is None else {**tensors, key: changed}, path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        TARGET.read_codes(folder)


@pytest.mark.parametrize(
    "said", ["", "{", "[]", '{"_data": 3}', GOLDEN.replace("int3", "int2"), GOLDEN.replace("32]", "64]")]
)
def test_damaged_metadata_is_a_clear_error(folder: Path, said: str) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata=metadata_of(folder) | {f"{NAME}.weight": said})
    with pytest.raises(ValueError, match=r"q_proj: the metadata says .*, which is not W2HA16G32"):
        TARGET.read_codes(folder)
    config = read_json(folder / "config.json")
    config["quantization_config"]["quant_method"] = "awq"
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match="describes no weights of torchao"):
        TARGET.read_codes(folder)
