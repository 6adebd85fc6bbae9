"""The decoder against transformers' forward pass, its slow twin; and how much memory a runtime model takes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fewbits import Rule, Scheme, prepare
from fewbits.convert import convert
from fewbits.export import export
from fewbits.runtime import Decoder, build, generate_stream, to_runtime
from fewbits.runtime import decoder as decoder_module
from fewbits.runtime.decoder import greedy, refusal
from fewbits.runtime.generate import uses_decoder
from fewbits.testing.tiny import TINY_MODELS, tiny_llama, tiny_qwen3

TOLERANCE = 2e-6
"""fp32 sums in another order, two layers: seen below 3e-7."""
SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def packed(model: Any, text: str = "W2A16G32", *, rules: list[Rule] | None = None, **options: Any) -> Any:
    rules = [Rule(scheme=Scheme.parse(text))] if rules is None else rules
    return to_runtime(convert(prepare(model, rules)), **options).eval()


def qwen2_with_biases() -> Any:
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def odd_llama(**changes: Any) -> Any:
    """Heads of 20, which no vector divides, and normalization weights that are not 1."""
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "head_dim": 20, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.eval()


def llama3_rope() -> Any:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    return odd_llama(rope_parameters=rope, mlp_bias=True, attention_bias=True)


MODELS = {
    "llama": tiny_llama,
    "llama tied": TINY_MODELS["llama_tied"],
    "qwen3": tiny_qwen3,
    "qwen2 biases": qwen2_with_biases,
    "odd heads": odd_llama,
    "llama3 rope": llama3_rope,
}


def some_ids(length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def twin(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids[None]).logits[0]


def stepped(model: Any, ids: torch.Tensor, prompt: int = 5, **options: Any) -> torch.Tensor:
    decoder = Decoder(model, len(ids), **options)
    return torch.stack([decoder.prefill(ids[:prompt])] + [decoder.step(int(token)) for token in ids[prompt:]])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_a_step_is_the_forward_pass(kind: str, activations: Any) -> None:
    model, ids = packed(MODELS[kind](), activations=activations), some_ids()
    assert (stepped(model, ids) - twin(model, ids)[4:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("kernel", ["auto", "avx2", "portable"])
@pytest.mark.parametrize("text", ["W1A16G32", "W1.58", "W3A16G32", "W4A16G32", "W2KA16G32", "W2HA16G32"])
def test_every_grid_and_kernel(text: str, kernel: Any) -> None:
    library = build.load_kernels()
    assert library is not None
    if kernel == "avx2" and not library.fb_supports(1):
        kernel = "auto"
    model, ids = packed(tiny_llama(), text, kernel=kernel), some_ids(12)
    assert (stepped(model, ids) - twin(model, ids)[4:]).abs().max() < TOLERANCE


def test_schemes_that_differ_inside_a_block() -> None:
    """Query, key and value read differently prepared activations, and one of them cannot round to int8."""
    rules = [
        Rule(pattern="*.q_proj", scheme=Scheme.parse("W3A16G32")),
        Rule(pattern="*.k_proj", scheme=Scheme.parse("W2KA16G32")),
        Rule(pattern="*.up_proj", scheme=Scheme.parse("W1A16G64")),
        Rule(pattern="*", scheme=Scheme.parse("W2A16G32")),
    ]
    model, ids = packed(tiny_llama(), rules=rules, activations="int8"), some_ids()
    assert (stepped(model, ids) - twin(model, ids)[4:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_threads_change_no_bit(activations: Any) -> None:
    torch.manual_seed(0)
    wide = LlamaForCausalLM(
        LlamaConfig(**{**SHAPE, "hidden_size": 768, "intermediate_size": 1536, "num_attention_heads": 12})
    )
    model, ids = packed(wide.eval(), activations=activations), some_ids(10)
    one, three = stepped(model, ids, num_threads=1), stepped(model, ids, num_threads=3)
    assert torch.equal(one, three)
    assert (one - twin(model, ids)[4:]).abs().max() < 4 * TOLERANCE


def test_greedy_text_is_that_of_generate() -> None:
    model, ids = packed(tiny_llama()), some_ids(6)
    with torch.inference_mode():
        out = model.generate(ids[None], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert greedy(model, ids, 20) == out[0, 6:].tolist()


def test_a_prompt_may_fill_the_cache_and_a_decoder_starts_again() -> None:
    model, ids = packed(tiny_llama()), some_ids(8)
    decoder = Decoder(model, 8)
    full = decoder.prefill(ids)
    assert (full - twin(model, ids)[-1]).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="the cache is full"):
        decoder.step(1)
    decoder.prefill(ids[:3])
    assert (decoder.step(int(ids[3])) - twin(model, ids[:4])[-1]).abs().max() < TOLERANCE
    assert decoder.length == 4
    for bad in (ids[:0], some_ids(9)):
        with pytest.raises(ValueError, match="the cache holds 1 to 8"):
            decoder.prefill(bad)
    with pytest.raises(IndexError):
        decoder.step(256)
    with pytest.raises(ValueError, match="max_length=0"):
        Decoder(model, 0)


def test_what_the_decoder_leaves_to_transformers() -> None:
    def window(model: Any) -> Any:
        model.config.model_type, model.config.sliding_window = "mistral", 4
        return model

    half = packed(tiny_llama(dtype=torch.bfloat16))
    partly = packed(tiny_llama(), rules=[Rule(pattern="*.mlp.*", scheme=Scheme.parse("W2A16G32"))])
    cases = {
        "layer 0's q_proj is not packed": partly,
        "not in fp32": half,
        "type 'gpt2'": packed(TINY_MODELS["gpt2"]()),
        "type 'gemma3_text'": packed(TINY_MODELS["gemma3"]()),
        "type 'Linear'": torch.nn.Linear(2, 2),
        "has a rotation or no compiled kernel": packed(tiny_llama(), kernel="torch"),
        "a window of 4": window(packed(tiny_llama())),
        "kind 'dynamic'": packed(odd_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
        "activation function 'gelu'": packed(odd_llama(hidden_act="gelu")),
    }
    for reason, model in cases.items():
        assert reason in (refusal(model) or ""), reason
        with pytest.raises(ValueError, match="the decoder cannot run this model"):
            Decoder(model, 4)
    assert refusal(packed(tiny_llama())) is None


def test_streams_are_the_same_with_and_without_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(253))]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    model = packed(tiny_llama())
    assert uses_decoder(model)
    used: list[int] = []
    monkeypatch.setattr(decoder_module.Decoder, "step", spy(decoder_module.Decoder.step, used))
    options: list[dict[str, Any]] = [{}, {"temperature": 2.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.5}]
    fast = ["".join(generate_stream(model, tokenizer, "w3 w7", max_new_tokens=16, **o)) for o in options]
    assert len(used) > 20
    used.clear()
    monkeypatch.setattr("fewbits.runtime.generate.uses_decoder", lambda _: False)
    slow = ["".join(generate_stream(model, tokenizer, "w3 w7", max_new_tokens=16, **o)) for o in options]
    assert fast == slow
    assert not used
    penal = copy.deepcopy(model)
    monkeypatch.undo()
    penal.generation_config.repetition_penalty = 1.5
    assert not uses_decoder(penal)


def spy(function: Any, calls: list[int]) -> Any:
    def wrapped(self: Any, token: int) -> Any:
        calls.append(token)
        return function(self, token)

    return wrapped


def test_the_end_token_stops_the_decoder() -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(253))]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    model = packed(tiny_llama())
    whole = "".join(generate_stream(model, tokenizer, "w3 w7", max_new_tokens=16)).split()
    stop = whole[3]
    model.generation_config.eos_token_id = [2, words.index(stop)]
    cut = "".join(generate_stream(model, tokenizer, "w3 w7", max_new_tokens=16)).split()
    assert cut == whole[: whole.index(stop) + 1]


CHILD = """
import gc, json, sys, time
from pathlib import Path
import torch
from fewbits.pretrained import load_model
from fewbits.runtime import Decoder, runtime_bytes, to_runtime

