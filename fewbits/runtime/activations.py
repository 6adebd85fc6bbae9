"""Symmetric int8 activations with one scale per token and group: the torch twin of what the C kernels do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 127
DEFAULT_GROUP = 128
"""Group of activations where the weight has one scale per channel or tensor."""


def quantize_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    r"""Round tokens to int8, one scale per group.

    .. math:: s_{tg} = \max_{k \in g} |x_{tk}| / 127, \qquad q_{tk} = \mathrm{round\_half\_even}(x_{tk} / s_{tg})

    A group whose scale would be subnormal becomes zero. A group with a NaN or infinity gets the scale NaN: seen, not
    hidden. Bit for bit what the kernels compute.

    Args:
        x: ``(tokens, width)``, computed in fp32.
        group_size: consecutive activations that share a scale; the last group of a token may be short.

    Returns:
        ``(q, scale)``: int8 ``(tokens, width)`` in -127..127 and fp32 ``(tokens, ceil(width / group_size))``.

    Example:
        >>> q, scale = quantize_activations(torch.tensor([[2.54, -1.27, 0.0, 0.02]]), 2)
        >>> q.tolist(), [round(s, 6) for s in scale[0].tolist()]
        ([[127, -64, 0, 127]], [0.02, 0.000157])
    """
    x = x.float()
    tokens, width = x.shape
    num_groups = math.ceil(width / group_size)
    groups = torch.nn.functional.pad(x, (0, num_groups * group_size - width)).view(tokens, num_groups, group_size)
    top = groups.abs().amax(-1)
    scale = torch.where(top.isfinite(), top / LEVELS, torch.nan)
    scale = torch.where(scale < torch.finfo(torch.float32).smallest_normal, 0.0, scale)
    q = (groups / scale[..., None]).round()
    q = torch.where((scale > 0)[..., None], q, 0.0).to(torch.int8)
    return q.view(tokens, -1)[:, :width].contiguous(), scale


def dequantize_activations(q: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """``q`` times its group's scale, fp32, in the shape of ``q``."""
    return q.float() * scale.repeat_interleave(group_size, dim=-1)[:, : q.shape[-1]]
