"""What every grid offers, and the arithmetic that grids share."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

MAX_BITS = 8
"""Largest number of bits of a code."""


class Grid(Protocol):
    """What every level set offers; ``levels`` are sorted, and code ``qmin + i`` decodes to ``levels[i]``."""

    kind: ClassVar[str]

    @property
    def num_bits(self) -> int:
        """Bits of one code in a dense word (2 for ternary)."""
        ...

    @property
    def storage_bits(self) -> float:
        """Bits of one packed code (1.6 for ternary: five in a byte)."""
        ...

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels in steps, ascending."""
        ...

    @property
    def qmin(self) -> int:
        """Smallest code."""
        ...

    @property
    def step(self) -> float:
        """Distance of neighbouring levels in units of the scale (mean distance for a codebook)."""
        ...

    @property
    def scale_gradient(self) -> str:
        """``lsq``: level minus v inside the edge, level outside; ``level``: the level everywhere."""
        ...

    @property
    def scale_edge(self) -> tuple[float, float]:
        """The interval of v that the scale gradient counts as inside."""
        ...

    def project_(self, v: Tensor) -> Tensor:
        """Replace ``v`` by its nearest level in place; equals ``decode(encode(v))``."""
        ...

    def encode(self, v: Tensor) -> Tensor:
        """Codes of the nearest levels, dtype ``code_dtype``."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of the codes, fp32."""
        ...

    def cell_coordinate(self, v: Tensor) -> Tensor:
        """``v`` in units of cells: integers on levels, half-integers on decision boundaries."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :func:`grid_from_dict` is the inverse."""
        ...


def check_bits(kind: str, num_bits: int, low: int = 1) -> None:
    """Refuse a number of bits outside ``low`` to ``MAX_BITS``."""
    if not isinstance(num_bits, int) or isinstance(num_bits, bool) or not low <= num_bits <= MAX_BITS:
        raise ValueError(f"{kind} grid with num_bits={num_bits!r}: it must be an integer from {low} to {MAX_BITS}")


class LevelSet:
    """Shared arithmetic of equally spaced grids: ``level = step * code + offset``."""

    kind: ClassVar[str]

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.levels)

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels in steps, ascending."""
        raise AssertionError  # every concrete grid defines it

    @property
    def qmin(self) -> int:
        """Smallest code."""
        raise AssertionError

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.qmin + self.num_levels - 1

    @property
    def min_level(self) -> float:
        """Outermost level on the left, in steps."""
        return self.levels[0]

    @property
    def max_level(self) -> float:
        """Outermost level on the right, in steps."""
        return self.levels[-1]

    @property
    def step(self) -> float:
        """Distance of neighbouring levels in units of the scale."""
        return 1.0

    @property
    def zero_point(self) -> float:
        """The code (perhaps fractional) that would decode to exactly 0."""
        return self.qmin - self.levels[0] / self.step

    @property
    def bin_edge(self) -> tuple[float, float]:
        """Ends of the outermost cells, half a step beyond the outermost levels."""
        return self.min_level - self.step / 2, self.max_level + self.step / 2

    @property
    def level_edge(self) -> tuple[float, float]:
        """The outermost levels: where the mean-field quantizer stops following the weight (a hard step)."""
        return self.min_level, self.max_level

    @property
    def code_dtype(self) -> torch.dtype:
        """Integer dtype of the codes."""
        return torch.int8

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :func:`grid_from_dict` is the inverse."""
        return {"kind": self.kind}
