"""QTensor: codes, scales and scheme, with the one canonical dequantization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.numerics import is_representable
from fewbits.scales import combine, double_quantize, find_scale, stored_scale
from fewbits.scheme import Scheme


def dequantize_levels(levels: Tensor, scale: Tensor) -> Tensor:
    """THE canonical order: fp32(scale) times level, in fp32; whoever wants another dtype casts afterwards.

    ``levels`` is ``(R, G, size)`` and is overwritten; ``scale`` is ``(R, G)``.
    """
    return levels.mul_(scale[..., None])


@dataclass(frozen=True)
class QTensor:
    r"""A quantized matrix, :math:`\hat w = R^{-1}(\mathrm{fp32}(s) \cdot \mathrm{level}(\mathrm{code}))`.

    Invariants, checked by :meth:`validate` (called at construction):

    * ``codes`` is an integer tensor of the weight's own shape, within ``[qmin, qmax]`` of the grid;
    * ``scale`` is fp32 ``(R, G)``, finite, positive and exact in the stored dtype;
    * with double-quantized scales, ``super_scale`` (R, S) and ``multipliers`` uint8 (R, G) are there, and
      ``scale == super_scale * multipliers`` exactly; without, both are None.

    Raises:
        ValueError: naming the invariant that fails.
    """

    codes: Tensor
    scale: Tensor
    scheme: Scheme
    super_scale: Tensor | None = None
    multipliers: Tensor | None = None

    def __post_init__(self) -> None:
        self.validate()

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def bits_per_weight(self) -> float:
        """True storage cost, scales counted."""
        return self.scheme.bits_per_weight(self.shape)

    def validate(self) -> None:
        """Check the invariants of the class docstring."""
        grid, spec = self.scheme.grid, self.scheme.scale
        self.scheme.check_shape(self.codes.shape, name="codes")
        if self.codes.dtype != grid.code_dtype:
            raise ValueError(f"codes have dtype {self.codes.dtype}; {grid} needs {grid.code_dtype}")
        if self.codes.device.type != "meta":
            low, high = int(self.codes.min()), int(self.codes.max())
            if low < grid.qmin or high > grid.qmax:
                raise ValueError(f"codes run from {low} to {high}; {grid} allows {grid.qmin} to {grid.qmax}")
        expected = spec.view(self.codes.shape).scale_shape
        if tuple(self.scale.shape) != expected or self.scale.dtype != torch.float32:
            raise ValueError(f"scale is {self.scale.dtype} {tuple(self.scale.shape)}; float32 {expected} is needed")
        if (spec.superblock is None) != (self.super_scale is None) or (self.super_scale is None) != (
            self.multipliers is None
        ):
            raise ValueError("super_scale and multipliers belong to schemes with a superblock, and only to these")
        stored = self.scale if self.super_scale is None else self.super_scale
        if not is_representable(stored, spec.dtype):
            raise ValueError(f"a scale is not finite, not positive or not exact in {spec.dtype!r}")
        if self.super_scale is not None:
            assert self.multipliers is not None
            if not torch.equal(combine(self.super_scale, self.multipliers, spec), self.scale):
                raise ValueError("scale differs from super_scale * multipliers")

    def levels(self) -> Tensor:
        """Levels in steps, fp32, in the weight's shape (before the inverse rotation)."""
        return self.scheme.grid.decode(self.codes)

    def dequantize(self, dtype: torch.dtype = torch.float32, *, rotated: bool = False) -> Tensor:
        """The weight that trains and ships, computed in fp32 in the canonical order and cast to ``dtype``.

        ``rotated`` leaves it in the basis in which it was rounded.
        """
        view = self.scheme.scale.view(self.shape)
        x = view.merge(dequantize_levels(view.split(self.levels()), self.scale))
        return (x if rotated else self.scheme.rotation.invert(x)).to(dtype)


def quantize(w: Tensor, scheme: Scheme, scale: Tensor | None = None) -> QTensor:
    r"""Round a weight to codes: :math:`\mathrm{code} = \mathrm{nearest}(R w / s)`.

    Args:
        w: latent weight ``(out_features, in_features)``, floating point; computed in fp32.
        scheme: grid, scale and rotation.
        scale: raw scales ``(R, G)`` (rounded here to the stored dtype); None finds them by the scheme's rule.

    Returns:
        A :class:`QTensor` whose ``dequantize`` equals ``fake_quantize(w, scheme, scale)`` bit for bit.

    Raises:
        ValueError: for a shape the scheme cannot take, or weights that are not finite.

    Example:
        >>> q = quantize(torch.tensor([[-1.3, -.6, .05, 2.]]), Scheme.parse("W2"), scale=torch.tensor([[0.5]]))
        >>> q.codes.tolist(), q.dequantize().tolist()
        ([[-2, -1, 0, 1]], [[-1.0, -0.5, 0.0, 0.5]])
    """
    scheme.check_shape(w.shape)
    w = w.detach()
    if not bool(torch.isfinite(w).all()):
        raise ValueError(f"weight of shape {tuple(w.shape)} has {int((~torch.isfinite(w)).sum())} non-finite entries")
    rotated = scheme.rotation.apply(w.float())
    spec = scheme.scale
    view = spec.view(w.shape)
    raw = find_scale(rotated, scheme.grid, spec) if scale is None else scale.detach().float()
    if tuple(raw.shape) != view.scale_shape:
        raise ValueError(
            f"scale has shape {tuple(raw.shape)}; {scheme.name} of {tuple(w.shape)} needs {view.scale_shape}"
        )
    super_scale, multipliers = (None, None) if spec.superblock is None else double_quantize(raw, spec)
    s = stored_scale(raw, spec)
    codes = view.merge(scheme.grid.encode(view.split(rotated) / s[..., None]))
    return QTensor(codes.contiguous(), s, scheme, super_scale, multipliers)


def initial_scale(w: Tensor, scheme: Scheme) -> Tensor:
    """Raw scales by the scheme's rule, after the rotation: the start of a learned scale."""
    return find_scale(scheme.rotation.apply(w.detach().float()), scheme.grid, scheme.scale)


__all__ = ["AnyGrid", "QTensor", "dequantize_levels", "initial_scale", "quantize"]
