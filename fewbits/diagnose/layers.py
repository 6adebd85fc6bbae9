"""Which layers suffer: the rise of the loss when one layer alone is rounded, and the mixed recipe that follows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fewbits.diagnose.losses import TokenLoss
from fewbits.diagnose.sites import Site
from fewbits.geometry import Allocation, Option, allocate_bits, loss_value, placed
from fewbits.geometry._result import HIDDEN, Result
from fewbits.recipe import Recipe, RuleSpec
from fewbits.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class SensitivityTable(Result):
    """``rises[layer][scheme]`` in nats per token, ``sizes[layer][scheme]`` in bits, codes and scales counted."""

    base_loss: float
    rises: dict[str, dict[str, float]]
    sizes: dict[str, dict[str, int]]
    num_weights: dict[str, int]

    def options(self) -> dict[str, dict[str, Option]]:
        """The table that :func:`~fewbits.geometry.allocate_bits` takes; rises that are not finite are left out."""
        return {
            layer: {
                name: Option(loss=rise, size=self.sizes[layer][name])
                for name, rise in row.items()
                if math.isfinite(rise)
            }
            for layer, row in self.rises.items()
        }


def layer_sensitivity(
    loss: TokenLoss,
    sites: Sequence[Site],
    schemes: Mapping[str, Scheme],
    *,
    known: Mapping[tuple[str, str], float] | None = None,
    on_value: Callable[[str, str, float], None] | None = None,
    base_loss: float | None = None,
) -> SensitivityTable:
    r"""Round one layer at a time: :math:`L(w + e_l) - L(w)` for every layer ``l`` and scheme.

    Args:
        loss: of the plain model; called ``layers * schemes + 1`` times.
        sites: layers; restored bit for bit.
        schemes: by the name that the table uses.
        known: rises of an interrupted run by ``(layer, scheme)``; not computed again.
        on_value: called with ``(layer, scheme, rise)`` after each, to save or to show progress.
        base_loss: loss of the unrounded model where it is known already, nats.

    Reference: arXiv:2606.09012 (its slices, layer by layer).
    """
    base = loss_value(loss) if base_loss is None else base_loss
    rises: dict[str, dict[str, float]] = {}
    for site in sites:
        row: dict[str, float] = {}
        for name, scheme in schemes.items():
            rise = None if known is None else known.get((site.name, name))
            if rise is None:
                with placed([site.weight], [site.rounded(scheme)]):
                    rise = loss_value(loss) - base
                if on_value is not None:
                    on_value(site.name, name, rise)
            row[name] = rise
        rises[site.name] = row
    return SensitivityTable(
        base_loss=base,
        rises=rises,
        sizes={s.name: {name: s.size_in_bits(scheme) for name, scheme in schemes.items()} for s in sites},
        num_weights={s.name: s.weight.numel() for s in sites},
    )


@dataclass(frozen=True, kw_only=True)
class Proposal(Result):
    """A mixed-bit recipe; ``bits_per_weight`` over the quantized weights, rises in nats per token, before training.

    ``measured_rise`` is that of the mixed model itself, beside the ``allocation``'s sum over single layers;
    ``uniform`` is the largest single scheme within the budget (None if there is none) with its own rise.
    """

    allocation: Allocation
    bits_per_weight: float
    budget_bits_per_weight: float
    measured_rise: float
    uniform: str | None
    uniform_bits_per_weight: float | None
    uniform_rise: float | None
    recipe: Recipe = field(repr=False, metadata=HIDDEN)


def propose_recipe(
    loss: TokenLoss,
    sites: Sequence[Site],
    schemes: Mapping[str, Scheme],
    table: SensitivityTable,
    *,
    budget: float,
    base: Recipe | None = None,
    surrogate: str | dict[str, Any] = "ste",
    ties: Sequence[Sequence[str]] = (),
) -> Proposal:
    """Bits for each layer under a size budget, solved exactly, as a recipe that ``fewbits train`` takes.

    Args:
        loss: of the plain model, to measure the mixed model before any training; weights are restored bit for bit.
        sites: the layers of the table.
        schemes: of the table; names must be what :meth:`~fewbits.Scheme.parse` reads, as rules hold them as text.
        table: from :func:`layer_sensitivity`.
        budget: bits per quantized weight, scales counted.
        base: everything but the rules: model, data, training; the default recipe if None.
        surrogate: of every rule.
        ties: groups of layers that must share a scheme (fused q, k, v).

    Raises:
        ValueError: for a budget below the smallest scheme, or from :func:`~fewbits.geometry.allocate_bits`.
    """
    total = sum(table.num_weights.values())
    allocation = allocate_bits(table.options(), budget=math.floor(budget * total), ties=ties)
    base = base or Recipe()
    recipe = base.model_copy(update={"rules": _rules(allocation.choices, schemes, surrogate)})
    recipe = Recipe.parse(recipe.to_yaml())  # every validator runs on what will be written
    fitting = {
        name: sum(row[name] for row in table.sizes.values())
        for name in schemes
        if sum(row[name] for row in table.sizes.values()) <= allocation.budget
    }
    uniform = max(fitting, key=fitting.__getitem__) if fitting else None
    return Proposal(
        allocation=allocation,
        bits_per_weight=allocation.size / total,
        budget_bits_per_weight=budget,
        measured_rise=_rise(loss, sites, {s.name: schemes[allocation.choices[s.name]] for s in sites}, table.base_loss),
        uniform=uniform,
        uniform_bits_per_weight=None if uniform is None else fitting[uniform] / total,
        uniform_rise=None
        if uniform is None
        else _rise(loss, sites, {s.name: schemes[uniform] for s in sites}, table.base_loss),
        recipe=recipe,
    )


def _rules(
    choices: Mapping[str, str], schemes: Mapping[str, Scheme], surrogate: str | dict[str, Any]
) -> list[RuleSpec]:
    rules = []
    for name in schemes:
        layers = [re.escape(layer) for layer, choice in choices.items() if choice == name]
        if layers:
            rules.append(RuleSpec(pattern=f"re:{'|'.join(layers)}", scheme=name, surrogate=surrogate))
    return rules


@torch.no_grad()
def _rise(loss: TokenLoss, sites: Sequence[Site], schemes: Mapping[str, Scheme], base_loss: float) -> float:
    with placed([site.weight for site in sites], [site.rounded(schemes[site.name]) for site in sites]):
        return loss_value(loss) - base_loss
