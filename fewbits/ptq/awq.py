r"""AWQ: make the columns that matter larger before rounding, and the inputs of the layer smaller by the same factors.

:math:`W x = (W \mathrm{diag}(s))(\mathrm{diag}(s)^{-1} x)` for every positive s, so that s costs nothing if whatever
computes x can take the division (:mod:`fewbits.ptq.folding`). Rounding errors of scaled columns count less by
:math:`1/s_c`; s follows the size of the inputs, with one exponent found by the output error.

Reference: Lin et al., arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.ptq._base import (
    PTQResult,
    check_scale,
    check_weight,
    output_error,
    resolve_hessian,
    rotate_hessian,
)
from fewbits.ptq.clip import clip_scale
from fewbits.qtensor import initial_scale, quantize
from fewbits.scheme import Scheme

_SMALLEST = 1e-4
"""Of a factor before it is normalised (the published code's clamp)."""
_SEARCH_ROWS = 256
"""Rows of a weight that the search for the exponent looks at."""


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """Result of :func:`search_scale`.

    Attributes:
        factors: s, ``(in_features,)`` fp32, positive; all 1 if no exponent beats 0.
        ratio: the exponent.
        error: output error of the rounded scaled weights, mean per token.
        plain_error: the same without factors.
    """

    factors: Tensor
    ratio: float
    error: float
    plain_error: float


def scale_factors(magnitude: Tensor, ratio: float) -> Tensor:
    r"""Factors of one exponent, :math:`s_c = \max(m_c^{\rho}, 10^{-4})`, divided by :math:`\sqrt{\max s\,\min s}`.

    Example:
        >>> scale_factors(torch.tensor([1.0, 4.0]), 0.5)
        tensor([0.7071, 1.4142])
    """
    s = magnitude.float().pow(ratio).clamp_min(_SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def awq(
    w: Tensor,
    scheme: Scheme,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    scale: Tensor | None = None,
    clip: bool = True,
) -> PTQResult:
    """The part of AWQ that a single layer can do: round to nearest, with scales searched by the output error.

    The factors of the columns need a place to go; :func:`search_scale` finds them, :func:`fewbits.ptq.apply_ptq` folds
    them. Call this with the scaled weight and the Hessian of the scaled inputs.

    Args:
        w: ``(out_features, in_features)``.
        scheme: grid, scale and rotation.
        hessian: ``(in_features, in_features)`` of the layer's inputs.
        inputs: ``(.., in_features)`` instead of the Hessian.
        scale: raw scales ``(R, G)`` to start from; None finds them by the scheme's rule.
        clip: search the scales by :func:`~fewbits.ptq.clip.clip_scale`; False is round-to-nearest.

    Returns:
        :class:`PTQResult` whose latent weight is ``w``.

    Raises:
        ValueError: for a bad shape, or a missing or bad Hessian.
    """
    w = check_weight(w, scheme)
    h = resolve_hessian(w, hessian, inputs)
    scale = initial_scale(w, scheme) if scale is None else check_scale(w, scheme, scale)
    if clip:
        scale = clip_scale(scheme.rotation.apply(w.float()), scheme, rotate_hessian(h, scheme), scale)
    return PTQResult(qtensor=quantize(w, scheme, scale), scale=scale, latent=w.clone())


def search_scale(
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    magnitude: Tensor,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    num_ratios: int = 20,
    clip: bool = True,
) -> ScaleSearch:
    r"""One set of factors for all layers that read the same input, by the summed error of their outputs.

    The exponents :math:`0, 1/n, .., (n - 1)/n` are compared by what :func:`awq` makes of the scaled weights, clip
    search included, on at most 256 rows of each; the best one has to beat 0 on all. (Factors and clip compete: a rule
    that minimises the error of the scaled weight, such as ``mse`` without clip search, clips just the columns that were
    made large, and then the exponent 0 wins. The published combination is ``rule="absmax"``.)

    Args:
        weights: matrices ``(out_features, in_features)`` with a common ``in_features``.
        schemes: one for each.
        magnitude: mean abs(x) of every input channel, ``(in_features,)``.
        hessian: of the inputs, ``(in_features, in_features)``.
        inputs: the inputs themselves instead, ``(.., in_features)``.
        num_ratios: n; 1 tries the exponent 0 only.
        clip: as of :func:`awq`.

    Returns:
        :class:`ScaleSearch`.

    Raises:
        ValueError: for a bad number, or a missing or bad Hessian.
    """
    if num_ratios < 1:
        raise ValueError(f"num_ratios={num_ratios} must be at least 1")
    h = resolve_hessian(weights[0], hessian, inputs)
    parts = [w[torch.linspace(0, len(w) - 1, min(len(w), _SEARCH_ROWS)).round().long()] for w in weights]

    def error(of: Sequence[Tensor], factors: Tensor) -> float:
        scaled, total = h / torch.outer(factors, factors).double(), 0.0
        for w, scheme in zip(of, schemes, strict=True):
            w = w.detach().float() * factors
            total += output_error(w, awq(w, scheme, hessian=scaled, clip=clip).qtensor.dequantize(), scaled)
        return total

    tried = {i / num_ratios: scale_factors(magnitude, i / num_ratios) for i in range(num_ratios)}
    ratio = min(tried, key=lambda r: error(parts, tried[r]))
    found, plain = error(weights, tried[ratio]), error(weights, tried[0.0])
    if found >= plain:
        return ScaleSearch(factors=tried[0.0], ratio=0.0, error=plain, plain_error=plain)
    return ScaleSearch(factors=tried[ratio], ratio=ratio, error=found, plain_error=plain)
