r"""AdaRound: decide for every weight whether it goes to the level below or above, by a relaxation that hardens.

.. math:: \hat w = s\,\bigl(\ell_- + h(V)\,(\ell_+ - \ell_-)\bigr), \qquad
          h(V) = \mathrm{clip}\bigl(1.2\,\sigma(V) - 0.1,\, 0,\, 1\bigr)

with the two levels around w / s: on any grid, a codebook too. V starts where h is the fraction of the way from the one
to the other, so that the relaxed weight starts at w itself (clipped to the grid's range). The loss is the output error
in units of round-to-nearest's plus :math:`\lambda\,\mathrm{mean}(1 - |2 h - 1|^\beta)`; beta falls from 20 to 2 after a
warm-up without this term, so that every h ends at 0 or 1.

Reconstructed: lambda 0.01 belongs to a sum over a layer's weights in the published loss, whose units follow the data;
here both terms have no units, and the default is ours.

Reference: Nagel et al., arXiv:2004.10568.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewbits.ptq._base import (
    PTQResult,
    check_scale,
    check_weight,
    finish,
    resolve_hessian,
    rotate_hessian,
)
from fewbits.ptq.clip import clip_scale
from fewbits.qtensor import initial_scale
from fewbits.scales import stored_scale
from fewbits.scheme import Scheme

STRETCH = 1.2
"""The sigmoid is stretched to (-0.1, 1.1) before it is clipped, so that 0 and 1 are reached at finite V."""
BETA = (20.0, 2.0)
"""Exponent of the term that hardens, at its start and end."""


def soft_rounding(v: Tensor) -> Tensor:
    """h(V), in [0, 1].

    Example:
        >>> soft_rounding(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (STRETCH * torch.sigmoid(v) - (STRETCH - 1) / 2).clamp(0, 1)


def inverse_soft_rounding(fraction: Tensor) -> Tensor:
    r"""V with h(V) = f, :math:`-\log(1.2 / (f + 0.1) - 1)`, for f in [0, 1]."""
    return -torch.log(STRETCH / (fraction + (STRETCH - 1) / 2) - 1)


def hardening(h: Tensor, beta: float) -> Tensor:
    r""":math:`1 - |2 h - 1|^\beta`: 1 half way, 0 at 0 and 1."""
    return 1 - (2 * h - 1).abs().pow(beta)


def beta_at(step: int, iterations: int, warmup: float) -> float:
    """Cosine from 20 to 2 over the steps after the warm-up.

    Example:
        >>> beta_at(200, 1000, 0.2), round(beta_at(600, 1000, 0.2), 6), round(beta_at(1000, 1000, 0.2), 6)
        (20.0, 11.0, 2.0)
    """
    start, end = BETA
    done = max(0.0, (step - warmup * iterations) / max(1e-12, (1 - warmup) * iterations))
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(1.0, done)))


def adaround(
    w: Tensor,
    scheme: Scheme,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    scale: Tensor | None = None,
    iterations: int = 1000,
    learning_rate: float = 3e-2,
    regularization: float = 3.0,
    warmup: float = 0.2,
    clip: bool = False,
) -> PTQResult:
    r"""Choose the rounding of every weight together, for the layer's output; scales stay as they are.

    Args:
        w: ``(out_features, in_features)``.
        scheme: grid, scale and rotation.
        hessian: ``(in_features, in_features)`` of the layer's inputs.
        inputs: ``(.., in_features)`` instead of the Hessian.
        scale: raw scales ``(R, G)``; None finds them by the scheme's rule.
        iterations: Adam steps, >= 1.
        learning_rate: of V, > 0.
        regularization: lambda, >= 0.
        warmup: share of the steps without the term that hardens, in [0, 1).
        clip: improve scales that are found by :func:`~fewbits.ptq.clip.clip_scale` first.

    Returns:
        :class:`PTQResult`: round-to-nearest's where this is no better. The latent weight is w where it rounds to the
        chosen code, else on the level.

    Raises:
        ValueError: for a bad option, or a missing or bad Hessian.

    Example:
        >>> from fewbits.ptq import output_error, rtn
        >>> w, x, scheme = torch.randn(8, 32), torch.randn(100, 4) @ torch.randn(4, 32), Scheme.parse("W2")
        >>> h = x.t() @ x
        >>> errors = [output_error(w, f(w, scheme, hessian=h).qtensor.dequantize(), h) for f in (adaround, rtn)]
        >>> errors[0] < errors[1]
        True
    """
    w = check_weight(w, scheme)
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    if not (learning_rate > 0 and regularization >= 0 and 0 <= warmup < 1):
        raise ValueError(
            f"learning_rate={learning_rate} must be positive, regularization={regularization} >= 0 and "
            f"warmup={warmup} in [0, 1)"
        )
    h = rotate_hessian(resolve_hessian(w, hessian, inputs), scheme).float()
    x, grid = scheme.rotation.apply(w.float()), scheme.grid
    if scale is None:
        scale = clip_scale(x, scheme, h, initial_scale(w, scheme)) if clip else initial_scale(w, scheme)
    else:
        scale = check_scale(w, scheme, scale)
    steps = scheme.scale.view(w.shape).expand(stored_scale(scale, scheme.scale))
    lower, upper, fraction = between_levels(x / steps, torch.tensor(grid.levels, device=w.device))

    def error(share: Tensor) -> Tensor:
        delta = (lower + share * (upper - lower)) * steps - x
        return ((delta @ h) * delta).sum()

    nearest = (grid.project_(x / steps) > lower).float()
    unit = error(nearest).clamp_min(1e-30)
    variable = inverse_soft_rounding(fraction).requires_grad_()
    optimizer = torch.optim.Adam([variable], lr=learning_rate)
    for step in range(iterations):
        share = soft_rounding(variable)
        loss = error(share) / unit
        if step >= warmup * iterations:
            loss = loss + regularization * hardening(share, beta_at(step, iterations, warmup)).mean()
        (variable.grad,) = torch.autograd.grad(loss, [variable])
        optimizer.step()
    with torch.no_grad():
        hard = (soft_rounding(variable) >= 0.5).float()
        chosen = hard if bool(error(hard) < error(nearest)) else nearest
        codes = grid.encode(torch.where(chosen > 0, upper, lower))
    return finish(x, codes, scale, scheme, w)


def between_levels(v: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The level below, the one above, and how far v is on the way, clipped to [0, 1].

    Example:
        >>> below, above, fraction = between_levels(torch.tensor([-3.0, 0.25, 9.0]), torch.tensor([-1.0, 0.0, 2.0]))
        >>> below.tolist(), above.tolist(), fraction.tolist()
        ([-1.0, 0.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.125, 1.0])
    """
    index = (torch.bucketize(v.contiguous(), levels, right=True) - 1).clamp(0, len(levels) - 2)
    lower, upper = levels[index], levels[index + 1]
    return lower, upper, ((v - lower) / (upper - lower)).clamp(0, 1)
