"""onnxruntime-genai: the builder's graph holds the trained codes, and the engine generates the trained model's tokens.

The builder takes seconds for any model, so all but the engine's own text is slow.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from targets_common import FREE_CODEBOOK, IDS, byte_tokenizer, exported, logits, scheme, trained
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fewbits import Rule, Scheme, prepare
from fewbits.export import export
from fewbits.io import read_json
from fewbits.targets.base import model_codes
from fewbits.targets.genai import CONFIG_FILE, GenAI
from fewbits.targets.gptq import GPTQ
from fewbits.targets.onnx_graph import FILE
from fewbits.testing.tiny import tiny_gemma3, tiny_gpt2, tiny_llama
from fewbits.verify import verify

TOLERANCE = 1e-4
"""Largest difference of a logit from an engine with floating activations (issue 4); about 3e-7 is seen."""
INT8_TOLERANCE = 2e-2
"""With activations rounded to 8 bits; about 3e-3 is seen."""
NEW_TOKENS = 12
TARGET = GenAI()
NAME = "model.layers.0.self_attn.q_proj"


def greedy(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(IDS, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(
    ("kind", "what", "dtype"),
    [
        ("llama", scheme("W2A16G32"), torch.float32),
        ("llama", scheme("W2HA16G32"), torch.float32),
        ("llama", scheme("W1.58A16G32", dtype="fp32"), torch.float32),
        ("llama_tied", scheme("W1"), torch.float32),
        ("qwen3", scheme("W3A16G64"), torch.float32),
        ("qwen3", scheme("W4HA16G32"), torch.bfloat16),
        ("gemma", scheme("W2HA16G64"), torch.float32),
        ("gemma", scheme("W8"), torch.bfloat16),
    ],
)
def test_the_engine_computes_and_generates_what_was_trained(
    tmp_path: Path, kind: str, what: Scheme, dtype: torch.dtype
) -> None:
    model = trained(what, kind, dtype)
    folder = exported(model, TARGET, tmp_path / "genai", byte_tokenizer())
    reference = TARGET.reference(model)
    assert (TARGET.engine_logits(folder, IDS) - logits(reference)).abs().max() < TOLERANCE
    assert torch.equal(TARGET.engine_generate(folder, IDS, NEW_TOKENS), greedy(reference))
    rounded = TARGET.engine_logits(folder, IDS, accuracy_level=4) - logits(reference)
    assert rounded.abs().max() < INT8_TOLERANCE
    graph = onnx.load(folder / FILE, load_external_data=False).graph
    bits = {a.i for node in graph.node for a in node.attribute if a.name == "bits"}
    assert bits == {2 if "W2" in what.name or "W1" in what.name else 4 if "W3" in what.name else 8}
    session = read_json(folder / CONFIG_FILE)["model"]["decoder"]["session_options"]
    assert session.get("mlas.use_lut_gemm") == ("1" if what.name.startswith("W2H") else None)
    assert not (folder / ".gptq").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral"])
def test_biases_rotary_bases_and_heads_reach_the_engine(tmp_path: Path, kind: str) -> None:
    shape: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }  # fmt: skip
    model: Any
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=None))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value.add_(0.1 * torch.randn_like(value))
    rules = [Rule(pattern="*v_proj", scheme=scheme("W4A16G32")), Rule(scheme=scheme("W2A16G32"))]
    prepare(model.eval(), rules, ignore=[] if kind == "mistral" else None)
    folder = exported(model, TARGET, tmp_path / "genai", byte_tokenizer())
    assert (TARGET.engine_logits(folder, IDS) - logits(model)).abs().max() < TOLERANCE
    names = {node.name for node in onnx.load(folder / FILE, load_external_data=False).graph.node}
    assert "/model/layers.0/attn/v_proj/MatMulNBits" in names, "layers of different widths are not fused"
    assert ("/lm_head/MatMulNBits" in names) is (kind == "mistral")
    report = verify(model, folder)
    assert report.passed, report.to_text()
    assert [v.level for v in report.engines] == ["float", "int8"]


@pytest.mark.slow
def test_the_builder_imports_our_gptq_folders_as_they_are(tmp_path: Path) -> None:
    """Version 1, read by onnxruntime-genai itself: the same codes, zeros and scales, with nothing of ours after it."""
    model = trained(scheme("W2A16G32"))
    source = export(model, GPTQ(), tmp_path / "gptq", tokenizer=byte_tokenizer())
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(tmp_path / "out")]
    command += ["-p", "int4", "-e", "cpu", "-c", str(tmp_path / "cache"), "--extra_options", "accuracy_level=0"]
    command += ["nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather", "fuse_qkv=false"]
    subprocess.run(command, capture_output=True, check=True)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out" / FILE).graph.initializer}
    for name, q in model_codes(model).items():
        prefix = name.replace("self_attn", "attn") + ".MatMulNBits"
        packed = torch.from_numpy(tensors[f"{prefix}.qweight"].copy()).reshape(q.shape[0], -1)
        levels = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], -1).view(q.shape).float() - 2
        scale = torch.from_numpy(tensors[f"{prefix}.scales"].copy()).view(q.scale.shape).float()
        assert torch.equal(levels * scale.repeat_interleave(32, 1), q.dequantize())
        zeros = torch.from_numpy(tensors[f"{prefix}.qzeros"].copy())
        in_use = -(-q.scale.shape[1] // 4) * q.shape[0]
        assert zeros.numel() == in_use
        assert set(zeros.tolist()) <= {0b1010, 0b101010}, "two or three groups of zero 2"


@pytest.mark.slow
def test_damaged_folders_are_clear_errors(tmp_path: Path) -> None:
    model = trained(scheme("W2HA16G32"))
    folder = export(model, TARGET, tmp_path / "genai", tokenizer=byte_tokenizer())

    def edited(change: Any, message: str) -> None:
        graph = onnx.load(folder / FILE)
        change(graph.graph)
        broken = tmp_path / "broken"
        broken.mkdir(exist_ok=True)
        onnx.save(graph, broken / FILE)
        (broken / "fewbits_layers.json").write_bytes((folder / "fewbits_layers.json").read_bytes())
        with pytest.raises(ValueError, match=message):
            TARGET.read_codes(broken)

    nodes = [i for i, node in enumerate(onnx.load(folder / FILE).graph.node) if node.op_type == "MatMulNBits"]
    edited(lambda g: g.node.pop(nodes[0]), r"model\.layers\.0\.self_attn\.\w+: model.onnx has no MatMulNBits")
    edited(lambda g: setattr(g.node[nodes[0]], "name", "/x/MatMulNBits"), "'/x/MatMulNBits' stands for no known layer")
    edited(lambda g: setattr(g.node[nodes[0]].attribute[0], "i", 1), "are needed|bits=1")
    edited(lambda g: setattr(g.node[nodes[1]], "name", g.node[nodes[0]].name), "twice")
    (folder / f"{FILE}.data").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated, damaged or no ONNX file"):
        TARGET.read_codes(folder)


@pytest.mark.slow
def test_what_the_builder_says_when_it_fails_is_passed_on(tmp_path: Path) -> None:
    model = prepare(tiny_llama(), Rule(scheme=scheme("W2")))
    model.config.hidden_act = "no such activation"
    with pytest.raises(ValueError, match=r"onnxruntime-genai failed: \w+: The no such activation activation"):
        export(model, TARGET, tmp_path / "x", tokenizer=byte_tokenizer())
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- what cannot be held


@pytest.mark.parametrize(
    ("what", "shape", "reason"),
    [
        (scheme("W2A16G32", grid=FREE_CODEBOOK), (64, 64), "not multiples of 1/1024"),
        (scheme("W8H"), (64, 64), "do not fit 2/4/8-bit codes"),
        (scheme("W2"), (64, 100), "in_features=100 cannot be cut into blocks of 16, 32, 64, 128, 256"),
        (scheme("W4"), (36, 64), "out_features=36: GPTQ, from which the builder imports, needs a multiple of 32"),
    ],
)
def test_refusals_name_the_condition(what: Scheme, shape: tuple[int, int], reason: str) -> None:
    assert reason in (TARGET.holds(what, shape) or "")
    assert TARGET.judge(what, shape).verdict == "cannot"


def test_models_that_the_engine_does_not_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: Any, message: str, tokenizer: Any = True) -> None:
        with pytest.raises(ValueError, match=message):
            export(model, TARGET, tmp_path / "x", tokenizer=byte_tokenizer() if tokenizer else None)

    refused(trained(scheme("W2")), "needs the tokenizer; pass it", tokenizer=None)
    refused(prepare(tiny_gemma3(), Rule(scheme=scheme("W2"))), "this one is 'gemma3_text'")
    refused(prepare(tiny_gpt2(), Rule(scheme=scheme("W2"))), "is a Conv1D")
    refused(prepare(tiny_llama(), Rule(pattern="*mlp*", scheme=scheme("W2"))), r"self_attn\.k_proj is not")
    shape: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}
    windowed = MistralForCausalLM(MistralConfig(**shape, **heads))
    refused(prepare(windowed, Rule(scheme=scheme("W2"))), "attends to a sliding window")
    with pytest.raises(ValueError, match="accuracy_level=2 is unknown"):
        GenAI(accuracy_level=2)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(ImportError, match=r"pip install 'fewbits\[genai\]'"):
        export(trained(scheme("W2")), TARGET, tmp_path / "x", tokenizer=byte_tokenizer())
    assert list(tmp_path.iterdir()) == []
