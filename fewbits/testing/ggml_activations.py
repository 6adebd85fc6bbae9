r"""What llama.cpp's CPU kernels do to activations before they meet a quantized weight, in torch.

Every type has a partner in which a row of activations is stored: flat types (Q1_0, Q2_0, Q4_0, Q5_0, Q8_0) use Q8_0,
K-quants and ternary types use Q8_K. With this rounding put into a model, its logits at a single token agree with the
engine's to about 1e-5; in a longer text a number that lies on the edge of a rounding can flip and spread.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDED_TO_256 = ("TQ1_0", "TQ2_0", "Q2_K", "Q3_K")
"""Types whose partner is Q8_K; the partner of the others that are quantized is Q8_0 (of Q4_1: Q8_1)."""


def int8_per_32(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Codes and scales of blocks of 32 activations.

    .. math:: d = \max|x| / 127, \qquad q = \mathrm{round}(x \cdot 127 / \max|x|)

    Args:
        x: fp32 ``(.., width)``, the width a multiple of 32.

    Returns:
        fp32 ``(.., width / 32, 32)`` whole numbers in -127..127, and ``d``, fp32 ``(.., width / 32, 1)``. A block of
        zeros has d = 0.

    Example:
        >>> codes, d = int8_per_32(torch.tensor([[2.54, -1.27] + [0.0] * 30]))
        >>> codes[0, 0, :2].tolist(), round(d.item(), 4)
        ([127.0, -64.0], 0.02)
    """
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, blocks * (127 / largest), 0.0).round(), largest / 127


def round_q8_0(x: Tensor) -> Tensor:
    """Activations after Q8_0: :func:`int8_per_32` with the scale rounded to fp16; same shape."""
    codes, d = int8_per_32(x)
    return (codes * d.half().float()).reshape(x.shape)


def round_q8_k(x: Tensor) -> Tensor:
    """Activations after Q8_K: int8 per 256 with an fp32 scale; the number of largest magnitude becomes -127.

    Args:
        x: fp32, the width a multiple of 256.
    """
    blocks = x.reshape(-1, 256)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest != 0, -127 / largest, 0.0)
    codes = (blocks * inverse).round().clamp(max=127)
    return torch.where(largest != 0, codes / inverse, 0.0).reshape(x.shape)


def engine_rounding(x: Tensor, gguf_type: str) -> Tensor:
    """Activations as the kernels of a type see them; float types leave them alone.

    Raises:
        ValueError: for Q4_1, whose partner Q8_1 is no rounding of single activations.
    """
    if gguf_type in ("F32", "F16", "BF16"):
        return x
    if gguf_type == "Q4_1":
        raise ValueError("Q4_1 keeps a rounded sum of each block of activations too; there is no rounding of x alone")
    return round_q8_k(x) if gguf_type in ROUNDED_TO_256 else round_q8_0(x)
