"""Calibration data: token blocks in batches, and the loss of a whole model on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class BlockSource(Protocol):
    """A dataset of token blocks, such as :class:`fewbits.data.TokenBlocks`."""

    def __len__(self) -> int:
        """Number of blocks."""
        ...

    def __getitem__(self, index: int) -> Any:
        """A tensor, or a dict with ``input_ids``."""
        ...


Blocks = Tensor | BlockSource
"""Calibration data: token blocks ``(n, length)``, a dataset of ``{"input_ids"}``, or float inputs of a plain module."""


def to_batches(blocks: Blocks, batch_size: int, num_blocks: int | None, device: torch.device) -> list[Tensor]:
    """Calibration data in batches on the model's device; ``num_blocks`` of them, spread evenly over all.

    Raises:
        ValueError: if there is none, or a number is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if num_blocks is not None and num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks} must be at least 1")
    if len(blocks) == 0:
        raise ValueError("there is no calibration data; pass at least one token block")
    count = len(blocks) if num_blocks is None else min(num_blocks, len(blocks))
    rows = [blocks[int(i)] for i in torch.linspace(0, len(blocks) - 1, count, dtype=torch.float64).round()]
    rows = [row["input_ids"] if isinstance(row, dict) else torch.as_tensor(row) for row in rows]
    return [part.to(device) for part in torch.stack(rows).split(batch_size)]


def run_model(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits of a Transformers model, or the output of a plain module."""
    if isinstance(model, PreTrainedModel):
        return model(input_ids=batch, use_cache=False).logits
    return first_output(model(batch))


def first_output(output: Any) -> Tensor:
    """The tensor itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Calibration:
    """Data with the loss of the whole model on it.

    Attributes:
        model: as it is now.
        batches: token batches, or float inputs of a plain module.
        targets: what a plain module gave before anything was changed; None for a language model, whose loss is the
            cross-entropy of the next token.
    """

    model: nn.Module
    batches: list[Tensor]
    targets: list[Tensor] | None

    @classmethod
    def of(cls, model: nn.Module, batches: list[Tensor]) -> Calibration:
        """Record the targets where they are needed."""
        if isinstance(model, PreTrainedModel):
            return cls(model, batches, None)
        with torch.no_grad():
            return cls(model, batches, [run_model(model, batch) for batch in batches])

    def loss(self, i: int) -> Tensor:
        """Mean cross-entropy of a batch in nats, or the mean squared change of the output."""
        output, batch = run_model(self.model, self.batches[i]), self.batches[i]
        if self.targets is not None:
            return (output - self.targets[i]).float().square().mean()
        return nn.functional.cross_entropy(output[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())

    def mean_loss(self) -> float:
        """Over all batches, without gradients."""
        with torch.no_grad():
            return sum(float(self.loss(i)) for i in range(len(self.batches))) / len(self.batches)
