r"""THE one autograd function of fewbits: quantize and dequantize forward, a surrogate backward.

Forward: ``dequantize(quantize(w))`` bit for bit. Backward, with the upstream gradient G at the quantized weight:

* latent weight: :math:`R^{-1}\,\mathrm{pullback}(R\,G, v)`, whatever the surrogate says;
* scale: always from G itself, never from the surrogate: :math:`\frac{1}{\sqrt{n\,q_p}} \sum_g G_j\,(\ell_j - v_j
  1\{v_j\ \mathrm{inside}\})` with levels :math:`\ell` and n the number of weights that share the scale (LSQ,
  arXiv:1902.08153, with the per-group count); the binary grid uses :math:`\sum G_j \ell_j`;
* tensors of the surrogate's state that are trained (DSQ's alpha): what the surrogate says of the gradient per step.

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
    def forward(
        ctx: Any,
        w: Tensor,
        scale: Tensor,
        scheme: Scheme,
        surrogate: Surrogate,
        state: State,
        rotated: bool,
        *trained: Tensor,
    ) -> Tensor:
        del trained  # parts of the state; here so that they get their gradient
        ctx.save_for_backward(w, scale)
        ctx.scheme, ctx.surrogate, ctx.state, ctx.rotated = scheme, surrogate, state, rotated
        spec = scheme.scale
        view = spec.view(w.shape)
        s = stored_scale(scale, spec)
        v = view.split(scheme.rotation.apply(w.float())) / s[..., None]
        x = view.merge(dequantize_levels(scheme.grid.project_(v), s))
        return (x if rotated else scheme.rotation.invert(x)).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, scale = ctx.saved_tensors
        scheme, surrogate = ctx.scheme, ctx.surrogate
        need_w, need_scale = ctx.needs_input_grad[:2]
        need_state = any(ctx.needs_input_grad[6:])
        spec, grid = scheme.scale, scheme.grid
        view = spec.view(w.shape)
        grad = grads[0].float() if ctx.rotated else scheme.rotation.apply(grads[0].float())
        v = None
        if need_scale or need_state or surrogate.needs_v:
            with torch.no_grad():  # a constant of the backward pass: a double backward differentiates G alone
                s = stored_scale(scale, spec)
                v = view.split(scheme.rotation.apply(w.float())) / s[..., None]
        grad_w = grad_scale = None
        grad_state: tuple[Tensor | None, ...] = (None,) * (len(ctx.needs_input_grad) - 6)
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
        if need_state:
            assert v is not None
            per_step = view.merge(view.split(grad) * s[..., None])
            found = surrogate.state_gradient(per_step, view.merge(v), grid, ctx.state)
            grad_state = tuple(g.to(ctx.state[k].dtype) for k, g in zip(surrogate.trained, found, strict=True))
        return grad_w, grad_scale, None, None, None, None, *grad_state


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
    *,
    rotated: bool = False,
) -> Tensor:
    r"""Quantize and dequantize a latent weight, with a gradient.

    Args:
        w: ``(out_features, in_features)``, floating point.
        scheme: grid, scale and rotation.
        scale: raw scales ``(R, G)``, fp32, units of ``w`` per step; rounded to the stored dtype inside, with the
            gradient passed on. None finds them by the scheme's rule, as constants.
        surrogate: stands for the derivative; None is the identity STE.
        state: the surrogate's tensors; None makes fresh ones.
        rotated: leave the result in the basis in which it is rounded, :math:`s\,\ell(R w / s)`, where its upstream
            gradient is too.

    Returns:
        ``quantize(w, scheme, scale).dequantize(w.dtype, rotated=rotated)`` bit for bit, but for the sign of zeros (a
        small negative weight rounds to -0.0, a code decodes to 0.0; a pass that mends it would cost 15 % of this
        function); differentiable in ``w``, ``scale`` and what the surrogate trains.

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
    trained = (state[key] for key in surrogate.trained)
    return _FakeQuantize.apply(w, scale, scheme, surrogate, state, rotated, *trained)


def scale_as_function(w: Tensor, scheme: Scheme) -> Tensor:
    r"""Raw scales by the scheme's rule, differentiable in ``w``: the rank-one part of the quantizer's Jacobian.

    A dynamic scale is a function of the weights, so :math:`Q(w) = s(w)\,\ell(w/s(w))` has, besides the surrogate's, the
    gradient :math:`\frac{ds}{dw} \sum_j G_j(\ell_j - v_j 1\{v_j\ \mathrm{inside}\})`. Layers with ``mode="dynamic"``
    drop it (their scales are constants of the backward pass, as are those that :func:`fake_quantize` finds itself)
    unless their rule says ``differentiate_scale``; pass this function's result as ``scale`` to keep it. LSQ's gradient
    scale, a step-size rule for *learned* scales, is taken out again. ``docs/convergence.md`` compares the term with
    finite differences of the dither-averaged objective.

    Args:
        w: ``(out_features, in_features)``, floating point.
        scheme: with a rule other than ``mse``, whose line search has no closed derivative.

    Returns:
        fp32 ``(R, G)``, :func:`~fewbits.qtensor.initial_scale` bit for bit. Its derivative is that of the rule, s times
        :math:`\mathrm{sign}(w)/\max|w|` at the largest weight (``absmax*``), :math:`\mathrm{sign}(w)/\sum|w|`
        (``absmean``) or :math:`w/\sum w^2` (``rms``, ``gaussian``), with or without ``block_``; 0 for a group of zeros.

    Raises:
        ValueError: for the rule ``mse``.

    Example:
        >>> w = torch.tensor([[-2.0, 1.0, 0.25, 0.75]], requires_grad=True)
        >>> scheme = Scheme.parse("W1.58", rule="absmean", dtype="fp32", mode="dynamic")
        >>> fake_quantize(w, scheme, scale_as_function(w, scheme)).sum().backward()
        >>> w.grad.tolist()
        [[1.25, 0.75, 0.75, 0.75]]
    """
    spec = scheme.scale
    if spec.rule == "mse":
        raise ValueError(
            "rule 'mse' is a line search without a closed derivative; use absmax, absmean, rms or gaussian"
        )
    x = spec.view(w.shape).split(scheme.rotation.apply(w.float()))
    kind = spec.rule.removeprefix("block_")
    if kind.startswith("absmax"):
        size = x.abs().amax(-1)
    elif kind == "absmean":
        size = x.abs().sum(-1)
    else:
        size = x.square().sum(-1).clamp_min(1e-38).sqrt()
    whole = size.detach()
    # every rule is homogeneous of degree one, so this is its derivative; size - whole is exactly 0
    slope = torch.where(whole > 0, initial_scale(w, scheme) / whole.clamp_min(1e-30), 0.0)
    factor = scale_gradient_factor(scheme, w.shape).to(w.device)
    return initial_scale(w, scheme) + slope / factor * (size - whole)
