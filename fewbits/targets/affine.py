r"""Grids in formats that store unsigned codes: ``weight = stored_scale * (q - zero)``, ``q`` in ``0..2**num_bits - 1``.

Every format of integer codes is this one with another rule for ``zero``: the middle ``2**(num_bits - 1)`` (two's
complement codes), any integer, or any number. The levels of a grid are integers over a power of two, :math:`L = i / c`,
so a grid fits where a ``slope`` exists with :math:`i = \text{slope} (q - \text{zero})`; the stored scale is then
``scale * slope / c``. Half-shifted levels are odd integers over 2: they fit the middle with one bit more, and a zero of
1.5 with none.

Formats differ also in the numbers of weights that may share one scale. A scale that rules more weights than the format
allows is written several times, which changes no weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.numerics import STORED_DTYPE
from fewbits.qtensor import QTensor, quantize
from fewbits.scales import double_quantize
from fewbits.scheme import Scheme
from fewbits.targets.gguf_plan import SIGNIFICANT_BITS, Verdict, integer_levels

Zero = Literal["middle", "int", "float"]
_PROBE_ROWS, _NUM_PROBES = 4, 48
_SIGNIFICAND = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Whether a format holds a scheme: ``lossless``, ``lossless if`` (the numbers decide, at export) or ``cannot``.

    ``reason`` says how it is stored, what must hold, or which condition fails and what to do; ``stored`` says how it is
    stored where ``reason`` does not.
    """

    verdict: Verdict
    reason: str
    stored: str = ""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the levels of a grid are stored.

    Attributes:
        num_bits: of a stored code.
        multiplier: stored scale over scale.
        zero: the stored code that decodes to 0, not always an integer.
        zeros: the rule that ``zero`` satisfies.
        codes: stored code of every level, ascending.
    """

    num_bits: int
    multiplier: Fraction
    zero: Fraction
    zeros: Zero
    codes: tuple[int, ...]


def affine_fit(grid: AnyGrid, widths: Iterable[int], zeros: Sequence[Zero] = ("middle",)) -> Fit | None:
    """The first width, and in it the first rule for the zero, that holds every level; None if there is none.

    Example:
        >>> from fewbits.grids import HalfShifted
        >>> affine_fit(HalfShifted(2), (2, 3))
        Fit(num_bits=3, multiplier=Fraction(1, 2), zero=Fraction(4, 1), zeros='middle', codes=(1, 3, 5, 7))
        >>> affine_fit(HalfShifted(2), (2, 3), ("middle", "float")).zero
        Fraction(3, 2)
    """
    found = integer_levels(grid.levels)
    if found is None:
        return None
    integers, divisor = found
    for num_bits in widths:
        for kind in zeros:
            if fit := _fit(integers, divisor, num_bits, kind):
                return fit
    return None


@functools.lru_cache(maxsize=512)
def _fit(integers: tuple[int, ...], divisor: int, num_bits: int, kind: Zero) -> Fit | None:
    top = 2**num_bits - 1
    first = integers[0]
    step = math.gcd(*(i - first for i in integers))
    slopes = dict.fromkeys((1, math.gcd(*integers)) if kind == "middle" else (step,) if kind == "float" else (1, step))
    for slope in slopes:
        if kind == "middle":
            zero = Fraction(2 ** (num_bits - 1))
        else:  # the least level at code 0, or above it where the zero would be negative
            zero = max(Fraction(-first, slope), Fraction(0)) if kind == "int" else Fraction(-first, slope)
        codes = [Fraction(i, slope) + zero for i in integers]
        if kind == "int" and (zero.denominator != 1 or zero > top):
            continue
        if all(q.denominator == 1 and 0 <= q <= top for q in codes):
            stored = tuple(int(q) for q in codes)
            return Fit(num_bits=num_bits, multiplier=Fraction(slope, divisor), zero=zero, zeros=kind, codes=stored)
    return None


def refuse_scheme(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """What no format of integer codes holds, whatever its widths and groups."""
    try:
        scheme.check_shape(shape)
    except ValueError as error:
        return str(error)
    if scheme.rotation.kind != "none":
        return "the weight is rotated, and engines have no rotation; train with rotation 'none'"
    if integer_levels(scheme.grid.levels) is None:
        return "the levels are not multiples of 1/1024, and engines hold integer levels only; round the codebook"
    return None


def explain_misfit(grid: AnyGrid, widths: Sequence[int], zeros: Sequence[Zero]) -> str:
    """Why :func:`affine_fit` found nothing."""
    zero = {"middle": "no zero point", "int": "an integer zero point", "float": "a zero point"}[zeros[-1]]
    shown = f"{len(grid.levels)} levels {grid.levels[0]:g}..{grid.levels[-1]:g}"
    return f"the {shown} do not fit {'/'.join(map(str, widths))}-bit codes with {zero}"


def engine_group(scheme: Scheme, shape: tuple[int, int], sizes: Sequence[int] | None = None) -> int | None:
    """The largest allowed group that never crosses the border of two scales; None if there is none.

    Args:
        scheme: of the weight.
        shape: ``(out_features, in_features)``.
        sizes: allowed groups; None allows every divisor of ``in_features``.

    Example:
        >>> engine_group(Scheme.parse("W2A16G64"), (8, 96)), engine_group(Scheme.parse("W2"), (8, 96), (32, 64))
        (32, 32)
    """
    size = scheme.scale.group_size
    unit = shape[1] if size is None else math.gcd(size, shape[1])
    if sizes is None:
        return unit
    return max((n for n in sizes if unit % n == 0), default=None)


def always_exact(factor: Fraction, scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether ``factor * scale`` is a number of ``dtype`` for every scale of the scheme that a weight can have.

    False means that the numbers decide. Scales beyond 2**100 or below 2**-100 are left to that decision too.

    Example:
        >>> always_exact(Fraction(3, 2), Scheme.parse("W2H"), torch.float16)
        True
        >>> always_exact(Fraction(3, 2), Scheme.parse("W2H", dtype="fp16"), torch.float16)
        False
    """
    if factor == 0:
        return True
    spec = scheme.scale
    bits = SIGNIFICANT_BITS[spec.dtype]
    if dtype == torch.float16:
        twos = (factor.numerator & -factor.numerator).bit_length() - factor.denominator.bit_length()
        if spec.dtype not in ("portable", "fp16") or -13 - bits + twos < -24:  # from 2**-14 on, finest fp16 2**-24
            return False
    odd = abs(factor.numerator) // (factor.numerator & -factor.numerator)
    bits += spec.multiplier_bits if spec.superblock is not None else 0
    return bits + (odd.bit_length() if odd > 1 else 0) <= _SIGNIFICAND[dtype]


