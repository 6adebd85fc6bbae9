"""What is quantized in a model, how, and what it costs: before training, after it, or if some rules were applied."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.activations.kv_cache import choose_kv
from fewbits.activations.module import INPUT, input_scheme, kv_schemes
from fewbits.activations.scheme import ActivationScheme
from fewbits.activations.text import full_name
from fewbits.convert import Rule, add_tied_partners_, qat_layers, quantized_layers, select_layers
from fewbits.nn import QATConv1D, QATLayer, QuantizedEmbedding, QuantizedLayer, QuantizedLinear
from fewbits.scheme import Scheme


class LayerReport(BaseModel):
    """One quantized layer.

    Attributes:
        name: of the module.
        kind: ``linear``, ``conv1d`` or ``embedding``.
        shape: ``(out_features, in_features)``.
        scheme: its short name, with the bits of its input, and of keys and values in an attention module.
        surrogate: its name while training, else None.
        bits_per_weight: cost of one weight, codes and scales counted, without padding of rows to whole bytes.
        num_bytes: in the packed file of the target ``hf``; 0 for a layer that uses the codes of another.
        tied_to: the layer whose codes it uses, or None.
        activation: how its input is quantized, in words; None for not at all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    shape: tuple[int, int]
    scheme: str
    surrogate: str | None
    bits_per_weight: float
    num_bytes: int
    tied_to: str | None = None
    activation: str | None = None


class ModelReport(BaseModel):
    """A whole model; tied tensors count once.

    Attributes:
        layers: quantized layers in model order.
        num_quantized: weights with a code.
        num_other: parameters and stored buffers without one (norms, biases, embeddings that stay).
        quantized_bytes: codes and scales in the packed file.
        other_bytes: the rest, in its own dtype or the one asked for.
        total_bytes: both; the size of the tensors of a packed file.
        quantized_bits_per_weight: mean of the layers' bits over the quantized weights; None if there are none.
        model_bits_per_weight: bits of the packed file over all parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[LayerReport]
    num_quantized: int
    num_other: int
    quantized_bytes: int
    other_bytes: int
    total_bytes: int
    quantized_bits_per_weight: float | None
    model_bits_per_weight: float

    def to_text(self) -> str:
        """A table for people; layers that differ only by a number in their name share a row."""
        rows: dict[tuple[str, ...], tuple[int, int]] = {}
        for layer in self.layers:
            note = f"tied to {layer.tied_to}" if layer.tied_to else layer.surrogate or ""
            note = "; ".join(part for part in (note, layer.activation) if part)
            key = (
                re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name),
                "x".join(map(str, layer.shape)),
                layer.scheme,
                f"{layer.bits_per_weight:.3f}",
                note,
            )
            count, size = rows.get(key, (0, 0))
            rows[key] = count + 1, size + layer.num_bytes
        header = ("layers", "number", "shape", "scheme", "bits", "bytes", "")
        table = [header] + [
            (name, str(count), shape, scheme, bits, f"{size:,}", note)
            for (name, shape, scheme, bits, note), (count, size) in rows.items()
        ]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        if not self.layers:
            lines = ["no layer is quantized"]
        total = self.num_quantized + self.num_other
        share = self.num_quantized / max(1, total)
        lines.append(f"quantized: {self.num_quantized:,} of {total:,} parameters ({share:.1%})")
        if self.quantized_bits_per_weight is not None:
            lines.append(f"bits per quantized weight: {self.quantized_bits_per_weight:.3f} (codes and scales)")
        lines.append(f"bits per parameter: {self.model_bits_per_weight:.3f}; size {self.total_bytes / 1e6:.2f} MB")
        return "\n".join(lines)


def inspect_model(
    model: nn.Module,
    rules: Sequence[Rule] | Rule | None = None,
    *,
    ignore: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> ModelReport:
    """Count what is quantized and what it costs; the model is not changed.

    Args:
        model: prepared or converted, or plain.
        rules: for a plain model, what ``prepare`` would be given.
        ignore: likewise.
        dtype: count floating-point tensors that are not quantized in this dtype; None takes their own.

    Raises:
        ValueError: for rules that ``prepare`` would refuse, or rules for a model that is prepared already.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 8))
        >>> report = inspect_model(model, Rule(pattern="0", scheme="W2A16G64"))
        >>> report.quantized_bits_per_weight, report.num_quantized, report.num_other, report.total_bytes
        (2.25, 512, 72, 432)
    """
    found = _present(model) if rules is None else _planned(model, [rules] if isinstance(rules, Rule) else rules, ignore)
    layers, inside = found
    others = _others(model, inside)
    num_other = sum(value.numel() for value in others)
    other_bytes = sum(value.numel() * _item_size(value, dtype) for value in others)
    owners = [layer for layer in layers if layer.tied_to is None]
    num_quantized = sum(layer.shape[0] * layer.shape[1] for layer in owners)
    quantized_bytes = sum(layer.num_bytes for layer in owners)
    bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in owners)
    return ModelReport(
        layers=layers,
        num_quantized=num_quantized,
        num_other=num_other,
        quantized_bytes=quantized_bytes,
        other_bytes=other_bytes,
        total_bytes=quantized_bytes + other_bytes,
        quantized_bits_per_weight=bits / num_quantized if owners else None,
        model_bits_per_weight=8 * (quantized_bytes + other_bytes) / max(1, num_quantized + num_other),
    )


def _item_size(value: Tensor, dtype: torch.dtype | None) -> int:
    return value.element_size() if dtype is None or not value.is_floating_point() else dtype.itemsize


def packed_bytes(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Bytes of the tensors that hold one quantized weight in the packed file (a codebook's table included)."""
    layer = QuantizedLinear(scheme, shape, torch.float32, device="meta")
    return sum(buffer.nbytes for buffer in layer.buffers())


