"""How each method goes through a stage: layer by layer, or with all layers of a block at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.nn import QATLayer
from fewbits.ptq._base import PTQResult
from fewbits.ptq.awq import awq, search_scale
from fewbits.ptq.calibration import Calibration
from fewbits.ptq.capture import Group, Moments, Stage
from fewbits.ptq.folding import PRODUCERS, Fold, multiply_columns_
from fewbits.ptq.lapq import search_scales
from fewbits.ptq.plan import Plan, naming, weight_of

LayerMethod = Callable[..., PTQResult]
_INVARIANT = {torch.float64: 1e-9, torch.float32: 2e-5}
"""Largest change of a block's output, in units of its largest entry, that a fold may leave behind; half types: 3e-2."""


def each_layer(plan: Plan, stage: Stage, method: LayerMethod, *, sequential: bool = True, **options: Any) -> None:
    """One group of layers with a common input after the other, each with the Hessian of what reaches it then."""
    groups = stage.groups()
    known = {} if sequential else stage.hessians([group.names[0] for group in groups])
    for group in groups:
        first = group.names[0]
        hessian = known[first] if known else stage.hessians([first])[first]
        for name in group.names:
            with naming(name):
                plan.set_(
                    name, method(weight_of(stage.module(name)), plan.rules[name].scheme, hessian=hessian, **options)
                )


def without_data(plan: Plan, stage: Stage, method: LayerMethod, **options: Any) -> None:
    """Every layer from its weight alone."""
    for name in stage.layers:
        with naming(name):
            plan.set_(name, method(weight_of(stage.module(name)), plan.rules[name].scheme, **options))


def awq_stage(plan: Plan, stage: Stage, *, num_ratios: int = 20, clip: bool = True) -> None:
    """Fold the factors of every group that has a place for them, then search the scales of every layer."""
    groups = stage.groups()
    moments = stage.moments([group.names[0] for group in groups])
    hessians = {}
    for group in groups:
        m = moments[group.names[0]]
        with naming(group.names[0]):
            factors = _fold_group_(plan, stage, group, m, num_ratios=num_ratios, clip=clip)
        hessians[group] = m.hessian / torch.outer(factors, factors)
    for group in groups:
        for name in group.names:
            with naming(name):
                scheme = plan.rules[name].scheme
                plan.set_(name, awq(weight_of(stage.module(name)), scheme, hessian=hessians[group], clip=clip))


@torch.no_grad()
def _fold_group_(plan: Plan, stage: Stage, group: Group, moments: Moments, **options: Any) -> Tensor:
    """Scale a group's columns and divide before it; ones where nothing is to be won or the output would change."""
    ones = torch.ones_like(moments.magnitude)
    fold = find_fold(stage, group)
    if fold is None or not bool(moments.magnitude.any()):
        return ones
    weights = [weight_of(stage.module(name)) for name in group.names]
    schemes = [plan.rules[name].scheme for name in group.names]
    magnitude = fold.shared_mean(moments.magnitude)
    found = search_scale(weights, schemes, magnitude, hessian=moments.hessian, **options)
    if found.ratio == 0:
        return ones
    factors = found.factors.double()
    readers = [stage.module(name) for name in (*group.names, *group.others)]
    touched = [p for module in (*readers, fold.module) for p in module.parameters(recurse=False)]
    kept = [p.detach().clone() for p in touched]
    before = stage.forward(0)
    for layer in readers:
        multiply_columns_(layer, factors)
    fold.divide_(factors)
    change = (stage.forward(0) - before).abs().max() / before.abs().max().clamp_min(1e-30)
    if float(change) <= _INVARIANT.get(before.dtype, 3e-2):
        return factors
    for p, value in zip(touched, kept, strict=True):
        p.copy_(value)
    return ones


def find_fold(stage: Stage, group: Group) -> Fold | None:
    """What stands before a group: the norm that wrote its input, or a sibling whose channels reach it."""
    if group.norm is not None:
        return Fold.of_norm(stage.module(group.norm))
    parent, _, leaf = group.names[0].rpartition(".")
    sibling = f"{parent}.{PRODUCERS.get(leaf, '')}"
    if len(group.names) > 1 or leaf not in PRODUCERS or sibling not in dict(stage.model.named_modules()):
        return None
    producer, width = stage.module(sibling), weight_of(stage.module(group.names[0])).shape[1]
    if not isinstance(producer, nn.Linear | Conv1D) or isinstance(producer, QATLayer):
        return None
    head_dim = getattr(stage.module(parent), "head_dim", None)
    return Fold.of_rows(producer, width, head_dim if isinstance(head_dim, int) else None)


def lapq_model(
    plan: Plan, data: Calibration, *, num_p: int = 10, iterations: int = 1, max_multiplier: float = 1.5
) -> None:
    """LAPQ of all layers together, by the loss of the model."""
    layers = {name: plan.layer(name) for name in plan.owners}

    @torch.no_grad()
    def set_(scales: Sequence[Tensor]) -> None:
        for layer, scale in zip(layers.values(), scales, strict=True):
            assert layer.weight_scale is not None
            layer.weight_scale.copy_(scale)

    def loss(scales: Sequence[Tensor]) -> float:
        set_(scales)
        return data.mean_loss()

    scales, _ = search_scales(
        [layer.scheme.rotation.apply(layer.latent().detach().float()) for layer in layers.values()],
        [layer.scheme for layer in layers.values()],
        loss,
        num_p=num_p,
        iterations=iterations,
        max_multiplier=max_multiplier,
    )
    set_(scales)
