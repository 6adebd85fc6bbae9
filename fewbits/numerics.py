"""What a number may be: rounding of scales to the dtypes that engines store, safe division, signal-to-noise.

Nothing here knows what a grid or a model is.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

ScaleDtype = Literal["portable", "fp16", "bf16", "fp32"]
SCALE_DTYPES: tuple[str, ...] = get_args(ScaleDtype)

FP16_MIN_NORMAL = 2.0**-14
"""Smallest normal fp16 number: below it fp16 loses bits, so no scale is stored there."""
FP16_MAX_PORTABLE = 65280.0
"""Largest fp16 number whose significand fits bf16 (255 * 2**8)."""
FP16_MAX = 65504.0
_FP32_MIN_NORMAL = 2.0**-126

STORED_DTYPE: dict[str, torch.dtype] = {
    "portable": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
"""The torch dtype that holds a rounded scale of each kind without loss."""


def round_scale(scale: Tensor, dtype: ScaleDtype) -> Tensor:
    r"""Round positive scales to the values that the stored dtype holds.

    ``portable`` keeps 8 significant bits inside the normal range of fp16, so that the value is exact in fp16, in bf16
    and in fp32 alike; the relative change is at most :math:`2^{-8}`.

    Args:
        scale: any shape, units of ``w`` per step; computed in fp32.
        dtype: ``portable``, ``fp16``, ``bf16`` or ``fp32``.

    Returns:
        fp32 tensor of the same shape, at least the smallest normal number of the dtype (a zero row thus gets a tiny
        positive scale, never a division by zero). NaN stays NaN, so that a diverged run is seen, not hidden.

    Raises:
        ValueError: for an unknown dtype.

    Example:
        >>> round_scale(torch.tensor([0.0, 0.1]), "portable").tolist()
        [6.103515625e-05, 0.10009765625]
    """
    scale = scale.float()
    if dtype == "portable":
        return scale.clamp(FP16_MIN_NORMAL, FP16_MAX_PORTABLE).to(torch.bfloat16).float()
    if dtype == "fp16":
        return scale.clamp(FP16_MIN_NORMAL, FP16_MAX).to(torch.float16).float()
    if dtype == "bf16":
        return scale.clamp(_FP32_MIN_NORMAL, 3e38).to(torch.bfloat16).float()
    if dtype == "fp32":
        return scale.clamp_min(_FP32_MIN_NORMAL)
    raise ValueError(f"scale dtype {dtype!r} is unknown; use one of {', '.join(SCALE_DTYPES)}")


def is_representable(scale: Tensor, dtype: ScaleDtype) -> bool:
    """Whether every scale is finite, positive and unchanged by :func:`round_scale`."""
    scale = scale.float()
    return (
        bool(torch.isfinite(scale).all()) and bool((scale > 0).all()) and torch.equal(round_scale(scale, dtype), scale)
    )


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    r"""Signal to quantization noise ratio, :math:`10 \log_{10} \|x\|^2 / \|x - \hat x\|^2`, in decibels.

    Returns ``inf`` where the two are equal and ``-inf`` for a zero reference that is not reproduced.

    Example:
        >>> sqnr_db(torch.tensor([1.0, 1.0]), torch.tensor([0.9, 1.1])).__round__(2)
        20.0
    """
    signal = reference.double().square().sum().item()
    noise = (reference.double() - approximation.double()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
