r"""Which GGUF type holds which grid without loss: the check itself, from which every table and message is made.

A grid's levels are integers over a power of two, :math:`L = i / c` (half-shifted levels are odd integers over 2). A
type can hold them if integers ``slope`` and ``offset`` exist with

.. math:: i = \text{slope} \cdot q + \text{offset}, \qquad q \in \text{codes of the type},

where only types with a minimum (Q4_1, Q2_K) have an offset. Then :math:`d = \text{slope} \cdot s / c` holds the scale
s, provided that this number is exact in fp16. The slope may be negative: that is how {-2..1} goes into {-1..2}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from fewbits.targets.gguf_blocks_k import Q2_K_SUB, Q3_K_SUB
from fewbits.targets.gguf_types import GGUF_TYPES, GGUFType, gguf_type

Verdict = Literal["lossless", "lossless if", "cannot"]
Engine = Literal["x86", "gpu"]

SIGNIFICANT_BITS = {"portable": 8, "fp16": 11, "bf16": 8, "fp32": 24}
"""Significant bits of a stored scale, by the scale dtype of a scheme."""
_DIVISORS = tuple(2**k for k in range(11))
_HAS_MINIMUM = ("Q4_1", "Q2_K")

_ORDER: dict[str, tuple[str, ...]] = {
    "x86": ("Q1_0", "TQ2_0", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q5_0", "Q8_0"),
    "gpu": ("Q1_0", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q5_0", "Q8_0"),
}
_WHY = {
    ("x86", "TQ2_0"): "the fastest 2-bit type of llama.cpp on x86",
    ("x86", "Q2_0"): "older llama.cpp has no fast x86 kernel for it: update, or use Q4_0, or train with group_size=256",
    ("gpu", "Q2_0"): "it has CUDA, Metal and Vulkan kernels, which TQ2_0 has not",
}


class HasLevels(Protocol):
    """What is asked of a grid (every class of :mod:`fewbits.grids` has it)."""

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels in steps, ascending."""
        ...

    @property
    def qmin(self) -> int:
        """Code of the first level; codes ascend by 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Verdict on one (grid, group, shape, type), and how the levels are stored.

    ``level = (slope * q + offset) / divisor`` for every code q of the type that is used; meaningless for ``cannot``
    and for float types.
    """

    gguf_type: str
    verdict: Verdict
    reason: str
    slope: int = 1
    offset: int = 0
    divisor: int = 1


def integer_levels(levels: tuple[float, ...]) -> tuple[tuple[int, ...], int] | None:
    """Integers and the least power of two with ``level = integer / divisor``, or None if it is beyond 1024.

    Example:
        >>> integer_levels((-1.5, -0.5, 0.5, 1.5))
        ((-3, -1, 1, 3), 2)
    """
    for divisor in _DIVISORS:
        if all((divisor * x).is_integer() for x in levels):
            return tuple(int(divisor * x) for x in levels), divisor
    return None


