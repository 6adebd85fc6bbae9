"""What a surrogate is: the stand-in for the derivative of the quantizer, with explicit state.

A surrogate is a frozen value. It never sees, and never changes, the forward pass: it maps the gradient at the quantized
weight to a gradient for the latent weight. Whatever it remembers lives in a dict of tensors that the layer keeps as
buffers, so that checkpoints hold it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewbits.grids import AnyGrid

Edge = Literal["level", "bin", "none"] | float
"""Where a clip mask ends: a name, or a positive multiple of the outermost levels."""
State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    r"""Base of all surrogates: :math:`\nabla_w = \mathrm{pullback}(\nabla_{\hat w}, v)`, ``v = w / scale``.

    Subclasses are final: they define ``name`` and :meth:`pullback`, and nothing subclasses them.
    """

    name: ClassVar[str]
    needs_v: ClassVar[bool] = True
    """Whether :meth:`pullback` reads ``v``; if not, the backward pass does not compute it."""

    def init_state(self, shape: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors to remember for a weight of this shape; empty for most surrogates."""
        del shape, device
        return {}

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the state's tensors that the optimizer trains; none for most surrogates."""
        return ()

    def state_gradient(self, grad: Tensor, v: Tensor, grid: AnyGrid, state: State) -> tuple[Tensor, ...]:
        """Gradients of the :attr:`trained` tensors, in their order.

        Args:
            grad: gradient at the level of every weight, that is per step: at the quantized weight, times the scale.
            v: latent weight in steps, same shape.
            grid: the level set.
            state: what :meth:`init_state` made.
        """
        raise AssertionError(f"{type(self).__name__} does not define state_gradient")

    def pullback(self, grad: Tensor, v: Tensor | None, grid: AnyGrid, state: State) -> Tensor:
        """Gradient for the latent weight.

        Args:
            grad: gradient at the quantized weight, fp32, ``(out_features, in_features)``.
            v: latent weight in steps, same shape (None if ``needs_v`` is False). Treated as a constant.
            grid: the level set.
            state: what :meth:`init_state` made.
        """
        raise AssertionError(f"{type(self).__name__} does not define pullback")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :func:`fewbits.surrogates.surrogate_from_dict` is the inverse."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ElementwiseSurrogate(Surrogate):
    """A surrogate that multiplies each entry of the gradient by a gain that depends on ``v`` alone."""

    def gain(self, v: Tensor, grid: AnyGrid) -> Tensor:
        """Replacement derivative of the quantizer at ``v``; same shape and dtype as ``v``."""
        raise AssertionError(f"{type(self).__name__} does not define gain")

    def pullback(self, grad: Tensor, v: Tensor | None, grid: AnyGrid, state: State) -> Tensor:
        """``grad * gain(v)``."""
        del state
        assert v is not None
        return grad * self.gain(v, grid)


def inside(v: Tensor, grid: AnyGrid, edge: Edge) -> Tensor:
    """Boolean mask of the weights that a clip mask lets through.

    ``level``: within the outermost levels; ``bin``: within the outermost cells; ``none``: all; a number: within that
    multiple of the outermost levels.
    """
    if edge == "none":
        return torch.ones_like(v, dtype=torch.bool)
    if isinstance(edge, str):
        low, high = grid.level_edge if edge == "level" else grid.bin_edge
    else:
        low, high = (float(edge) * level for level in grid.level_edge)
    return (v >= low) & (v <= high)


def check_edge(edge: Edge) -> None:
    """Refuse an unknown edge."""
    if isinstance(edge, str):
        if edge not in ("level", "bin", "none"):
            raise ValueError(f"edge={edge!r} is unknown; use 'level', 'bin', 'none' or a positive number")
    elif isinstance(edge, bool) or not isinstance(edge, int | float) or not (math.isfinite(edge) and edge > 0):
        raise ValueError(f"edge={edge!r} must be a name or a positive finite multiple of the outermost level")
