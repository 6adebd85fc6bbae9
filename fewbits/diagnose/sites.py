"""Where a model is rounded: the weights that a rule would quantize, each tensor once, in the layout they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.convert import Rule, select_layers
from fewbits.geometry.directions import Vector
from fewbits.qtensor import QTensor, quantize
from fewbits.scheme import Scheme


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One weight: module name, the parameter itself, and whether it is stored as ``(in_features, out_features)``."""

    name: str
    weight: Tensor
    transposed: bool = False

    @property
    def matrix(self) -> Tensor:
        """The weight as ``(out_features, in_features)``, detached."""
        w = self.weight.detach()
        return w.t() if self.transposed else w

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        rows, columns = self.matrix.shape
        return rows, columns

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix ``(out_features, in_features)`` in the layout of the parameter."""
        return (matrix.t() if self.transposed else matrix).contiguous()

    def quantized(self, scheme: Scheme) -> QTensor:
        """Codes of the weight, scales by the scheme's own rule (``mse`` unless it says otherwise)."""
        return quantize(self.matrix, scheme)

    def rounded(self, scheme: Scheme) -> Tensor:
        """The deployed weight, in the layout and dtype of the parameter."""
        return self.stored(self.quantized(scheme).dequantize(self.weight.dtype))

    def size_in_bits(self, scheme: Scheme) -> int:
        """Codes and scales, rounded to whole bits."""
        return round(scheme.bits_per_weight(self.shape) * self.weight.numel())


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """What rounding at a point knows: deployed weight, pitch of every weight, and the error of the clipped ones."""

    rounded: Vector
    pitch: Vector
    clip_error: Vector
    clipped_share: float


def find_sites(model: nn.Module, schemes: Sequence[Scheme], ignore: Sequence[str] | None = None) -> list[Site]:
    """The weights that ``prepare`` would quantize with a single rule ``*``, tied ones once.

    Args:
        model: a plain model on real memory.
        schemes: every one must take the shape of every weight.
        ignore: patterns as ``prepare`` takes them.

    Raises:
        ValueError: for a prepared model, no layer, no scheme, or a shape that a scheme cannot take.

    Example:
        >>> sites = find_sites(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), [Scheme.parse("W2")])
        >>> [(s.name, s.shape) for s in sites]
        [('0', (4, 8)), ('1', (2, 4))]
    """
    if not schemes:
        raise ValueError("no schemes: name at least one, e.g. W2")
    chosen = select_layers(model, [Rule(scheme=schemes[0])], ignore)
    sites: list[Site] = []
    for name, (_, module) in chosen.items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        site = Site(name=name, weight=weight, transposed=isinstance(module, Conv1D))
        if any(weight is other.weight for other in sites):
            continue
        for scheme in schemes:
            scheme.check_shape(site.shape, name=f"{name}.weight")
        sites.append(site)
    return sites


def round_cells(sites: Sequence[Site], scheme: Scheme) -> Cells:
    """Round every site and tell how wide its cells are.

    A weight counts as clipped where it lies more than half a step beyond the outermost level; its pitch is given as 0,
    since its error is known and not random. With a rotation this is decided on the rotated axes, and the pitch of a
    weight is that of its group. For a codebook the pitch is the mean one.
    """
    rounded, pitch, clip_error, clipped = [], [], [], 0
    for site in sites:
        q = site.quantized(scheme)
        value = q.dequantize(site.weight.dtype)
        width = scheme.scale.view(q.shape).expand(q.scale) * scheme.grid.step
        latent = scheme.rotation.apply(site.matrix.float())
        error = scheme.rotation.apply(value.float()) - latent
        low, high = scheme.grid.bin_edge
        v = latent / scheme.scale.view(q.shape).expand(q.scale)
        outside = (v < low) | (v > high)
        rounded.append(site.stored(value))
        pitch.append(site.stored(torch.where(outside, 0.0, width)))
        clip_error.append(site.stored(scheme.rotation.invert(torch.where(outside, error, 0.0)).to(site.weight.dtype)))
        clipped += int(outside.sum())
    total = sum(site.weight.numel() for site in sites)
    return Cells(rounded=rounded, pitch=pitch, clip_error=clip_error, clipped_share=clipped / total)
