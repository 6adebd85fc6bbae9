r"""Clip search: the scale of every group by what its rounding does to the layer's output.

Reference: the second half of AWQ, Lin et al., arXiv:2306.00978.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.scales import GroupView, stored_scale
from fewbits.scheme import Scheme


def clip_scale(
    w: Tensor, scheme: Scheme, hessian: Tensor, scale: Tensor, *, octaves: float = 1.0, num: int = 25
) -> Tensor:
    r"""Multiply every raw scale by the number from :math:`2^{-o}` to :math:`2^o` that is best for its group's output.

    The error of a group is :math:`\Delta_g H_{gg} \Delta_g^\top`: what its weights do to the output. The published
    search only goes down, from the largest weight; here it goes both ways, since a rule such as ``mse`` has clipped.

    Args:
        w: in the basis in which it is rounded, ``(out_features, in_features)``.
        scheme: grid and scale.
        hessian: in the same basis.
        scale: raw, ``(R, G)``: where the search starts, and what it returns where nothing is better.
        octaves: o, >= 0.
        num: multiples tried, in equal ratios.

    Returns:
        Raw scales ``(R, G)``.
    """
    spec, grid = scheme.scale, scheme.grid
    per_row = (
        GroupView(tuple(w.shape), "per_group", spec.group_size)
        if spec.group_size
        else GroupView(tuple(w.shape), "per_channel")
    )
    x = per_row.split(w.detach().float())
    blocks = _diagonal_blocks(hessian.float(), per_row)

    def error(candidate: Tensor) -> Tensor:
        s = stored_scale(candidate, spec).expand(per_row.rows, -1)[..., None]
        delta = grid.project_(x / s) * s - x
        each = (torch.einsum("rgi,gij->rgj", delta, blocks) * delta).sum(-1)
        return each if candidate.shape == each.shape else each.sum().reshape(1, 1)

    best = scale
    start = lowest = error(scale)
    for exponent in torch.linspace(-octaves, octaves, num).tolist():
        candidate = scale * 2.0**exponent
        value = error(candidate)
        best = torch.where(value < lowest, candidate, best)
        lowest = torch.minimum(value, lowest)
    # double-quantized scales of a row hang together: the parts that are best alone may not be together
    worse = error(best).sum(-1, keepdim=True) > start.sum(-1, keepdim=True)
    return torch.where(worse, scale, best)


def _diagonal_blocks(hessian: Tensor, view: GroupView) -> Tensor:
    """``(G, size, size)``: the Hessian inside every group of columns, 0 where the last one is padded."""
    size, num = view.size, view.num_groups
    missing = num * size - len(hessian)
    padded = torch.nn.functional.pad(hessian, (0, missing, 0, missing))
    return torch.stack([padded[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(num)])
