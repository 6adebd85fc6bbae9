r"""What every layer method shares: the Hessian of the inputs, the output error, and a result with its latent weight.

A linear layer's mean squared output error on inputs X (n, in) is a quadratic form of the weight error alone,

.. math:: \frac1n \|X (\hat W - W)^\top\|_F^2 = \mathrm{tr}\bigl((\hat W - W)\, H\, (\hat W - W)^\top\bigr),
          \qquad H = \tfrac1n X^\top X,

so that H is all that most methods need to know of the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.qtensor import QTensor, dequantize_levels, quantize
from fewbits.scales import double_quantize, stored_scale
from fewbits.scheme import Scheme

_REPAIR_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class PTQResult:
    """A quantized matrix and what a training layer needs to hold exactly these codes.

    Attributes:
        qtensor: codes, stored scales and scheme (which may carry a fitted codebook).
        scale: raw scales ``(R, G)`` fp32; rounded to the stored dtype they are ``qtensor.scale``.
        latent: weight of the original's shape and dtype with
            ``quantize(latent, qtensor.scheme, scale).codes == qtensor.codes``.
    """

    qtensor: QTensor
    scale: Tensor
    latent: Tensor


def hessian_of(inputs: Tensor) -> Tensor:
    """``X^T X / n`` in float64 from inputs ``(.., in_features)``.

    Example:
        >>> hessian_of(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
        tensor([[1., 1.],
                [1., 2.]], dtype=torch.float64)
    """
    x = inputs.detach().reshape(-1, inputs.shape[-1]).double()
    return x.t() @ x / max(1, len(x))


def resolve_hessian(w: Tensor, hessian: Tensor | None, inputs: Tensor | None) -> Tensor:
    """The Hessian that a calibrated method was given, in float64, symmetric and checked.

    Raises:
        ValueError: if not exactly one of the two is given, or its shape or values are wrong.
    """
    if (hessian is None) == (inputs is None):
        raise ValueError("give exactly one of hessian (in, in) and inputs (.., in): a calibrated method needs data")
    h = hessian_of(inputs) if hessian is None else hessian.detach().double()  # type: ignore[arg-type]
    if tuple(h.shape) != (w.shape[1], w.shape[1]):
        raise ValueError(f"the Hessian has shape {tuple(h.shape)}; a weight {tuple(w.shape)} needs {(w.shape[1],) * 2}")
    if not bool(torch.isfinite(h).all()):
        raise ValueError("the Hessian is not finite: the layer's inputs on the calibration data hold NaN or infinity")
    return ((h + h.t()) / 2).to(w.device)


def output_error(w: Tensor, w_hat: Tensor, hessian: Tensor) -> float:
    r"""Mean squared output error per token, :math:`\mathrm{tr}(\Delta H \Delta^\top)`, in float64.

    Example:
        >>> output_error(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), torch.eye(2))
        5.0
    """
    delta = w_hat.detach().double() - w.detach().double()
    return float(((delta @ hessian.double()) * delta).sum())


def rotate_hessian(hessian: Tensor, scheme: Scheme) -> Tensor:
    """The Hessian in the basis in which the scheme rounds: both axes rotated."""
    return scheme.rotation.apply(scheme.rotation.apply(hessian).t()).t()


def check_scale(w: Tensor, scheme: Scheme, scale: Tensor) -> Tensor:
    """A given raw scale as fp32.

    Raises:
        ValueError: for a wrong shape.
    """
    expected = scheme.scale.view(w.shape).scale_shape
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; {scheme.name} of {tuple(w.shape)} needs {expected}")
    return scale.detach().float()


def check_weight(w: Tensor, scheme: Scheme) -> Tensor:
    """The weight, detached.

    Raises:
        ValueError: for a shape that the scheme cannot take, or weights that are not finite.
    """
    scheme.check_shape(w.shape)
    if not bool(torch.isfinite(w).all()):
        raise ValueError(f"weight of shape {tuple(w.shape)} has {int((~torch.isfinite(w)).sum())} non-finite entries")
    return w.detach()


def pack(codes: Tensor, scale: Tensor, scheme: Scheme) -> QTensor:
    """A :class:`QTensor` of given codes and raw scales."""
    spec = scheme.scale
    super_scale, multipliers = (None, None) if spec.superblock is None else double_quantize(scale, spec)
    return QTensor(codes.contiguous(), stored_scale(scale, spec), scheme, super_scale, multipliers)


def finish(target: Tensor, codes: Tensor, scale: Tensor, scheme: Scheme, w: Tensor) -> PTQResult:
    """Codes, raw scales and the latent weight nearest to ``target`` that still rounds to exactly these codes.

    Args:
        target: where the latent weight should lie, in the rotated basis, ``(out_features, in_features)``.
        codes: of the grid, same shape.
        scale: raw, ``(R, G)``.
        scheme: grid, scale and rotation.
        w: the original weight, for its dtype.

    Entries of the target in another cell (a clipped, an adjusted or, in a coarse dtype, an unlucky weight) are put on
    their level.

    Raises:
        ValueError: if the latent dtype is too coarse to hold the codes.
    """
    q = pack(codes, scale, scheme)
    view = scheme.scale.view(w.shape)
    levels = view.merge(dequantize_levels(view.split(q.levels()), q.scale))
    target = target.float().clone()
    for attempt in range(_REPAIR_ROUNDS + 1):
        latent = scheme.rotation.invert(target).to(w.dtype).contiguous()
        wrong = quantize(latent, scheme, scale).codes != q.codes
        if not bool(wrong.any()):
            return PTQResult(qtensor=q, scale=scale, latent=latent)
        # behind a rotation every entry of the latent weight mixes many of the target: in the end take all levels
        target = torch.where(wrong, levels, target) if attempt < _REPAIR_ROUNDS - 1 else levels
    raise ValueError(
        f"{int(wrong.sum())} of {wrong.numel()} codes of {scheme.name} cannot be held by a latent weight in {w.dtype}; "
        "load the model in float32"
    )
