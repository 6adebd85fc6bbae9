"""FPQ's feature perturbation: the input of a quantized layer moves by up to half an activation step, now and then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewbits.convert import qat_layers
from fewbits.nn import QATEmbedding


def perturbed(x: Tensor, num_bits: int) -> Tensor:
    r""":math:`x + \delta`, :math:`\delta` uniform in :math:`[-s/2, s/2]`, with :math:`s` the step of a token.

    The variance of :math:`\delta` is :math:`s^2 / 12`, so on a smooth loss the mean effect is
    :math:`\frac{s^2}{24}\,\mathrm{tr} H`, H the Hessian for the input.

    Args:
        x: ``(..., channels)``.
        num_bits: of a notional symmetric quantizer per token: :math:`s = \max_c |x| / (2^{b-1} - 1)`.

    Returns:
        Same shape and dtype; the noise is a constant, the gradient passes as it is.

    Example:
        >>> x = torch.ones(1, 4)
        >>> bool((perturbed(x, 8) - x).abs().max() <= 0.5 / 127)
        True
    """
    step = x.detach().abs().amax(-1, keepdim=True).float() / (2 ** (num_bits - 1) - 1)
    return x + ((torch.rand(x.shape, device=x.device) - 0.5) * step).to(x.dtype)


class ActivationNoise:
    """Perturbs the inputs of all quantized linear layers in training mode, each with its own coin per forward pass.

    The paper's step is that of a trained activation quantizer; models here have 16-bit activations in training, so the
    step is that of a notional ``num_bits`` quantizer per token (reconstructed). Draws come from torch's own stream,
    which checkpoints save and activation checkpointing replays.

    Args:
        probability: p in [0, 1] that a layer's input is perturbed in one forward pass; the paper tries .1 to .5.
        num_bits: of the notional quantizer, 2 to 16.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> ActivationNoise(0.1).num_bits
        8

    Reference: FPQ, arXiv:2503.11159.
    """

    def __init__(self, probability: float, num_bits: int = 8) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"activation noise with probability={probability}, which is outside [0, 1]")
        if not 2 <= num_bits <= 16:
            raise ValueError(f"activation noise with num_bits={num_bits}; use 2 to 16")
        self.probability, self.num_bits = probability, num_bits

    def attach(self, model: nn.Module) -> Sequence[RemovableHandle]:
        """Hook every quantized linear layer of a prepared model; ``handle.remove()`` takes the noise away.

        With probability 0 there is no hook at all.
        """
        if self.probability == 0:
            return []
        linear = [layer for _, layer in qat_layers(model) if not isinstance(layer, QATEmbedding)]
        return [layer.register_forward_pre_hook(self._hook) for layer in linear]

    def _hook(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not layer.training or float(torch.rand(())) >= self.probability:
            return None
        return (perturbed(inputs[0], self.num_bits), *inputs[1:])