def scale_dtype(scheme: Scheme, factor: Fraction, *, half: bool = True) -> torch.dtype:
    """The smallest dtype that always holds ``factor * scale``, fp32 if only the numbers can tell."""
    stored = STORED_DTYPE[scheme.scale.dtype]
    return stored if half and always_exact(factor, scheme, stored) else torch.float32


def times(scale: Tensor, factor: Fraction, dtype: torch.dtype, what: str) -> Tensor:
    """``factor * scale`` in ``dtype``, exactly.

    Raises:
        ValueError: naming ``what`` is not exact there, and in how many places.
    """
    exact = scale.double() * factor.numerator / factor.denominator
    stored = exact.to(dtype)
    if wrong := int((stored.double() != exact).sum()):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{what}: {factor} times the scale is not exact in {name} for {wrong} of {scale.numel()} scales; "
            "train with portable scales"
        )
    return stored


@functools.lru_cache(maxsize=64)
def _ordinary(scheme: Scheme, width: int) -> tuple[QTensor, ...]:
    """Quantized matrices with scales as training leaves them; several, since one scale may be exact by luck."""
    generator = torch.Generator().manual_seed(0)
    w = 0.05 * torch.randn(_PROBE_ROWS, width, generator=generator)
    size = scheme.scale.view(w.shape).scale_shape
    scales = [0.02 + 0.02 * torch.rand(size, generator=generator) for _ in range(_NUM_PROBES)]
    return tuple(quantize(w, scheme, scale) for scale in scales)


