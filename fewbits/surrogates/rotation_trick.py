"""Rotation Trick: a fixed geometric alignment of the gradient, group by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.scales import GroupView
from fewbits.surrogates._base import State, Surrogate

_SMALL = 1e-12


def rotate_back(grad: Tensor, e: Tensor, q: Tensor) -> Tensor:
    r"""The transpose of the rotation and rescaling that maps ``e`` to ``q``, applied to ``grad``.

    With unit vectors :math:`\hat e, \hat q` and :math:`r = \hat e + \hat q`,

    .. math:: \frac{\|q\|}{\|e\|} R^\top g, \qquad R = I - 2\frac{r r^\top}{\|r\|^2} + 2 \hat q \hat e^\top,
              \qquad R \hat e = \hat q,\ R^\top R = I.

    Where no such map is defined (a zero vector, or ``q`` opposite to ``e``) the gradient passes unchanged.

    Args:
        grad: gradient at ``q``, ``(..., n)``.
        e: what was quantized, same shape.
        q: what it became, same shape.

    Returns:
        Gradient at ``e``, same shape; its inner product with ``e`` is that of ``grad`` with ``q``.

    Example:
        >>> rotate_back(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor([ 0., -2.])
    """
    norm_e, norm_q = e.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    unit_e, unit_q = e / norm_e.clamp_min(_SMALL), q / norm_q.clamp_min(_SMALL)
    r = unit_e + unit_q
    length = r.square().sum(-1, keepdim=True)
    rotated = (
        grad
        - r * (2 * (r * grad).sum(-1, keepdim=True) / length.clamp_min(_SMALL))
        + unit_e * (2 * (unit_q * grad).sum(-1, keepdim=True))
    )
    defined = (norm_e > _SMALL) & (norm_q > _SMALL) & (length > _SMALL)
    return torch.where(defined, rotated * (norm_q / norm_e.clamp_min(_SMALL)), grad)


@dataclass(frozen=True, kw_only=True)
class RotationTrick(Surrogate):
    r"""Gradient turned and scaled as ``w`` is turned and scaled into ``Q(w)``, per group of weights.

    Nothing is learned and nothing is clipped: the map of :func:`rotate_back` is a constant of the backward pass. It
    keeps angles: the gradient makes the same angle with the latent group as it made with the quantized one. A group
    that lies on the grid passes its gradient unchanged (to rounding); so does a group that rounds to 0 as a whole. The
    trick was made for vectors of a VQ-VAE; on groups of scalar-quantized weights it is a baseline.

    Args:
        group_size: weights that turn together, consecutive in a row, >= 2 (one weight has no direction); None is the
            whole row. Groups should lie inside the scheme's scale groups: the map is computed in steps, which is the
            same map only where one scale is shared.

    Raises:
        ValueError: for a group of fewer than 2 weights.

    Example:
        >>> from fewbits.grids import HalfShifted
        >>> v = torch.tensor([[0.5, -1.5, 1.5, 0.5]])
        >>> torch.allclose(RotationTrick().pullback(torch.ones(1, 4), v, HalfShifted(2), {}), torch.ones(1, 4))
        True

    Reference: arXiv:2410.06424; as a QAT baseline in arXiv:2605.25469.
    """

    name: ClassVar[str] = "rotation_trick"
    group_size: int | None = 128

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} must be at least 2, or None for whole rows")

    def pullback(self, grad: Tensor, v: Tensor | None, grid: AnyGrid, state: State) -> Tensor:
        """The turned and rescaled gradient."""
        del state
        assert v is not None
        view = GroupView(tuple(v.shape), "per_channel" if self.group_size is None else "per_group", self.group_size)
        return view.merge(rotate_back(view.split(grad), view.split(v), view.split(grid.project_(v.clone()))))
