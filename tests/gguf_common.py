"""What the tests of the GGUF target share: small models whose rows fill blocks of 256, and real tokenizers for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fewbits import Rule, Scheme, prepare
from fewbits.targets.base import Target, model_codes
from fewbits.testing.tiny import toy_text

VOCAB_SIZE = 320
_TEXT = toy_text(300) + " Ünïcödé 12 345, don't! It's\n\n\tdone   here."
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_ROPE = {"rope_theta": 10000.0}
LLAMA3_ROPE = _ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 64}  # fmt: skip
YARN_ROPE = _ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**_SHAPE | changes))


def gemma3(**changes: Any) -> Any:
    """Head size and query scale as Transformers' GGUF reader assumes; the sixth of seven layers sees everything."""
    defaults = {"num_hidden_layers": 7, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16,
                "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    return Gemma3ForCausalLM(Gemma3TextConfig(**_SHAPE | defaults | changes))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama one layer": lambda: llama(num_hidden_layers=1),
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama small heads": lambda: llama(head_dim=32),
    "llama3 rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "linear rope": lambda: llama(rope_parameters=_ROPE | {"rope_type": "linear", "factor": 4.0}),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE | {"num_hidden_layers": 1}, head_dim=128)),
    "qwen3 small heads": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=64)),
    "qwen3 yarn": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=64, rope_parameters=YARN_ROPE)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_SHAPE, head_dim=64)),
    "gemma3": gemma3,
    "gemma3 small heads": lambda: gemma3(
        head_dim=64, query_pre_attn_scalar=64, num_attention_heads=4, num_key_value_heads=2
    ),
}


def scheme(text: str, **options: Any) -> Scheme:
    """``Scheme.parse`` with a rule that takes no search, since training moves the scale anyway."""
    return Scheme.parse(text, **{"rule": "gaussian"} | options)


def untrained(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose norms and biases are no ones and zeros, so that mixing them up shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = MODELS[kind]()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim == 1:
                    p.add_(0.2 * torch.randn_like(p) if "norm" in name else 0.1 * torch.randn_like(p))
    return model.to(dtype).eval()


def train_(model: Any, steps: int = 2) -> Any:
    """A few steps of plain SGD, large enough to move codes and scales."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(2, VOCAB_SIZE, (2, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    direction = (p.grad / (p.grad.square().mean().sqrt() + 1e-8)).clamp(-2, 2)
                    p.sub_(0.05 * p.abs().mean().clamp_max(0.1) * direction)
                    p.grad = None
    return model.eval()


@functools.lru_cache(maxsize=4)
def trained(what: Scheme, kind: str = "llama one layer", dtype: torch.dtype = torch.float32) -> Any:
    """A prepared model after a few steps; shared between tests, which must not change it."""
    return train_(prepare(untrained(kind, dtype), Rule(scheme=what)))


def written(model: Any, target: Target, folder: Path, tokenizer: Any | None = None) -> Path:
    """The export, after codes, scales and all other tensors were read back and found equal bit for bit."""
    folder.mkdir(parents=True, exist_ok=True)
    target.write(model, tokenizer or byte_level(), folder)
    codes, stored = model_codes(model), target.read_codes(folder)
    if stored is not None:
        assert stored.keys() == codes.keys()
        for name, q in codes.items():
            found = stored[name]
            assert found.scheme == q.scheme
            assert found.codes.dtype == q.codes.dtype
            assert torch.equal(found.codes, q.codes)
            assert torch.equal(found.scale, q.scale)
            assert (found.multipliers is None) == (q.multipliers is None)
            if found.multipliers is not None and found.super_scale is not None:
                assert q.multipliers is not None
                assert torch.equal(found.multipliers, q.multipliers)
                assert torch.equal(found.super_scale, q.super_scale)
    tensors, expected = target.read_tensors(folder), target.expected_tensors(model)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value), name
    return folder


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``(length, vocabulary)`` of one sequence."""
    return model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False).logits[0]


def some_ids(length: int = 96, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS % numbers), "isolated"), byte_level])


PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: _split(r"\p{N}"),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
}


@functools.lru_cache(maxsize=8)
def byte_level(pre: str = "gpt-2", *, add_bos: bool = False, template: str | None = None) -> Any:
    """A byte-level BPE tokenizer of at most 320 tokens, trained in a moment."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 4,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    wrapped.add_tokens(["<tool>"])
    wrapped.chat_template = template
    return wrapped


@functools.lru_cache(maxsize=2)
def sentencepiece_like(*, prefix: bool) -> Any:
    """A BPE tokenizer as Transformers makes it of a SentencePiece model: byte fallback, spaces as a letter."""
    words = toy_text(300).replace(" ", " ▁").split(" ")
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=57, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    special = ["<s>", "</s>", "<unk>"]
    vocab = {text: i for i, text in enumerate([*special, *(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    # SentencePiece has scores, not merges: every cut of a piece into two pieces is a merge, in the order of the pieces
    merges = [(p[:k], p[k:]) for p in pieces for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
