"""Prompts and answers: one example a row, padded, with labels on the answer alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.data import TokenBlocks
from fewbits.objectives.losses import IGNORE_INDEX


def read_traces(path: str | Path) -> list[tuple[str, str]]:
    """``(prompt, answer)`` of every line of a JSON Lines file with the keys ``prompt`` and ``answer``.

    Raises:
        ValueError: for a missing or empty file, or a line that is not such an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"traces {str(path)!r} do not exist; give a .jsonl file of objects with prompt and answer")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number}, is not JSON") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "answer")):
            raise ValueError(f"{path}, line {number}, needs the texts prompt and answer")
        pairs.append((row["prompt"], row["answer"]))
    if not pairs:
        raise ValueError(f"{path} holds no trace")
    return pairs


class TraceBlocks(TokenBlocks):
    """Rows of one example each; labels are -100 on the prompt and behind the end.

    Args:
        tokens: ``(num_rows, length)``, prompt, answer, end, padding.
        labels: same shape, token ids on the answer and its end, -100 elsewhere.
        bytes_per_token: mean UTF-8 bytes of an answer's token.
    """

    def __init__(self, tokens: np.ndarray, labels: np.ndarray, bytes_per_token: float) -> None:
        super().__init__(tokens, bytes_per_token)
        self.labels = np.ascontiguousarray(labels, dtype=np.int32)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = torch.from_numpy(self.labels[index].astype(np.int64))
        return {**super().__getitem__(index), "labels": labels}

    def take(self, num_blocks: int) -> TraceBlocks:
        """Rows spread evenly (all if there are fewer)."""
        if num_blocks >= len(self):
            return self
        index = np.linspace(0, len(self) - 1, num_blocks).round().astype(int)
        return TraceBlocks(self.tokens[index], self.labels[index], self.bytes_per_token)

    def split(self, holdout: float) -> tuple[TraceBlocks, TraceBlocks]:
        """``(train, valid)``: the last rows are held out.

        Raises:
            ValueError: if either part would be empty.
        """
        count = len(super().split(holdout)[0])
        first = TraceBlocks(self.tokens[:count], self.labels[:count], self.bytes_per_token)
        return first, TraceBlocks(self.tokens[count:], self.labels[count:], self.bytes_per_token)


def pack_traces(pairs: list[tuple[str, str]], tokenizer: Any, length: int) -> TraceBlocks:
    """One row per example: prompt, answer, the end token, padding with the end token.

    The padding is on the right, where no earlier position of a causal model sees it, and has no label.

    Args:
        pairs: prompts and answers.
        tokenizer: a Hugging Face tokenizer with an end token; no special tokens of its own are added.
        length: tokens of a row.

    Raises:
        ValueError: without an end token, for an empty prompt, or an example that is longer than a row.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("traces need a tokenizer with an end-of-text token")
    tokens = np.full((len(pairs), length), end, dtype=np.int32)
    labels = np.full((len(pairs), length), IGNORE_INDEX, dtype=np.int32)
    num_bytes = num_labels = 0
    for row, (prompt, answer) in enumerate(pairs):
        head = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        tail = [*tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], end]
        if not head:
            raise ValueError(f"trace {row} has an empty prompt; the first token of an answer needs a context")
        if len(head) + len(tail) > length:
            raise ValueError(f"trace {row} has {len(head) + len(tail)} tokens, a row {length}; use longer rows")
        stop = len(head) + len(tail)
        tokens[row, :stop] = [*head, *tail]
        labels[row, len(head) : stop] = tail
        num_bytes += len(answer.encode())
        num_labels += len(tail)
    return TraceBlocks(tokens, labels, num_bytes / num_labels)