def _row(
    name: str,
    kind: str,
    shape: tuple[int, int],
    scheme: Scheme,
    surrogate: str | None,
    tied_to: str | None,
    activation: ActivationScheme | None,
    kv: dict[str, ActivationScheme],
) -> LayerReport:
    cache = next((scheme for attention, scheme in kv.items() if name.startswith(f"{attention}.")), None)
    return LayerReport(
        name=name,
        kind=kind,
        shape=shape,
        scheme=full_name(scheme.name, activation, cache),
        surrogate=surrogate,
        bits_per_weight=scheme.bits_per_weight(shape),
        num_bytes=0 if tied_to else packed_bytes(scheme, shape),
        tied_to=tied_to,
        activation=None if activation is None else activation.summary,
    )


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding | QuantizedEmbedding):
        return "embedding"
    return "conv1d" if isinstance(module, Conv1D | QATConv1D) else "linear"


Found = tuple[list[LayerReport], set[str]]
"""Rows, and the names of the state dict that they account for."""


def _present(model: nn.Module) -> Found:
    layers: dict[str, QATLayer | QuantizedLayer] = {**dict(qat_layers(model)), **dict(quantized_layers(model))}
    names = {id(layer): name for name, layer in layers.items()}
    rows, inside, kv = [], set(), kv_schemes(model)
    for name, layer in layers.items():
        shape = layer.latent().shape if isinstance(layer, QATLayer) else layer.shape
        surrogate = layer.surrogate.name if isinstance(layer, QATLayer) else None
        tied_to = None if layer.owner is layer else names[id(layer.owner)]
        size = shape[0], shape[1]
        rows.append(_row(name, _kind(layer), size, layer.scheme, surrogate, tied_to, input_scheme(layer), kv))
        inside |= {f"{name}.{key}" for key in layer.state_dict() if key != "bias" and not key.startswith(f"{INPUT}.")}
    return rows, inside


def _planned(model: nn.Module, rules: Sequence[Rule], ignore: Sequence[str] | None) -> Found:
    chosen = select_layers(model, rules, ignore)
    add_tied_partners_(model, chosen, ignore)
    rows, inside = [], set()
    kv = choose_kv(model, {name: rule.kv_cache for name, (rule, _) in chosen.items()})
    first: dict[int, str] = {}
    for name, (rule, module) in chosen.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        shape = tuple(weight.t().shape) if isinstance(module, Conv1D) else tuple(weight.shape)
        rule.scheme.check_shape(shape, name=f"{name}.weight")
        owner = first.setdefault(id(weight), name)
        tied_to = None if owner == name else owner
        size, kind = (shape[0], shape[1]), _kind(module)
        activation = None if kind == "embedding" else rule.activation
        rows.append(_row(name, kind, size, rule.scheme, rule.surrogate.name, tied_to, activation, kv))
        inside.add(f"{name}.weight")
    return rows, inside


def _others(model: nn.Module, inside: set[str]) -> list[Tensor]:
    """Stored tensors outside the quantized layers; tied ones once."""
    state = model.state_dict(keep_vars=True)
    skip = {id(state[name]) for name in inside}
    seen: dict[int, Tensor] = {id(value): value for value in state.values() if id(value) not in skip}
    return list(seen.values())
