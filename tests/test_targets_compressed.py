"""compressed-tensors: what is written is what was trained, and Transformers' own loader computes the same bits."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from targets_common import (
    FREE_CODEBOOK,
    GRIDS,
    INTEGER_CODEBOOK,
    SHIFTED_CODEBOOK,
    exported,
    logits,
    scheme,
    trained,
)

from fewbits import Rule, Scheme, convert, prepare
from fewbits.export import export
from fewbits.grids import Codebook, HalfShifted, Int
from fewbits.io import read_json, write_json
from fewbits.rotations import Rotation
from fewbits.targets.affine import affine_fit, always_exact, codes_from_stored, engine_group, gather_scale, spread_scale
from fewbits.targets.base import model_codes
from fewbits.targets.compressed_tensors import CompressedTensors
from fewbits.targets.layers import LAYERS_FILE
from fewbits.targets.words import pack_words, unpack_words
from fewbits.testing.tiny import tiny_gpt2, tiny_llama
from fewbits.verify import verify

CT = CompressedTensors()
BITS = {"W1": 2, "W1.58": 2, "W2": 2, "W3": 3, "W4": 4, "W8": 8, "W2H": 3, "W3H": 4, "W4H": 5}
SCHEMES = {
    **{f"{grid} channel": scheme(grid) for grid in GRIDS},
    **{f"{grid} group 32": scheme(f"{grid}A16G32") for grid in GRIDS},
    "per tensor": scheme("W1.58", "per_tensor"),
    "group 64, ragged in rows of 96": scheme("W3A16G64"),
    "fp32 scales": scheme("W3HA16G32", dtype="fp32"),
    "bf16 scales": scheme("W2A16G32", dtype="bf16"),
    "double-quantized": scheme("W4A16G32", superblock=64),
    "integer codebook": scheme("W2A16G32", grid=INTEGER_CODEBOOK),
    "shifted codebook": scheme("W2A16G32", grid=SHIFTED_CODEBOOK),
}


def weights_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")["quantization_config"]["config_groups"]["group_0"]["weights"]


def kinds_of(folder: Path) -> list[tuple[str, int | None]]:
    groups = read_json(folder / "config.json")["quantization_config"]["config_groups"].values()
    return [(group["weights"]["strategy"], group["weights"]["group_size"]) for group in groups]


@pytest.mark.parametrize("key", SCHEMES)
def test_every_scheme_is_written_and_read_back_exactly(tmp_path: Path, key: str) -> None:
    what = SCHEMES[key]
    folder = exported(trained(what), CT, tmp_path / "ct")
    weights = weights_of(folder)
    if what.grid.kind != "codebook":
        assert weights["num_bits"] == BITS[what.name.partition("A")[0]]
    assert weights["symmetric"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", ["W1 group 32", "W1.58 channel", "W2 group 32", "W2H group 32", "W4 channel"])
def test_transformers_computes_the_trained_logits_bit_for_bit(tmp_path: Path, key: str, dtype: torch.dtype) -> None:
    model = trained(SCHEMES[key], dtype=dtype)
    report = verify(model, exported(model, CT, tmp_path / "ct"))
    assert report.passed, report.to_text()
    assert report.logits is not None
    assert report.logits.bitwise_equal


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3", "gemma", "gemma3"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    model = trained(SCHEMES["W2H group 32"], kind)
    report = verify(model, exported(model, CT, tmp_path / "ct"))
    assert report.passed, report.to_text()


def test_groups_of_128_ragged_groups_and_a_converted_model(tmp_path: Path) -> None:
    model = trained(scheme("W3HA16G128"), "wide")
    folder = exported(model, CT, tmp_path / "a")
    assert sorted(kinds_of(folder)) == [("channel", None), ("group", 128)]
    assert verify(model, folder).passed
    ragged = prepare(tiny_llama(), Rule(scheme=scheme("W3A16G64")))
    folder = exported(ragged, CT, tmp_path / "b")
    assert sorted(kinds_of(folder)) == [("channel", None), ("group", 32)]
    assert verify(ragged, folder).passed
    expected = logits(ragged)
    folder = exported(convert(ragged), CT, tmp_path / "c")
    assert torch.equal(logits(CT.load(folder, ragged)), expected)


def test_schemes_may_differ_by_layer(tmp_path: Path) -> None:
    rules = [
        Rule(pattern="*mlp*", scheme=scheme("W1.58A16G32")),
        Rule(pattern="*q_proj", scheme=scheme("W3H")),
        Rule(pattern="*k_proj", scheme=scheme("W2A16G32")),
    ]
    model = prepare(tiny_llama(), rules)
    folder = exported(model, CT, tmp_path / "ct")
    config = read_json(folder / "config.json")["quantization_config"]
    assert [len(group["targets"]) for group in config["config_groups"].values()] == [2, 8]
    assert "model.layers.0.self_attn.v_proj" in config["ignore"]
    assert verify(model, folder).passed


def test_a_chosen_width_and_zero_points(tmp_path: Path) -> None:
    model = trained(SCHEMES["W2 group 32"])
    folder = exported(model, CompressedTensors(num_bits=4), tmp_path / "four")
    assert weights_of(folder)["num_bits"] == 4
    assert torch.equal(logits(CT.load(folder, model)), logits(model))

    model = trained(SCHEMES["shifted codebook"])
    two = CompressedTensors(num_bits=2)
    folder = exported(model, two, tmp_path / "zero")
    assert weights_of(folder)["symmetric"] is False
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert tensors[f"{name}.weight_zero_point"].shape == (96 * 2 // 32, 2)
    assert torch.equal(logits(two.load(folder, model)), logits(model))
    assert CT.judge(SCHEMES["shifted codebook"], (64, 64)).reason.startswith("3-bit codes")

    rules = [Rule(pattern="*mlp*", scheme=SCHEMES["shifted codebook"]), Rule(scheme=SCHEMES["W2 channel"])]
    with pytest.raises(ValueError, match="zero points only where all layers have one scheme"):
        export(prepare(tiny_llama(), rules), two, tmp_path / "mixed")


def test_the_library_unpacks_the_same_weights(tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for bits in range(1, 9):
        what = scheme("W2A16G32", grid=Codebook(tuple(float(i - 2 ** (bits - 1)) for i in range(2**bits))))
        model = prepare(tiny_llama(), Rule(pattern="*layers.0.mlp.down_proj", scheme=what))
        folder = exported(model, CompressedTensors(num_bits=bits), tmp_path / str(bits))
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.down_proj"
        state = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        args = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights_of(folder)))
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        found = compressor.decompress({**state, "weight_scale": state["weight_scale"].float()}, args)["weight"]
        assert torch.equal(found, model_codes(model)[name].dequantize())


# ------------------------------------------------------------------------------------------------- what cannot be held


@pytest.mark.parametrize(
    ("what", "target", "reason"),
    [
        (scheme("W2A16G32", grid=FREE_CODEBOOK), CT, "not multiples of 1/1024"),
        (scheme("W2", rotation=Rotation(kind="hadamard", block_size=32)), CT, "rotated"),
        (scheme("W8H"), CT, "do not fit 1/2/3/4/5/6/7/8-bit codes with an integer zero point"),
        (scheme("W2H"), CompressedTensors(num_bits=2), "4 levels -1.5..1.5 do not fit 2-bit codes"),
        (scheme("W2A16G128"), CT, "group_size=128 is larger than its in_features=64"),
    ],
)
def test_refusals_name_the_condition(tmp_path: Path, what: Scheme, target: CompressedTensors, reason: str) -> None:
    assert reason in (target.holds(what, (64, 64)) or "")
    assert target.judge(what, (64, 64)).verdict == "cannot"
    if what.scale.group_size != 128:
        with pytest.raises(ValueError, match=r"cannot hold model\.layers\.0\.self_attn\.q_proj"):
            export(prepare(tiny_llama(), Rule(scheme=what)), target, tmp_path / "x")


@pytest.mark.parametrize(("text", "exact"), [("W2A16G32", True), ("W3A16G32", False), ("W2HA16G32", False)])
def test_bfloat16_models_need_portable_scales_unless_the_rounding_commutes(
    tmp_path: Path, text: str, exact: bool
) -> None:
    what = scheme(text, dtype="fp16")
    assert CT.judge(what, (64, 64)).verdict == "lossless if"
    model = trained(what, dtype=torch.bfloat16)
    if exact:  # codes -2, -1, 0, 1: rounding the scale is rounding the weight
        assert verify(model, exported(model, CT, tmp_path / "x")).passed
    else:
        with pytest.raises(ValueError, match=r"model is bfloat16 .* changes \d+ of \d+ weights; train with portable"):
            export(model, CT, tmp_path / "x")
    assert verify(trained(what), exported(trained(what), CT, tmp_path / "y")).passed


def test_only_linear_layers(tmp_path: Path) -> None:
    model = prepare(tiny_llama(), Rule(scheme=scheme("W4"), embeddings=True))
    with pytest.raises(ValueError, match=r"model\.embed_tokens is a quantized embedding"):
        export(model, CT, tmp_path / "x")
    for kind in (lambda m: m, convert):
        with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
            export(kind(prepare(tiny_gpt2(), Rule(scheme=scheme("W4")))), CT, tmp_path / "x")
    head = prepare(tiny_llama(), Rule(scheme=scheme("W4")), ignore=[])
    assert verify(head, exported(head, CT, tmp_path / "head")).passed
    with pytest.raises(ValueError, match=r"num_bits=9 is outside 1\.\.8"):
        CompressedTensors(num_bits=9)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(SCHEMES["W2 channel"])
    folder = exported(model, CT, tmp_path / "x")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ImportError, match=r"pip install 'fewbits\[compressed\]'"):
        CT.load(folder, model)


# ---------------------------------------------------------------------------------------------------- damaged folders

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(trained(SCHEMES["W2H group 32"]), CT, tmp_path / "ct")


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("weight_packed", lambda v: None, "weight_packed is missing"),
        ("weight_packed", lambda v: v[:, :-1].contiguous(), r"weight_packed is torch.int32 \(64, 5\)"),
        ("weight_packed", lambda v: v.long(), "weight_packed is torch.int64"),
        ("weight_packed", lambda v: torch.zeros_like(v), "stored code 0 is no level"),
        ("weight_scale", lambda v: -v, "not finite, not positive"),
        ("weight_scale", lambda v: v * torch.nan, "belong to one group|not finite"),
        ("weight_scale", lambda v: v.int(), "a floating-point tensor"),
        ("weight_shape", lambda v: v + 1, "weight_shape is not"),
    ],
)
def test_damaged_tensors_are_clear_errors(folder: Path, leaf: str, change: Any, message: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(f"{NAME}.{leaf}"))
    save_file(tensors if changed is None else {**tensors, f"{NAME}.{leaf}": changed}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        CT.read_codes(folder)
    assert not verify(trained(SCHEMES["W2H group 32"]), folder).passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="dense"), "describes no pack-quantized"),
        (lambda c: c.update(quant_method="gptq"), "describes no pack-quantized"),
        (lambda c: c.update(config_groups={}), "does not say how"),
        (lambda c: c.update(ignore=[NAME]), "does not say how"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=2), "num_bits=2"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits="3"), "num_bits=3"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=64), "group_size=64"),
    ],
)
def test_a_foreign_config_is_a_clear_error(folder: Path, change: Any, message: str) -> None:
    config = read_json(folder / "config.json")
    change(config["quantization_config"])
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match=message):
        CT.read_codes(folder)


def test_a_damaged_layers_file_is_a_clear_error(folder: Path) -> None:
    path = folder / LAYERS_FILE
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        CT.read_codes(folder)
    path.write_text(json.dumps({"quant_method": "fewbits", "format_version": 1}))
    with pytest.raises(ValueError, match="lists no layer"):
        CT.read_codes(folder)
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        CT.read_codes(folder)


# --------------------------------------------------------------------------------------------------------- the algebra


@given(st.integers(1, 8), st.integers(1, 70), st.randoms(use_true_random=False))
def test_words_hold_code_i_at_bit_i_num_bits(num_bits: int, width: int, random: Any) -> None:
    codes = torch.tensor([[random.randrange(2**num_bits) for _ in range(width)] for _ in range(2)])
    words = pack_words(codes, num_bits)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum(code << (i * num_bits) for i, code in enumerate(row))  # the slow twin: one long integer
        assert sum((word % 2**32) << (32 * i) for i, word in enumerate(packed)) == number
    assert torch.equal(unpack_words(words, width, num_bits).long(), codes)
    with pytest.raises(ValueError, match="packed words are"):
        unpack_words(words.short(), width, num_bits)


@pytest.mark.parametrize("zeros", [("middle",), ("int",), ("float",), ("middle", "int", "float")])
@pytest.mark.parametrize("key", SCHEMES)
def test_a_fit_reproduces_every_level(key: str, zeros: Any) -> None:
    grid = SCHEMES[key].grid
    fit = affine_fit(grid, range(1, 9), zeros)
    if fit is None:
        assert zeros == ("int",)
        return
    for code, level in zip(fit.codes, grid.levels, strict=True):
        assert fit.multiplier * (code - fit.zero) == Fraction(level)
    assert 0 <= min(fit.codes) <= max(fit.codes) < 2**fit.num_bits
    stored = torch.tensor([list(fit.codes)])
    assert torch.equal(grid.decode(codes_from_stored(stored, SCHEMES[key], fit))[0], torch.tensor(grid.levels))


@pytest.mark.parametrize(("size", "fits"), [(1, True), (8, True), (16, True), (32, True), (64, False)])
def test_scales_spread_and_gather(size: int, fits: bool) -> None:
    what = Scheme.parse("W2A16G64")
    q = model_codes(prepare(torch.nn.Sequential(torch.nn.Linear(96, 3)), Rule(scheme=what)))["0"]
    spread = spread_scale(q, size)
    assert torch.equal(spread, torch.stack([q.scale[:, i // 64] for i in range(0, 96, size)], 1))
    assert (engine_group(what, (3, 96), (size,)) == size) is fits
    if fits:
        assert torch.equal(gather_scale(spread * 0.5, Fraction(1, 2), what, (3, 96), size), q.scale)
        broken = spread.clone()
        broken[1, -1] *= 2
        if size < 32:
            with pytest.raises(ValueError, match="belong to one group"):
                gather_scale(broken, Fraction(1), what, (3, 96), size)


@pytest.mark.parametrize("scale_dtype", ["portable", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [Fraction(1), Fraction(1, 2), Fraction(3, 2), Fraction(7), Fraction(7, 2)])
def test_always_exact_agrees_with_every_scale(scale_dtype: Any, dtype: torch.dtype, factor: Fraction) -> None:
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    stored = torch.bfloat16 if scale_dtype == "bf16" else torch.float16
    scales = everything.view(stored).double()
    scales = (
        scales[(scales >= 2.0**-14) & (scales <= 2.0**-1)]
        if scale_dtype != "bf16"
        else scales[(scales >= 2.0**-40) & (scales <= 2.0**40)]
    )
    if scale_dtype == "portable":
        scales = scales[scales.to(torch.bfloat16).double() == scales]
    product = scales * float(factor)
    exact = bool((product.to(dtype).double() == product).all())
    assert always_exact(factor, scheme("W2H", dtype=scale_dtype), dtype) is exact


def test_half_shifted_grids_are_odd_integers_of_one_bit_more() -> None:
    for bits in range(2, 8):
        fit = affine_fit(HalfShifted(bits), range(1, 9))
        assert fit is not None
        assert (fit.num_bits, fit.multiplier) == (bits + 1, Fraction(1, 2))
        assert all((code - fit.zero) % 2 == 1 for code in fit.codes)
        plain = affine_fit(Int(bits), range(1, 9))
        assert plain is not None
        assert (plain.num_bits, plain.multiplier) == (bits, 1)
