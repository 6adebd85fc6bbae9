"""Quantized inputs in compressed-tensors: the library's own forward rounds as ours does, or the export is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from targets_common import SHIFTED_CODEBOOK, exported, logits, scheme
from torch import Tensor, nn

from fewbits import Rule, convert, prepare
from fewbits.activations import ActivationScheme, calibrate_activations_, dynamic_scale, fake_quantize_activation
from fewbits.activations.module import input_quantizer, input_quantizers
from fewbits.export import export
from fewbits.io import read_json, write_json
from fewbits.targets.base import check_activations
from fewbits.targets.compressed_activations import input_args, refuse_input
from fewbits.targets.compressed_tensors import CompressedTensors
from fewbits.testing.tiny import tiny_llama, toy_blocks
from fewbits.verify import verify

CT = CompressedTensors()
LAYER = "model.layers.0.mlp.up_proj"
HELD: dict[str, dict[str, Any]] = {
    "token": {"preset": "compressed_tensors"},
    "token, trust mask": {"preset": "compressed_tensors", "gradient": "trust"},
    "tensor": {"preset": "compressed_tensors", "granularity": "tensor"},
    "lsq": {"preset": "lsq"},
    "pact": {"preset": "pact"},
    "sasq": {"preset": "sasq"},
    "fixed": {"preset": "lsq", "learned": False, "start_clip": 4.0},
}


def activation(fields: dict[str, Any], num_bits: int = 8) -> ActivationScheme:
    parsed = ActivationScheme.parse({"num_bits": num_bits, **fields})
    assert parsed is not None
    return parsed


def trained(how: ActivationScheme, weights: str = "W4A16G32", pattern: str = "*", **rule: Any) -> Any:
    """A tiny Llama whose inputs were calibrated and trained for two steps."""
    model: Any = prepare(tiny_llama(), Rule(pattern=pattern, scheme=scheme(weights), activation=how, **rule))
    calibrate_activations_(model, [toy_blocks(2, 12, seed=7)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(2):
        ids = toy_blocks(2, 12, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def args_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")["quantization_config"]["config_groups"]["group_0"]["input_activations"]


def library(x: Tensor, args: QuantizationArgs, scale: Tensor | None = None) -> Tensor:
    zero = None
    if scale is None:
        scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Linear(1, 1))
    return fake_quantize(x, scale, zero, args)


def inputs(seed: int = 0) -> Tensor:
    """Tokens of many sizes, with a row of zeros, one element in a row, and inputs on the ties of a scale of 1/8."""
    x = torch.randn(3, 50, 96, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-12, 12, 50)[None, :, None]
    x[0, 0], x[1, 1, 1:] = 0.0, 0.0
    x[2, :8] = (torch.arange(8 * 96).view(8, 96) % 255 - 126.5) / 8
    x[2, :8, 0] = 127.5 / 8  # half the range, so the dynamic scale of 8 bits is 1/8
    return x


# -------------------------------------------------------------------------------------------------- what is held


@pytest.mark.parametrize("num_bits", [8, 4, 2])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_the_library_rounds_dynamic_inputs_to_the_same_bits(granularity: Any, num_bits: int) -> None:
    how = ActivationScheme(num_bits=num_bits, rule="half_range", granularity=granularity)
    args = QuantizationArgs(**input_args(how))
    for seed in range(4):
        x = inputs(seed)
        scale, _ = dynamic_scale(x, how)
        theirs, zero = compute_dynamic_scales_and_zp(x, args, nn.Linear(1, 1))
        assert not zero.any()
        nonzero = x.abs().amax((-1) if granularity == "token" else (0, 1, 2), keepdim=True) > 0
        assert torch.equal(scale[nonzero], theirs.view_as(scale)[nonzero])
        assert torch.equal(fake_quantize_activation(x, how), library(x, args))
    row = inputs()[2, :8]
    assert dynamic_scale(row, ActivationScheme(num_bits=8, rule="half_range"))[0].flatten().unique().tolist() == [0.125]


@pytest.mark.parametrize("num_bits", [8, 4, 2])
@pytest.mark.parametrize("scale", [0.125, 0.0371, 3.0, 1e-6])
def test_the_library_rounds_static_inputs_to_the_same_bits(scale: float, num_bits: int) -> None:
    how = activation({"preset": "lsq"}, num_bits)
    args = QuantizationArgs(**input_args(how))
    for seed in range(4):
        x = inputs(seed)
        ours = fake_quantize_activation(x, how, torch.tensor(scale))
        assert torch.equal(ours, library(x, args, torch.tensor([scale])))


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("key", HELD)
def test_transformers_computes_the_trained_logits_bit_for_bit(tmp_path: Path, key: str, num_bits: int) -> None:
    how = activation(HELD[key], num_bits)
    model = trained(how)
    folder = exported(model, CT, tmp_path / "ct")
    args = args_of(folder)
    assert (args["num_bits"], args["strategy"], args["dynamic"]) == (num_bits, how.granularity, how.mode == "dynamic")
    report = verify(model, folder)
    assert report.passed, report.to_text()
    assert report.logits is not None
    assert report.logits.bitwise_equal
    stored = load_file(folder / "model.safetensors").get(f"{LAYER}.input_scale")
    quantizer = input_quantizer(model.get_submodule(LAYER))
    assert quantizer is not None
    scale = quantizer.static_scale()
    assert (stored is None) == (scale is None)
    if stored is not None and scale is not None:
        assert stored.dtype == torch.float32
        assert torch.equal(stored, scale.detach()[None])
    for _, each in input_quantizers(model):  # the comparison above sees the inputs' rounding
        each.enabled = False
    assert not verify(model, folder).passed


def test_a_converted_model_and_rules_that_differ(tmp_path: Path) -> None:
    rules = [
        Rule(pattern="*mlp*", scheme=scheme("W2A16G32"), activation=activation(HELD["token"])),
        Rule(pattern="*q_proj", scheme=scheme("W2A16G32"), activation=activation(HELD["token"], 4)),
        Rule(pattern="*k_proj", scheme=scheme("W2A16G32")),
        Rule(pattern="*v_proj", scheme=scheme("W2A16G32"), activation=activation(HELD["fixed"])),
    ]
    model: Any = prepare(tiny_llama(), rules).eval()
    expected = logits(model)
    folder = exported(model, CT, tmp_path / "a")
    groups = read_json(folder / "config.json")["quantization_config"]["config_groups"].values()
    found = {g["targets"][0].rpartition(".")[2]: g["input_activations"] for g in groups}
    bits = {name: None if args is None else args["num_bits"] for name, args in found.items()}
    assert bits == {"q_proj": 4, "k_proj": None, "v_proj": 8, "gate_proj": 8}
    assert verify(model, folder).passed
    assert torch.equal(logits(CT.load(folder, model)), expected)
    folder = exported(convert(model), CT, tmp_path / "b")
    assert torch.equal(logits(CT.load(folder, model)), expected)


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, r"its dynamic scale is max\|x\| / 127.5, not 'absmax'; use rule='half_range'"),
        ({"rule": "rms"}, "not 'rms'"),
        ({"symmetric": False}, "zero point is added before the rounding, so ties fall on other levels; use symmetric"),
        ({"signed": False}, r"levels 0\.\.255 need a zero point"),
        ({"preset": "lsq_plus"}, "LSQ\\+'s offset is a number in units of x"),
        ({"preset": "quest"}, r"no rotation \(hadamard\) of inputs"),
        ({"preset": "quest", "rotation": "none"}, "not grid='centred'"),
        ({"preset": "n2uq"}, "thresholds='uniform'"),
    ],
)
def test_refusals_name_value_limit_and_fix(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    model = prepare(tiny_llama(), Rule(scheme=scheme("W4A16G32"), activation=activation(fields)))
    match = rf"cannot hold the quantized activations of model\.layers\.0\.self_attn\.q_proj .*{reason}"
    with pytest.raises(ValueError, match=match):
        export(model, CT, tmp_path / "x")
    with pytest.raises(ValueError, match=reason):
        CT.write(model, None, tmp_path)


def test_each_refusal_of_a_number_has_a_counterexample() -> None:
    """Where the library computes something else, on the same input."""
    x = inputs()
    plain = ActivationScheme(num_bits=8)
    args = QuantizationArgs(**input_args(plain))
    assert not torch.equal(fake_quantize_activation(x, plain), library(x, args))

    offset = ActivationScheme(num_bits=8, symmetric=False)  # scale 1, zero point 1 (theirs -127): 0.5 is a tie
    tie = torch.tensor([[[-1.0, 0.5, 254.0]]])
    args = QuantizationArgs(**{**input_args(offset), "symmetric": False})
    assert fake_quantize_activation(tie, offset).flatten().tolist() == [-1.0, 0.0, 254.0]
    assert library(tie, args).flatten().tolist() == [-1.0, 1.0, 254.0]

    half = ActivationScheme(num_bits=8, rule="half_range")
    rounded = x[:, 20:30].bfloat16()
    assert not torch.equal(
        fake_quantize_activation(rounded, half), library(rounded, QuantizationArgs(**input_args(half)))
    )


def test_keys_and_values_are_refused_since_the_library_scales_all_tokens_of_a_head_together(tmp_path: Path) -> None:
    keys = torch.randn(2, 3, 7, 16)
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    assert compute_dynamic_scales_and_zp(keys, args, nn.Linear(1, 1))[0].shape == (2, 3, 1, 1)
    assert dynamic_scale(keys, ActivationScheme(num_bits=8, rule="half_range"))[0].shape == (2, 3, 7, 1)
    cache = ActivationScheme(num_bits=8, rule="half_range")
    model = prepare(tiny_llama(), Rule(scheme=scheme("W4A16G32"), kv_cache=cache))
    with pytest.raises(ValueError, match=r"keys and values of model\.layers\.0\.self_attn .*kv_cache_scheme is not"):
        export(model, CT, tmp_path / "x")


def test_other_dtypes_zero_points_and_scales_out_of_range(tmp_path: Path) -> None:
    how = activation(HELD["fixed"])
    half = prepare(tiny_llama().bfloat16(), Rule(scheme=scheme("W4A16G32"), activation=how))
    with pytest.raises(ValueError, match=r"model is bfloat16, .* export the model in float32 \(model\.float\(\)\)"):
        export(half, CT, tmp_path / "x")
    shifted = prepare(tiny_llama(), Rule(scheme=scheme("W2A16G32", grid=SHIFTED_CODEBOOK), activation=how))
    with pytest.raises(ValueError, match="zero points only without quantized inputs; drop num_bits"):
        export(shifted, CompressedTensors(num_bits=2), tmp_path / "x")
    assert verify(shifted, exported(shifted.eval(), CT, tmp_path / "three")).passed
    quantizer = input_quantizer(shifted.get_submodule(LAYER))
    assert quantizer is not None
    quantizer.get_buffer("scale").fill_(0.0)
    with pytest.raises(ValueError, match=rf"the input scale 0 of {LAYER} must be finite and >= 1e-30"):
        export(shifted, CT, tmp_path / "x")


def test_targets_that_describe_weights_alone_refuse_every_scheme() -> None:
    from fewbits.targets import TARGETS

    how = activation(HELD["token"])
    for name, target in TARGETS.items():
        if name == "hf" or name.startswith("compressed-tensors"):
            check_activations(target, {"a": how}, {})
            continue
        with pytest.raises(ValueError, match=r"quantized activations of a .* files describe weights alone"):
            check_activations(target, {"a": how}, {})
        with pytest.raises(ValueError, match=r"quantized keys and values of a .* files describe weights alone"):
            check_activations(target, {}, {"a": how})
    assert refuse_input(how) is None


# ----------------------------------------------------------------------------------------------------- damaged folders


def test_a_changed_description_or_scale_is_found(tmp_path: Path) -> None:
    model = trained(activation(HELD["lsq"]))
    folder = exported(model, CT, tmp_path / "ct")
    config, tensors = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    group = config["quantization_config"]["config_groups"]["group_0"]
    for value in (None, {**group["input_activations"], "num_bits": 4}):
        changed = {**config["quantization_config"], "config_groups": {"group_0": {**group, "input_activations": value}}}
        write_json(folder / "config.json", {**config, "quantization_config": changed})
        with pytest.raises(ValueError, match=r"q_proj: config\.json says input_activations="):
            CT.read_codes(folder)
    write_json(folder / "config.json", config)
    key = f"{LAYER}.input_scale"
    for change in ({}, {key: tensors[key] * 2}):
        kept = {k: v for k, v in tensors.items() if k != key} | change
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        report = verify(model, folder, save=False)
        assert any(row.where == key for row in report.differences), report.to_text()