def _fit(integers: tuple[int, ...], kind: GGUFType) -> tuple[int, int] | None:
    """The slope and offset that put the integers into the codes of the type, or None."""
    assert kind.codes is not None
    if kind.name in _HAS_MINIMUM:
        offset = integers[0]
        slope = math.gcd(*(i - offset for i in integers))
        return (slope, offset) if (integers[-1] - offset) // slope in kind.codes else None
    common = math.gcd(*integers)
    for slope in (common, -common):
        if all(i // slope in kind.codes for i in integers):
            return slope, 0
    return None


def _holds(multiple: int, divisor: int, scale_dtype: str, top: int, *, bits: int = 11) -> bool:
    """Whether ``multiple / divisor * k * scale`` fits ``bits`` significant bits for every scale and k = 1..top.

    With the default bits: whether fp16 holds it. The smallest scale is fp16's smallest normal number 2^-14, the finest
    fp16 number 2^-24; the upper end (weights beyond 65504) is left to the check of the real numbers.
    """
    if multiple == 0:
        return True
    significant = SIGNIFICANT_BITS[scale_dtype]
    if bits == 11:
        if scale_dtype not in ("portable", "fp16"):
            return False
        lowest = -(13 + significant) + (multiple & -multiple).bit_length() - divisor.bit_length()
        if lowest < -24:
            return False
    odd = [abs(multiple) * k // (multiple * k & -(multiple * k)) for k in range(1, top + 1)]
    return significant + max(0 if m == 1 else m.bit_length() for m in odd) <= bits


def plan(
    grid: HasLevels,
    group_size: int,
    in_features: int,
    gguf_type_name: str,
    *,
    superblock: int | None = None,
    scale_dtype: str = "portable",
    multiplier_bits: int = 4,
) -> Plan:
    r"""Whether a GGUF type holds a quantized matrix without loss.

    Args:
        grid: the level set.
        group_size: weights under one scale; ``in_features`` (or more) for one scale a row.
        in_features: row length of the matrix.
        gguf_type_name: for example ``"Q2_0"``, in any case.
        superblock: for double-quantized scales ``s = super_scale * k``: weights under one super scale; None otherwise.
        scale_dtype: what the scale (with a superblock: the super scale) is rounded to in training: ``portable``,
            ``fp16``, ``bf16`` or ``fp32``.
        multiplier_bits: k runs from 1 to ``2**multiplier_bits - 1``; only with a superblock.

    Returns:
        A :class:`Plan`. ``lossless`` holds for every weight below 65504; ``lossless if`` depends on the numbers and is
        decided when the tensor is packed; ``cannot`` names the condition that fails and a way out.

    Raises:
        ValueError: for an unknown type or scale dtype, or sizes below 1.

    Example:
        >>> from fewbits.grids import HalfShifted, Int
        >>> plan(Int(2), 64, 576, "Q2_0").verdict, plan(Int(2), 64, 576, "Q2_0").slope
        ('lossless', -1)
        >>> plan(HalfShifted(2), 64, 512, "Q2_K").verdict, plan(HalfShifted(2), 64, 512, "Q2_K", superblock=256).verdict
        ('cannot', 'lossless')
    """
    kind = gguf_type(gguf_type_name)
    if scale_dtype not in SIGNIFICANT_BITS:
        raise ValueError(f"scale_dtype={scale_dtype!r} is unknown; use one of {', '.join(SIGNIFICANT_BITS)}")
    if group_size < 1 or in_features < 1 or (superblock is not None and superblock < 1):
        raise ValueError(f"group_size={group_size}, in_features={in_features}, superblock={superblock}: use sizes >= 1")
    top = 1 if superblock is None else 2**multiplier_bits - 1
    found = integer_levels(grid.levels)
    if kind.codes is None:
        return _plan_floats(kind, found, scale_dtype, top)
    refusal = _refuse_shape(kind, group_size, in_features, superblock)
    if refusal:
        return Plan(gguf_type=kind.name, verdict="cannot", reason=refusal)
    if found is None:
        reason = "levels are not multiples of 1/1024; GGUF holds integer codebooks only: train with rounded levels"
        return Plan(gguf_type=kind.name, verdict="cannot", reason=reason)
    integers, divisor = found
    fit = _fit(integers, kind)
    if fit is None:
        shown = f"{len(integers)} levels {grid.levels[0]:g}..{grid.levels[-1]:g}"
        codes = f"{kind.codes[0]}..{kind.codes[-1]}" if kind.codes.step == 1 else "-1, 1"
        reason = (
            f"{shown} do not fit {kind.stored} with q in {{{codes}}}; use Q4_0, Q5_0 or Q8_0, which have more codes"
        )
        return Plan(gguf_type=kind.name, verdict="cannot", reason=reason)
    slope, offset = fit
    verdict, reason = _judge(kind, slope, offset, divisor, scale_dtype, top)
    return Plan(gguf_type=kind.name, verdict=verdict, reason=reason, slope=slope, offset=offset, divisor=divisor)


def _refuse_shape(kind: GGUFType, group_size: int, in_features: int, superblock: int | None) -> str | None:
    if in_features % kind.block:
        return (
            f"in_features={in_features} is not a multiple of the block of {kind.block}; "
            "use a type with a smaller block (Q4_0: 32, Q2_0: 64)"
        )
    unit = kind.block if superblock is None or kind.scale_block is None else kind.scale_block
    if group_size % unit and group_size < in_features:
        quantized = kind.scale_block is not None and superblock is None
        fix = f"train with group_size={kind.block}" + (" or a superblock of 256" if quantized else "")
        return f"group_size={group_size} is not a multiple of {unit}, the values under one scale; {fix}"
    if superblock is not None and kind.scale_block is not None and superblock % kind.block:
        return f"superblock={superblock} is not a multiple of {kind.block}; train with superblock={kind.block}"
    return None


def _judge(kind: GGUFType, slope: int, offset: int, divisor: int, scale_dtype: str, top: int) -> tuple[Verdict, str]:
    def times(number: int, what: str = "scale") -> str:
        factor = Fraction(number, divisor)
        return what if factor == 1 else f"-{what}" if factor == -1 else f"{factor} {what}"

    if kind.scale_block is None:
        stored = f"d = {times(slope)}" + (f", m = {times(offset)}" if offset else "")
        if all(_holds(n, divisor, scale_dtype, top) for n in (slope, offset)):
            return "lossless", stored
        numbers = " and ".join(times(n) for n in (slope, offset) if n)
        return "lossless if", f"every {numbers} is an fp16 number ({stored})"
    sub, what = (Q2_K_SUB if kind.name == "Q2_K" else Q3_K_SUB), "scale" if top == 1 else "super_scale"

    def sub_blocks(a: int, b: int) -> str:
        k = [f"{n}" if top == 1 else "k" if n == 1 else f"{n} k" for n in (a, b)]
        return f", sub-scales {k[0]}" + (f", sub-minimums {k[1]}" if b else "")

    spread = f"d = {times(1, what)}" + (f", dmin = {times(1, what)}" if offset else "") + sub_blocks(slope, abs(offset))
    if _holds(1, divisor, scale_dtype, 1) and all(n * top in sub for n in (abs(slope), abs(offset))):
        return "lossless", spread
    folded = f"d = {times(slope, what)}" + (f", dmin = {times(-offset, what)}" if offset else "")
    folded += sub_blocks(1, 1 if offset else 0)
    if top in sub and all(_holds(n, divisor, scale_dtype, 1) for n in (slope, offset)):
        return "lossless", folded
    ways = spread if spread == folded else f"{spread}, or {folded}"
    return "lossless if", f"every block can be {ways}, in fp16 and with sub-scales in {sub[0]}..{sub[-1]}"


def _plan_floats(kind: GGUFType, found: tuple[tuple[int, ...], int] | None, scale_dtype: str, top: int) -> Plan:
    if kind.name == "F32":
        return Plan(gguf_type="F32", verdict="lossless", reason="fp32 holds every dequantized weight")
    bits = 11 if kind.name == "F16" else 8
    if found and all(_holds(i, found[1], scale_dtype, top, bits=bits) for i in found[0]):
        reason = f"scale * level has at most {bits} significant bits"
        return Plan(gguf_type=kind.name, verdict="lossless", reason=reason)
    return Plan(gguf_type=kind.name, verdict="lossless if", reason=f"every scale * level is a {kind.name} number")


def choose_type(
    grid: HasLevels,
    group_size: int,
    in_features: int,
    *,
    superblock: int | None = None,
    scale_dtype: str = "portable",
    multiplier_bits: int = 4,
    prefer: Engine = "x86",
) -> tuple[str, str]:
    """The smallest type that is fast on the preferred engine and lossless, and why.

    Args:
        grid: the level set.
        group_size: as in :func:`plan`, as are the other arguments.
        in_features: row length.
        superblock: see :func:`plan`.
        scale_dtype: see :func:`plan`.
        multiplier_bits: see :func:`plan`.
        prefer: ``x86`` (llama.cpp on the CPU) or ``gpu`` (CUDA, Metal, Vulkan; ARM CPUs too).

    Returns:
        ``(type name, reason)``: the first lossless type in the engine's order, else the first ``lossless if``.

    Raises:
        ValueError: if no type fits, with the reason of each, or for an unknown engine.

    Example:
        >>> from fewbits.grids import HalfShifted, Int
        >>> choose_type(Int(2), 256, 512)[0], choose_type(Int(2), 256, 512, prefer="gpu")[0]
        ('TQ2_0', 'Q2_0')
        >>> choose_type(HalfShifted(2), 64, 576)
        ('Q4_0', 'd = 1/2 scale; 4.5 bits per weight')
    """
    if prefer not in _ORDER:
        raise ValueError(f"prefer={prefer!r} is unknown; use one of {', '.join(_ORDER)}")
    plans = [
        plan(grid, group_size, in_features, name, superblock=superblock, scale_dtype=scale_dtype,
             multiplier_bits=multiplier_bits)
        for name in _ORDER[prefer]
    ]  # fmt: skip
    for verdict in ("lossless", "lossless if"):
        for p in plans:
            if p.verdict == verdict:
                condition = p.reason if verdict == "lossless" else f"lossless if {p.reason}"
                why = _WHY.get((prefer, p.gguf_type))
                bits = f"{GGUF_TYPES[p.gguf_type].bits_per_weight:g} bits per weight"
                return p.gguf_type, "; ".join(filter(None, (condition, bits, why)))
    listed = "\n".join(f"  {p.gguf_type}: {p.reason}" for p in plans)
    raise ValueError(f"no GGUF type holds this tensor without loss:\n{listed}")