def resident():
    pages = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(pages[key].split()[0]) * 1024 for key in ("RssAnon", "VmHWM", "VmRSS")}

torch.set_num_threads(1)
small, folder = sys.argv[1:]
Decoder(to_runtime(load_model(small)), 8).prefill(torch.arange(4))  # imports and kernels are no part of a model
gc.collect()
before = resident()
model = to_runtime(load_model(folder))
gc.collect()
after = resident()
dense = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"grown": after["RssAnon"] - before["RssAnon"], "peak": after["VmHWM"] - before["VmRSS"],
                  "packed": runtime_bytes(model), "dense": dense}))
"""


def test_memory_of_a_packed_model_is_its_packed_size(tmp_path: Path) -> None:
    """In a fresh process: private memory afterwards within 5%, and the peak on the way there.

    Tensors that stay dense lie in the mapped file. Its pages count as resident too while they are mapped, codes
    included, but the system may drop them.
    """
    for name, size in (("small", 64), ("large", 1024)):
        changes = {"hidden_size": size, "intermediate_size": 4 * size, "num_hidden_layers": 6, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))
        scheme = Scheme.parse("W4A16G64", rule="absmean", mode="frozen")
        export(convert(prepare(model, [Rule(scheme=scheme)])), "hf", tmp_path / name)
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    ideal = found["packed"] + found["dense"]
    assert ideal > 40e6
    assert found["grown"] < 1.05 * found["packed"] + 2e6  # 2 MB for Python's objects
    assert found["peak"] < 2.2 * ideal + 4e6
