"""Verification passes on what was exported and on nothing else; it answers, whatever happened to the files."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbits import Rule, Scheme, convert, prepare
from fewbits.checkpoint import load_model, save_prepared
from fewbits.comparison import compare_logits, count_different, evaluating, fixed_tokens, tensor_difference
from fewbits.convert import qat_layers
from fewbits.export import export, export_verified
from fewbits.io import read_json, write_json
from fewbits.manifest import write_manifest
from fewbits.targets.dequantized import Dequantized
from fewbits.testing.tiny import TINY_MODELS, tiny_gpt2, tiny_llama
from fewbits.verify import VerifyReport, verify

NAME = "model.layers.0.self_attn.q_proj"
FEW = torch.arange(12).view(1, 12)


def trained(model: Any, scheme: Any = "W2A16G64", *, seed: int = 0) -> Any:
    """Every matrix quantized; scales and norms look trained."""
    prepare(model, Rule(scheme=scheme, embeddings=True), ignore=[])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim < 2 or value.dtype == torch.float32:
                value.mul_(0.8 + 0.2 * torch.rand(value.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return trained(tiny_llama(tie=True))


@pytest.fixture(scope="module")
def exports(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for target in ("hf", "dequantized"):
        export(model, target, folder / target)
    return folder


@pytest.fixture(params=["hf", "dequantized"])
def copy(request: pytest.FixtureRequest, exports: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports / request.param, tmp_path / request.param))


def reseal(folder: Path) -> None:
    """A new manifest, so that digests no longer tell: the comparison itself must."""
    manifest = read_json(folder / "fewbits_export.json")
    write_manifest(folder, manifest["target"], manifest["fewbits"])


def change_tensor(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    reseal(folder)


# ------------------------------------------------------------------------------------------------------------ it passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_true_exports_pass(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    TINY_MODELS[name]().save_pretrained(tmp_path / "plain")
    model = trained(load_model(tmp_path / "plain", dtype=dtype), "W3A16G32")
    for target in ("hf", "dequantized", "dequantized:fp32"):
        folder = export(model, target, tmp_path / target.replace(":", "-"))
        report = verify(model, folder)
        assert report.passed, report.to_text()
        assert report.logits is not None
        assert report.logits_to_trained is not None
        assert report.logits.bitwise_equal
        assert report.logits.max_abs_diff == report.logits.kl == 0
        assert report.logits.top1_agreement == 1
        assert report.notes == []
        if target == "hf":
            assert report.logits_to_trained == report.logits
            assert report.num_layers == len([layer for _, layer in qat_layers(model) if layer.owner is layer])
            assert report.num_codes > 0
        else:
            assert report.num_layers == report.num_codes == 0
            assert report.logits_to_trained.kl < 1e-3
        assert VerifyReport(**read_json(folder / "verify.json")) == report
        assert verify(model, folder).passed, "the report itself must not count as a change"


def test_a_run_folder_is_a_reference(model: Any, tmp_path: Path) -> None:
    save_prepared(model, None, tmp_path / "run" / "model")
    folder = export(tmp_path / "run", "hf")
    assert verify(tmp_path / "run", folder).passed
    assert verify(model, folder).passed
    assert verify(str(tmp_path / "run" / "model"), str(folder)).passed


def test_a_converted_model_is_a_reference(exports: Path) -> None:
    converted = convert(trained(tiny_llama(tie=True)))
    assert verify(converted, exports / "hf", save=False).passed
    assert verify(converted, exports / "dequantized", save=False).passed


def test_a_model_that_was_cast_is_noted(tmp_path: Path) -> None:
    model = trained(tiny_llama(dtype=torch.bfloat16))  # built in fp32, then .to(bfloat16): the rotary table is rounded
    report = verify(model, export(model, "hf", tmp_path / "hf"))
    assert report.passed
    assert "rotary_emb.inv_freq" in report.notes[0]
    assert report.logits_to_trained is not None
    assert not report.logits_to_trained.bitwise_equal


def test_training_mode_comes_back_and_dropout_does_not_matter(tmp_path: Path) -> None:
    model = trained(tiny_gpt2()).train()
    model.transformer.h[0].eval()
    assert verify(model, export(model, "hf", tmp_path / "hf")).passed
    assert model.training
    assert not model.transformer.h[0].attn.training
    assert model.transformer.h[1].attn.training


def test_shards_are_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tiny_llama())
    monkeypatch.setattr(model, "save_pretrained", functools.partial(model.save_pretrained, max_shard_size="20KB"))
    for target in ("hf", "dequantized"):
        folder = export(model, target, tmp_path / target)
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert verify(model, folder).passed
        max(folder.glob("*.safetensors")).unlink()
        assert not verify(model, folder).passed


def test_many_tokens_are_compared_in_parts(model: Any, exports: Path) -> None:
    ids = torch.arange(3 * 100).view(3, 100) % 256
    report = verify(model, exports / "hf", token_ids=ids, save=False)
    assert report.passed
    assert report.logits is not None
    assert report.logits.num_tokens == 300


def test_own_tokens(model: Any, exports: Path) -> None:
    ids = torch.arange(20).view(4, 5)
    report = verify(model, exports / "hf", token_ids=ids, save=False)
    assert report.logits is not None
    assert report.logits.num_tokens == 20
    for bad in (torch.zeros(3, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match="token_ids is"):
            verify(model, exports / "hf", token_ids=bad)
    with pytest.raises(ValueError, match="the model has 256 tokens"):
        verify(model, exports / "hf", token_ids=torch.tensor([[256]]))


# ------------------------------------------------------------------------------------------------------------- it fails


def test_one_flipped_bit_anywhere_fails(model: Any, copy: Path) -> None:
    path = copy / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    body = torch.randint(header, len(data), (5,), generator=generator).tolist()
    for place in [0, 3, 8, 20, header // 2, header - 1, header, *body, len(data) - 1]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        report = verify(model, copy, token_ids=FEW)
        assert not report.passed, place
        assert any(row.where == "model.safetensors" for row in report.differences), place
        assert "NOT EQUAL" in report.to_text()


def test_one_flipped_bit_of_a_tensor_is_found_without_the_digest(model: Any, copy: Path) -> None:
    path = copy / "model.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    body = 8 + int.from_bytes(data[:8], "little")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        flipped = bytearray(data)
        flipped[body + (start + end) // 2] ^= 0b100
        path.write_bytes(flipped)
        reseal(copy)
        report = verify(model, copy, token_ids=FEW)
        layer = name.rpartition(".")[0]
        assert not report.passed
        assert any(layer in row.where or layer in row.what for row in report.differences), report.to_text()


def test_a_changed_code_is_counted_and_named(model: Any, exports: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports / "hf", tmp_path / "hf"))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.weight_packed"][3, :2] ^= 0b01010101  # the lowest bit of eight codes

    change_tensor(folder, change)
    report = verify(model, folder)
    row = next(row for row in report.differences if row.where == NAME)
    assert (row.what, row.num_different, row.num_total) == ("codes differ", 8, 64 * 64)
    assert {row.where for row in report.differences} == {NAME, "logits"}
    assert report.logits is not None
    assert report.logits.kl > 0
    assert f"! {NAME}: codes differ (8 of 4096)" in report.to_text()


def test_a_changed_norm_is_counted_and_named(model: Any, copy: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][5] *= 1.5

    change_tensor(copy, change)
    rows = {row.where: row for row in verify(model, copy).differences}
    assert rows["model.norm.weight"].num_different == 1
    assert "logits" in rows


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_missing_and_extra_tensors_fail(model: Any, copy: Path, name: str) -> None:
    change_tensor(copy, lambda tensors: tensors.pop(name))
    rows = {row.where: row.what for row in verify(model, copy).differences}
    assert "missing in the file" in rows[name]
    assert "lacks 1 tensors" in rows["loading"]
    change_tensor(copy, lambda tensors: tensors.update({name: torch.ones(64), "model.extra": torch.ones(2)}))
    rows = {row.where: row.what for row in verify(model, copy).differences}
    assert "only in the file" in rows["model.extra"]
    assert "model.extra, which the model does not have" in rows["loading"]


def test_another_dtype_or_shape_fails(model: Any, copy: Path) -> None:
    change_tensor(copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.float64)}))
    rows = {row.where: row.what for row in verify(model, copy).differences}
    assert "float64 (64,) in the file" in rows["model.norm.weight"]
    change_tensor(copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    rows = {row.where: row.what for row in verify(model, copy).differences}
    assert "(32,) in the file" in rows["model.norm.weight"]
    assert "loading" in rows


def test_the_export_of_another_model_fails(model: Any, tmp_path: Path) -> None:
    others = {
        "weights": trained(tiny_llama(tie=True, seed=1)),
        "scales": trained(tiny_llama(tie=True), seed=1),
        "scheme": trained(tiny_llama(tie=True), "W3A16G64"),
        "untied": trained(tiny_llama()),
        "layers": prepare(tiny_llama(tie=True), Rule(pattern="*mlp*", scheme="W2A16G64")),
        "architecture": trained(tiny_gpt2()),
    }
    for key, other in others.items():
        for target in ("hf", "dequantized"):
            report = verify(model, export(other, target, tmp_path / f"{key}-{target}"), token_ids=FEW)
            assert not report.passed, (key, target)
            assert report.differences
            assert report.to_text().count("!") >= 1


def test_the_same_weights_under_another_config_fail(model: Any, copy: Path) -> None:
    config = read_json(copy / "config.json")
    config["rope_parameters"]["rope_theta"] = 5000.0
    write_json(copy / "config.json", config)
    reseal(copy)
    rows = {row.where: row.what for row in verify(model, copy).differences}
    assert "another config.json" in rows["model.rotary_emb.inv_freq"]
    assert "logits" in rows


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_damaged_and_missing_files_fail_without_a_crash(model: Any, copy: Path, file: str) -> None:
    data = (copy / file).read_bytes()
    for content in (b"", data[: len(data) // 2], b"PK\x03\x04" + bytes(64)):
        (copy / file).write_bytes(content)
        report = verify(model, copy)
        assert not report.passed
        assert {"loading", file} <= {row.where for row in report.differences}
        assert report.logits is None
    (copy / file).unlink()
    report = verify(model, copy)
    assert not report.passed
    assert any("is missing" in row.what or "does not exist" in row.what for row in report.differences)


def test_nan_logits_fail(tmp_path: Path) -> None:
    model = trained(tiny_llama())
    folder = export(model, "hf", tmp_path / "hf")
    model.model.norm.weight.data[0] = torch.nan
    change_tensor(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(0, torch.nan))
    report = verify(model, folder)
    assert {row.where: row.what for row in report.differences} == {"logits": "not all are finite"}
    assert VerifyReport(**read_json(folder / "verify.json")).logits is not None


def test_things_that_are_no_export(model: Any, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        verify(model, tmp_path / "none")
    with pytest.raises(ValueError, match="no export of fewbits"):
        verify(model, tmp_path)
    with pytest.raises(ValueError, match="no quantized layer"):
        verify(tiny_llama(), copy)
    with pytest.raises(ValueError, match="neither a run folder nor"):
        verify(tmp_path, copy)
    manifest = read_json(copy / "fewbits_export.json")
    for change, message in (
        ({"target": "tflite"}, "unknown target 'tflite'"),
        ({"format_version": 9}, "format version 9"),
        ({"files": None}, "is damaged"),
    ):
        write_json(copy / "fewbits_export.json", manifest | change)
        with pytest.raises(ValueError, match=message):
            verify(model, copy)


# ------------------------------------------------------------------------------------------------------ export_verified


def test_an_export_that_is_not_equal_never_takes_the_place(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report = export_verified(model, "dequantized", tmp_path / "out")
    assert (folder, report.passed, report.folder) == (tmp_path / "out", True, str(tmp_path / "out"))
    assert VerifyReport(**read_json(folder / "verify.json")) == report

    write = Dequantized.write

    def wrong(self: Dequantized, model: Any, tokenizer: Any, folder: Path) -> None:
        write(self, model, tokenizer, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(Dequantized, "write", wrong)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    for _ in range(2):  # a second failure replaces the first
        folder, report = export_verified(model, "dequantized", tmp_path / "out", overwrite=True)
        assert folder == tmp_path / "out.rejected"
        assert not report.passed
        assert not VerifyReport(**read_json(folder / "verify.json")).passed
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.rejected"]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is taken"):
        export_verified(model, "dequantized", tmp_path / "out", overwrite=True)


# ------------------------------------------------------------------------------------------------------------ the parts


def test_count_different_sees_bits() -> None:
    a = torch.tensor([0.0, 1.0, torch.nan])
    assert count_different(a, a.clone()) == 0
    assert count_different(a, torch.tensor([-0.0, 1.0, torch.nan])) == 1
    assert count_different(torch.tensor(3), torch.tensor(3)) == 0
    codes = torch.zeros(4, 6, dtype=torch.int8)
    assert count_different(codes, codes.clone().fill_(-1)) == 24


def test_tensor_difference_in_words() -> None:
    a = torch.zeros(2)
    assert tensor_difference("x", "values", None, None) is None
    assert tensor_difference("x", "values", a, a) is None
    missing, extra = tensor_difference("x", "values", None, a), tensor_difference("x", "values", a, None)
    assert missing is not None
    assert extra is not None
    assert (missing.what, extra.what) == ("values: missing in the file", "values: only in the file")


def test_compare_logits_against_closed_forms() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    ids = torch.zeros(3, 2, dtype=torch.long)
    zero = torch.zeros(3, 2, 3)
    assert compare_logits(lambda row: zero, lambda row: -zero, ids).bitwise_equal
    assert not compare_logits(lambda row: zero, lambda row: zero + 1e-30, ids).bitwise_equal
    found = compare_logits(lambda row: p.log().expand(*row.shape, 3), lambda row: q.log().expand(*row.shape, 3), ids)
    assert found.kl == pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    assert found.max_abs_diff == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    assert (found.top1_agreement, found.bitwise_equal, found.finite, found.num_tokens) == (0.0, False, True, 6)
    with pytest.raises(ValueError, match="logits have shape"):
        compare_logits(lambda row: torch.zeros(3, 2, 3), lambda row: torch.zeros(3, 2, 4), ids)


def test_fixed_tokens_are_fixed_and_fit() -> None:
    model = tiny_gpt2()
    ids = fixed_tokens(model.config)
    assert torch.equal(ids, fixed_tokens(model.config))
    assert ids.shape == (4, 64)
    assert fixed_tokens(model.config, length=1000).shape == (4, 128)
    assert int(ids.max()) < 256


def test_evaluating_gives_back_the_modes_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail() -> None:
        with evaluating(model):
            assert not model[0].training
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert [module.training for module in model] == [True, False]


def test_a_long_list_of_differences_is_cut_with_a_count(model: Any, tmp_path: Path) -> None:
    rows = [{"where": f"layer {i}", "what": "codes differ"} for i in range(25)]
    report = VerifyReport(
        target="hf", folder="x", passed=False, num_layers=25, num_codes=1, num_tensors=0, differences=rows,
        logits=None, logits_to_trained=None, notes=["a note"], versions={},
    )  # fmt: skip
    text = report.to_text()
    assert text.count("codes differ") == 20
    assert "and 5 more differences" in text
    assert text.endswith("note: a note")


def test_double_quantized_scales_are_compared_part_by_part(tmp_path: Path) -> None:
    model = trained(tiny_llama(), Scheme.parse("W2A16G32", superblock=64))
    folder = export(model, "hf", tmp_path / "hf")
    assert verify(model, folder).passed

    def change(tensors: dict[str, Tensor]) -> None:
        value = tensors[f"{NAME}.weight_multipliers"]
        value[0, 0] = 1 + value[0, 0] % 15

    change_tensor(folder, change)
    rows = [row.what for row in verify(model, folder).differences if row.where == NAME]
    assert rows == ["scales differ", "scale multipliers differ"]


def test_a_missing_engine_is_a_note_and_codes_still_count(
    model: Any, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbits.targets import get_target

    target = type(get_target(read_json(copy / "fewbits_export.json")["target"]))

    def missing(self: Any, folder: Path, like: Any) -> Any:
        raise ImportError("this needs the package engine; run: pip install engine")

    monkeypatch.setattr(target, "load", missing)
    report = verify(model, copy)
    assert report.passed, report.to_text()
    assert report.logits is None
    assert "pip install engine" in report.to_text()
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert not verify(model, copy).passed
