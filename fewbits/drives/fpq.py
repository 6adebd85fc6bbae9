"""FPQ-style noise: uniform, one cell wide, now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.drives._base import Drive, draw


@dataclass(frozen=True, kw_only=True)
class FPQ(Drive):
    r"""With probability p per forward pass :math:`Q(w + \delta)`, :math:`\delta` uniform and ``width`` cells wide.

    The paper perturbs the *input* of a layer by one activation step; on the weight this is our reconstruction. One cell
    wide, it is stochastic rounding: :math:`E\,Q(w + \delta) = w` within the outermost levels. The mean effect on a
    smooth loss is :math:`\frac{(\mathrm{width} \cdot \mathrm{pitch})^2}{24}\,\mathrm{tr} H` per perturbed pass.

    Args:
        probability: p in [0, 1] that a layer is perturbed in one forward pass.
        width: full width of the noise in cells, > 0.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> FPQ(probability=0.0).perturbs
        False

    Reference: arXiv:2503.11159.
    """

    name: ClassVar[str] = "fpq"
    probability: float = 0.1
    width: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability} is outside [0, 1]")
        if not 0 < self.width < float("inf"):
            raise ValueError(f"width={self.width} must be positive and finite; it is in cells")

    @property
    def perturbs(self) -> bool:
        """Whether there is ever noise."""
        return self.probability > 0

    def perturb(self, w: Tensor, pitch: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``w``, or ``w`` plus uniform noise."""
        if float(draw("uniform", torch.zeros(()), generator)) >= self.probability:
            return w
        return w + ((draw("uniform", w, generator) - 0.5) * (self.width * pitch)).to(w.dtype)
