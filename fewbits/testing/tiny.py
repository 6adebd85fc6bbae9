"""Tiny seeded models of the architectures that fewbits must handle, and a byte-level toy corpus to train them on.

The models have two layers, hidden size 64 and a vocabulary of the 256 bytes; their intermediate size 96 is not a
multiple of 64 or 128, so that groups of these sizes are ragged there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 256
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _build(make: Callable[[], PreTrainedModel], seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model in evaluation mode; the caller's random stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    torch.nn.Module.to(model, dtype)
    return model.eval()


def tiny_llama(*, tie: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer Llama; ``tie`` shares the embedding with the output head.

    Example:
        >>> tiny_llama().model.layers[0].mlp.down_proj.weight.shape
        torch.Size([64, 96])
    """
    return _build(lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, tie_word_embeddings=tie)), seed, dtype)


def tiny_qwen3(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer Qwen3 (normalized queries and keys, own head size), untied."""
    config = {**_SHAPE, "head_dim": 16}
    return _build(lambda: Qwen3ForCausalLM(Qwen3Config(**config, tie_word_embeddings=False)), seed, dtype)


def tiny_gemma(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer Gemma (embedding tied to the head)."""
    return _build(lambda: GemmaForCausalLM(GemmaConfig(**{**_SHAPE, "head_dim": 16})), seed, dtype)


def tiny_gemma3(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer Gemma 3 text model (scaled embedding of its own class, tied to the head, one sliding layer)."""
    config = {**_SHAPE, "head_dim": 16, "sliding_window": 16}
    return _build(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**config)), seed, dtype)


def tiny_gpt2(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer GPT-2 (transposed linear layers with biases, two embeddings, tied head)."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=64,
        n_inner=96,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _build(lambda: GPT2LMHeadModel(config), seed, dtype)


def _tied_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_llama(tie=True, seed=seed, dtype=dtype)


TINY_MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama_tied": _tied_llama,
    "qwen3": tiny_qwen3,
    "gemma": tiny_gemma,
    "gemma3": tiny_gemma3,
    "gpt2": tiny_gpt2,
}
"""Builders by name; each takes ``seed`` and ``dtype``."""

_NOUNS = ("fox", "owl", "river", "stone", "lamp", "garden", "letter", "winter")
_VERBS = ("sees", "follows", "remembers", "carries", "paints", "forgets")
_PLACES = ("at dawn", "by the sea", "in the city", "under the bridge", "after the rain")


def toy_text(num_sentences: int = 200, *, seed: int = 0) -> str:
    """English-like sentences of a small grammar: easy enough that a tiny model learns it in seconds.

    Example:
        >>> toy_text(1)
        'the lamp carries the garden at dawn.'
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    return " ".join(
        f"the {pick(_NOUNS)} {pick(_VERBS)} the {pick(_NOUNS)} {pick(_PLACES)}." for _ in range(num_sentences)
    )


def toy_blocks(num_blocks: int = 16, block_length: int = 32, *, seed: int = 0) -> Tensor:
    """Token blocks ``(num_blocks, block_length)``, int64: the bytes of :func:`toy_text`.

    Example:
        >>> bytes(toy_blocks(1, 10)[0].tolist())
        b'the lamp c'
    """
    data = b""
    sentences = 1 + num_blocks * block_length // 30
    while len(data) < num_blocks * block_length:
        data = toy_text(sentences, seed=seed).encode()
        sentences *= 2
    return torch.tensor(list(data[: num_blocks * block_length])).view(num_blocks, block_length)
