r"""Bits for each layer under a size budget: the exact optimum of an integer program.

With :math:`x_{lo} \in \{0, 1\}` saying that layer ``l`` takes option ``o`` (say, a scheme),

.. math:: \min \sum_{lo} \mathrm{loss}_{lo}\, x_{lo} \quad \text{s.t.} \quad \sum_o x_{lo} = 1 \; \forall l, \qquad
          \sum_{lo} \mathrm{size}_{lo}\, x_{lo} \le \text{budget}.

The loss of a recipe is predicted as the sum of the losses of its layers measured one at a time. That ignores how layers
interact, so the prediction is a ranking, to be checked by evaluating the recipe. Built on the per-layer widths and
rises of arXiv:2606.09012's slices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewbits.geometry._result import Result


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice for a layer: predicted rise in ``loss`` (nats, may be negative) and stored ``size`` in bits."""

    loss: float
    size: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.loss):
            raise ValueError(f"loss={self.loss} must be finite; give a diverged option a large number or leave it out")
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 0:
            raise ValueError(f"size={self.size!r} must be a whole number of bits, not negative")


Table = Mapping[str, Mapping[str, Option]]
"""Sensitivity table: layer name -> option name -> :class:`Option`."""


@dataclass(frozen=True, kw_only=True)
class Allocation(Result):
    """The chosen option of every layer, the predicted loss (sum, nats) and the size in bits; ``slack`` is unused."""

    choices: dict[str, str]
    loss: float
    size: int
    budget: int
    _derived: ClassVar[tuple[str, ...]] = ("slack",)

    @property
    def slack(self) -> int:
        """Bits of the budget left over."""
        return self.budget - self.size


def allocate_bits(table: Table, *, budget: int, ties: Sequence[Sequence[str]] = ()) -> Allocation:
    """Choose one option per layer, least total loss, total size within the budget; an exact integer program.

    Args:
        table: sensitivity table; layers may have different options.
        budget: size limit in bits.
        ties: groups of layers that must take the same option (fused q, k, v; tied embeddings); a group may use the
            options that all its members have.

    Returns:
        The optimum, proven to 1e-10 of the spread of the losses (so an option that diverged should not be given an
        astronomic loss). Among recipes of equal loss any one may be returned; the same call returns the same one.

    Raises:
        ValueError: for an empty table or layer, unknown or repeated names in ``ties``, a group without a common
            option, or a budget below the smallest possible size (which the message names).

    Example:
        >>> table = {"a": {"W2": Option(loss=0.9, size=20), "W4": Option(loss=0.1, size=40)},
        ...          "b": {"W2": Option(loss=0.2, size=20), "W4": Option(loss=0.1, size=40)}}
        >>> allocate_bits(table, budget=60).choices
        {'a': 'W4', 'b': 'W2'}

    Reference: arXiv:2606.09012 (sensitivities).
    """
    groups = _grouped(table, ties)
    merged = [
        {
            name: (
                math.fsum(table[layer][name].loss for layer in group),
                sum(table[layer][name].size for layer in group),
            )
            for name in _common_options(table, group)
        }
        for group in groups
    ]
    smallest = sum(min(size for _, size in options.values()) for options in merged)
    if budget < smallest:
        raise ValueError(f"budget={budget} bits is below the smallest possible size, {smallest} bits; raise the budget")
    picked = _solve(merged, budget)
    choices = {layer: name for group, name in zip(groups, picked, strict=True) for layer in group}
    return Allocation(
        choices={layer: choices[layer] for layer in table},
        loss=math.fsum(table[layer][choices[layer]].loss for layer in table),
        size=sum(table[layer][choices[layer]].size for layer in table),
        budget=budget,
    )


def _grouped(table: Table, ties: Sequence[Sequence[str]]) -> list[list[str]]:
    if not table:
        raise ValueError("the sensitivity table is empty")
    for layer, options in table.items():
        if not options:
            raise ValueError(f"layer {layer!r} has no options")
    tied = [layer for group in ties for layer in group]
    unknown = sorted(set(tied) - set(table))
    if unknown:
        raise ValueError(f"ties name layers that the table lacks: {', '.join(unknown)}")
    if len(set(tied)) != len(tied):
        raise ValueError("a layer appears twice in ties; put it into one group")
    return [list(group) for group in ties if group] + [[layer] for layer in table if layer not in set(tied)]


def _common_options(table: Table, group: Sequence[str]) -> list[str]:
    names = [name for name in table[group[0]] if all(name in table[layer] for layer in group)]
    if not names:
        raise ValueError(f"the tied layers {', '.join(group)} have no option in common")
    return names


def _solve(merged: Sequence[Mapping[str, tuple[float, int]]], budget: int) -> list[str]:
    # Imported here: scipy.optimize takes longer to load than the rest of this package.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    floors = [min(size for _, size in options.values()) for options in merged]
    free = budget - sum(floors)
    kept = [_useful(options, floor, free) for options, floor in zip(merged, floors, strict=True)]
    flat = [(index, name, loss, extra) for index, row in enumerate(kept) for name, loss, extra in row]
    owner, extra = [entry[0] for entry in flat], [entry[3] for entry in flat]
    # Only differences within a layer matter, and sizes only in units of their common divisor. Above 2**20 units they
    # are rounded down, which relaxes the limit: the solver then works on small whole numbers, where it is reliable, and
    # what it lets through is caught below.
    unit = math.gcd(*extra) or 1
    unit *= -(-(free // unit) // 2**20) or 1
    size = np.array([float(e // unit) for e in extra])
    # Stretched so that the solver's absolute gap of 1e-6 is 1e-10 of the spread of the losses.
    least = [min(loss for _, loss, _ in row) for row in kept]
    loss = np.array([entry[2] - least[entry[0]] for entry in flat])
    spread = float(loss.sum())
    loss *= 1e4 / spread if spread > 0 else 1.0
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(kept), len(flat)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(size[None, :], -np.inf, free // unit)]
    ends = np.cumsum([0, *map(len, kept)]).tolist()
    while True:
        result = milp(
            loss,
            constraints=constraints,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        if not result.success:
            raise RuntimeError(f"the integer program was not solved to optimality: {result.message}")
        chosen = [a + int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(ends)]
        if sum(extra[index] for index in chosen) <= free:
            return [flat[index][1] for index in chosen]
        # Over the limit by a few bits. Forbidding exactly this point and solving again loses no true optimum.
        cut = np.zeros(len(flat))
        cut[chosen] = 1
        constraints.append(LinearConstraint(cut[None, :], -np.inf, len(kept) - 1))


def _useful(options: Mapping[str, tuple[float, int]], floor: int, free: int) -> list[tuple[str, float, int]]:
    """Options as ``(name, loss, bits above the smallest)``, less those that no optimum needs.

    Dropped are options that alone exceed the free bits, and those beaten by one that is no larger and no worse.
    """
    found: list[tuple[str, float, int]] = []
    for name, (loss, size) in sorted(options.items(), key=lambda item: (item[1][1], item[1][0])):
        if size - floor <= free and (not found or loss < found[-1][1]):
            found.append((name, loss, size - floor))
    return found
