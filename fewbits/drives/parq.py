"""PARQ, BinaryRelax and hard prox: the forward weight hardens along the run, from the latent weight to the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewbits.drives._base import Drive, DriveContext
from fewbits.grids import AnyGrid


def inverse_slope(fraction: float, *, steepness: float = 10.0, center: float = 0.5) -> float:
    r"""The annealed inverse slope, :math:`\frac{\bar\sigma(f) - \bar\sigma(1)}{\bar\sigma(0) - \bar\sigma(1)}`.

    With :math:`\bar\sigma(f) = 1/(1 + e^{S(f - c)})`: exactly 1 at f = 0 and 0 at f = 1 for *every* center (the
    published schedule is normalised for c = 1/2 only). ``steepness -> 0`` is the line 1 - f.

    Args:
        fraction: f, clamped to [0, 1].
        steepness: S > 0.
        center: c in [0, 1], where the fall is steepest.

    Example:
        >>> [round(inverse_slope(f), 4) for f in (0, 0.25, 0.5, 0.75, 1)]
        [1.0, 0.9299, 0.5, 0.0701, 0.0]
    """

    f = min(1.0, max(0.0, fraction))
    at_start, at_f, at_end = (math.tanh(0.5 * steepness * (x - center)) for x in (0.0, f, 1.0))
    return (at_end - at_f) / (at_end - at_start)


def prox(v: Tensor, grid: AnyGrid, inverse: float) -> Tensor:
    r"""PARQ's proximal map: between two levels with midpoint m, :math:`\mathrm{clip}(m + (v - m)/\rho, q_-, q_+)`.

    Args:
        v: weight in steps.
        grid: the level set.
        inverse: rho in [0, 1], the inverse slope: 1 is the identity within the outermost levels (and clamps outside),
            0 is the nearest level.

    Returns:
        Same shape, within the outermost levels; continuous and monotone in ``v`` for rho > 0.

    Example:
        >>> from fewbits.grids import Codebook
        >>> prox(torch.tensor([0.1, 0.4, 0.6, 0.9, 1.4]), Codebook((0.0, 1.0)), 0.5).round(decimals=4) + 0.0
        tensor([0.0000, 0.3000, 0.7000, 1.0000, 1.0000])

    Reference: arXiv:2503.15748.
    """
    if inverse == 0:
        return grid.project_(v.clone())
    levels = torch.tensor(grid.levels, dtype=v.dtype, device=v.device)
    cell = (torch.bucketize(v.contiguous(), levels, right=True) - 1).clamp_(0, len(levels) - 2)
    low, high = levels[cell], levels[cell + 1]
    middle = (low + high) / 2
    return torch.clamp(middle + (v - middle) / inverse, low, high)


class _Substitute(torch.autograd.Function):
    """Another value with the gradient of ``quantized``."""

    @staticmethod
    def forward(ctx: Any, quantized: Tensor, value: Tensor) -> Tensor:
        return value.to(quantized.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


@dataclass(frozen=True, kw_only=True)
class PARQ(Drive):
    r"""The forward pass of training uses a prox of the latent weight that hardens from identity to quantizer.

    ======================== =========================================================================
    ``kind="parq"``          :func:`prox` with :math:`\rho` of :func:`inverse_slope`
    ``kind="binary_relax"``  :math:`\rho w + (1 - \rho) Q(w)`, same schedule (no clamp outside)
    ``kind="hard"``          the quantizer at once (:math:`\rho = 0`): the end of both
    ======================== =========================================================================

    Gradients are those of the hard quantizer: the surrogate for the latent weight (the paper passes the gradient at the
    prox unchanged: :class:`~fewbits.surrogates.STE`), LSQ's for a learned scale. Before ``start`` the weight is only
    clamped, after ``end`` it is the hard quantizer bit for bit; evaluation always uses the hard one, so a run that is
    evaluated early looks worse than it trains. The levels move with the scale at every step.

    Args:
        kind: which map.
        steepness: S > 0 of the schedule.
        center: c in [0, 1]: where the fall is steepest, as a share of the time from start to end.
        start: share of the run at which hardening starts.
        end: share of the run at which it is complete, ``start < end <= 1``.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> round(PARQ(start=0.2, end=0.8).inverse(0.5), 9)
        0.5

    Reference: arXiv:2503.15748; BinaryRelax, arXiv:1801.06313.
    """

    name: ClassVar[str] = "parq"
    kind: Literal["parq", "hard", "binary_relax"] = "parq"
    steepness: float = 10.0
    center: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("parq", "hard", "binary_relax"):
            raise ValueError(f"kind={self.kind!r} is unknown; use 'parq', 'hard' or 'binary_relax'")
        if not 0 < self.steepness <= 50:
            raise ValueError(f"steepness={self.steepness} is outside (0, 50]; 10 is the published one")
        if not 0 <= self.center <= 1:
            raise ValueError(f"center={self.center} is outside [0, 1]; it is a share of the time from start to end")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start={self.start}, end={self.end} must satisfy 0 <= start < end <= 1")

    def inverse(self, progress: float) -> float:
        """The inverse slope at this share of the run."""
        if self.kind == "hard":
            return 0.0
        fraction = (progress - self.start) / (self.end - self.start)
        return inverse_slope(fraction, steepness=self.steepness, center=self.center)

    def forward_weight(self, w: Tensor, quantized: Tensor, context: DriveContext) -> Tensor:
        """The relaxed weight with the gradients of ``quantized``."""
        inverse = self.inverse(context.progress)
        if inverse == 0:
            return quantized
        with torch.no_grad():
            if self.kind == "binary_relax":
                value = torch.lerp(quantized.float(), w.float(), inverse)
            else:
                scheme = context.scheme
                scale = scheme.scale.view(w.shape).expand(context.scale)
                soft = prox(scheme.rotation.apply(w.float()) / scale, scheme.grid, inverse)
                value = scheme.rotation.invert(soft * scale)
        return _Substitute.apply(quantized, value)
