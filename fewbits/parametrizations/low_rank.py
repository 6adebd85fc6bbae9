r"""LR-QAT: low-rank factors inside the round, over a frozen and compressed base.

.. math:: \hat W = R^{-1}\Bigl( s \cdot \mathrm{level}\bigl(\Phi_0 + \tfrac{\alpha}{r} A B\bigr) \Bigr), \qquad
          \Phi_0 = \varphi(R W_0 / s_0)

Everything inside the level map is in steps. The base :math:`\Phi_0` is computed once, with the scale at the start, and
kept in int8 fixed point, bf16 or fp32; only A, B and the scales are trained, so gradients and optimizer states are
those of :math:`r\,(m + n)` numbers instead of :math:`m n`. What is merged is the *code*, not the weight: it is the one
that the forward pass used, whatever the storage did to :math:`W_0`.

Since the argument of the level map does not contain s, the exact derivative by the scale is the level itself,
:math:`\partial \hat W/\partial s = \ell`, for every surrogate; LSQ's factor :math:`1/\sqrt{n\,q_p}` is kept.

Reference: LR-QAT, arXiv:2406.06385.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewbits.drives import Drive, NoDrive
from fewbits.fake_quant import fake_quantize, scale_gradient_factor
from fewbits.grids import AnyGrid
from fewbits.qtensor import QTensor
from fewbits.rotations import Rotation
from fewbits.scales import ScaleSpec, double_quantize, stored_scale
from fewbits.scheme import Scheme
from fewbits.surrogates import JacQuant, Surrogate
from fewbits.surrogates._base import State

Storage = Literal["int8", "bf16", "fp32"]
_DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}
_MAX_FRACTION_BITS = 7
_STEPS = ScaleSpec(granularity="per_tensor", rule="absmax", mode="frozen", dtype="fp32")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    r"""Rank, factor and storage of the low-rank parametrization.

    Args:
        rank: r, columns of A and rows of B, >= 1 and at most the smaller side of the weight.
        alpha: the product is multiplied by ``alpha / rank``, > 0. The authors use 1.
        storage: of the base. ``int8`` is fixed point with as many fraction bits as the outermost level leaves
            (:meth:`fraction_bits`: Q4.4 for 4-bit integers), off by at most half a unit of it; ``bf16``; ``fp32`` loses
            nothing.
        seed: of B's start, uniform in :math:`\pm 1/\sqrt{n}`; A starts at 0, so training starts from the rounded base.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> from fewbits.grids import Int
        >>> LowRank(rank=8).fraction_bits(Int(4)), LowRank(rank=8).num_trained((64, 32))
        (4, 768)

    Reference: LR-QAT, arXiv:2406.06385.
    """

    name: ClassVar[str] = "low_rank"
    rank: int = 32
    alpha: float = 1.0
    storage: Storage = "int8"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be a whole number of at least 1")
        if not isinstance(self.alpha, int | float) or not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha={self.alpha!r} must be a positive number; the authors use 1")
        if self.storage not in get_args(Storage):
            raise ValueError(f"storage={self.storage!r} is unknown; use one of {', '.join(get_args(Storage))}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} must be a whole number of at least 0")

    @property
    def storage_dtype(self) -> torch.dtype:
        """The torch dtype of the base."""
        return _DTYPES[self.storage]

    def check(self, scheme: Scheme, surrogate: Surrogate, drive: Drive | None) -> None:
        """Refuse what moves or reads a full trained weight.

        Raises:
            ValueError: for dynamic scales, a weight that stays rotated, a drive, or a gain that is applied to the
                optimizer's step.
        """
        if scheme.scale.mode == "dynamic":
            raise ValueError(
                "parametrization low_rank divides by the scale once, so the scale cannot be found anew at every step; "
                "use mode 'learned' or 'frozen'"
            )
        if scheme.rotation.basis == "rotated":
            raise ValueError("parametrization low_rank rotates its result back; it needs rotation basis 'original'")
        if drive is not None and not isinstance(drive, NoDrive):
            raise ValueError(
                f"drive {drive.name!r} moves the full latent weight, which low_rank keeps frozen; drop one of the two"
            )
        if isinstance(surrogate, JacQuant) and surrogate.apply == "update":
            raise ValueError(
                "jacquant with apply='update' multiplies the step of a full weight, which low_rank does not train; "
                "use apply='grad'"
            )
        if self.storage == "int8":
            self.fraction_bits(scheme.grid)

    def fraction_bits(self, grid: AnyGrid) -> int:
        """Bits after the point of the int8 base: the most with which every level of the grid can be held.

        Raises:
            ValueError: for a grid with a level beyond int8.
        """
        for bits in range(_MAX_FRACTION_BITS, -1, -1):
            if grid.levels[0] * 2**bits >= -128 and grid.levels[-1] * 2**bits <= 127:
                return bits
        raise ValueError(f"storage 'int8' cannot hold the levels of {grid}; use storage 'bf16' or 'fp32'")

    def num_trained(self, shape: tuple[int, int] | torch.Size) -> int:
        """Trained numbers of a weight of this shape, scales not counted."""
        return self.rank * (int(shape[0]) + int(shape[1]))

    def compress(self, w: Tensor, scheme: Scheme, scale: Tensor) -> Tensor:
        r"""The frozen base :math:`\varphi(R W / s)`, in steps times ``2**fraction_bits`` for int8 and in steps else.

        int8 saturates at its own range, which contains all levels, so saturation never changes a code.

        Args:
            w: ``(out_features, in_features)``.
            scheme: grid, scale and rotation.
            scale: raw scales ``(R, G)``, units of ``w`` per step.
        """
        s = scheme.scale.view(w.shape).expand(stored_scale(scale.detach(), scheme.scale))
        v = scheme.rotation.apply(w.detach().float()) / s
        if self.storage == "int8":
            v = (v * 2 ** self.fraction_bits(scheme.grid)).round().clamp(-128, 127)
        return v.to(self.storage_dtype)

    def start(self, shape: tuple[int, int] | torch.Size, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(A, B)`` before training, ``(out_features, rank)`` zeros and ``(rank, in_features)``, in ``like``'s dtype.

        B is a function of seed and layer name; torch's random stream is untouched.

        Raises:
            ValueError: for a rank above the smaller side of the weight.
        """
        rows, columns = int(shape[0]), int(shape[1])
        if self.rank > min(rows, columns):
            raise ValueError(
                f"{name or 'weight'}: rank={self.rank} is above the smaller side of {(rows, columns)}, where low rank "
                f"is no restriction; use rank <= {min(rows, columns)}"
            )
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        b = (2 * torch.rand(self.rank, columns, generator=generator) - 1) / math.sqrt(columns)
        return torch.zeros(rows, self.rank, dtype=like.dtype, device=like.device), b.to(like.device, like.dtype)

    def steps(self, base: Tensor, a: Tensor, b: Tensor, grid: AnyGrid) -> Tensor:
        r""":math:`\Phi_0 + \frac{\alpha}{r} A B` in steps, fp32, also under autocast."""
        unit = 2.0 ** -self.fraction_bits(grid) if self.storage == "int8" else 1.0
        with torch.autocast(base.device.type, enabled=False):
            return torch.addmm(base.float(), a.float(), b.float(), beta=unit, alpha=self.alpha / self.rank)

    def weight(
        self,
        base: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        scheme: Scheme,
        surrogate: Surrogate,
        state: State,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        r"""The weight of the forward pass, differentiable in A, B and the scale.

        With G the gradient at the result and P the surrogate's pullback, in the rotated space:
        :math:`\partial L/\partial A = \frac{\alpha}{r} P(s \odot G) B^T`,
        :math:`\partial L/\partial B = \frac{\alpha}{r} A^T P(s \odot G)`, and for the scale
        :math:`\frac{1}{\sqrt{n q_p}} \sum_g G_j \ell_j`. Only base, A, B and the scale are kept for the backward pass,
        which computes everything else again.

        Args:
            base: what :meth:`compress` gave, ``(out_features, in_features)``.
            a: ``(out_features, rank)``.
            b: ``(rank, in_features)``.
            scale: raw scales ``(R, G)``.
            scheme: grid, scale and rotation.
            surrogate: stands for the derivative of the level map.
            state: the surrogate's tensors.
            dtype: of the result; None is A's.

        Returns:
            ``qtensor(...).dequantize(dtype)`` bit for bit.
        """

        def compute(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
            v = self.steps(base, a, b, scheme.grid)
            inner = _in_steps(scheme)
            levels = fake_quantize(v, inner, torch.ones(1, 1, device=v.device), surrogate, state)
            view = scheme.scale.view(v.shape)
            factor = scale_gradient_factor(scheme, v.shape).to(v.device)
            s = stored_scale(scale.detach(), scheme.scale) + (scale - scale.detach()) * factor  # the sum adds 0
            return scheme.rotation.invert(view.merge(view.split(levels) * s[..., None])).to(dtype or a.dtype)

        if torch.is_grad_enabled() and any(t.requires_grad for t in (a, b, scale)):
            recomputed: Tensor = checkpoint(compute, a, b, scale, use_reentrant=False, preserve_rng_state=False)
            return recomputed
        return compute(a, b, scale)

    def latent(self, base: Tensor, a: Tensor, b: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
        r""":math:`R^{-1}(s\,(\Phi_0 + \frac{\alpha}{r} A B))`: the full weight that stands before the level map."""
        v = self.steps(base, a, b, scheme.grid)
        s = scheme.scale.view(v.shape).expand(stored_scale(scale.detach(), scheme.scale))
        return scheme.rotation.invert(v * s).to(a.dtype)

    @torch.no_grad()
    def qtensor(self, base: Tensor, a: Tensor, b: Tensor, scale: Tensor, scheme: Scheme) -> QTensor:
        """Codes and scales, merged exactly: those of the forward pass.

        Raises:
            ValueError: for factors that are not finite.
        """
        v = self.steps(base, a, b, scheme.grid)
        if not bool(torch.isfinite(v).all()):
            raise ValueError(f"low-rank factors of a weight of shape {tuple(v.shape)} give non-finite entries")
        raw = scale.detach().float()
        super_scale, multipliers = (
            (None, None) if scheme.scale.superblock is None else double_quantize(raw, scheme.scale)
        )
        codes = scheme.grid.encode(v).contiguous()
        return QTensor(codes, stored_scale(raw, scheme.scale), scheme, super_scale, multipliers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :func:`fewbits.parametrizations.parametrization_from_dict` is the inverse."""
        return {"name": self.name, **asdict(self)}


def _in_steps(scheme: Scheme) -> Scheme:
    """The same grid on weights that are in steps already."""
    return replace(scheme, scale=_STEPS, rotation=Rotation())
