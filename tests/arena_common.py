"""A tiny checkpoint with a byte tokenizer and a text, and an arena of three methods on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fewbits.arena import ArenaSettings
from fewbits.testing.tiny import tiny_llama, toy_text


def write_checkpoint(folder: Path) -> Path:
    """``model/`` and ``text.txt`` below the folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tiny_llama().save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[2]).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(toy_text(200))
    return folder


def tiny_arena(checkpoint: Path, **changes: Any) -> ArenaSettings:
    """Three methods, two seeds, four steps."""
    fields: dict[str, Any] = {
        "model": str(checkpoint / "model"),
        "text": str(checkpoint / "text.txt"),
        "schemes": ("W2G32",),
        "methods": ("clipped_ste", "paretoq", "rtn"),
        "budget": "steps=4",
        "seeds": 2,
        "learning_rates": (1e-3, 3e-3),
        "eval_tokens": 64,
        "block_size": 32,
        "batch_size": 2,
    }
    return ArenaSettings(**{**fields, **changes})
