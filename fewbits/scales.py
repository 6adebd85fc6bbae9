"""Scales: granularity as a view of the weight, rules that find a scale, and the double-quantized form.

A weight ``(rows, in_features)`` is viewed as ``(R, G, size)``: R scales rows, G groups a row. Scales have shape
``(R, G)`` and broadcast over the last axis. Nothing is copied unless the weight is transposed or its last group ragged.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from fewbits.grids import AnyGrid, Binary, HalfShifted, Ternary
from fewbits.numerics import SCALE_DTYPES, ScaleDtype, round_scale

Granularity = Literal["per_tensor", "per_channel", "per_group", "per_token"]
ScaleRule = Literal[
    "absmax", "absmax_cover", "absmax_qmax", "absmean", "mse", "gaussian", "rms",
    "block_absmax", "block_absmean", "block_rms",
]  # fmt: skip
ScaleMode = Literal["learned", "dynamic", "frozen"]
GRID_FREE_RULES: tuple[ScaleRule, ...] = ("block_absmax", "block_absmean", "block_rms")
"""Sizes of the group itself, whatever the grid: the units of a codebook that is fitted to the normalized weights."""
_LINE_SEARCH_POINTS = 48
_SEARCH_LOW, _SEARCH_HIGH = 0.3, 3.5


@dataclass(frozen=True)
class GroupView:
    """How a weight is cut into the groups that share one scale.

    Both directions give contiguous tensors, so that sums and matrix products do not depend on how a weight is stored.

    Example:
        >>> view = GroupView((4, 100), "per_group", 32)
        >>> view.scale_shape, view.counts().tolist()
        ((4, 4), [32, 32, 32, 4])
    """

    shape: tuple[int, ...]
    granularity: Granularity
    group_size: int | None = None

    @property
    def rows(self) -> int:
        """Number of scale rows."""
        return 1 if self.granularity == "per_tensor" else math.prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """Weights in one row."""
        return math.prod(self.shape) if self.granularity == "per_tensor" else self.shape[-1]

    @property
    def size(self) -> int:
        """Weights in one (full) group."""
        if self.granularity == "per_group":
            assert self.group_size is not None
            return min(self.group_size, self.width)
        return self.width

    @property
    def num_groups(self) -> int:
        """Groups in a row, the ragged last one counted."""
        return -(-self.width // self.size)

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of the scale tensor."""
        return self.rows, self.num_groups

    @property
    def ragged(self) -> bool:
        """Whether the last group is short."""
        return self.width % self.size != 0

    def counts(self) -> Tensor:
        """Weights in each group of a row, shape (G,)."""
        counts = torch.full((self.num_groups,), self.size)
        if self.ragged:
            counts[-1] = self.width % self.size
        return counts

    def split(self, x: Tensor) -> Tensor:
        """``(R, G, size)`` view; a copy of a transposed weight, zero-padded where the last group is ragged."""
        x = x.reshape(self.rows, self.width).contiguous()
        if self.ragged:
            x = torch.nn.functional.pad(x, (0, self.num_groups * self.size - self.width))
        return x.view(self.rows, self.num_groups, self.size)

    def merge(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`split`, in the weight's own shape."""
        return x.reshape(self.rows, self.num_groups * self.size)[:, : self.width].reshape(self.shape).contiguous()

    def expand(self, scale: Tensor) -> Tensor:
        """The scale of every weight, in the weight's own shape."""
        return self.merge(scale.reshape(self.rows, self.num_groups, 1).expand(-1, -1, self.size))


@dataclass(frozen=True, kw_only=True)
class ScaleSpec:
    r"""Granularity x rule x mode x stored dtype.

    Args:
        granularity: ``per_tensor``, ``per_channel`` (a row), ``per_group`` or ``per_token`` (activations, dynamic).
        group_size: 32 to 256 consecutive weights of a row; the last group may be short. Only with ``per_group``.
        rule: how a scale is found from the weights of a group, see :func:`find_scale`.
        mode: ``learned`` (the rule starts it, LSQ's gradient moves it), ``dynamic`` (the rule at every forward pass)
            or ``frozen`` (the rule once).
        dtype: what the scale is rounded to inside every forward pass; ``portable`` is exact in fp16, bf16 and fp32.
        superblock: if set (256), scales are double quantized as k-quants store them: one scale of ``dtype`` per
            ``superblock`` weights times an integer of ``multiplier_bits`` bits per group.
        multiplier_bits: 1 to 8; the integer runs from 1 to ``2**multiplier_bits - 1``.

    Raises:
        ValueError: with the value, the limit and the fix.
    """

    granularity: Granularity = "per_channel"
    group_size: int | None = None
    rule: ScaleRule = "mse"
    mode: ScaleMode = "learned"
    dtype: ScaleDtype = "portable"
    superblock: int | None = None
    multiplier_bits: int = 4

    def __post_init__(self) -> None:
        for name, kinds in (("granularity", Granularity), ("rule", ScaleRule), ("mode", ScaleMode)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(get_args(kinds))}")
        if self.dtype not in SCALE_DTYPES:
            raise ValueError(f"scale dtype {self.dtype!r} is unknown; use one of {', '.join(SCALE_DTYPES)}")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError(
                f"granularity={self.granularity!r} with group_size={self.group_size}: "
                "give group_size with per_group, and only then"
            )
        if self.group_size is not None and not 32 <= self.group_size <= 256:
            raise ValueError(f"group_size={self.group_size} is outside 32..256; engines hold 32, 64, 128 or 256")
        if self.granularity == "per_token" and self.mode != "dynamic":
            raise ValueError(f"per_token scales with mode={self.mode!r}: tokens change, use mode='dynamic'")
        if self.superblock is not None:
            if self.group_size is None or self.superblock % self.group_size or self.superblock <= self.group_size:
                raise ValueError(
                    f"superblock={self.superblock} needs per_group scales whose group_size divides it and is smaller; "
                    f"group_size is {self.group_size}"
                )
            if not 1 <= self.multiplier_bits <= 8:
                raise ValueError(f"multiplier_bits={self.multiplier_bits} is outside 1..8")

    def view(self, shape: tuple[int, ...] | torch.Size) -> GroupView:
        """The :class:`GroupView` of a weight of this shape."""
        return GroupView(tuple(shape), self.granularity, self.group_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


QUEST_S: dict[int, float] = {
    2: 0.7978845608, 3: 1.2240089519, 4: 1.49353462, 8: 2.0510683541, 16: 2.5139305786, 32: 2.9160938835,
    64: 3.2765972826, 128: 3.6010497188, 256: 3.8849386788,
}  # fmt: skip
"""QuEST's S_b: outermost level in units of the RMS, by number of levels (arXiv:2502.05003)."""


@functools.lru_cache(maxsize=64)
def gaussian_step(grid: AnyGrid) -> float:
    r"""The scale that minimises :math:`E (x - s\,q(x / s))^2` for x ~ N(0, 1), by the closed-form error.

    Example:
        >>> from fewbits.grids import HalfShifted, Int
        >>> round(gaussian_step(Int(2)), 3), round(gaussian_step(HalfShifted(2)), 3)
        (1.048, 0.996)
    """
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    middle = (levels[1:] + levels[:-1]) / 2

    def distortion(log_scale: float) -> float:
        s = math.exp(log_scale)
        edges = torch.cat([torch.tensor([-40.0]), s * middle, torch.tensor([40.0])]).double()
        cdf = 0.5 * (1 + torch.erf(edges / math.sqrt(2)))
        pdf = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass, first = cdf.diff(), -pdf.diff()
        second = mass - (edges * pdf).diff()
        q = s * levels
        return float((second - 2 * q * first + q * q * mass).sum())

    start = math.log(3.0 / max(abs(float(levels[0])), abs(float(levels[-1]))))
    grid_points = [start + (i - 40) * 0.05 for i in range(61)]
    best = min(grid_points, key=distortion)
    found = minimize_scalar(distortion, bounds=(best - 0.1, best + 0.1), method="bounded", options={"xatol": 1e-10})
    return math.exp(float(found.x))


@functools.lru_cache(maxsize=64)
def gaussian_size(rule: str, count: int) -> float:
    r"""What :func:`block_size` expects of ``count`` weights from N(0, 1): for ``absmax`` :math:`\int_0^\infty 1 -
    \mathrm{erf}(t/\sqrt2)^n dt`, for ``absmean`` :math:`\sqrt{2/\pi}`, for ``rms`` 1 (its root mean square).

    Example:
        >>> round(gaussian_size("block_absmax", 64), 3), round(gaussian_size("block_absmean", 64), 3)
        (2.596, 0.798)
    """
    kind = rule.removeprefix("block_")
    if kind.startswith("absmax"):
        t = torch.linspace(0, 12, 12_001, dtype=torch.float64)
        return float(torch.trapezoid(1 - torch.erf(t / math.sqrt(2)) ** count, t))
    return math.sqrt(2 / math.pi) if kind == "absmean" else 1.0


def block_size(x: Tensor, counts: Tensor, rule: str) -> Tensor:
    """The size of every group that a rule is about: its largest, mean or root mean square magnitude.

    Args:
        x: ``(R, G, size)``, padded with zeros.
        counts: weights in each group, ``(G,)``.
        rule: of :class:`ScaleSpec`; ``absmax*`` is the largest magnitude, ``absmean`` the mean one, all others are rms,
            with or without ``block_`` before them.

    Returns:
        ``(R, G)``, units of ``x``, >= 0.

    Example:
        >>> block_size(torch.tensor([[[3.0, -4.0, 0.0]]]), torch.tensor([2]), "block_absmean")
        tensor([[3.5000]])
    """
    kind = rule.removeprefix("block_")
    if kind.startswith("absmax"):
        return x.abs().amax(-1)
    if kind == "absmean":
        return x.abs().sum(-1) / counts
    return (x.square().sum(-1) / counts).sqrt()


def find_scale(w: Tensor, grid: AnyGrid, spec: ScaleSpec) -> Tensor:
    r"""The scale of every group by the spec's rule, not yet rounded to the stored dtype.

    ============== ====================================================================================
    ``absmax``       :math:`\max|w| / ((L_{max} - L_{min})/2)`: outermost levels at the largest weight
    ``absmax_cover`` :math:`\max|w|` at the end of the outermost cell (SEQ's start, ParetoQ arXiv:2502.02631)
    ``absmax_qmax``  :math:`\max|w| / L_{max}` (LSQ's start in ParetoQ; at 2 bits 92 % of Gaussian weights become 0)
    ``absmean``      mean abs(w) for binary and ternary (BitNet b1.58), else :math:`2\,E|w|/\sqrt{L_{max}}` (LSQ)
    ``mse``          line search over 48 scales around ``gaussian``, up to ``absmax_qmax`` for heavy tails, then two
                     least-squares refinements, best kept
    ``gaussian``     rms times the MSE-optimal scale of N(0, 1) for this grid
    ``rms``          rms times QuEST's S_b (binary, ternary and half-shifted grids; arXiv:2502.05003)
    ``block_*``      :math:`\max|w|`, :math:`E|w|` or :math:`\sqrt{E w^2}` itself, for codebooks (arXiv:2602.15563)
    ============== ====================================================================================

    Args:
        w: ``(rows, in_features)`` or any shape whose last axis is cut into groups.
        grid: the level set.
        spec: granularity and rule.

    Returns:
        fp32 ``(R, G)``, units of ``w`` per step, >= 0 (0 only for an all-zero group).

    Raises:
        ValueError: if the rule has no meaning for the grid.
    """
    view = spec.view(w.shape)
    x = view.split(w.detach().float())
    counts = view.counts().to(x.device)
    low, high = grid.level_edge
    if spec.rule in GRID_FREE_RULES:
        return block_size(x, counts, spec.rule)
    if spec.rule.startswith("absmax"):
        divisor = {
            "absmax": (high - low) / 2,
            "absmax_cover": (grid.bin_edge[1] - grid.bin_edge[0]) / 2,
            "absmax_qmax": high,
        }[spec.rule]
        if divisor <= 0:
            raise ValueError(f"rule {spec.rule!r} has no positive level in {grid}; use 'mse'")
        return block_size(x, counts, spec.rule) / divisor
    if spec.rule == "absmean":
        mean = block_size(x, counts, spec.rule)
        if isinstance(grid, Binary | Ternary):
            return mean
        if high <= 0:
            raise ValueError(f"rule 'absmean' has no positive level in {grid}; use 'mse'")
        return 2 * mean / math.sqrt(high)
    rms = block_size(x, counts, spec.rule)
    if spec.rule == "rms":
        if not isinstance(grid, Binary | Ternary | HalfShifted):
            raise ValueError(f"rule 'rms' is QuEST's centred grid; {grid} is not centred, use 'gaussian'")
        return rms * (2 * QUEST_S[grid.num_levels] / (high - low))
    start = rms * gaussian_step(grid)
    if spec.rule == "gaussian":
        return start
    return _mse_scale(x, counts, start, x.abs().amax(-1) / (high if high > 0 else -low), grid)


def _mse_scale(x: Tensor, counts: Tensor, start: Tensor, largest: Tensor, grid: AnyGrid) -> Tensor:
    """Line search by rows, so that the working copy stays small; padding holds zeros and is masked out.

    From .3 of the Gaussian optimum to 3.5 of it, or to ``largest`` where one large weight carries most of the energy.
    """
    best = torch.empty_like(start)
    mask = (torch.arange(x.shape[-1], device=x.device) < counts[:, None]).float()
    rows = max(1, 2**18 // max(1, x[0].numel()))
    marks = torch.linspace(0, 1, _LINE_SEARCH_POINTS).tolist()
    for r in range(0, len(x), rows):
        part, s0 = x[r : r + rows], start[r : r + rows].clamp_min(1e-30)
        span = (largest[r : r + rows] / s0).clamp_min(_SEARCH_HIGH) / _SEARCH_LOW

        def error(s: Tensor, part: Tensor = part) -> tuple[Tensor, Tensor]:
            levels = grid.project_(part / s[..., None]) * mask
            return (part - levels * s[..., None]).square().sum(-1), levels

        lowest, chosen = error(s0)[0], s0
        for mark in marks:
            candidate = s0 * _SEARCH_LOW * span**mark
            value = error(candidate)[0]
            chosen = torch.where(value < lowest, candidate, chosen)
            lowest = torch.minimum(value, lowest)
        for _ in range(2):
            levels = error(chosen)[1]
            candidate = ((part * levels).sum(-1) / levels.square().sum(-1).clamp_min(1e-30)).clamp_min(1e-30)
            value = error(candidate)[0]
            chosen = torch.where(value < lowest, candidate, chosen)
            lowest = torch.minimum(value, lowest)
        best[r : r + rows] = chosen
    return torch.where(start > 0, best, start)


def double_quantize(scale: Tensor, spec: ScaleSpec) -> tuple[Tensor, Tensor]:
    r"""Split group scales into a super scale per superblock and an integer multiplier per group.

    .. math:: d = \mathrm{round}(\max_g s_g / (2^m - 1)), \qquad k_g = \mathrm{clip}(\lfloor s_g / d \rceil, 1, 2^m - 1)

    Args:
        scale: ``(R, G)``.
        spec: with ``superblock`` set.

    Returns:
        ``(super_scale, multipliers)``: fp32 ``(R, S)`` exact in ``spec.dtype`` and uint8 ``(R, G)``. The scale that
        counts is ``super_scale * multiplier`` in fp32, exact (at most 11 + 8 significant bits).
    """
    assert spec.superblock is not None
    assert spec.group_size is not None
    per = spec.superblock // spec.group_size
    top = 2**spec.multiplier_bits - 1
    num_super = -(-scale.shape[1] // per)
    padded = torch.nn.functional.pad(scale.float(), (0, num_super * per - scale.shape[1]))
    super_scale = round_scale(padded.view(len(scale), num_super, per).amax(-1) / top, spec.dtype)
    spread = super_scale.repeat_interleave(per, dim=1)[:, : scale.shape[1]]
    return super_scale, (scale.float() / spread).round().clamp(1, top).to(torch.uint8)


def combine(super_scale: Tensor, multipliers: Tensor, spec: ScaleSpec) -> Tensor:
    """Group scales ``(R, G)`` from the two parts of :func:`double_quantize`."""
    assert spec.superblock is not None
    assert spec.group_size is not None
    per = spec.superblock // spec.group_size
    return super_scale.float().repeat_interleave(per, dim=1)[:, : multipliers.shape[1]] * multipliers.float()


def stored_scale(scale: Tensor, spec: ScaleSpec) -> Tensor:
    """The scale as the file will hold it, fp32 ``(R, G)``: rounded to the dtype, or double quantized."""
    if spec.superblock is None:
        return round_scale(scale, spec.dtype)
    return combine(*double_quantize(scale, spec), spec)
