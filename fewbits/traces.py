"""Prompts and answers: one example a row, padded, with labels on the answer alone."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.data import TokenBlocks
from fewbits.io import write_text
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


def write_traces(path: str | Path, pairs: Sequence[tuple[str, str]]) -> Path:
    """The file that :func:`read_traces` reads, whole or not at all."""
    rows = (json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) for prompt, answer in pairs)
    write_text(Path(path), "".join(row + "\n" for row in rows))
    return Path(path)


def addition_traces(num_traces: int, *, num_digits: int = 2, seed: int = 0) -> list[tuple[str, str]]:
    r"""Different sums ``a+b=`` of numbers below :math:`10^{\mathrm{num\_digits}}`, in random order: a task to verify.

    Args:
        num_traces: at most ``10 ** (2 * num_digits)``, which is all of them; no prompt comes twice.
        num_digits: most digits of a summand.
        seed: the pairs are a function of it.

    Raises:
        ValueError: for fewer than one trace or more than there are.

    Example:
        >>> addition_traces(2, seed=1)
        [('22+1=', '23'), ('93+25=', '118')]
    """
    base = 10**num_digits
    if not 1 <= num_traces <= base**2:
        raise ValueError(
            f"num_traces={num_traces}: there are {base**2} sums of {num_digits} digits; use 1 to that many"
        )
    pairs = (divmod(index, base) for index in random.Random(seed).sample(range(base**2), num_traces))
    return [(f"{a}+{b}=", str(a + b)) for a, b in pairs]


def digit_reward(completion: str, answer: str) -> float:
    """Share of places at which a completion has the answer's character; 1 for the answer itself and nothing else.

    Missing and superfluous characters count as wrong places, so that stopping is learned too.

    Args:
        completion: what a model wrote.
        answer: what is right; not empty.

    Returns:
        A number in ``[0, 1]``.

    Raises:
        ValueError: for an empty answer.

    Example:
        >>> digit_reward("107", "107"), digit_reward("117", "107"), digit_reward("1", "23")
        (1.0, 0.6666666666666666, 0.0)
    """
    if not answer:
        raise ValueError("the answer is empty; nothing could be verified")
    right = sum(a == b for a, b in zip(completion, answer, strict=False))
    return right / max(len(completion), len(answer))


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
