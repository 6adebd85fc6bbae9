"""Straight-through estimators: identity and clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.surrogates._base import Edge, ElementwiseSurrogate, State, Surrogate, check_edge, inside


@dataclass(frozen=True, kw_only=True)
class STE(Surrogate):
    r"""Identity: :math:`\nabla_w = \nabla_{\hat w}`. The default and the limit case of every other surrogate.

    Example:
        >>> import torch
        >>> STE().pullback(torch.ones(2), None, None, {})
        tensor([1., 1.])

    Reference: Bengio et al., arXiv:1308.3432.
    """

    name: ClassVar[str] = "ste"
    needs_v: ClassVar[bool] = False

    def pullback(self, grad: Tensor, v: Tensor | None, grid: AnyGrid, state: State) -> Tensor:
        """The gradient itself."""
        del v, grid, state
        return grad


@dataclass(frozen=True, kw_only=True)
class ClippedSTE(ElementwiseSurrogate):
    r"""Identity inside the range, zero outside: :math:`g(v) = 1\{l \le v \le u\}`.

    ``edge="level"`` clips at the outermost *levels*: this is exactly the derivative of the mean-field (uniformly
    dithered) quantizer, the target that JacQuant estimates, and the mask of LSQ. ``edge="bin"`` clips half a step
    further out: the mask of SEQ, and QuEST's trust mask (error at most half a step). A number clips at that multiple of
    the outermost levels: QuEST's mask at 1 bit is ``edge=1.3`` (1.25 without Hadamard).

    Args:
        edge: ``level``, ``bin``, ``none`` (identity), or a positive number, 1 being ``level``.

    Raises:
        ValueError: for another name, or a number that is not positive.

    Example:
        >>> import torch
        >>> from fewbits.grids import HalfShifted
        >>> ClippedSTE().gain(torch.tensor([0.0, 1.5, 1.6]), HalfShifted(2))
        tensor([1., 1., 0.])

    Reference: arXiv:2605.25469, arXiv:1902.08153, arXiv:2502.05003.
    """

    name: ClassVar[str] = "clipped_ste"
    edge: Edge = "level"

    def __post_init__(self) -> None:
        check_edge(self.edge)

    def gain(self, v: Tensor, grid: AnyGrid) -> Tensor:
        """1 inside, 0 outside."""
        return inside(v, grid, self.edge).to(v.dtype)
