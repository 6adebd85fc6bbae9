r"""EWGS's delta from the curvature of the loss, measured during training: the schedule of arXiv:2104.00903.

The Hessian meant is that of the loss with respect to the *quantized* weights, at the quantized weights, where the loss
is a smooth function; no surrogate takes part. Layers are measured in the coordinates in which the surrogate works: the
rotated weight in cells, :math:`\hat w = R^{-1}(p \odot u)` with the pitch p (step times scale), so that

.. math:: \mathrm{tr} H_u = E\, d^\top \nabla^2 L(\hat w)\, d, \quad d = R^{-1}(p \odot z), \quad
          \nabla_u L = p \odot R \nabla L(\hat w), \qquad z_j = \pm 1.

One direction z serves all layers at once: products of different layers have mean 0, so each layer's part is an estimate
of its own trace. Second derivatives come from a double backward pass with attention in its plain form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import default_data_collator

from fewbits.convert import owned_layers, qat_layers
from fewbits.data import TokenBlocks
from fewbits.geometry.curvature import gradient_and_products
from fewbits.geometry.directions import dot, random_vector
from fewbits.nn import QATLayer
from fewbits.scales import stored_scale
from fewbits.surrogates import EWGS
from fewbits.surrogates.ewgs import HessianSchedule, curvature_delta
from fewbits.teacher_logits import DistilledBlocks
from fewbits.training.variance import collect_batches, reference_indices

Loss = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerCurvature:
    """What was measured of one layer, per cell.

    Attributes:
        trace: of the Hessian block of the quantized weight, mean over batches and directions.
        num_weights: its entries.
        gradient_std: standard deviation of the gradient's entries, mean over batches.
    """

    trace: float
    num_weights: int
    gradient_std: float

    @property
    def delta(self) -> float:
        """:func:`~fewbits.surrogates.ewgs.curvature_delta` of the three."""
        return curvature_delta(self.trace, self.num_weights, self.gradient_std)


@contextmanager
def at_quantized_weights(layers: Mapping[str, QATLayer], model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, forward passes take the quantized weights of these layers from leaf tensors, which are yielded by name.

    Args:
        layers: owners of their weights; layers tied to them use the same leaf.
        model: that holds them.
    """
    with torch.no_grad():
        leaves = {name: layer.quantized_weight().detach().clone() for name, layer in layers.items()}
    by_owner = {id(layer): leaves[name] for name, layer in layers.items()}
    patched = [layer for _, layer in qat_layers(model) if id(layer.owner) in by_owner]
    try:
        for layer in patched:
            leaf = by_owner[id(layer.owner)]
            layer.__dict__["quantized_weight"] = partial(_the_leaf, leaf)
            layer.__dict__["operand"] = partial(layer.scheme.rotation.into_product, leaf)
        yield leaves
    finally:
        for layer in patched:
            for method in ("quantized_weight", "operand"):
                layer.__dict__.pop(method, None)


def _the_leaf(leaf: Tensor) -> Tensor:
    return leaf


def measure_curvature(
    model: nn.Module,
    losses: Sequence[Loss],
    layers: Mapping[str, QATLayer],
    *,
    num_probes: int,
    generator: torch.Generator,
) -> dict[str, LayerCurvature]:
    r"""Trace of the Hessian and spread of the gradient per layer, per cell; the module's head has the formulas.

    The model is evaluated in eval mode (no dropout, no noise, no half-way drive) and left as it was.

    Args:
        model: a prepared model.
        losses: one closure per batch, each the mean loss of ``model`` on it, nats.
        layers: owners by name.
        num_probes: directions per batch, >= 1.
        generator: of the directions.

    Example:
        >>> from fewbits.convert import Rule, prepare
        >>> model = prepare(nn.Sequential(nn.Linear(4, 1, bias=False)), Rule(scheme="W2"))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[0.5, 0.0, -0.5, 0.25]])), model[0].weight_scale.fill_(0.5)
        >>> loss = lambda: model(torch.eye(4)).square().sum() / 2  # H = identity, so 1/4 per weight in cells
        >>> measure_curvature(model, [loss], {"0": model[0]}, num_probes=1, generator=torch.Generator())["0"].trace
        1.0
    """
    modes = {module: module.training for module in model.modules()}
    names = list(layers)
    pitches, rotations = [], []
    for layer in layers.values():
        spec, shape = layer.scheme.scale, layer.latent().shape
        s = spec.view(shape).expand(stored_scale(layer.raw_scale().detach(), spec))
        pitches.append(s * layer.scheme.grid.step)
        rotations.append(layer.scheme.rotation)
    traces, spreads = [0.0] * len(names), [0.0] * len(names)
    model.eval()
    try:
        with at_quantized_weights(layers, model) as leaves:
            params = list(leaves.values())
            for loss in losses:
                signs = [random_vector(pitches, generator, law="rademacher") for _ in range(num_probes)]
                probes = [[r.invert(p * z) for r, p, z in zip(rotations, pitches, sign, strict=True)] for sign in signs]
                grads, products = gradient_and_products(loss, params, probes)
                for i, (r, p, g) in enumerate(zip(rotations, pitches, grads, strict=True)):
                    spreads[i] += float(
                        (p * r.apply(g.to(torch.promote_types(g.dtype, p.dtype)))).double().std(correction=0)
                    ) / len(losses)
                    share = len(losses) * num_probes
                    traces[i] += sum(dot([d[i]], [h[i]]) for d, h in zip(probes, products, strict=True)) / share
    finally:
        for module, training in modes.items():
            module.training = training
    return {
        name: LayerCurvature(trace=trace, num_weights=pitch.numel(), gradient_std=spread)
        for name, trace, spread, pitch in zip(names, traces, spreads, pitches, strict=True)
    }


