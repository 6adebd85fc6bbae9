"""The embedded model: loads offline, reads and writes any text, and scores what its record says."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import string
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fewbits.corpora import (
    DOCUMENT_SEPARATOR,
    embedded_model_path,
    embedded_texts,
    pydoc_corpus,
    split_documents,
    without_shared_paragraphs,
)

FOLDER = embedded_model_path()
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_embedded.py"
SIZE_LIMIT = 8_000_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_embedded", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


# the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = sorted(path for path in FOLDER.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) < SIZE_LIMIT
    assert {path.name for path in files} == {
        "LICENSE-PSF.txt",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
        "valid.txt",
    }


def test_stored_weights_are_bf16_finite_and_counted(record: dict[str, Any], model: PreTrainedModel) -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in stored.values())
    assert sum(tensor.numel() for tensor in stored.values()) == record["num_parameters"] == model.num_parameters()
    loaded = model.state_dict()
    for name, tensor in stored.items():
        torch.testing.assert_close(loaded[name], tensor.float(), rtol=0, atol=0)


def test_every_linear_layer_holds_whole_groups_of_256(model: PreTrainedModel) -> None:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    assert {name: module.in_features % 256 for name, module in linears.items()} == dict.fromkeys(linears, 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_card_states_what_the_record_measured(record: dict[str, Any]) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    held_out = record["held_out"]
    for fact in (
        record["command"],
        f"Python {record['python']}",
        f"{record['num_parameters']:,} parameters",
        f"perplexity {held_out['perplexity']:.2f}",
        f"{held_out['bits_per_byte']:.3f} bits per byte",
        f"{record['tokens_seen']:,} tokens",
        *(f"{name} {number}" for name, number in record["versions"].items()),
    ):
        assert fact in card


# the tokenizer ---------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@example(text="<|bos|>def f():\r\n\treturn  ' \\x00 '<|eos|>")
@example(text=" , .  don't 're \u00a0\u2028 \U0001f40d e\u0301 \x00\x7f")
@given(text=st.one_of(st.text(), st.text(alphabet=string.printable, max_size=200)))
def test_any_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < 2048 for index in ids)


def test_vocabulary_and_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|bos|>", "<|eos|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.config.bos_token_id, model.config.eos_token_id)
    assert tokenizer("<|bos|>a<|eos|>")["input_ids"][::2] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer("")["input_ids"] == []


def test_token_widths_count_the_bytes_of_any_text(script: ModuleType, tokenizer: PreTrainedTokenizerBase) -> None:
    widths = script.token_widths(tokenizer)
    text = "naïve \U0001f40d\n" + "".join(embedded_texts("valid")[:20])
    assert int(widths[torch.tensor(tokenizer(text)["input_ids"])].sum()) == len(text.encode())


# the model -------------------------------------------------------------------------------------------------------


def test_the_recorded_score_is_measured_again(
    script: ModuleType, record: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    recorded = record["held_out_slice"]
    measured = script.score(model, tokenizer, embedded_texts("valid"), recorded["num_windows"])
    assert measured["num_tokens"] == recorded["num_tokens"]
    assert measured["num_bytes"] == recorded["num_bytes"]
    # 2%: another processor or torch adds up in another order, which moves the loss by far less
    assert measured["bits_per_byte"] == pytest.approx(recorded["bits_per_byte"], rel=0.02)
    assert measured["perplexity"] < model.config.vocab_size / 20


def test_the_score_of_a_uniform_model_is_the_logarithm_of_the_vocabulary(
    script: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    uniform = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32)
    torch.nn.init.zeros_(uniform.model.embed_tokens.weight)
    assert script.score(uniform, tokenizer, embedded_texts("valid"), 2)["perplexity"] == pytest.approx(2048, rel=1e-5)
    with pytest.raises(ValueError, match="less than one window"):
        script.score(uniform, tokenizer, ["short"])


def test_a_bf16_load_and_the_whole_context_are_finite(model: PreTrainedModel) -> None:
    half = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)
    assert half.dtype == torch.bfloat16
    ids = torch.arange(model.config.max_position_embeddings)[None] % 2048
    with torch.no_grad():
        assert half(input_ids=ids).logits.isfinite().all()


def test_greedy_text_is_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenizer("Return a new", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    words = re.findall(r"[A-Za-z]{2,}", text)
    known = set(re.findall(r"[A-Za-z]{2,}", " ".join(embedded_texts("valid"))))
    assert len(words) >= 10
    assert sum(word in known for word in words) >= 0.8 * len(words)


# the script ------------------------------------------------------------------------------------------------------


def test_the_held_out_text_is_what_the_recorded_python_extracts(script: ModuleType, record: dict[str, Any]) -> None:
    valid = embedded_texts("valid")
    assert script.digest(valid) == record["text"]["valid_sha256"]
    assert len(valid) == record["text"]["valid_documents"]
    assert DOCUMENT_SEPARATOR.join(valid) == (FOLDER / "valid.txt").read_text(encoding="utf-8")
    if platform.python_version() == record["python"]:  # another version holds other texts
        train, held_out = split_documents(pydoc_corpus())
        assert script.held_out(held_out) == valid
        assert script.digest(without_shared_paragraphs(train, valid)) == record["text"]["train_sha256"]


def test_windows_are_full_seeded_and_cover_the_text_once_a_pass(
    script: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = [[300 + number] * 16 for number in range(64)]
    first = script.Windows(documents, tokenizer, length=8, num_windows=100, seed=3)
    again = script.Windows(documents, tokenizer, length=8, num_windows=100, seed=3)
    other = script.Windows(documents, tokenizer, length=8, num_windows=100, seed=4)
    assert len(first) == 100
    assert torch.equal(torch.stack(first.rows), torch.stack(again.rows))
    assert not torch.equal(torch.stack(first.rows), torch.stack(other.rows))
    counts = torch.bincount(torch.stack(first.rows).flatten(), minlength=364)[300:]
    assert counts.max() <= 16  # no document twice in one pass
    assert (counts == 0).sum() <= 64 - 100 * 8 // 18  # at most what 100 windows cannot hold
    assert torch.equal(first[0]["labels"], first[0]["input_ids"])


def test_held_out_text_keeps_its_order_under_the_limit(script: ModuleType) -> None:
    documents = [f"{number:06d}" + "x" * 5994 for number in range(100)]
    kept = script.held_out(documents)
    assert kept == [text for text in documents if text in set(kept)]
    assert 0 <= script.VALID_BYTES - sum(len(text) + len(DOCUMENT_SEPARATOR) for text in kept) < 6003
    assert script.held_out(kept) == kept


def test_a_width_without_whole_groups_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_embedded.py", "--output", "x", "--intermediate-size", "640"])
    with pytest.raises(SystemExit):
        script.parse()
    assert "intermediate_size=640 does not hold whole groups of 256" in capsys.readouterr().err
