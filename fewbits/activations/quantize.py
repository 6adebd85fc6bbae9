r"""Fake quantization of activations: dynamic scales, static learned ones, and offsets, in one autograd function.

Forward, with :math:`v = (x - \beta)/s`: :math:`\hat x = s\,\ell(v) + \beta`, levels :math:`\ell` clipped to the
outermost ones :math:`\ell_-, \ell_+`. Backward, with the upstream gradient G and ``inside`` for
:math:`\ell_- \le v \le \ell_+`:

* x: G where v lies within ``margin`` of the outermost levels, else 0;
* scale: :math:`\sum G\,(\ell - v\,1\{\mathrm{inside}\})` (LSQ) or :math:`\sum G\,\ell\,1\{\mathrm{outside}\}` (PACT);
* offset: :math:`\sum G\,1\{\mathrm{outside}\}` (LSQ+).

Only the input and the (small) scale and offset are saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fewbits.activations.scheme import ActivationScheme
from fewbits.activations.thresholds import learned_thresholds
from fewbits.grids import Int
from fewbits.scales import QUEST_S, gaussian_step

SMALLEST_SCALE = 1e-30
"""Below it a scale is taken for it, so that a row of zeros stays a row of zeros."""


def working_dtype(x: Tensor) -> torch.dtype:
    """What quantization computes in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, zero: Tensor | None, scheme: ActivationScheme
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset, zero)
        ctx.scheme = scheme
        v, low, high = _in_steps(x, scale, offset, zero, scheme)
        out = _levels(v, low, high, scheme) * scale.to(v.dtype)
        return (out if offset is None else out + offset.to(v.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset, zero = ctx.saved_tensors
        scheme: ActivationScheme = ctx.scheme
        strict = scheme.scale_gradient == "clip"  # PACT's conventions for inputs exactly on the clip
        grad, margin = grads[0], scheme.margin
        grad_x = grad_scale = grad_offset = None
        if margin == math.inf and not any(ctx.needs_input_grad[1:3]):
            return grad, None, None, None, None
        with torch.no_grad():
            v, low, high = _in_steps(x, scale, offset, zero, scheme)
            outside = (v <= low) | (v >= high) if strict else (v < low) | (v > high)
        if ctx.needs_input_grad[0]:
            shut = outside if strict else (v < low - margin) | (v > high + margin)
            grad_x = grad if margin == math.inf else grad.masked_fill(shut, 0.0)
        wide = grad.to(v.dtype)
        if ctx.needs_input_grad[1]:
            with torch.no_grad():
                slope = _levels(v, low, high, scheme)
                slope = slope * outside if strict else slope - v.masked_fill(outside, 0.0)
            grad_scale = ((wide * slope).sum() * gradient_factor(scheme, x.shape[-1])).to(scale.dtype)
        if offset is not None and ctx.needs_input_grad[2]:
            grad_offset = ((wide * outside).sum() * gradient_factor(scheme, x.shape[-1])).to(offset.dtype)
        return grad_x, grad_scale, grad_offset, None, None


def _in_steps(
    x: Tensor, scale: Tensor, offset: Tensor | None, zero: Tensor | None, scheme: ActivationScheme
) -> tuple[Tensor, Any, Any]:
    """v, and the outermost levels; those of a dynamic zero point are tensors."""
    dtype = working_dtype(x)
    wide = x.to(dtype)
    v = (wide if offset is None else wide - offset.to(dtype)) / scale.to(dtype)
    low, high = scheme.levels
    return (v, low, high) if zero is None else (v, low - zero.to(dtype), high - zero.to(dtype))


def _levels(v: Tensor, low: Any, high: Any, scheme: ActivationScheme) -> Tensor:
    shift = 0.5 if scheme.grid == "centred" else 0.0  # rounded as the grids of weights are
    return ((v - shift).round() + shift).clamp(low, high) if shift else v.round().clamp(low, high)


def gradient_factor(scheme: ActivationScheme, num_features: int) -> float:
    r"""What the gradient of a static scale or offset is multiplied by.

    .. math:: 1/\sqrt{n \max(1, \lfloor \ell_+ \rfloor)}

    for ``lsq`` with n features (arXiv:1902.08153), 1 for ``clip``. Adam takes a constant factor out again.

    Example:
        >>> gradient_factor(ActivationScheme(num_bits=3, mode="static", granularity="tensor"), 12) == 1 / 6
        True
    """
    if scheme.scale_gradient == "clip":
        return 1.0
    return 1 / math.sqrt(num_features * max(1, math.floor(scheme.levels[1])))


@torch.no_grad()
def dynamic_scale(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor | None]:
    r"""Scale and integer zero point of what is to be quantized.

    ``absmax``: :math:`\max|x|/\ell_+`, ``half_range``: :math:`\max|x|/\tfrac12(2^b-1)`; with an offset
    :math:`(\max(x,0) - \min(x,0))/(2^b-1)` and the zero point :math:`\lfloor -\min(x,0)/s \rceil`; ``rms``:
    :math:`\sqrt{E x^2}` times the best step of a Gaussian.

    Args:
        x: ``(.., features)``, rotated already.
        scheme: with ``granularity`` token or tensor.

    Returns:
        ``(scale, zero)``: ``(.., 1)`` per token or all axes 1 per tensor, units of x per step, > 0; zero None where
        the scheme is symmetric.

    Example:
        >>> scale, zero = dynamic_scale(torch.tensor([[-0.5, 1.27], [0.0, 0.0]]), ActivationScheme(num_bits=8))
        >>> round(scale[0].item(), 4), zero
        (0.01, None)
    """
    axes = (-1,) if scheme.granularity == "token" else tuple(range(x.ndim))
    wide = x.to(working_dtype(x))
    high = scheme.levels[1]
    if not scheme.symmetric:
        least = wide.amin(axes, keepdim=True).clamp_max(0)
        scale = ((wide.amax(axes, keepdim=True).clamp_min(0) - least) / high).clamp_min(SMALLEST_SCALE)
        return scale, (-least / scale).round()
    if scheme.rule in ("absmax", "half_range"):
        largest = (wide.abs() if scheme.signed else wide).amax(axes, keepdim=True)
        over = high if scheme.rule == "absmax" else (2**scheme.num_bits - 1) / 2
        return (largest / over).clamp_min(SMALLEST_SCALE), None
    rms = wide.square().mean(axes, keepdim=True).sqrt()
    return (rms * rms_step(scheme)).clamp_min(SMALLEST_SCALE), None


def rms_step(scheme: ActivationScheme) -> float:
    """The scale for inputs of RMS 1 by the rule ``rms``: QuEST's table, or the optimum of the integer grid.

    Example:
        >>> round(rms_step(ActivationScheme(num_bits=4, rule="rms")), 4)
        0.3386
    """
    if scheme.grid == "centred":
        return 2 * QUEST_S[2**scheme.num_bits] / (2**scheme.num_bits - 1)
    return gaussian_step(Int(scheme.num_bits))


def fake_quantize_activation(
    x: Tensor,
    scheme: ActivationScheme,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Quantize and dequantize activations, with a gradient.

    Args:
        x: ``(.., features)``, floating point.
        scheme: how.
        scale: of a static scheme, one number > 0, units of x per step.
        offset: of a static scheme with ``symmetric=False``, one number in units of x.
        lengths: of a scheme with learned thresholds, ``(num_levels - 1,)`` in steps.

    Returns:
        :math:`\hat x`, shape and dtype of ``x``, still rotated if the rotation's basis is; differentiable in
        everything that is static.

    Raises:
        ValueError: if the static numbers given are not those that the scheme needs.

    Example:
        >>> fake_quantize_activation(torch.tensor([[0.1, -1.0, 0.5]]), ActivationScheme(num_bits=2))
        tensor([[ 0., -1.,  0.]])

    Reference: BitNet b1.58 arXiv:2402.17764 (``A8``); QuEST arXiv:2502.05003; LSQ arXiv:1902.08153.
    """
    static = scheme.mode == "static"
    needed = (static, static and not scheme.symmetric, scheme.thresholds == "learned")
    if (given := tuple(value is not None for value in (scale, offset, lengths))) != needed:
        raise ValueError(f"(scale, offset, lengths) are given as {given}; the scheme {scheme.summary!r} needs {needed}")
    rotated = scheme.rotation.apply(x.to(working_dtype(x))) if scheme.rotation.kind != "none" else x
    zero = None
    if scale is None:
        scale, zero = dynamic_scale(rotated, scheme)
    else:
        scale = scale.clamp_min(SMALLEST_SCALE)
    if lengths is None:
        out = _FakeQuantize.apply(rotated, scale, offset, zero, scheme)
    else:
        out = learned_thresholds(rotated, scale, lengths, scheme.levels[0])
    return (out if scheme.rotation.basis == "rotated" else scheme.rotation.invert(out)).to(x.dtype)
