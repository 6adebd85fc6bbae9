r"""N2UQ: learned input thresholds, uniform output levels (arXiv:2111.14826).

With K = levels - 1 interval lengths :math:`a_i > 0` in steps, :math:`\tau_i = \ell_- + \sum_{j<i} a_j` and
:math:`v = x/s`, the output is :math:`s\,(\ell_- + \#\{i : v > \tau_i + a_i/2\})`. The gradient is that of the expected
output under stochastic rounding inside the intervals (generalized straight-through estimator),

.. math:: m(v) = \ell_- + i + (v - \tau_i)/a_i \quad\text{for } \tau_i \le v \le \tau_{i+1},

constant outside: :math:`m' = 1/a_i`, :math:`\partial m/\partial a_i = -(v-\tau_i)/a_i^2`,
:math:`\partial m/\partial a_j = -1/a_i` for j < i. All lengths 1 give the uniform quantizer and its clipped STE.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SHORTEST = 1e-3
"""Lengths are taken for at least this, as in the paper's code."""


class _LearnedThresholds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lengths: Tensor, low: float) -> Tensor:
        ctx.save_for_backward(x, scale, lengths)
        ctx.low = low
        v, a, edges = _places(x, scale, lengths, low)
        above = torch.bucketize(v, edges[:-1] + a / 2)
        return ((above.to(v.dtype) + low) * scale.to(v.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, lengths = ctx.saved_tensors
        grad = grads[0]
        with torch.no_grad():
            v, a, edges = _places(x, scale, lengths, ctx.low)
            i = torch.bucketize(v, edges[1:-1])
            outside = (v < edges[0]) | (v > edges[-1])
            slope = (1 / a)[i].masked_fill(outside, 0.0)
            wide = grad.to(v.dtype)
            level = torch.bucketize(v, edges[:-1] + a / 2).to(v.dtype) + ctx.low
            factor = 1 / math.sqrt(x.shape[-1] * max(1, ctx.low + len(a)))
            grad_scale = (wide * (level - v * slope)).sum() * factor
            g = wide.masked_fill(outside, 0.0) * scale.to(v.dtype)
            own = torch.bincount(i.flatten(), (g * (v - edges[:-1][i])).flatten(), len(a)) / a.square()
            through = torch.bincount(i.flatten(), g.flatten(), len(a)) / a
            later = through.flip(0).cumsum(0).flip(0) - through
        held = (lengths >= SHORTEST).to(lengths.dtype)
        return (wide * slope).to(x.dtype), grad_scale.to(scale.dtype), -(own + later).to(lengths.dtype) * held, None


def _places(x: Tensor, scale: Tensor, lengths: Tensor, low: float) -> tuple[Tensor, Tensor, Tensor]:
    """v, the lengths in use, and the ends of the intervals (one more than lengths)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    a = lengths.detach().to(dtype).clamp_min(SHORTEST)
    edges = torch.cat([a.new_tensor([low]), low + a.cumsum(0)])
    return x.to(dtype) / scale.to(dtype), a, edges


def learned_thresholds(x: Tensor, scale: Tensor, lengths: Tensor, low: float) -> Tensor:
    r"""Quantize with learned thresholds and dequantize, with the gradient of the module's head.

    Args:
        x: any shape whose last axis is the features.
        scale: one number > 0, units of x per step, of inputs and outputs alike. Its gradient is
            :math:`\sum G\,(\ell - v\,m'(v))` times LSQ's factor.
        lengths: ``(num_levels - 1,)`` in steps; those below ``SHORTEST`` are taken for it and get no gradient.
        low: the lowest level.

    Returns:
        Shape and dtype of ``x``.

    Example:
        >>> learned_thresholds(torch.tensor([0.2, 0.9]), torch.tensor(1.0), torch.tensor([0.2, 1.0, 1.0]), 0.0)
        tensor([1., 2.])
    """
    return _LearnedThresholds.apply(x, scale, lengths, low)
