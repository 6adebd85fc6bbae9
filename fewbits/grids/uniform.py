"""Equally spaced grids: binary, ternary, two's complement integers, odd multiples of half a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.grids._base import LevelSet, check_bits


@dataclass(frozen=True)
class Binary(LevelSet):
    """Signs: codes {0, 1} decode to {-1, +1}; ``sign(0) = +1``, so a zero weight never makes a third level.

    Example:
        >>> Binary().encode(torch.tensor([-0.1, 0.0, 3.0]))
        tensor([0, 1, 1], dtype=torch.int8)
    """

    kind: ClassVar[str] = "binary"
    num_bits: ClassVar[int] = 1
    storage_bits: ClassVar[float] = 1.0
    scale_gradient: ClassVar[str] = "level"

    @property
    def levels(self) -> tuple[float, ...]:
        """(-1, +1)."""
        return (-1.0, 1.0)

    @property
    def qmin(self) -> int:
        """Code of the level -1."""
        return 0

    @property
    def step(self) -> float:
        """The two levels lie two scales apart."""
        return 2.0

    @property
    def scale_edge(self) -> tuple[float, float]:
        """Unused by the ``level`` scale gradient; the outermost levels."""
        return self.level_edge

    def project_(self, v: Tensor) -> Tensor:
        """Sign with sign(0) = +1, in place."""
        positive = v >= 0
        return v.mul_(0).add_(positive, alpha=2).sub_(1)  # times 0, so that a NaN stays one and is seen

    def encode(self, v: Tensor) -> Tensor:
        """1 where v >= 0, else 0."""
        return (v >= 0).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """2 code - 1."""
        return codes.float().mul_(2).sub_(1)

    def cell_coordinate(self, v: Tensor) -> Tensor:
        """(v - 1) / 2: levels at -1 and 0, the boundary at -1/2."""
        return (v - 1) / 2


@dataclass(frozen=True)
class Ternary(LevelSet):
    """{-1, 0, +1}; stored as five trits a byte (1.6 bits).

    Example:
        >>> Ternary().encode(torch.tensor([-0.6, 0.5, 0.51]))
        tensor([-1,  0,  1], dtype=torch.int8)
    """

    kind: ClassVar[str] = "ternary"
    num_bits: ClassVar[int] = 2
    storage_bits: ClassVar[float] = 1.6
    scale_gradient: ClassVar[str] = "lsq"

    @property
    def levels(self) -> tuple[float, ...]:
        """(-1, 0, +1)."""
        return (-1.0, 0.0, 1.0)

    @property
    def qmin(self) -> int:
        """-1."""
        return -1

    @property
    def scale_edge(self) -> tuple[float, float]:
        """SEQ's convention: inside up to the end of the outermost cells."""
        return self.bin_edge

    def project_(self, v: Tensor) -> Tensor:
        """Round and clamp in place."""
        return v.round_().clamp_(-1, 1)

    def encode(self, v: Tensor) -> Tensor:
        """Round and clamp."""
        return v.round().clamp_(-1, 1).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """The codes themselves."""
        return codes.float()

    def cell_coordinate(self, v: Tensor) -> Tensor:
        """v itself."""
        return v


@dataclass(frozen=True)
class Int(LevelSet):
    """Two's complement integers ``{-2**(b-1) .. 2**(b-1) - 1}``.

    Example:
        >>> Int(2).encode(torch.tensor([-3.0, -0.5, 0.6, 9.0]))
        tensor([-2,  0,  1,  1], dtype=torch.int8)
    """

    num_bits: int
    kind: ClassVar[str] = "int"
    scale_gradient: ClassVar[str] = "lsq"

    def __post_init__(self) -> None:
        check_bits(self.kind, self.num_bits)

    @property
    def storage_bits(self) -> float:
        """The code's bits."""
        return float(self.num_bits)

    @property
    def levels(self) -> tuple[float, ...]:
        """The integers themselves."""
        half = 2 ** (self.num_bits - 1)
        return tuple(float(k) for k in range(-half, half))

    @property
    def qmin(self) -> int:
        """-2**(b-1)."""
        return -(2 ** (self.num_bits - 1))

    @property
    def scale_edge(self) -> tuple[float, float]:
        """LSQ's convention: inside between the outermost levels."""
        return self.level_edge

    def project_(self, v: Tensor) -> Tensor:
        """Round and clamp in place."""
        return v.round_().clamp_(self.qmin, self.qmax)

    def encode(self, v: Tensor) -> Tensor:
        """Round and clamp."""
        return v.round().clamp_(self.qmin, self.qmax).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """The codes themselves."""
        return codes.float()

    def cell_coordinate(self, v: Tensor) -> Tensor:
        """v itself."""
        return v

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": self.kind, "num_bits": self.num_bits}


@dataclass(frozen=True)
class HalfShifted(LevelSet):
    """Odd multiples of half a step: ``level = code + 1/2``, at 2 bits {-1.5, -0.5, 0.5, 1.5}.

    The grid of SEQ and of QuEST up to scale (see the module's head).

    Example:
        >>> grid = HalfShifted(2)
        >>> grid.decode(grid.encode(torch.tensor([-9.0, 0.0, 0.9, 1.2])))
        tensor([-1.5000,  0.5000,  0.5000,  1.5000])
    """

    num_bits: int
    kind: ClassVar[str] = "half_shifted"
    scale_gradient: ClassVar[str] = "lsq"

    def __post_init__(self) -> None:
        check_bits(self.kind, self.num_bits)

    @property
    def storage_bits(self) -> float:
        """The code's bits."""
        return float(self.num_bits)

    @property
    def levels(self) -> tuple[float, ...]:
        """Half-integers, symmetric about 0."""
        half = 2 ** (self.num_bits - 1)
        return tuple(k + 0.5 for k in range(-half, half))

    @property
    def qmin(self) -> int:
        """-2**(b-1)."""
        return -(2 ** (self.num_bits - 1))

    @property
    def scale_edge(self) -> tuple[float, float]:
        """SEQ's convention: inside up to the end of the outermost cells."""
        return self.bin_edge

    def project_(self, v: Tensor) -> Tensor:
        """Shift, round, clamp and shift back in place."""
        return v.sub_(0.5).round_().clamp_(self.qmin, self.qmax).add_(0.5)

    def encode(self, v: Tensor) -> Tensor:
        """Round v - 1/2 and clamp."""
        return (v - 0.5).round_().clamp_(self.qmin, self.qmax).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """code + 1/2."""
        return codes.float().add_(0.5)

    def cell_coordinate(self, v: Tensor) -> Tensor:
        """v - 1/2."""
        return v - 0.5

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": self.kind, "num_bits": self.num_bits}
