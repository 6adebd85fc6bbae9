"""Engines are asked level by level, a wrong answer fails at its level, and a missing engine is a note."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_common import byte_level, scheme, trained, untrained
from targets_common import byte_tokenizer
from targets_common import scheme as plain_scheme
from targets_common import trained as plain_trained

from fewbits import Rule, prepare
from fewbits.comparison import Difference
from fewbits.engines import ask_engines, linear_names, rounding_activations
from fewbits.export import export, export_verified
from fewbits.io import read_json, write_json
from fewbits.manifest import write_manifest
from fewbits.targets import bitnet, gguf_engine, llamacpp
from fewbits.targets.engine import EngineCheck, round_activations
from fewbits.targets.gguf_contents import FILE
from fewbits.targets.gguf_file import GGUFTensor, write_gguf
from fewbits.targets.gguf_reader import read_gguf
from fewbits.targets.llamacpp import LlamaCpp
from fewbits.testing.tiny import tiny_llama
from fewbits.verify import ROW_HEADER, VerifyReport, record, verify

TERNARY = plain_scheme("W1.58", "per_tensor")
# Transformers' BitNet file compiles functions when it is imported, and torch then warns of itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def model() -> Any:
    return trained(scheme("W2A16G64"))


@pytest.fixture(scope="module")
def made(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, "gguf:q2_0", tmp_path_factory.mktemp("gguf") / "q2_0", tokenizer=byte_level())


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def levels(report: VerifyReport) -> list[str]:
    return [row.level for row in report.differences]


def reseal(folder: Path) -> None:
    manifest = read_json(folder / "fewbits_export.json")
    write_manifest(folder, manifest["target"], manifest["fewbits"])


def with_metadata(folder: Path, **changes: Any) -> None:
    """The same tensors under other metadata, sealed."""
    file = read_gguf(folder / FILE)
    tensors = [
        GGUFTensor(name=name, shape=info.shape, gguf_type=info.gguf_type, data=file.read(name))
        for name, info in file.tensors.items()
    ]
    write_gguf(folder / FILE, file.metadata | changes, tensors)
    reseal(folder)


# ------------------------------------------------------------------------------------------------------------ it passes


def test_the_three_levels_of_a_gguf_file(model: Any, made: Path) -> None:
    report = verify(model, made)
    assert report.passed, report.to_text()
    weights, control, rounded = report.engines
    assert (weights.level, control.level, rounded.level) == ("weights", "float", "int8")
    assert (weights.num_different, weights.num_total) == (0, report.num_codes)
    assert control.logits is not None
    assert 0 < control.logits.max_abs_diff <= 1e-4 * max(1.0, control.logits.max_abs_logit)
    assert rounded.logits is not None
    assert rounded.control is not None
    assert rounded.logits.kl > 100 * control.logits.kl, "only here are activations rounded"
    assert 0.5 < rounded.logits.kl / rounded.control.kl < 2, "the rounding is the one that is emulated"
    assert VerifyReport(**read_json(made / "verify.json")) == report
    text = report.to_text()
    assert "weights differ, ok (every weight equal)" in text
    assert "our model with activations so rounded" in text
    assert len(report.row) == len(ROW_HEADER)
    assert report.row[:3] == ["gguf:q2_0", "int8", str(report.num_codes)]
    assert report.row[-1] == "equal"
    assert verify(model, made, engines=False, save=False).engines == []


@pytest.mark.parametrize(
    ("target", "what", "expected"),
    [
        ("gguf:f32", None, ["float"]),
        ("mlx", None, ["weights", "float"]),
        ("mlx:fp16", None, ["weights", "float"]),
        ("bitnet", TERNARY, ["float", "int8"]),
        ("compressed-tensors", None, []),
        ("hf", None, []),
    ],
)
def test_every_target_asks_its_engine(target: str, what: Any, expected: list[str], model: Any, tmp_path: Path) -> None:
    if target.startswith("gguf"):
        folder = export(model, target, tmp_path / "x", tokenizer=byte_level())
    else:
        model = plain_trained(what or plain_scheme("W2A16G32"))
        folder = export(model, target, tmp_path / "x")
    report = verify(model, folder)
    assert report.passed, report.to_text()
    assert [verdict.level for verdict in report.engines] == expected
    assert report.notes == []
    if not expected:
        assert report.logits is not None
        assert report.logits.bitwise_equal
        assert report.row[1:4] == ["weights", str(report.num_codes), "0"]


def test_a_bfloat16_model_is_compared_with_its_weights_in_fp32(tmp_path: Path) -> None:
    model = plain_trained(plain_scheme("W2A16G32"), dtype=torch.bfloat16)
    report = verify(model, export(model, "mlx", tmp_path / "mlx"))
    assert report.passed, report.to_text()
    model = trained(scheme("W2A16G64"), dtype=torch.bfloat16)
    report = verify(model, export(model, "gguf", tmp_path / "gguf", tokenizer=byte_level()))
    assert report.passed, report.to_text()
    assert len(report.engines) == 3


def test_gemma_in_llama_cpp_and_its_table(tmp_path: Path) -> None:
    model = prepare(untrained("gemma"), Rule(scheme=scheme("W2A16G64")))
    report = verify(model, export(model, "gguf", tmp_path / "gguf", tokenizer=byte_level()))
    assert report.passed, report.to_text()
    with_metadata(tmp_path / "gguf", **{"gemma.rope.freq_base": np.float32(5000.0)})
    assert levels(verify(model, tmp_path / "gguf")) == ["float"]


# ------------------------------------------------------------------------------------------------ it fails at its level


def test_one_flipped_bit_fails_at_weight_level_and_no_engine_is_asked(model: Any, copy: Path) -> None:
    file = read_gguf(copy / FILE)
    raw = bytearray((copy / FILE).read_bytes())
    raw[file.tensors["blk.0.ffn_up.weight"].offset + 7] ^= 1
    (copy / FILE).write_bytes(raw)
    reseal(copy)
    report = verify(model, copy)
    assert levels(report) == ["weights"]
    assert report.differences[0].what == "codes differ"
    assert report.engines == []
    assert "asked only about files without differences" in report.notes[0]
    assert report.row[1:3] == ["weights", "no"]


def test_an_engine_that_decodes_other_weights_fails_at_weight_level(
    model: Any, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gguf_engine.ggml_dequantize

    def wrong(name: str, data: Any, count: int) -> Any:
        values = original(name, data, count)
        if name == "Q2_0":
            values[3] = np.nextafter(values[3], np.float32(9))
        return values

    monkeypatch.setattr(gguf_engine, "ggml_dequantize", wrong)
    report = verify(model, made, save=False)
    assert set(levels(report)) == {"weights"}
    assert [row.num_different for row in report.differences] == [1] * 7
    assert [verdict.passed for verdict in report.engines] == [False]


@pytest.mark.parametrize(
    "change",
    [{"llama.rope.freq_base": np.float32(5000.0)}, {"llama.attention.layer_norm_rms_epsilon": np.float32(1e-2)}],
)
def test_a_wrong_config_fails_at_float_level(model: Any, copy: Path, change: dict[str, Any]) -> None:
    with_metadata(copy, **change)
    report = verify(model, copy)
    assert levels(report) == ["float"]
    assert [verdict.passed for verdict in report.engines] == [True, False]
    assert "F32 copy of the file" in report.differences[0].where
    assert report.row[1] == "float"
    assert report.row[-1] == "NOT EQUAL"


def test_a_broken_int8_kernel_fails_at_int8_level(model: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaCpp.logits

    def wrong(self: Any, ids: Any) -> Any:
        found = original(self, ids)
        return found * 1.5 if self.path == made / FILE else found

    monkeypatch.setattr(LlamaCpp, "logits", wrong)
    report = verify(model, made, save=False)
    assert levels(report) == ["int8"]
    assert [verdict.passed for verdict in report.engines] == [True, True, False]
    assert "allowed: KL <=" in report.differences[0].what


def test_mlx_with_another_rotary_base_fails_at_float_level(tmp_path: Path) -> None:
    model = plain_trained(plain_scheme("W2A16G32"))
    folder = export(model, "mlx", tmp_path / "mlx")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"rope_theta": 5000.0})
    reseal(folder)
    assert levels(verify(model, folder)) == ["float"]


def test_bitnet_with_another_epsilon_fails_at_float_level(tmp_path: Path) -> None:
    model = plain_trained(TERNARY)
    folder = export(model, "bitnet", tmp_path / "bitnet")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"rms_norm_eps": 0.01})
    reseal(folder)
    report = verify(model, folder)
    assert levels(report) == ["float"]
    assert "fp32 activations" in report.differences[0].where


def test_a_rejected_export_says_at_which_level(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nonsense(self: Any, ids: Any) -> Any:
        return np.full((len(ids), self.vocab_size), np.nan, dtype=np.float32)

    monkeypatch.setattr(LlamaCpp, "logits", nonsense)
    folder, report = export_verified(model, "gguf", tmp_path / "gguf", tokenizer=byte_level())
    assert folder == tmp_path / "gguf.rejected"
    assert levels(report) == ["float"]
    assert "not all finite" in report.differences[0].what
    assert levels(VerifyReport(**read_json(folder / "verify.json"))) == ["float"]


def test_an_engine_that_refuses_the_file_fails(model: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, ids: Any) -> Any:
        raise RuntimeError("unknown tensor type")

    monkeypatch.setattr(LlamaCpp, "logits", refuse)
    report = verify(model, made, save=False)
    assert levels(report) == ["float"]
    assert "RuntimeError: unknown tensor type" in report.differences[0].what
    assert "NOT OK (runs the file)" in report.to_text()


# -------------------------------------------------------------------------------------------------- it is not installed


@pytest.mark.parametrize(("target", "package"), [("mlx", "mlx.core"), ("mlx", "mlx_lm.utils")])
def test_a_missing_engine_is_a_note(target: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_trained(plain_scheme("W2A16G32"))
    folder = export(model, target, tmp_path / "x")
    monkeypatch.setitem(sys.modules, package, None)
    report = verify(model, folder)
    assert report.passed
    assert len(report.notes) == 1
    assert "was not asked: this needs the package" in report.notes[0]
    assert "pip install 'fewbits[mlx]'" in report.notes[0]


def test_a_missing_llama_cpp_is_a_note(model: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("the xllamacpp wheel is not installed: pip install 'fewbits[llamacpp]'")

    monkeypatch.setattr(gguf_engine, "ggml_dequantize", missing)
    monkeypatch.setattr(llamacpp, "_library", missing)
    report = verify(model, made, save=False)
    assert report.passed
    assert report.engines == []
    assert "pip install 'fewbits[llamacpp]'" in report.notes[0]


# ------------------------------------------------------------------------------------------------------------ the parts


def test_rounding_of_activations_against_a_loop() -> None:
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(0)).double().float()
    x[0, 0, :32] = 0
    for block in (0, 1, 32, 64, 70, 100):
        found = round_activations(x, block)
        size = block or 70
        for place in np.ndindex(2, 3):
            for start in range(0, 70, size):
                part = x[place][start : start + size]
                step = part.abs().max() / 127
                expected = (part / step).round() * step if step > 0 else torch.zeros_like(part)
                assert torch.equal(found[place][start : start + size], expected)
    assert torch.equal(round_activations(found, 100), round_activations(round_activations(found, 100), 100))
    with pytest.raises(ValueError, match="block=-1 is negative"):
        round_activations(x, -1)


def test_rounding_is_put_before_linear_layers_and_taken_away() -> None:
    model: Any = prepare(tiny_llama(tie=True), Rule(scheme=plain_scheme("W4"), embeddings=True), ignore=[])
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert len(linear_names(model)) == 15, "seven layers in each of two blocks, and the head"
        with rounding_activations(model, linear_names(model), 0):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


def test_a_check_says_what_its_level_needs() -> None:
    with pytest.raises(ValueError, match="needs weights or logits"):
        EngineCheck(engine="x", level="float")
    with pytest.raises(ValueError, match="needs weights or logits"):
        EngineCheck(engine="x", level="weights", logits=lambda ids: ids)


def test_the_limit_of_the_float_level_grows_with_the_logits(tmp_path: Path) -> None:
    """The same relative error passes at every scale; the absolute one only below logits of 1."""

    def asked(scale: float, error: float) -> list[Difference]:
        expected = torch.zeros(1, 4, 8)
        expected[..., 0] = scale
        check = EngineCheck(engine="x", level="float", logits=lambda ids: expected + error)

        class One:
            def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
                return (check,)

        one: Any = One()
        model: Any = None
        ids = torch.zeros(1, 4, dtype=torch.long)
        return ask_engines(one, tmp_path, model, {}, ids, torch.nn.Identity(), lambda rows: expected)[1]

    assert not asked(35.0, 0.9 * 35e-4)
    assert asked(35.0, 1.1 * 35e-4)
    assert not asked(0.1, 0.9e-4)
    assert asked(0.1, 1.1e-4)


def test_a_run_keeps_one_entry_for_each_target(model: Any, made: Path, tmp_path: Path) -> None:
    report = verify(model, made, save=False, engines=False)
    record(tmp_path, report)
    record(tmp_path, report.model_copy(update={"target": "mlx", "passed": False}))
    record(tmp_path, report.model_copy(update={"target": "mlx"}))
    targets = read_json(tmp_path / "verify.json")["targets"]
    assert sorted(targets) == ["gguf:q2_0", "mlx"]
    assert VerifyReport(**targets["gguf:q2_0"]) == report
    assert targets["mlx"]["passed"] is True


def test_bitnet_rounds_again_after_the_control(tmp_path: Path) -> None:
    model = plain_trained(TERNARY)
    folder = export(model, "bitnet", tmp_path / "bitnet", tokenizer=byte_tokenizer())
    ids, target = torch.arange(8)[None], bitnet.BitNet()
    exact, rounded = target.engine_logits(folder, ids, exact=True), target.engine_logits(folder, ids)
    assert not torch.equal(exact, rounded)
    assert torch.equal(target.engine_logits(folder, ids), rounded)
