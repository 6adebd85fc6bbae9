r"""THE one autograd function of fewbits: quantize and dequantize forward, a surrogate backward.

Forward: ``dequantize(quantize(w))`` bit for bit. Backward, with the upstream gradient G at the quantized weight:

* latent weight: :math:`R^{-1}\,\mathrm{pullback}(R\,G, v)`, whatever the surrogate says;
* scale: always from G itself, never from the surrogate: :math:`\frac{1}{\sqrt{n\,q_p}} \sum_g G_j\,(\ell_j - v_j
  1\{v_j\ \mathrm{inside}\})` with levels :math:`\ell` and n the number of weights that share the scale (LSQ,
  arXiv:1902.08153, with the per-group count); the binary grid uses :math:`\sum G_j \ell_j`.

Only the latent weight itself and the scale are saved: no mask, no second copy. The backward pass computes ``v`` again,
and only where the surrogate or the scale needs it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fewbits.qtensor import dequantize_levels, initial_scale
from fewbits.scales import stored_scale
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, Surrogate
from fewbits.surrogates._base import State


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, scheme: Scheme, surrogate: Surrogate, state: State) -> Tensor:
        ctx.save_for_backward(w, scale)
        ctx.scheme, ctx.surrogate, ctx.state = scheme, surrogate, state
        spec = scheme.scale
        view = spec.view(w.shape)
        s = stored_scale(scale, spec)
        v = view.split(scheme.rotation.apply(w.float())) / s[..., None]
        x = view.merge(dequantize_levels(scheme.grid.project_(v), s))
        return scheme.rotation.invert(x).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, scale = ctx.saved_tensors
        scheme, surrogate = ctx.scheme, ctx.surrogate
        need_w, need_scale = ctx.needs_input_grad[:2]
        spec, grid = scheme.scale, scheme.grid
        view = spec.view(w.shape)
        grad = scheme.rotation.apply(grads[0].float())
        v = None
        if need_scale or surrogate.needs_v:
            with torch.no_grad():  # a constant of the backward pass: a double backward differentiates G alone
                s = stored_scale(scale, spec)
                v = view.split(scheme.rotation.apply(w.float())) / s[..., None]
        grad_w = grad_scale = None
        if need_w:
            flat = None if v is None else view.merge(v)
            grad_w = scheme.rotation.invert(surrogate.pullback(grad, flat, grid, ctx.state)).to(w.dtype)
        if need_scale:
            assert v is not None
            with torch.no_grad():
                slope = grid.project_(v.clone())
                if grid.scale_gradient == "lsq":
                    low, high = grid.scale_edge
                    slope -= v.masked_fill_((v < low) | (v > high), 0.0)
                factor = scale_gradient_factor(scheme, w.shape).to(w.device)
            grad_scale = ((view.split(grad) * slope).sum(-1) * factor).to(scale.dtype)
        return grad_w, grad_scale, None, None, None


def scale_gradient_factor(scheme: Scheme, shape: torch.Size) -> Tensor:
    r"""LSQ's gradient scale :math:`1/\sqrt{n_g\,q_p}` per group, shape (G,); ``q_p``: largest whole level, >= 1."""
    qp = max(1.0, math.floor(scheme.grid.max_level))
    return 1 / (scheme.scale.view(shape).counts().float() * qp).sqrt()


def fake_quantize(
    w: Tensor,
    scheme: Scheme,
    scale: Tensor | None = None,
    surrogate: Surrogate | None = None,
    state: State | None = None,
) -> Tensor:
    r"""Quantize and dequantize a latent weight, with a gradient.

    Args:
        w: ``(out_features, in_features)``, floating point.
        scheme: grid, scale and rotation.
        scale: raw scales ``(R, G)``, fp32, units of ``w`` per step; rounded to the stored dtype inside, with the
            gradient passed on. None finds them by the scheme's rule, as constants.
        surrogate: stands for the derivative; None is the identity STE.
        state: the surrogate's tensors; None makes fresh ones.

    Returns:
        ``quantize(w, scheme, scale).dequantize(w.dtype)`` bit for bit, differentiable in ``w`` and ``scale``.

    Raises:
        ValueError: for a shape that the scheme cannot take.

    Example:
        >>> w = torch.tensor([[-1.3, -0.6, 0.05, 2.0]], requires_grad=True)
        >>> fake_quantize(w, Scheme.parse("W2"), torch.tensor([[0.5]])).tolist()
        [[-1.0, -0.5, 0.0, 0.5]]
    """
    scheme.check_shape(w.shape)
    surrogate = STE() if surrogate is None else surrogate
    scale = initial_scale(w, scheme) if scale is None else scale
    expected = scheme.scale.view(w.shape).scale_shape
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; {scheme.name} of {tuple(w.shape)} needs {expected}")
    state = surrogate.init_state(w.shape, w.device) if state is None else state
    return _FakeQuantize.apply(w, scale, scheme, surrogate, state)
