"""Block Hadamard rotations of the input axis: what happens to ``w`` before and after quantization."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

RotationKind = Literal["none", "hadamard", "random_hadamard"]


@dataclass(frozen=True, kw_only=True)
class Rotation:
    r"""An orthonormal block-diagonal transform of the last axis; its own inverse up to the signs.

    ``hadamard``: :math:`y = x H / \sqrt{n}` in blocks of n; ``random_hadamard``: signs, then the same.
    A width that ``block_size`` does not divide uses the largest power of two that divides it. Butterflies of additions,
    not a matrix product, so that the result does not depend on batch shape, threads or BLAS.

    Args:
        kind: ``none``, ``hadamard`` or ``random_hadamard``.
        block_size: power of two, 2..4096.
        seed: of the random signs.

    Example:
        >>> spike = torch.eye(128)[:1]
        >>> round(Rotation(kind="hadamard").apply(spike)[0, 5].item(), 5)
        0.08839

    Reference: QuEST, arXiv:2502.05003.
    """

    kind: RotationKind = "none"
    block_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(RotationKind):
            raise ValueError(f"rotation {self.kind!r} is unknown; use one of {', '.join(get_args(RotationKind))}")
        n = self.block_size
        if n < 2 or n > 4096 or n & (n - 1):
            raise ValueError(f"rotation block_size={n} must be a power of two from 2 to 4096")

    def block_for(self, width: int) -> int:
        """The block used for a row of this width.

        Raises:
            ValueError: for an odd width, which no Hadamard block divides.
        """
        block = min(self.block_size, width & -width)
        if block < 2:
            raise ValueError(f"rotation of an odd width {width}: no power of two divides it; use rotation 'none'")
        return block

    def _signs(self, width: int, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + width)
        return (torch.randint(0, 2, (width,), generator=generator) * 2 - 1).to(like.device, like.dtype)

    def apply(self, x: Tensor) -> Tensor:
        """Rotate the last axis (new tensor; ``x`` itself for ``none``)."""
        if self.kind == "none":
            return x
        if self.kind == "random_hadamard":
            x = x * self._signs(x.shape[-1], x)
        return _walsh_hadamard(x, self.block_for(x.shape[-1]))

    def invert(self, x: Tensor) -> Tensor:
        """Undo :meth:`apply` (to rounding); also its transpose, so the backward pass uses it too."""
        if self.kind == "none":
            return x
        x = _walsh_hadamard(x, self.block_for(x.shape[-1]))
        return x * self._signs(x.shape[-1], x) if self.kind == "random_hadamard" else x

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _walsh_hadamard(x: Tensor, block: int) -> Tensor:
    shape = x.shape
    x = x.reshape(-1, block)
    half = 1
    while half < block:
        pairs = x.view(-1, block // (2 * half), 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((a + b, a - b), dim=2).view(-1, block)
        half *= 2
    return (x * (1 / math.sqrt(block))).view(shape)
