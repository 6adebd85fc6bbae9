"""``prepare`` and ``convert``: how a model gets fake quantization, and how it is made real."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.activations.kv_cache import choose_kv, quantize_kv_
from fewbits.activations.module import INPUT, add_input_quantizer_, input_quantizer
from fewbits.nn import QATConv1D, QATEmbedding, QATLayer, QATLinear, QuantizedEmbedding, QuantizedLayer, QuantizedLinear
from fewbits.parametrize import parametrize_
from fewbits.rules import (
    DEFAULT_IGNORE,
    Rule,
    add_tied_partners_,
    closest_names,
    is_quantizable,
    matches,
    select_layers,
)
from fewbits.scheme import Scheme

__all__ = [
    "DEFAULT_IGNORE",
    "Rule",
    "add_tied_partners_",
    "closest_names",
    "convert",
    "drop_buffers_",
    "empty_quantized",
    "is_quantizable",
    "matches",
    "owned_layers",
    "prepare",
    "qat_layers",
    "quantized_layers",
    "replace_module_",
    "replace_modules_",
    "select_layers",
    "training_layer",
]


def prepare(model: nn.Module, rules: Sequence[Rule] | Rule, *, ignore: Sequence[str] | None = None) -> nn.Module:
    """Insert fake quantization, in place; names of parameters stay as they are.

    Tied weights stay tied: if the rules choose one layer of a tied pair, the other one uses the same quantized weight
    (there is one stored tensor). If the other one is to stay in full precision, untie first.

    Args:
        model: any module with linear layers, on real memory.
        rules: the first rule that matches a layer wins.
        ignore: patterns of layers to leave alone; ``["lm_head"]`` if None.

    Returns:
        The same model.

    Raises:
        ValueError: for rules that choose nothing, shapes that a scheme cannot take (nothing is changed then), a model
            on the meta device, an already prepared model, or a tied pair of which one is ignored by the user.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
        >>> _ = prepare(model, Rule(pattern="0", scheme="W2A16G64"))
        >>> sorted(model.state_dict())
        ['0.bias', '0.weight', '0.weight_scale', '1.bias', '1.weight']
    """
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    if not rules:
        raise ValueError("no rules: nothing to prepare; pass at least one Rule")
    chosen = select_layers(model, rules, ignore)
    for name, (rule, module) in chosen.items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device; load the weights before prepare")
        shape = tuple(weight.t().shape) if isinstance(module, Conv1D) else tuple(weight.shape)
        rule.scheme.check_shape(shape, name=f"{name}.weight")
        if rule.activation is not None:
            rule.activation.check_width(shape[1], name=f"the input of {name}")
    kv_schemes = choose_kv(model, {name: rule.kv_cache for name, (rule, _) in chosen.items()})
    add_tied_partners_(model, chosen, ignore)
    owners: dict[int, QATLayer] = {}
    with torch.no_grad():
        for name, (rule, module) in chosen.items():
            new = training_layer(module)
            new.setup_(
                rule.scheme,
                rule.surrogate,
                owner=owners.get(id(new.weight)),
                drive=rule.drive,
                differentiate_scale=rule.differentiate_scale,
            )
            add_input_quantizer_(new, rule.activation, device=new.weight.device)
            owners.setdefault(id(new.weight), new)
            new.train(module.training)
            replace_module_(model, name, new)
        parametrize_(qat_layers(model), {name: rule.parametrization for name, (rule, _) in chosen.items()})
    quantize_kv_(model, kv_schemes)
    _warn_if_little_is_quantized(model)
    return model


def training_layer(module: nn.Module) -> QATLayer:
    """A training layer that shares the parameters of ``module``."""
    new: QATLayer
    if isinstance(module, nn.Embedding):
        new = QATEmbedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
        new.embed_scale = float(getattr(module, "scalar_embed_scale", 1.0))
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            raise ValueError("embeddings with max_norm, sparse or scale_grad_by_freq cannot be quantized")
    elif isinstance(module, Conv1D):
        with torch.device("meta"):
            new = QATConv1D(module.nf, module.nx)
        new.bias = module.bias
    else:
        assert isinstance(module, nn.Linear)
        new = QATLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
        new.bias = module.bias
    assert isinstance(module.weight, nn.Parameter)
    new.weight = module.weight
    return new


def replace_module_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule ``name``, also where other parents hold the same module."""
    replace_modules_(model, {name: new})