def judge_dtype(scheme: Scheme, multiplier: Fraction, stored: str) -> Judgement:
    """The verdict of a format that keeps ``multiplier`` times the scale in the model's own dtype."""
    if all(always_exact(multiplier, scheme, dtype) for dtype in (torch.float16, torch.bfloat16)):
        return Judgement(verdict="lossless", reason=stored)
    condition = "the model is float32, or its dtype holds every scale"
    return Judgement(verdict="lossless if", reason=condition, stored=stored)


def judge_numbers(
    scheme: Scheme, shape: tuple[int, int], condition: str, stored: str, pack: Callable[[QTensor], object]
) -> Judgement:
    """The verdict where the numbers decide: ``cannot`` if ordinary ones fail, since training would be in vain.

    Args:
        scheme: of the weight.
        shape: ``(out_features, in_features)``.
        condition: what must hold.
        stored: how it is stored then.
        pack: raises ValueError for a matrix that is not exact.
    """
    for q in _ordinary(scheme, shape[1]):
        try:
            pack(q)
        except ValueError as error:
            dtype = scheme.scale.dtype
            return Judgement(verdict="cannot", reason=f"only if {condition}, but with {dtype} scales: {error}")
    return Judgement(verdict="lossless if", reason=condition, stored=stored)


def stored_codes(q: QTensor, fit: Fit) -> Tensor:
    """Unsigned stored codes, uint8 ``(out_features, in_features)``."""
    table = torch.tensor(fit.codes, dtype=torch.uint8, device=q.codes.device)
    return table[q.codes.int() - q.scheme.grid.qmin]


def codes_from_stored(stored: Tensor, scheme: Scheme, fit: Fit) -> Tensor:
    """Inverse of :func:`stored_codes`.

    Raises:
        ValueError: for a stored code that is no level of the grid (a damaged file).
    """
    table = torch.full((2**fit.num_bits,), -1, dtype=torch.int16)
    table[torch.tensor(fit.codes)] = torch.arange(len(fit.codes), dtype=torch.int16)
    index = table[stored.int()]
    if bool((index < 0).any()):
        raise ValueError(f"the stored code {int(stored[index < 0][0])} is no level of {scheme.grid}")
    return (index + scheme.grid.qmin).to(scheme.grid.code_dtype)


def spread_scale(q: QTensor, size: int) -> Tensor:
    """The scale of every ``size`` weights of every row, fp32 ``(out_features, ceil(in_features / size))``."""
    rows, width = q.shape
    group = q.scheme.scale.group_size or width
    return q.scale.expand(rows, -1)[:, torch.arange(0, width, size, device=q.scale.device) // group]


def gather_scale(spread: Tensor, factor: Fraction, scheme: Scheme, shape: tuple[int, int], size: int) -> Tensor:
    """Scales ``(R, G)`` of the scheme from ``factor * scale`` of every ``size`` weights: inverse of the spreading.

    Raises:
        ValueError: if the shape is wrong, or numbers that belong to one scale differ (a damaged file).
    """
    rows, width = shape
    if tuple(spread.shape) != (rows, -(-width // size)):
        raise ValueError(f"scales have shape {tuple(spread.shape)}; {(rows, -(-width // size))} is needed")
    scale = (spread.double() * factor.denominator / factor.numerator).float()
    group = scheme.scale.group_size or width
    count = scheme.scale.view(shape).scale_shape
    first = torch.arange(count[1]) * group // size
    kept = scale[: count[0], first]
    again = kept.expand(rows, -1)[:, torch.arange(0, width, size) // group]
    if not torch.equal(again, scale):
        raise ValueError(f"scales that belong to one group of {scheme.name} differ")
    return kept.contiguous()


def assemble(codes: Tensor, scale: Tensor, scheme: Scheme) -> QTensor:
    """A QTensor from codes and scales that a file holds; double-quantized scales are taken apart again.

    Raises:
        ValueError: if the numbers do not belong to the scheme.
    """
    if scheme.scale.superblock is None:
        return QTensor(codes, scale, scheme)
    return QTensor(codes, scale, scheme, *double_quantize(scale, scheme.scale))
