"""Methods that take a whole transformer block at once: its layers get trained weights, its output is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from fewbits.ptq._base import PTQResult
from fewbits.ptq.block_ap import FixedCodes, TrainedWeight, descend
from fewbits.ptq.calibration import Calibration
from fewbits.ptq.capture import Stage
from fewbits.ptq.plan import Plan, naming, weight_of
from fewbits.ptq.rtn import rtn
from fewbits.ptq.signround import SignRoundWeight, sign_descent
from fewbits.qtensor import initial_scale


class Trained(Protocol):
    """A weight with variables."""

    def weight(self) -> Tensor:
        """The quantized weight, differentiable."""
        ...

    def result(self) -> PTQResult:
        """Where it stands."""
        ...


@contextmanager
def supply(plan: Plan, weights: Mapping[str, Trained]) -> Iterator[None]:
    """The prepared layers of these names use the given weights while the block runs."""
    layers = [plan.layer(name) for name in weights]
    for layer, weight in zip(layers, weights.values(), strict=True):
        layer.quantized_weight = weight.weight  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.quantized_weight


def batch_order(num_batches: int, iterations: int, seed: int) -> list[int]:
    """Which batch each step takes: all of them once in a random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < iterations:
        order += torch.randperm(num_batches, generator=generator).tolist()
    return order


def _losses(stage: Stage, order: Sequence[int]) -> tuple[Callable[[int], Tensor], Callable[[], float]]:
    """Loss of a step and mean over all batches: the block's squared error in units of round-to-nearest's."""
    targets = stage.targets
    assert targets is not None

    def error(i: int) -> Tensor:
        return (stage.forward(i) - targets[i]).float().square().mean()

    def score() -> float:
        with torch.no_grad():
            return sum(float(error(i)) for i in range(stage.num_batches)) / stage.num_batches

    unit = max(score(), 1e-30)
    return (lambda step: error(order[step % len(order)]) / unit), (lambda: score() / unit)


def _start(plan: Plan, stage: Stage) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and scale of every layer, which is rounded to nearest so far."""
    found = {}
    for name in stage.layers:
        with naming(name):
            w, scheme = weight_of(stage.module(name)).detach().clone(), plan.rules[name].scheme
            scale = initial_scale(w, scheme)
            plan.set_(name, rtn(w, scheme, scale=scale))
            found[name] = w, scale
    return found


def signround_stage(
    plan: Plan,
    stage: Stage,
    *,
    iterations: int = 200,
    learning_rate: float | None = None,
    learn_scale: bool = True,
    seed: int = 0,
) -> None:
    """SignRound of all layers of a block for the block's output; the best state over all batches is kept."""
    weights = {
        name: SignRoundWeight(w, plan.rules[name].scheme, scale, learn_scale=learn_scale)
        for name, (w, scale) in _start(plan, stage).items()
    }
    with supply(plan, weights):
        loss, score = _losses(stage, batch_order(stage.num_batches, iterations, seed))
        sign_descent(list(weights.values()), loss, score=score, iterations=iterations, learning_rate=learning_rate)
    for name, weight in weights.items():
        plan.update_(name, weight.result())


def block_ap_stage(
    plan: Plan,
    stage: Stage,
    *,
    iterations: int = 200,
    learning_rate: float = 1e-3,
    scale_learning_rate: float = 5e-3,
    seed: int = 0,
) -> None:
    """Block-AP of one block: weights and scales of its layers trained for its output."""
    weights = {
        name: TrainedWeight(w, plan.rules[name].scheme, scale) for name, (w, scale) in _start(plan, stage).items()
    }
    with supply(plan, weights):
        loss, score = _losses(stage, batch_order(stage.num_batches, iterations, seed))
        descend(
            list(weights.values()),
            loss,
            score,
            iterations=iterations,
            learning_rate=learning_rate,
            scale_learning_rate=scale_learning_rate,
        )
    for name, weight in weights.items():
        plan.update_(name, weight.result())


def train_scales(
    plan: Plan,
    data: Calibration,
    *,
    end_iterations: int = 100,
    end_learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Block-AP's second half: the scales of all layers trained together on the task, with every code fixed.

    Args:
        plan: of a quantized model.
        data: calibration data with its loss.
        end_iterations: steps; 0 leaves the scales as the blocks gave them.
        end_learning_rate: in units of each scale.
        seed: of the order of the batches.
    """
    if end_iterations == 0:
        return
    weights = {name: FixedCodes(plan.result(name)) for name in plan.owners}
    order = batch_order(len(data.batches), end_iterations, seed)
    with supply(plan, weights):
        descend(
            list(weights.values()),
            lambda step: data.loss(order[step]),
            data.mean_loss,
            iterations=end_iterations,
            learning_rate=0.0,
            scale_learning_rate=end_learning_rate,
        )
    for name, weight in weights.items():
        plan.update_(name, weight.result())