def replace_modules_(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """:func:`replace_module_` for many names, in one walk through the model."""
    old = [model.get_submodule(name) for name in new]
    by_id = {id(module): replacement for module, replacement in zip(old, new.values(), strict=True)}
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if id(module) in by_id:
                setattr(parent, child, by_id[id(module)])


def _warn_if_little_is_quantized(model: nn.Module) -> None:
    """Fused experts and the like are plain parameters that no layer rule reaches: say so instead of skipping them."""
    inside = {id(layer.weight) for _, layer in qat_layers(model)}
    rest = {
        name: p.numel()
        for name, p in model.named_parameters()
        if id(p) not in inside and p.ndim >= 3 and p.numel() >= 2**16
    }
    if rest:
        largest = sorted(rest, key=rest.__getitem__, reverse=True)[:3]
        warnings.warn(
            f"{sum(rest.values()):,} weights stay in full precision in parameters of 3 or more axes that are no linear "
            f"layer, e.g. {', '.join(largest)}",
            stacklevel=3,
        )


def qat_layers(model: nn.Module) -> Iterator[tuple[str, QATLayer]]:
    """Named training layers, in model order, tied ones included."""
    for name, module in model.named_modules():
        if isinstance(module, QATLayer):
            yield name, module


def owned_layers(model: nn.Module) -> Iterator[tuple[str, QATLayer]]:
    """Named training layers that own their weight: each quantized tensor once."""
    return ((name, layer) for name, layer in qat_layers(model) if layer.owner is layer)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Named converted layers, in model order, tied ones included."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def empty_quantized(layer: nn.Module, scheme: Scheme, dtype: torch.dtype, device: Any = None) -> QuantizedLayer:
    """A converted layer with empty buffers for a linear layer, Conv1D or embedding (trained or original)."""
    if isinstance(layer, nn.Embedding):
        scale = getattr(layer, "scalar_embed_scale", layer.embed_scale if isinstance(layer, QATEmbedding) else 1.0)
        return QuantizedEmbedding(
            scheme,
            (layer.num_embeddings, layer.embedding_dim),
            dtype,
            padding_idx=layer.padding_idx,
            embed_scale=float(scale),
            device=device,
        )
    if isinstance(layer, Conv1D):
        shape = (layer.nf, layer.nx)
    else:
        assert isinstance(layer, nn.Linear)
        shape = (layer.out_features, layer.in_features)
    return QuantizedLinear(scheme, shape, dtype, bias=layer.bias is not None, device=device)


def convert(model: nn.Module) -> nn.Module:
    """Replace fake quantization by packed codes, in place; the logits do not change by a single bit.

    Returns:
        The same model, with :class:`~fewbits.nn.QuantizedLinear` and ``QuantizedEmbedding`` layers.

    Raises:
        ValueError: for a model without prepared layers, or weights that are not finite.

    Example:
        >>> model = prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2A16G64"))
        >>> x = torch.ones(1, 64)
        >>> before = model(x)
        >>> torch.equal(convert(model)(x), before)
        True
    """
    layers = list(qat_layers(model))
    if not layers:
        raise ValueError("the model has no prepared layer; call prepare first")
    owners: dict[int, QuantizedLayer] = {}
    with torch.no_grad():
        qtensors = {name: layer.qtensor() for name, layer in layers if layer.owner is layer}
        # owners first: a tied layer may come before the layer that it is tied to
        for name, layer in sorted(layers, key=lambda item: item[1].owner is not item[1]):
            new = empty_quantized(layer, layer.scheme, layer.weight_dtype, layer.owner.weight.device)
            if layer.owner is layer:
                new.load_qtensor_(qtensors[name])
                owners[id(layer)] = new
            else:
                drop_buffers_(new, owners[id(layer.owner)])
            if getattr(layer, "bias", None) is not None:
                new.bias = layer.bias
            if (quantizer := input_quantizer(layer)) is not None:
                new.add_module(INPUT, quantizer.deployed())
            new.train(layer.training)
            replace_module_(model, name, new)
    return model


def drop_buffers_(layer: QuantizedLayer, owner: QuantizedLayer) -> None:
    """Tie a converted layer to the one that holds the codes."""
    for key in list(layer._buffers):
        delattr(layer, key)
    layer._owner = (owner,)
