"""Which target holds which grid: a table that is asked of the code that checks, scheme by scheme.

A cell sums up one grid in one target over all group sizes: ``lossless`` where every one is, ``lossless if`` where some
are or where the numbers decide, ``cannot`` where none is, with the condition or the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from fewbits.grids import Codebook
from fewbits.numerics import ScaleDtype
from fewbits.scheme import Scheme
from fewbits.targets import TARGETS
from fewbits.targets.affine import Judgement, always_exact
from fewbits.targets.base import Target
from fewbits.targets.dequantized import Dequantized
from fewbits.targets.gguf_plan import Verdict, integer_levels

SHAPE = (2048, 2048)
"""Of the weight that is asked about: every group divides its rows."""

GRIDS: dict[str, Scheme] = {
    **{text: Scheme.parse(text) for text in ("W1", "W1.58", "W2", "W2H", "W3", "W3H", "W4", "W4H", "W8")},
    "W2K integers": Scheme.parse("W2", grid=Codebook((-7.0, -2.0, 2.0, 7.0))),
    "W2K": Scheme.parse("W2K"),
}
"""One scheme of every grid, by the name that recipes use (a codebook of integers beside the free one)."""

GROUPS: dict[str, dict[str, object]] = {
    "per tensor": {"granularity": "per_tensor"},
    "per channel": {"granularity": "per_channel"},
    "G32": {"granularity": "per_group", "group_size": 32},
    "G64": {"granularity": "per_group", "group_size": 64},
    "G128": {"granularity": "per_group", "group_size": 128},
    "G256": {"granularity": "per_group", "group_size": 256},
    "G64 in superblocks of 256": {"granularity": "per_group", "group_size": 64, "superblock": 256},
}
"""Every granularity that a cell is asked for."""
_LAST_RESORT = "G64 in superblocks of 256"
"""Named only where a group of 64 with scales of its own does not fit."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One grid in one target.

    Attributes:
        verdict: over all of :data:`GROUPS`.
        condition: what must hold for ``lossless if``, or the reason for ``cannot``; empty for ``lossless``.
        judgements: by name of the group.
    """

    verdict: Verdict
    condition: str
    judgements: Mapping[str, Judgement]

    @property
    def text(self) -> str:
        """``lossless``, ``lossless if ..`` or ``cannot: ..``."""
        joint = {"lossless": "", "lossless if": " ", "cannot": ": "}[self.verdict]
        return f"{self.verdict}{joint}{self.condition}"


def judge(target: Target, scheme: Scheme, shape: tuple[int, int] = SHAPE) -> Judgement:
    """The verdict of a target's own checks on one scheme.

    Example:
        >>> from fewbits.targets import get_target
        >>> judge(get_target("onnx"), Scheme.parse("W2HA16G64")).reason
        '2-bit codes, zero point 3/2, blocks of 64'
        >>> judge(get_target("mlx:fp16"), Scheme.parse("W4A16G64")).verdict
        'cannot'
    """
    own = getattr(target, "judge", None)
    if own is not None:
        found: Judgement = own(scheme, shape)
        return found
    if reason := target.holds(scheme, shape):
        return Judgement(verdict="cannot", reason=reason)
    if isinstance(target, Dequantized):
        return _judge_dequantized(target, scheme)
    choose = getattr(target, "choose", None)
    reason = "" if choose is None else ": ".join(choose(scheme, shape))
    if ": lossless if " in reason:
        return Judgement(verdict="lossless if", reason=reason.replace(": lossless if ", ": "))
    return Judgement(verdict="lossless", reason=reason)


def _judge_dequantized(target: Dequantized, scheme: Scheme) -> Judgement:
    found = integer_levels(scheme.grid.levels)
    if target.dtype == "fp32":
        return Judgement(verdict="lossless", reason="the weights as they are computed")
    exact = found is not None and scheme.rotation.kind == "none"
    if found is not None and exact:
        levels = [Fraction(i, found[1]) for i in found[0]]
        exact = all(always_exact(level, scheme, target.torch_dtype) for level in levels)
    if exact:
        return Judgement(verdict="lossless", reason=f"scale * level is a {target.dtype} number")
    return Judgement(verdict="lossless if", reason=f"every scale * level is a {target.dtype} number")


def target_matrix(
    targets: Iterable[Target] | None = None,
    *,
    scale_dtype: ScaleDtype = "portable",
    shape: tuple[int, int] = SHAPE,
) -> dict[str, dict[str, Cell]]:
    """Every grid in every target.

    Args:
        targets: the columns; all that there are, if None.
        scale_dtype: of the schemes' scales.
        shape: of the weight.

    Returns:
        By name of the target, then by name of the grid (:data:`GRIDS`).

    Example:
        >>> from fewbits.targets import get_target
        >>> row = target_matrix([get_target("bitnet")])["bitnet"]
        >>> row["W1.58"].text, row["W2"].text
        ('lossless if per tensor', 'cannot: the 4 levels -2..1 are not ternary; train with W1.58')
    """
    chosen = tuple(TARGETS.values() if targets is None else targets)
    return {
        target.name: {
            name: _cell({group: judge(target, scheme.with_scale(dtype=scale_dtype, **parts), shape)
                         for group, parts in GROUPS.items()})
            for name, scheme in GRIDS.items()
        }
        for target in chosen
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Held:
    """One grid with one group in one target that holds it, always or if the numbers allow it."""

    target: str
    grid: str
    group: str
    scheme: Scheme
    judgement: Judgement


def held(
    target: Target, shapes: Mapping[str, tuple[int, int]] | None = None, *, scale_dtype: ScaleDtype = "portable"
) -> list[Held]:
    """Every grid and group that a target holds.

    Args:
        target: which one.
        shapes: of the weight asked about, by name of the group; :data:`SHAPE` where it says nothing.
        scale_dtype: of the schemes' scales.

    Example:
        >>> from fewbits.targets import get_target
        >>> [(one.grid, one.group) for one in held(get_target("bitnet"))]
        [('W1', 'per tensor'), ('W1.58', 'per tensor')]
    """
    found = []
    for grid, plain in GRIDS.items():
        for group, parts in GROUPS.items():
            scheme = plain.with_scale(dtype=scale_dtype, **parts)
            judgement = judge(target, scheme, (shapes or {}).get(group, SHAPE))
            if judgement.verdict != "cannot":
                found.append(Held(target=target.name, grid=grid, group=group, scheme=scheme, judgement=judgement))
    return found


def _cell(judgements: dict[str, Judgement]) -> Cell:
    plain = {group: j for group, j in judgements.items() if group != _LAST_RESORT}
    asked = plain if plain["G64"].verdict != "cannot" else judgements
    held = {group: j for group, j in asked.items() if j.verdict != "cannot"}
    if not held:
        return Cell(verdict="cannot", condition=plain["per tensor"].reason, judgements=judgements)
    numbers = {group: j.reason for group, j in held.items() if j.verdict == "lossless if"}
    if len(held) == len(asked) and not numbers:
        return Cell(verdict="lossless", condition="", judgements=judgements)
    always = [group for group in held if group not in numbers]
    parts = [", ".join(always)] if always else []
    conditions: dict[str, list[str]] = {}
    for group, reason in numbers.items():
        conditions.setdefault(reason, []).append(group)
    for reason, groups in conditions.items():
        where = "" if len(groups) == len(asked) else f"{', '.join(groups)} and "
        parts.append(where + reason)
    return Cell(verdict="lossless if", condition="; or ".join(parts), judgements=judgements)


def matrix_markdown(matrix: Mapping[str, Mapping[str, Cell]], *, reasons: bool = False) -> str:
    """The matrix as a Markdown table, a row for each target, with the conditions numbered below it.

    Args:
        matrix: of :func:`target_matrix`.
        reasons: number the reasons of refusals too.

    Example:
        >>> from fewbits.targets import get_target
        >>> print(matrix_markdown(target_matrix([get_target("hf")])).splitlines()[2])
        | `hf` | yes | yes | yes | yes | yes | yes | yes | yes | yes | yes | yes |
    """
    names = list(next(iter(matrix.values()), {}))
    lines = [f"| target | {' | '.join(names)} |", f"|---{'|:-:' * len(names)}|"]
    notes: dict[str, int] = {}
    for target, row in matrix.items():
        cells = []
        for cell in row.values():
            word = {"lossless": "yes", "lossless if": "if", "cannot": "no"}[cell.verdict]
            if cell.verdict == "lossless if" or (reasons and cell.verdict == "cannot"):
                text = cell.text.replace("\n", " ")
                word += f" ({notes.setdefault(text, len(notes) + 1)})"
            cells.append(word)
        lines.append(f"| `{target}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in notes.items())]).rstrip() + "\n"
