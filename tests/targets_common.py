"""What the tests of engine targets share: tiny models trained for a few steps, and the schemes to try."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewbits import Rule, Scheme, prepare
from fewbits.export import export
from fewbits.grids import Codebook
from fewbits.scales import Granularity
from fewbits.targets.base import Target, model_codes, plain_tensors
from fewbits.testing.tiny import TINY_MODELS, toy_blocks

IDS = toy_blocks(2, 24, seed=5)
_FAST: dict[str, Any] = {"rule": "gaussian"}

GRIDS = ("W1", "W1.58", "W2", "W3", "W4", "W8", "W2H", "W3H", "W4H")
"""Every uniform grid of an engine, as :meth:`Scheme.parse` spells it."""


def scheme(text: str, granularity: Granularity | None = None, **options: Any) -> Scheme:
    """``Scheme.parse`` with a rule that takes no search, since training moves the scale anyway."""
    extra: dict[str, Any] = {} if granularity is None else {"granularity": granularity}
    return Scheme.parse(text, **{**_FAST, **extra, **options})


INTEGER_CODEBOOK = Codebook((-7.0, -2.0, 2.0, 7.0))
SHIFTED_CODEBOOK = Codebook((0.0, 1.0, 2.0, 3.0))
FREE_CODEBOOK = Codebook.lloyd_max(4)


def wide_llama() -> LlamaForCausalLM:
    """One layer whose every row has at least 128 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).eval()


@functools.lru_cache(maxsize=64)
def trained(what: Scheme, kind: str = "llama", dtype: torch.dtype = torch.float32, steps: int = 2) -> Any:
    """A tiny model of this scheme after a few AdamW steps; shared between tests, which must not change it."""
    model: Any = wide_llama().to(dtype) if kind == "wide" else TINY_MODELS[kind](dtype=dtype)
    prepare(model, Rule(scheme=what))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)  # fp16 has no 1e-8
    for step in range(steps):
        ids = toy_blocks(4, 24, seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def exported(model: Any, target: Target, folder: Path, tokenizer: Any | None = None) -> Path:
    """The export, after codes, scales and all other tensors were read back and found equal bit for bit."""
    export(model, target, folder, tokenizer=tokenizer)
    codes, stored = model_codes(model), target.read_codes(folder)
    assert stored is not None
    assert set(stored) == set(codes)
    for name, q in codes.items():
        assert stored[name].scheme == q.scheme
        assert torch.equal(stored[name].codes, q.codes)
        assert torch.equal(stored[name].scale, q.scale)
        assert (stored[name].multipliers is None) == (q.multipliers is None)
        assert torch.equal(stored[name].dequantize(), q.dequantize())
    tensors, expected = target.read_tensors(folder), target.expected_tensors(model)
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
    assert plain_tensors(model), "a model without norms would make the comparison empty"
    return folder


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits ``(sequences, length, vocabulary)``."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def byte_tokenizer() -> Any:
    """A tokenizer of the 256 bytes, in the order of their stand-in characters."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"pad_token": characters[0], "bos_token": characters[1], "eos_token": characters[2]}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
