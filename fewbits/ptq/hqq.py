r"""HQQ, scale only: half-quadratic quantization for grids without a zero point; needs no data.

The published method keeps the scale and moves the zero point. Our grids have none, so the same splitting is applied to
the scale: with a separate error e that takes the outliers,

.. math:: \min_{s, q, e} \|e\|_p^p + \tfrac{\beta}{2} \|w - s q - e\|_2^2, \qquad 0 < p \le 1,

is minimised in turn over e (a generalised soft threshold), over s (least squares with the codes fixed) and over the
codes (nearest level of w / s, as published: of w, not of w - e):

.. math:: e \leftarrow \mathrm{sgn}(x)\,\max(0, |x| - |x|^{p - 1}/\beta),\; x = w - s q; \qquad
          s \leftarrow \frac{\langle w - e, q\rangle}{\langle q, q\rangle}.

Limits: beta to 0 puts nothing into e and s becomes the least-squares scale; beta to infinity puts everything into e and
s stays. The published code measures x in units of the weights, for which beta = 10 sets every error below 0.17 to 0,
that is all of them in an ordinary language model (rms 0.02): there it is least squares. ``relative=True`` measures x in
starting steps instead, which is what the idea asks for. It helps against real outliers and a start at the largest
weight; on the embedded model at 2 bits it is worse than least squares (perplexity 49.7 against 44.4), so it is off.

Reference: Badri & Shaji, "Half-quadratic quantization of large machine learning models", 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.ptq._base import PTQResult, check_scale, check_weight
from fewbits.qtensor import initial_scale, quantize
from fewbits.scales import stored_scale
from fewbits.scheme import Scheme


def shrink(x: Tensor, *, p: float, beta: float) -> Tensor:
    r"""Generalised soft threshold :math:`\mathrm{sgn}(x)\max(0, |x| - |x|^{p-1}/\beta)`, 0 below
    :math:`\beta^{-1/(2-p)}`; p = 1 is the ordinary one at 1 / beta.

    Example:
        >>> shrink(torch.tensor([0.17, -0.3, 1.0]), p=0.7, beta=10.0)
        tensor([ 0.0000, -0.1565,  0.9000])
    """
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-30).pow(p - 1) / beta).clamp_min(0)


def hqq(
    w: Tensor,
    scheme: Scheme,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    scale: Tensor | None = None,
    iterations: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
    relative: bool = False,
) -> PTQResult:
    r"""Round to nearest with scales that a few outliers do not move.

    Args:
        w: ``(out_features, in_features)``.
        scheme: grid, scale and rotation.
        hessian: not used; every layer method takes it.
        inputs: not used either.
        scale: raw scales ``(R, G)`` to start from; None finds them by the scheme's rule.
        iterations: of the three updates, >= 1.
        p: exponent of the norm of the errors, in (0, 1].
        beta: weight of the quadratic part, > 0; constant (the published growth by 1.01 a step has no effect there).
        relative: measure errors in starting steps; False in units of the weights, as the published code.

    Returns:
        :class:`PTQResult` whose latent weight is w. Every group keeps the scale with the least
        :math:`\|w - \hat w\|_p`, the starting one included.

    Raises:
        ValueError: for a bad shape or option.

    Example:
        >>> w = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([3.0])])[None]
        >>> scheme = Scheme.parse("W3", rule="absmax", dtype="fp32")
        >>> [round(hqq(w, scheme, beta=beta, relative=True).scale.item(), 2) for beta in (1e9, 10.0)]
        [0.86, 0.74]
    """
    del hessian, inputs
    w = check_weight(w, scheme)
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    if not (0 < p <= 1 and beta > 0):
        raise ValueError(f"p={p} must lie in (0, 1] and beta={beta} must be positive")
    start = initial_scale(w, scheme) if scale is None else check_scale(w, scheme, scale)
    spec, grid = scheme.scale, scheme.grid
    view = spec.view(w.shape)
    x = view.split(scheme.rotation.apply(w.float()))
    mask = (torch.arange(x.shape[-1], device=x.device) < view.counts().to(x.device)[:, None]).float()
    unit = stored_scale(start, spec)[..., None] if relative else 1.0

    def residual(raw: Tensor) -> tuple[Tensor, Tensor]:
        s = stored_scale(raw, spec)[..., None]
        levels = grid.project_(x / s) * mask
        return levels, x - s * levels

    best, now = start, start
    levels, rest = residual(now)
    least = rest.abs().pow(p).sum(-1)
    for _ in range(iterations):
        e = shrink(rest / unit, p=p, beta=beta) * unit
        fit = ((x - e) * levels).sum(-1) / levels.square().sum(-1).clamp_min(1e-30)
        now = torch.where(fit > 0, fit, now)
        levels, rest = residual(now)
        value = rest.abs().pow(p).sum(-1)
        best = torch.where(value < least, now, best)
        least = torch.minimum(value, least)
    return PTQResult(qtensor=quantize(w, scheme, best), scale=best, latent=w.clone())
