"""Block Hadamard rotations of the input axis: what happens to ``w`` before and after quantization."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

RotationKind = Literal["none", "hadamard", "random_hadamard"]
Basis = Literal["original", "rotated"]


@dataclass(frozen=True, kw_only=True)
class Rotation:
    r"""An orthonormal block-diagonal transform of the last axis; its own inverse up to the signs.

    ``hadamard``: :math:`y = x H / \sqrt{n}` in blocks of n; ``random_hadamard``: signs, then the same.
    A width that ``block_size`` does not divide uses the largest power of two that divides it. Butterflies of additions,
    not a matrix product, so that the result does not depend on batch shape, threads or BLAS.

    A rotation stands around a quantizer, :math:`R^{-1} Q(R x)`: QuEST's "Hadamard" form. With ``basis="rotated"`` the
    result of a product's operand stays rotated and the other operand is rotated too, :math:`y = Q(R x)\,Q(R w)^\top`:
    its "HalfHadamard" form. R is orthonormal, so the two are one function up to rounding; in the second one both
    operands of the product are levels times scales, at the price of rotating inputs at run time.

    Args:
        kind: ``none``, ``hadamard`` or ``random_hadamard``.
        block_size: power of two, 2..4096.
        seed: of the random signs.
        basis: ``original`` rotates back after rounding; ``rotated`` does not, in the product of a linear layer.

    Raises:
        ValueError: for values out of range, or a basis without a rotation.

    Example:
        >>> spike = torch.eye(128)[:1]
        >>> round(Rotation(kind="hadamard").apply(spike)[0, 5].item(), 5)
        0.08839

    Reference: QuEST, arXiv:2502.05003.
    """

    kind: RotationKind = "none"
    block_size: int = 128
    seed: int = 0
    basis: Basis = "original"

    def __post_init__(self) -> None:
        if self.basis not in get_args(Basis):
            raise ValueError(f"rotation basis={self.basis!r} is unknown; use one of {', '.join(get_args(Basis))}")
        if self.basis == "rotated" and self.kind == "none":
            raise ValueError("rotation basis='rotated' needs a rotation; use kind 'hadamard' or 'random_hadamard'")
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

    def into_product(self, x: Tensor) -> Tensor:
        """``x`` as a product takes it: rotated if the basis is, in float32 or wider and cast back, else as it is."""
        if self.basis == "original":
            return x
        return self.apply(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the basis only where it is not the original one, so that older files are as they were."""
        data = asdict(self)
        if self.basis == "original":
            del data["basis"]
        return data


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
