r"""A trajectory in weight space without its weights: linear sketches that keep lengths and angles.

The count sketch adds every coordinate, with a random sign, to one of ``m`` random buckets,

.. math:: (S a)_b = \sum_{j : h(j) = b} \sigma_j a_j, \qquad E \langle S a, S c\rangle = \langle a, c\rangle, \qquad
          \mathrm{Var} \le \tfrac{2}{m} \|a\|^2 \|c\|^2 .

It is linear, so :math:`S w_k - S w_0 = S (w_k - w_0)`: sketches saved *during* training can be projected *afterwards*
on a plane that is known only when training is over, at ``m`` numbers per step instead of a copy of the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CountSketch:
    r"""The map :math:`S`: from named tensors to ``size`` numbers; a tensor's part depends on its name, not its place.

    Args:
        size: buckets ``m``; the relative error of an inner product is about :math:`\sqrt{2 / m}` (0.6% at 65,536).
        seed: of buckets and signs.

    Raises:
        ValueError: for a size below 1 or a negative seed.

    Example:
        >>> sketch = CountSketch(size=4096, seed=0)
        >>> a = {"w": torch.ones(100, 10)}
        >>> torch.equal(sketch({"w": 2 * a["w"]}), 2 * sketch(a))
        True
        >>> abs(float(sketch(a) @ sketch(a)) - 1000) < 100
        True

    Reference: the count sketch of Charikar, Chen and Farach-Colton; here for the slices of arXiv:2606.09012.
    """

    size: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} buckets must be at least 1; use e.g. 65536")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")

    @property
    def relative_error(self) -> float:
        r"""Standard deviation bound of an inner product over the product of the two norms, :math:`\sqrt{2/m}`."""
        return math.sqrt(2 / self.size)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sketch ``(size,)``, fp64 on the CPU."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for name, value in tensors.items():
            # Seeded by the name, so that the order of a model's parameters does not matter.
            key = hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
            flat = value.detach().reshape(-1).to(device="cpu", dtype=torch.float64)
            draw = torch.randint(0, 2 * self.size, flat.shape, generator=generator)
            total.index_add_(0, draw >> 1, torch.where(draw % 2 == 0, flat, -flat))
        return total
