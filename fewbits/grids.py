r"""Level sets: what a code decodes to, in steps (units of the scale).

A grid knows its levels, how to ``encode`` a weight in steps ``v = w / scale`` to the nearest level (ties half to even,
as ``torch.round``) and how to ``decode`` codes. It knows neither scales nor gradients.

Relations to the names of the field, with step ``s``:

* SEQ with range ``alpha`` (ParetoQ, arXiv:2502.02631) at b bits is ``half_shifted`` with ``s = alpha / 2**(b - 1)``;
  SEQ ternary is ``ternary`` with ``s = 2 alpha / 3``.
* QuEST (arXiv:2502.05003) with outermost level ``S`` is ``half_shifted`` with ``s = 2 S / (2**b - 1)``.
* LSQ, StableQAT, GPTQ and ``num_bits=b`` of compressed-tensors are ``int``.
* BitNet b1.58 is ``ternary``, sign binary is ``binary``, 1-Bit Wonder is ``codebook``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

MAX_BITS = 8


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


def _check_bits(kind: str, num_bits: int, low: int = 1) -> None:
    if not isinstance(num_bits, int) or isinstance(num_bits, bool) or not low <= num_bits <= MAX_BITS:
        raise ValueError(f"{kind} grid with num_bits={num_bits!r}: it must be an integer from {low} to {MAX_BITS}")


class _Uniform:
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


@dataclass(frozen=True)
class Binary(_Uniform):
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
        return v.copy_(torch.where(v >= 0, 1.0, -1.0))

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
class Ternary(_Uniform):
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
class Int(_Uniform):
    """Two's complement integers ``{-2**(b-1) .. 2**(b-1) - 1}``.

    Example:
        >>> Int(2).encode(torch.tensor([-3.0, -0.5, 0.6, 9.0]))
        tensor([-2,  0,  1,  1], dtype=torch.int8)
    """

    num_bits: int
    kind: ClassVar[str] = "int"
    scale_gradient: ClassVar[str] = "lsq"

    def __post_init__(self) -> None:
        _check_bits(self.kind, self.num_bits)

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
class HalfShifted(_Uniform):
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
        _check_bits(self.kind, self.num_bits)

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


@dataclass(frozen=True)
class Codebook(_Uniform):
    """Any 2 to 256 distinct levels (k-means, Lloyd-Max); codes count from 0; ties go to the even code.

    Args:
        codebook: ascending distinct levels in steps, each exactly representable in fp32 (they are stored so).

    Raises:
        ValueError: for too few, too many, unsorted, repeated, non-finite or not fp32-exact levels.

    Example:
        >>> Codebook((-3.0, -1.0, 1.0, 7.0)).encode(torch.tensor([-9.0, 0.0, 3.9, 4.1]))
        tensor([0, 2, 2, 3], dtype=torch.uint8)
    """

    codebook: tuple[float, ...]
    kind: ClassVar[str] = "codebook"
    scale_gradient: ClassVar[str] = "lsq"

    def __post_init__(self) -> None:
        table = tuple(float(x) for x in self.codebook)
        object.__setattr__(self, "codebook", table)
        if not 2 <= len(table) <= 2**MAX_BITS:
            raise ValueError(f"codebook has {len(table)} levels; use 2 to {2**MAX_BITS}")
        if not all(math.isfinite(x) for x in table):
            raise ValueError(f"codebook {table} has a level that is not finite")
        if any(a >= b for a, b in zip(table, table[1:], strict=False)):
            raise ValueError(f"codebook {table} must be strictly ascending; sort it and drop repeated levels")
        if torch.tensor(table, dtype=torch.float32).tolist() != list(table):
            raise ValueError("codebook levels must be exact in fp32; pass torch.tensor(levels).float().tolist()")

    @classmethod
    def lloyd_max(cls, num_levels: int) -> Codebook:
        """The Lloyd-Max quantizer of N(0, 1): for K=4, levels -1.51, -0.4528, 0.4528, 1.51 (distortion .11748).

        Example:
            >>> [round(x, 4) for x in Codebook.lloyd_max(4).levels]
            [-1.5104, -0.4528, 0.4528, 1.5104]
        """
        return cls(_lloyd_max_levels(num_levels))

    @property
    def num_bits(self) -> int:
        """Bits that hold every code."""
        return max(1, (len(self.codebook) - 1).bit_length())

    @property
    def storage_bits(self) -> float:
        """The code's bits."""
        return float(self.num_bits)

    @property
    def levels(self) -> tuple[float, ...]:
        """The table."""
        return self.codebook

    @property
    def qmin(self) -> int:
        """0."""
        return 0

    @property
    def step(self) -> float:
        """Mean distance of neighbouring levels."""
        return (self.codebook[-1] - self.codebook[0]) / (len(self.codebook) - 1)

    @property
    def bin_edge(self) -> tuple[float, float]:
        """Half the outermost gap beyond the outermost levels."""
        t = self.codebook
        return t[0] - (t[1] - t[0]) / 2, t[-1] + (t[-1] - t[-2]) / 2

    @property
    def scale_edge(self) -> tuple[float, float]:
        """Inside between the outermost levels."""
        return self.level_edge

    @property
    def code_dtype(self) -> torch.dtype:
        """Unsigned, since codes run to 255."""
        return torch.uint8

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        table = torch.tensor(self.codebook, dtype=dtype, device=like.device)
        return table, (table[1:] + table[:-1]) / 2

    def _index(self, v: Tensor) -> tuple[Tensor, Tensor]:
        table, middle = self._tables(v)
        index = torch.bucketize(v.to(table.dtype), middle)
        tie = (index < len(middle)) & (v == middle[index.clamp(max=len(middle) - 1)])
        return index + (tie & (index % 2 == 1)).to(index.dtype), table

    def project_(self, v: Tensor) -> Tensor:
        """Look up the nearest level in place."""
        index, table = self._index(v)
        return v.copy_(table[index])

    def encode(self, v: Tensor) -> Tensor:
        """Index of the nearest level."""
        return self._index(v)[0].to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Table look-up."""
        return torch.tensor(self.codebook, dtype=torch.float32, device=codes.device)[codes.long()]

    def cell_coordinate(self, v: Tensor) -> Tensor:
        """Piecewise linear: integers on levels, half-integers on midpoints, unit slope in outermost gaps outside."""
        table, _ = self._tables(v)
        lower = (torch.bucketize(v.to(table.dtype), table, right=True) - 1).clamp(0, len(table) - 2)
        return lower + (v - table[lower]) / (table[lower + 1] - table[lower])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": self.kind, "codebook": list(self.codebook)}


AnyGrid = Binary | Ternary | Int | HalfShifted | Codebook
GRIDS: dict[str, type] = {cls.kind: cls for cls in (Binary, Ternary, Int, HalfShifted, Codebook)}


def grid_from_dict(data: dict[str, Any]) -> AnyGrid:
    """Inverse of ``grid.to_dict()``.

    Raises:
        ValueError: for an unknown kind or unknown keys.

    Example:
        >>> grid_from_dict({"kind": "int", "num_bits": 3})
        Int(num_bits=3)
    """
    data = dict(data)
    kind = data.pop("kind", None)
    if kind not in GRIDS:
        raise ValueError(f"unknown grid {kind!r}; known grids: {', '.join(GRIDS)}")
    if "codebook" in data:
        data["codebook"] = tuple(data["codebook"])
    try:
        return GRIDS[kind](**data)
    except TypeError as error:
        raise ValueError(f"grid {kind!r} does not take {sorted(data)}: {error}") from None


@functools.lru_cache(maxsize=16)
def _lloyd_max_levels(num_levels: int) -> tuple[float, ...]:
    """Fixed point of Lloyd's iteration on N(0, 1), by closed-form cell means."""
    if not 2 <= num_levels <= 2**MAX_BITS:
        raise ValueError(f"lloyd_max with {num_levels} levels; use 2 to {2**MAX_BITS}")

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2))) if math.isfinite(x) else (1.0 if x > 0 else 0.0)

    levels = [4 * (i + 0.5) / num_levels - 2 for i in range(num_levels)]
    for _ in range(20_000):
        edges = [-math.inf, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), math.inf]
        new = [
            (density(a) - density(b)) / max(below(b) - below(a), 1e-300) for a, b in zip(edges, edges[1:], strict=False)
        ]
        moved = max(abs(a - b) for a, b in zip(new, levels, strict=True))
        levels = new
        if moved < 1e-10:
            break
    # symmetrise before rounding to fp32: N(0, 1) is even
    levels = [(levels[i] - levels[-1 - i]) / 2 for i in range(num_levels)]
    return tuple(torch.tensor(levels, dtype=torch.float32).tolist())
