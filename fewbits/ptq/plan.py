"""Which layer gets which rule, which layers share a weight, and how a result gets into the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.activations.kv_cache import choose_kv, quantize_kv_
from fewbits.activations.module import add_input_quantizer_
from fewbits.convert import Rule, add_tied_partners_, qat_layers, replace_module_, select_layers, training_layer
from fewbits.kmeans import require_codebook
from fewbits.nn import QATLayer
from fewbits.parametrizations import Tanh
from fewbits.parametrize import parametrize_
from fewbits.ptq._base import PTQResult
from fewbits.scales import GRID_FREE_RULES


def choose(
    model: nn.Module, rules: Sequence[Rule], method: str, ignore: Sequence[str] | None
) -> dict[str, tuple[Rule, nn.Module]]:
    """The layers that will be quantized, tied ones included, with every check of :func:`fewbits.prepare`.

    Raises:
        ValueError: as :func:`fewbits.prepare`, for dynamic scales, and for ``kmeans`` on a grid that is no codebook.
    """
    chosen = select_layers(model, rules, ignore)
    for name, (rule, module) in chosen.items():
        if weight_of(module).is_meta:
            raise ValueError(f"{name}.weight is on the meta device; load the weights first")
        rule.scheme.check_shape(weight_of(module).shape, name=f"{name}.weight")
        if method == "kmeans":
            require_codebook(rule.scheme, name)
        sizes = method == "kmeans" and rule.scheme.scale.rule in GRID_FREE_RULES  # the method's own scales
        if rule.scheme.scale.mode == "dynamic" and method != "rtn" and not sizes:
            raise ValueError(
                f"{name} has dynamic scales, which are found anew at every use and cannot hold those of {method!r}; "
                "use mode='learned' or 'frozen'"
            )
        if isinstance(rule.parametrization, Tanh) and method != "rtn":
            raise ValueError(
                f"{name} quantizes tanh of its weight, so codes and scales that {method!r} finds for the weight itself "
                "would be lost; start from 'rtn', or drop the parametrization"
            )
    add_tied_partners_(model, chosen, ignore)
    return chosen


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer as ``(out_features, in_features)``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


class Plan:
    """The chosen layers of a model, of which ``owners`` are to be quantized, in model order."""

    def __init__(self, model: nn.Module, chosen: Mapping[str, tuple[Rule, nn.Module]]) -> None:
        self.model = model
        self.rules = {name: rule for name, (rule, _) in chosen.items()}
        self._partners: dict[str, str] = {}
        first: dict[int, str] = {}
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        for name in sorted(chosen, key=order.__getitem__):
            weight = chosen[name][1].weight
            if id(weight) in first:
                self._partners[name] = first[id(weight)]
            first.setdefault(id(weight), name)
        self.owners = list(first.values())

    @torch.no_grad()
    def set_(self, name: str, result: PTQResult) -> QATLayer:
        """Put a training layer in the place of ``name`` that holds the result's codes."""
        rule, module = self.rules[name], self.model.get_submodule(name)
        new = training_layer(module)
        weight_of(module).copy_(result.latent)
        new.setup_(
            result.qtensor.scheme,
            rule.surrogate,
            scale=result.scale,
            drive=rule.drive,
            differentiate_scale=rule.differentiate_scale,
        )
        new.train(module.training)
        replace_module_(self.model, name, new)
        _check(name, new, result)
        return new

    @torch.no_grad()
    def update_(self, name: str, result: PTQResult) -> None:
        """Give a layer that is prepared already another result of the same scheme."""
        layer = self.layer(name)
        layer.latent().copy_(result.latent)
        assert layer.weight_scale is not None
        layer.weight_scale.copy_(result.scale)
        _check(name, layer, result)

    def layer(self, name: str) -> QATLayer:
        """A layer that is prepared already."""
        layer = self.model.get_submodule(name)
        assert isinstance(layer, QATLayer)
        return layer

    @torch.no_grad()
    def result(self, name: str) -> PTQResult:
        """What a prepared layer holds."""
        layer = self.layer(name)
        return PTQResult(
            qtensor=layer.qtensor(), scale=layer.raw_scale().detach().clone(), latent=layer.latent().detach().clone()
        )

    def finish_(self) -> None:
        """Layers whose weight is tied to a quantized one use it; parametrizations and activations begin from here."""
        for name, owner_name in self._partners.items():
            owner, module = self.model.get_submodule(owner_name), self.model.get_submodule(name)
            assert isinstance(owner, QATLayer)
            new = training_layer(module)
            new.setup_(owner.scheme, owner.surrogate, owner)
            new.train(module.training)
            replace_module_(self.model, name, new)
        for name, rule in self.rules.items():
            layer = self.layer(name)
            add_input_quantizer_(layer, rule.activation, device=layer.weight.device)
        quantize_kv_(self.model, choose_kv(self.model, {name: rule.kv_cache for name, rule in self.rules.items()}))
        parametrize_(qat_layers(self.model), {name: rule.parametrization for name, rule in self.rules.items()})


def _check(name: str, layer: QATLayer, result: PTQResult) -> None:
    held = layer.qtensor()
    assert torch.equal(held.codes, result.qtensor.codes), f"{name} does not hold the codes of its method"
    assert torch.equal(held.scale, result.qtensor.scale), f"{name} does not hold the scales of its method"


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of the layer in front of a method's error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