class CurvatureRefresh:
    """Measures delta for every layer whose EWGS has a schedule; :class:`~fewbits.training.QATTrainer` brings one along.

    With a Trainer of your own, give one to :class:`~fewbits.training.QATCallback`.

    Args:
        loss: ``loss(model, batch)``, the mean training loss, nats.
        batches: ``batches(n)``, n fixed batches of the training data, the same at every call and on every rank.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], batches: Callable[[int], Sequence[Any]]) -> None:
        self.loss, self.batches = loss, batches
        self._kept: dict[int, Sequence[Any]] = {}

    def refresh_(self, model: nn.Module, step: int) -> dict[str, dict[str, float]]:
        """Measure what is due after this many optimizer steps and set it; deltas and traces by layer, often none.

        A layer that the loss does not reach, so that its gradient is zero, keeps its delta.
        """
        due: dict[HessianSchedule, dict[str, QATLayer]] = {}
        for name, layer in scheduled_layers(model).items():
            assert isinstance(layer.surrogate, EWGS)
            schedule = layer.surrogate.hessian
            assert schedule is not None
            if schedule.is_due(step):
                due.setdefault(schedule, {})[name] = layer
        found: dict[str, dict[str, float]] = {}
        for schedule, layers in due.items():
            if schedule.num_batches not in self._kept:
                self._kept[schedule.num_batches] = self.batches(schedule.num_batches)
            digest = hashlib.sha256(f"curvature/{schedule.seed}/{step}".encode()).digest()
            measured = measure_curvature(
                model,
                [partial(self.loss, model, batch) for batch in self._kept[schedule.num_batches]],
                layers,
                num_probes=schedule.num_probes,
                generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")),
            )
            for name, layer in layers.items():
                assert isinstance(layer.surrogate, EWGS)
                if measured[name].gradient_std > 0:
                    layer.surrogate.set_delta_(layer.state(), measured[name].delta)
                found[name] = {"delta": float(layer.state()["delta"]), "hessian_trace": measured[name].trace}
        return found


def scheduled_layers(model: nn.Module) -> dict[str, QATLayer]:
    """Owners whose EWGS has a Hessian schedule, by name."""
    return {
        name: layer
        for name, layer in owned_layers(model)
        if isinstance(layer.surrogate, EWGS) and layer.surrogate.hessian is not None
    }


def curvature_of(trainer: Any) -> CurvatureRefresh:
    """The trainer's own objective on fixed batches of its training data.

    Batches are as large as those of training, or all of the data where that is less.
    """

    def loss(model: Any, batch: Any) -> Tensor:
        with trainer.compute_loss_context_manager():
            value: Tensor = trainer.compute_loss(model, batch)
        return value

    def batches(num: int) -> list[Any]:
        data = trainer.train_dataset
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError("ewgs with a Hessian schedule needs training data with a length; drop hessian or load it")
        size = min(trainer.args.per_device_train_batch_size, len(data))
        # a collator of the caller's may count what training sees; blocks of this library need none
        own = isinstance(data, TokenBlocks | DistilledBlocks)
        collate = default_data_collator if own else trainer.data_collator
        chosen = reference_indices(len(data), size, min(num, len(data) // size))
        return [trainer._prepare_inputs(batch) for batch in collect_batches(data, chosen, collate)]

    return CurvatureRefresh(loss, batches)
