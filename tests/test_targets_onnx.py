"""ONNX: ``MatMulNBits`` of onnxruntime makes the trained weights of our codes, and whole graphs the trained logits.

``torch.onnx.export`` takes seconds for any model, so most schemes are tried on graphs of single layers here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from targets_common import (
    FREE_CODEBOOK,
    GRIDS,
    IDS,
    INTEGER_CODEBOOK,
    SHIFTED_CODEBOOK,
    exported,
    logits,
    scheme,
    trained,
)

from fewbits import Rule, Scheme, prepare
from fewbits.comparison import compare_logits, fixed_tokens
from fewbits.export import export
from fewbits.io import read_json
from fewbits.qtensor import QTensor
from fewbits.targets.base import model_codes
from fewbits.targets.layers import write_layers
from fewbits.targets.nbits import LEAVES, OP
from fewbits.targets.onnx import ONNX
from fewbits.targets.onnx_graph import FILE, MatMulNBits
from fewbits.testing.tiny import tiny_gpt2, tiny_llama
from fewbits.verify import verify

BITS = {"W1": 2, "W1.58": 2, "W2": 2, "W3": 4, "W4": 4, "W8": 8, "W2H": 2, "W3H": 4, "W4H": 8}
SCHEMES = {
    **{f"{grid} channel": scheme(grid) for grid in GRIDS},
    **{f"{grid} group 32": scheme(f"{grid}A16G32") for grid in GRIDS},
    "per tensor": scheme("W1.58", "per_tensor"),
    "group 64, ragged in rows of 96": scheme("W3A16G64"),
    "group 48": scheme("W2HA16G48"),
    "fp32 scales": scheme("W3HA16G32", dtype="fp32"),
    "bf16 scales": scheme("W2A16G32", dtype="bf16"),
    "double-quantized": scheme("W4A16G32", superblock=64),
    "integer codebook": scheme("W2A16G32", grid=INTEGER_CODEBOOK),
    "shifted codebook": scheme("W2A16G32", grid=SHIFTED_CODEBOOK),
}
TOLERANCE = 1e-4
"""Largest difference of a logit from an engine with floating activations (issue 4); about 3e-7 is seen."""
INT8_KL = 5e-3
"""Largest KL with activations rounded to 8 bits (issue 4)."""
NAME = "model.layers.0.self_attn.q_proj"


def layers_folder(codes: dict[str, QTensor], target: ONNX, folder: Path) -> Path:
    """A graph of nothing but the quantized layers, each with its own input and output."""
    folder.mkdir()
    nodes, inputs, outputs, tensors = [], [], [], []
    for name, q in codes.items():
        found = target._find(q.scheme, (q.shape[0], q.shape[1]))
        assert not isinstance(found, str)
        layer = MatMulNBits(name, q, *found, target.accuracy_level, None)
        buffers = {leaf: getattr(layer, leaf) for leaf in LEAVES if getattr(layer, leaf) is not None}
        tensors += [numpy_helper.from_array(value.numpy(), f"{name}.{leaf}") for leaf, value in buffers.items()]
        names = [f"x/{name}", *(f"{name}.{leaf}" for leaf in buffers)]
        nodes.append(helper.make_node(OP, names, [f"y/{name}"], domain="com.microsoft", **layer.attributes))
        inputs.append(helper.make_tensor_value_info(f"x/{name}", TensorProto.FLOAT, ["m", q.shape[1]]))
        outputs.append(helper.make_tensor_value_info(f"y/{name}", TensorProto.FLOAT, ["m", q.shape[0]]))
    graph = helper.make_graph(nodes, "layers", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / FILE)
    write_layers(folder, codes)
    return folder


def run(folder: Path, feed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    names = [f"y/{name}" for name in feed]
    found = session.run(names, {f"x/{name}": value.numpy() for name, value in feed.items()})
    return {name: torch.from_numpy(y) for name, y in zip(feed, found, strict=True)}


@pytest.mark.parametrize("key", SCHEMES)
def test_onnxruntime_multiplies_with_the_trained_weights(tmp_path: Path, key: str) -> None:
    what, target = SCHEMES[key], ONNX(accuracy_level=0)
    codes = model_codes(trained(what))
    folder = layers_folder(codes, target, tmp_path / "layers")
    for name, q in target.read_codes(folder).items():
        assert q.scheme == what
        assert torch.equal(q.codes, codes[name].codes)
        assert torch.equal(q.scale, codes[name].scale)
        assert torch.equal(q.dequantize(), codes[name].dequantize())
    found = run(folder, {name: torch.eye(q.shape[1]) for name, q in codes.items()})  # one-hot inputs: no rounding
    assert all(torch.equal(found[name].t(), q.dequantize()) for name, q in codes.items())
    x = {name: torch.randn(5, q.shape[1]) for name, q in codes.items()}
    for name, y in run(folder, x).items():
        exact = x[name].double() @ codes[name].dequantize().double().t()
        assert (y - exact).abs().max() < 1e-6 * exact.abs().max() * codes[name].shape[1] ** 0.5
    if what.grid.kind != "codebook" and "group 48" not in key:
        assert target.judge(what, (64, 64)).reason.startswith(f"{BITS[what.name.partition('A')[0]]}-bit codes")


@pytest.mark.parametrize(
    ("key", "bits"),
    [("W2 group 32", 4), ("W2 group 32", 8), ("W2H group 32", 4), ("W2H group 32", 8), ("W4H channel", 8)],
)
def test_a_chosen_width(tmp_path: Path, key: str, bits: int) -> None:
    codes = model_codes(trained(SCHEMES[key]))
    folder = layers_folder(codes, ONNX(num_bits=bits, accuracy_level=0), tmp_path / "layers")
    assert all(torch.equal(q.codes, codes[name].codes) for name, q in ONNX().read_codes(folder).items())
    found = run(folder, {name: torch.eye(q.shape[1]) for name, q in codes.items()})
    assert all(torch.equal(found[name].t(), q.dequantize()) for name, q in codes.items())


def test_a_whole_model_is_written_read_back_and_run(tmp_path: Path) -> None:
    model = trained(scheme("W2HA16G128"), "wide")
    folder = exported(model, ONNX(), tmp_path / "onnx")
    assert (ONNX().engine_logits(folder, IDS) - logits(model)).abs().max() < TOLERANCE
    text = (folder / FILE).read_bytes()
    assert b"site-packages" not in text
    assert str(Path(__file__).parents[1]).encode() not in text
    graph = onnx.load(folder / FILE).graph
    levels = {a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4}
    assert read_json(folder / "config.json")["model_type"] == "llama"
    report = verify(model, folder)
    assert report.passed, report.to_text()
    assert [v.level for v in report.engines] == ["float", "int8"]
    short, single = ONNX().engine_logits(folder, IDS[:1, :5]), logits(model, IDS[:1, :5])
    assert (short - single).abs().max() < TOLERANCE, "batch and length are free"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "what", "dtype"),
    [
        ("llama", scheme("W2HA16G32"), torch.float32),
        ("llama", scheme("W1.58"), torch.bfloat16),
        ("llama_tied", scheme("W4HA16G64"), torch.float32),
        ("qwen3", scheme("W3A16G64"), torch.float32),
        ("qwen3", scheme("W2HA16G32"), torch.bfloat16),
        ("gemma", scheme("W1A16G32"), torch.float32),
        ("gemma3", scheme("W8"), torch.float32),
    ],
)
def test_every_architecture_computes_the_trained_logits(
    tmp_path: Path, kind: str, what: Scheme, dtype: torch.dtype
) -> None:
    model, target = trained(what, kind, dtype), ONNX()
    folder = exported(model, target, tmp_path / "onnx")
    reference = target.reference(model)
    assert (target.engine_logits(folder, IDS) - logits(reference)).abs().max() < TOLERANCE
    ids = fixed_tokens(model.config)
    for use_lut in (False, True):
        found = compare_logits(
            lambda row: logits(reference, row),
            lambda row, lut=use_lut: target.engine_logits(folder, row, accuracy_level=4, use_lut=lut),
            ids,
        )
        assert found.kl < INT8_KL


@pytest.mark.slow
def test_large_models_keep_their_tensors_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.targets.onnx._ONE_FILE", 1000)
    model = trained(SCHEMES["W2H group 32"])
    folder = exported(model, ONNX(), tmp_path / "onnx")
    assert (folder / f"{FILE}.data").stat().st_size > (folder / FILE).stat().st_size / 2
    assert (ONNX().engine_logits(folder, IDS) - logits(model)).abs().max() < TOLERANCE
    assert verify(model, folder).passed
    (folder / f"{FILE}.data").write_bytes(b"short")
    assert not verify(model, folder).passed
    with pytest.raises(ValueError, match="truncated, damaged or no ONNX file"):
        ONNX().read_codes(folder)


# ------------------------------------------------------------------------------------------------- what cannot be held


@pytest.mark.parametrize(
    ("what", "target", "reason"),
    [
        (scheme("W2A16G32", grid=FREE_CODEBOOK), ONNX(), "not multiples of 1/1024"),
        (scheme("W8H"), ONNX(), "do not fit 2/4/8-bit codes with no zero point; a zero point between two codes has no"),
        (scheme("W3H"), ONNX(num_bits=2), "8 levels -3.5..3.5 do not fit 2-bit codes with a zero point"),
        (scheme("W4H"), ONNX(num_bits=4), "has no kernel beyond 2 bits"),
        (scheme("W2A16G40"), ONNX(), "group_size=40 in rows of 64 cannot be cut into blocks of 16, 32, 64, 128, 256"),
    ],
)
def test_refusals_name_the_condition(tmp_path: Path, what: Scheme, target: ONNX, reason: str) -> None:
    assert reason in (target.holds(what, (64, 64)) or "")
    assert target.judge(what, (64, 64)).verdict == "cannot"
    with pytest.raises(ValueError, match=r"cannot hold model\.layers\.0\.self_attn\.q_proj"):
        export(prepare(tiny_llama(), Rule(scheme=what)), target, tmp_path / "x")


def run_once(model: bytes) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros((1, 32), np.float32)})


def test_onnxruntime_refuses_what_we_refuse() -> None:
    """8-bit codes with a floating zero point, and 3 bits: the engine says no, so the target must not write them."""
    for bits, zeros in ((8, True), (3, False)):
        nodes = ["x", "b", "s", *(["z"] if zeros else [])]
        attributes = {"K": 32, "N": 16, "bits": bits, "block_size": 32}
        tensors = [
            numpy_helper.from_array(np.zeros((16, 1, 4 * bits), np.uint8), "b"),
            *(numpy_helper.from_array(np.ones((16, 1), np.float32), name) for name in nodes[2:]),
        ]
        graph = helper.make_graph(
            [helper.make_node(OP, nodes, ["y"], domain="com.microsoft", **attributes)],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", 32])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 16])],
            tensors,
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        with pytest.raises(Exception, match=r"nbits_|zero.points"):
            run_once(model)


def test_other_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is a Conv1D"):
        export(prepare(tiny_gpt2(), Rule(scheme=scheme("W4"))), ONNX(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"num_bits=3 is unknown to MatMulNBits; use one of 2, 4, 8"):
        ONNX(num_bits=3)
    with pytest.raises(ValueError, match="accuracy_level=1 is unknown"):
        ONNX(accuracy_level=1)
    for module in ("onnx", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=r"pip install 'fewbits\[onnx\]'"):
                export(trained(SCHEMES["W2 channel"]), ONNX(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return layers_folder(model_codes(trained(SCHEMES["W2H group 32"])), ONNX(), tmp_path / "layers")


def edit(folder: Path, change: Any) -> None:
    model = onnx.load(folder / FILE)
    change(model.graph)
    onnx.save(model, folder / FILE)


def attribute(key: str, value: int) -> Any:
    def change(graph: Any) -> None:
        next(a for a in graph.node[0].attribute if a.name == key).i = value

    return change


def tensor(leaf: str, change: Any) -> Any:
    def replace(graph: Any) -> None:
        old = next(t for t in graph.initializer if t.name == f"{NAME}.{leaf}")
        old.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(old)), old.name))

    return replace


def scales_as_zeros(graph: Any) -> None:
    graph.node[0].input[3] = graph.node[0].input[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (attribute("bits", 3), "the node has bits=3"),
        (attribute("bits", 8), "bits.* are needed|block"),
        (attribute("block_size", 64), "are needed"),
        (attribute("K", 65), "are needed"),
        (scales_as_zeros, "are needed"),
        (lambda graph: graph.node.pop(0), "has no MatMulNBits for it"),
        (tensor("codes", lambda v: v[:, :1]), r"codes is torch.uint8 \(64, 1, 8\)"),
        (tensor("codes", lambda v: v.astype(np.int8)), "codes is torch.int8"),
        (tensor("scales", lambda v: -v), "not finite, not positive"),
        (tensor("scales", lambda v: v.astype(np.float16)), "scales is torch.float16"),
        (tensor("zeros", lambda v: v + 1), "a zero point is not 3/2"),
        (lambda graph: [graph.initializer.pop() for _ in range(len(graph.initializer))], "codes is missing"),
    ],
)
def test_damaged_graphs_are_clear_errors(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        ONNX().read_codes(folder)


def test_foreign_and_truncated_files_are_clear_errors(folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    for wrong in (b"", b"GGUF" * 100, data[: len(data) // 2], b"\x00" * 64):
        (folder / FILE).write_bytes(wrong)
        with pytest.raises(ValueError, match="truncated, damaged or no ONNX file"):
            ONNX().read_codes(folder)
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match="does not exist"):
        ONNX().read_codes(folder)


def test_a_layer_that_is_not_described_is_a_clear_error(folder: Path) -> None:
    codes = model_codes(trained(SCHEMES["W2H group 32"]))
    del codes[NAME]
    write_layers(folder, codes)
    with pytest.raises(ValueError, match=rf"has the quantized layer {NAME}, which is not described"):
        ONNX().read_codes(folder)
