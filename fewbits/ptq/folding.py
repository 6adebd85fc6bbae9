"""Moving per-channel factors into whatever comes before a layer: gains of norms, rows of linear layers.

Names alone do not say whether a fold leaves the function as it was (a norm may add 1 to its gain, its output may be
read by something else), so norms are probed, and who folds compares the block's output before and after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PRODUCERS = {"o_proj": "v_proj", "down_proj": "up_proj"}
"""Layer to its sibling whose output channels reach it through operations that commute with positive factors: the
attention average, and the product with the gate."""


def gain_offset(norm: nn.Module) -> float | None:
    """0 if the norm multiplies by its weight, 1 if by 1 + weight (Gemma), None if by neither."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    bias = getattr(norm, "bias", None)
    kept = weight.detach().clone(), None if bias is None else bias.detach().clone()
    x = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)[None, None]
    with torch.no_grad():
        try:
            if bias is not None:
                bias.zero_()
            weight.zero_()
            zero = norm(x).double()
            weight.fill_(1.0)
            one = norm(x).double()
        finally:
            weight.copy_(kept[0])
            if bias is not None:
                bias.copy_(kept[1])
    if not bool(zero.any()):
        return 0.0
    return 1.0 if torch.allclose(one, 2 * zero, rtol=1e-2) else None


def divide_gain_(norm: nn.Module, factors: Tensor, offset: float) -> None:
    """Divide the output channels of a norm, in place."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_((weight.double() + offset) / factors.double() - offset)
        if bias is not None:
            bias.copy_(bias.double() / factors.double())


def multiply_columns_(layer: nn.Module, factors: Tensor) -> None:
    """Multiply the input channels of a linear layer, in place."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(weight.double() * (factors.double()[:, None] if isinstance(layer, Conv1D) else factors.double()))


def divide_rows_(layer: nn.Module, factors: Tensor) -> None:
    """Divide the output channels of a linear layer, bias included, in place."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(weight.double() / (factors.double() if isinstance(layer, Conv1D) else factors.double()[:, None]))
        if bias is not None:
            bias.copy_(bias.double() / factors.double())


def producer_channels(num_inputs: int, num_outputs: int, head_dim: int | None) -> Tensor | None:
    """For every input channel the producer's output channel that feeds it; None if that cannot be told.

    With grouped queries every head of the values feeds several neighbouring heads of the output projection.

    Example:
        >>> producer_channels(8, 4, 2)
        tensor([0, 1, 0, 1, 2, 3, 2, 3])
    """
    if num_inputs == num_outputs:
        return torch.arange(num_inputs)
    if head_dim is None or num_outputs % head_dim or num_inputs % num_outputs:
        return None
    heads = torch.arange(num_outputs).view(-1, 1, head_dim)
    return heads.expand(-1, num_inputs // num_outputs, -1).reshape(-1)


@dataclass(frozen=True)
class Fold:
    """A place that takes the division of some layers' inputs.

    Attributes:
        module: a norm, or the linear layer whose output channels reach the inputs.
        channels: for every input channel, the module's output channel that feeds it.
        offset: of the norm's gain; None for a linear layer.
    """

    module: nn.Module
    channels: Tensor
    offset: float | None

    @classmethod
    def of_norm(cls, norm: nn.Module) -> Fold | None:
        """Into a norm's gain, if it has one of the two known forms."""
        weight, offset = norm.weight, gain_offset(norm)
        assert isinstance(weight, Tensor)
        return None if offset is None else cls(norm, torch.arange(weight.numel(), device=weight.device), offset)

    @classmethod
    def of_rows(cls, producer: nn.Module, num_inputs: int, head_dim: int | None) -> Fold | None:
        """Into the rows of a linear layer."""
        weight = producer.weight
        assert isinstance(weight, Tensor)
        num_outputs = weight.shape[1 if isinstance(producer, Conv1D) else 0]
        channels = producer_channels(num_inputs, num_outputs, head_dim)
        return None if channels is None else cls(producer, channels.to(weight.device), None)

    def shared_mean(self, values: Tensor) -> Tensor:
        """Input channels that one output channel feeds must have one factor: their mean, for each of them."""
        size = int(self.channels.max()) + 1
        sums = torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, self.channels, values)
        return (sums / torch.bincount(self.channels, minlength=size))[self.channels]

    def divide_(self, factors: Tensor) -> None:
        """Divide what the module gives, in place; ``factors`` of the inputs, equal where they share a channel."""
        per_channel = torch.ones(int(self.channels.max()) + 1, dtype=factors.dtype, device=factors.device)
        per_channel[self.channels] = factors
        if self.offset is None:
            divide_rows_(self.module, per_channel)
        else:
            divide_gain_(self.module, per_channel, self.offset)
