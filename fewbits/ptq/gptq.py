r"""GPTQ: round column by column and let the columns that are left make up for each error.

Once a weight q is fixed, the best change of the others for the output error :math:`\mathrm{tr}(\Delta H \Delta^\top)`
has a closed form. Taken for the columns in order, all of them come from one Cholesky factor, :math:`H^{-1} = U^\top U`
with U upper triangular:

.. math:: e_j = \frac{w_j - q_j}{U_{jj}}, \qquad w_{j:} \leftarrow w_{j:} - e_j\, U_{j, j:}.

Reference: Frantar et al., arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from fewbits.scales import find_scale, stored_scale
from fewbits.scheme import Scheme


def gptq(
    w: Tensor,
    scheme: Scheme,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    scale: Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    clip: bool = False,
    block_size: int = 128,
) -> PTQResult:
    r"""Quantize for the least output error, given the second moments of the inputs; any grid.

    Columns whose input was always 0 are rounded to nearest (the published code sets them to 0, which is no level of the
    binary and the half-shifted grid, and forgets what other text may need). With :math:`H \propto I` this is
    round-to-nearest.

    Args:
        w: ``(out_features, in_features)``; computed in float64 if ``w`` is, else in fp32 (the factor in float64).
        scheme: grid, scale and rotation (then everything happens in the rotated basis).
        hessian: ``(in_features, in_features)``, :math:`X^\top X` up to a factor.
        inputs: ``(.., in_features)`` instead of the Hessian.
        scale: raw scales ``(R, G)``, given; None finds them by the scheme's rule.
        damping: added to the diagonal of H, in units of its mean, >= 0; the larger, the more like round-to-nearest.
        act_order: take the columns in the order of falling diagonal of H, so that the important ones are rounded while
            many others can still make up for them. Groups stay those of neighbouring columns, so their scales must be
            known before: with per-group scales this needs ``static_groups``.
        static_groups: find all scales from the original weight; otherwise the scales of a group are found when its
            first column is reached, from the weights as they are then.
        clip: improve every scale that is found by :func:`~fewbits.ptq.clip.clip_scale`, with the group's part of H.
        block_size: columns between two updates of the rest; changes speed only, up to rounding.

    Returns:
        :class:`PTQResult`; the latent weight is the compensated one that was rounded.

    Raises:
        ValueError: for a bad option, a missing or bad Hessian, or one that damping does not make positive definite.

    Example:
        >>> w, h = torch.tensor([[0.3, 0.1]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> gptq(w, Scheme.parse("W4"), hessian=h, scale=torch.ones(1, 1), damping=0.0).latent
        tensor([[0.3000, 0.2500]])
    """
    w = check_weight(w, scheme)
    if not damping >= 0:
        raise ValueError(f"damping={damping} must be >= 0; 0.01 is usual")
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    spec, grid = scheme.scale, scheme.grid
    grouped = spec.granularity == "per_group" and scale is None
    if act_order and grouped and not static_groups:
        raise ValueError(
            "act_order takes the columns of a group at different times, so scales of groups must be known before: "
            "pass static_groups=True"
        )
    h = rotate_hessian(resolve_hessian(w, hessian, inputs), scheme)
    x = scheme.rotation.apply(w if w.dtype == torch.float64 else w.float())
    order, u = _factor(h, damping, act_order)
    u = u.to(x.dtype)
    view = spec.view(w.shape)
    moving = grouped and not static_groups
    if moving:
        raw = torch.zeros(view.scale_shape, device=w.device)
        steps = torch.zeros_like(x)
    else:
        raw = find_scale(x, grid, spec) if scale is None else check_scale(w, scheme, scale)
        if clip and scale is None:
            raw = clip_scale(x, scheme, h, raw)
        steps = view.expand(stored_scale(raw, spec)).to(x.dtype)[:, order]
    x = x[:, order].clone()
    rounded = torch.empty_like(x)  # the weight as it was when it was rounded
    codes = torch.empty(x.shape, dtype=grid.code_dtype, device=w.device)
    for start, end in _column_blocks(x.shape[1], block_size, spec.superblock or spec.group_size if moving else None):
        if moving:
            part = x[:, start:end]
            assert spec.group_size is not None
            found = find_scale(part, grid, spec)
            if clip:
                found = clip_scale(part, scheme, h[start:end, start:end], found)
            first = start // spec.group_size
            raw[:, first : first + found.shape[1]] = found
            steps[:, start:end] = spec.view(part.shape).expand(stored_scale(found, spec))
        errors = torch.empty_like(x[:, start:end])
        for j in range(start, end):
            column, step = x[:, j].clone(), steps[:, j]
            rounded[:, j] = column
            codes[:, j] = grid.encode(column / step)
            error = (column - grid.decode(codes[:, j]).to(x.dtype) * step) / u[j, j]
            errors[:, j - start] = error
            x[:, j + 1 : end] -= error[:, None] * u[j, j + 1 : end]
        x[:, end:] -= errors @ u[start:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return finish(rounded[:, back], codes[:, back], raw, scheme, w)


def _factor(h: Tensor, damping: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """Order of the columns, and upper U with ``inv(H) = U^T U`` in that order."""
    h = h.clone()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones((), dtype=h.dtype, device=h.device)
    diagonal += damping * mean
    h[dead, :] = 0.0
    h[:, dead] = 0.0
    h.diagonal()[dead] = mean
    n = len(h)
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(n, device=h.device)
    lower, info = torch.linalg.cholesky_ex(h[order][:, order])
    if int(info) == 0:
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(info) != 0 or not bool(torch.isfinite(upper).all()):
        raise ValueError(
            f"the Hessian is not positive definite with damping={damping} (too little data, or redundant inputs); "
            "raise damping or calibrate on more text"
        )
    return order, upper


def _column_blocks(n: int, block_size: int, unit: int | None) -> Iterator[tuple[int, int]]:
    """Column ranges; with moving scales one group (or superblock) each, since it must be up to date when it starts."""
    size = block_size if unit is None else unit
    return ((start, min(start + size, n)) for start in range(0, n, size))
