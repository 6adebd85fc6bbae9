"""Swap the converted layers of a model for layers that compute from packed memory."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

from torch import nn

from fewbits.convert import quantized_layers
from fewbits.nn import QuantizedEmbedding, QuantizedLinear
from fewbits.runtime.linear import RuntimeEmbedding, RuntimeLayer, RuntimeLinear
from fewbits.runtime.packed import NO_VECTORS, Activations, KernelName, PackedWeight


def to_runtime(
    model: nn.Module,
    *,
    activations: Activations = "fp32",
    num_threads: int | None = None,
    kernel: KernelName = "auto",
) -> nn.Module:
    """Replace the packed layers of a converted model, in place, by layers that run from packed memory on the CPU.

    Args:
        model: after :func:`fewbits.convert`, on the CPU.
        activations: ``fp32`` (exact up to rounding) or ``int8`` (faster; activations are rounded per token and group,
            as llama.cpp does). Codebook layers keep fp32 activations.
        num_threads: threads of the kernels; what torch uses at each call if None.
        kernel: ``auto`` (the fastest that this CPU and each layer's shape allow), ``avx512``, ``avx2``, ``portable``
            (plain C) or ``torch``.

    Returns:
        The same model. :func:`describe` says which kernel each layer got, and why not a faster one.

    Raises:
        ValueError: for a model without converted layers or not on the CPU, damaged weights, or a request that a layer
            cannot meet; the model is unchanged then.

    Example:
        >>> from fewbits.convert import Rule, convert, prepare
        >>> model = convert(prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2A16G64")))
        >>> type(to_runtime(model)[0]).__name__
        'RuntimeLinear'
    """
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1, or None for torch's own number")
    layers = list(quantized_layers(model))
    if not layers:
        raise ValueError("the model has no converted layer; call fewbits.convert first (a runtime model has none left)")
    weights: dict[int, PackedWeight] = {}
    new: dict[str, RuntimeLayer] = {}
    for name, layer in layers:
        key = id(layer.owner)
        if key not in weights:
            try:
                weights[key] = PackedWeight(layer, activations=activations, kernel=kernel)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if isinstance(layer, QuantizedEmbedding):
            new[name] = RuntimeEmbedding(layer, weights[key], num_threads=num_threads)
        else:
            assert isinstance(layer, QuantizedLinear)
            new[name] = RuntimeLinear(layer, weights[key], num_threads=num_threads)
    for name, fast in new.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, fast)
    plain = [fast.packed.reason for fast in new.values() if fast.packed.kernel == "portable"]
    slow = Counter(reason for reason in plain if NO_VECTORS not in reason)  # layers that this CPU could run faster
    if slow and kernel == "auto":
        reasons = "; ".join(f"{count} of {len(new)} layers: {reason}" for reason, count in slow.items())
        warnings.warn(f"some layers run in plain C: {reasons}", stacklevel=2)
    return model


def runtime_layers(model: nn.Module) -> Iterator[tuple[str, RuntimeLayer]]:
    """Named runtime layers, in model order, tied ones included."""
    for name, module in model.named_modules():
        if isinstance(module, RuntimeLayer):
            yield name, module


def runtime_bytes(model: nn.Module) -> int:
    """Memory of the packed weights, tied ones once."""
    return sum({id(layer.packed): layer.packed.num_bytes for _, layer in runtime_layers(model)}.values())


def describe(model: nn.Module) -> str:
    """One line for each combination of scheme, activations, kernel and reason, with the number of layers and bytes.

    Example:
        >>> from fewbits.convert import Rule, convert, prepare
        >>> model = convert(prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2A16G64")))
        >>> describe(to_runtime(model, kernel="torch"))
        '1 x W2A16G64, fp32 activations, kernel torch (asked for), 0.2 kB'
    """
    groups: dict[tuple[str, str, str, str], list[PackedWeight]] = {}
    for _, layer in runtime_layers(model):
        packed = layer.packed
        key = (packed.scheme.name, packed.activations, packed.kernel, f" ({packed.reason})" if packed.reason else "")
        groups.setdefault(key, []).append(packed)
    lines = []
    for (scheme, activations, kernel, reason), packed_weights in groups.items():
        size = sum({id(p): p.num_bytes for p in packed_weights}.values()) / 1e3
        lines.append(
            f"{len(packed_weights)} x {scheme}, {activations} activations, kernel {kernel}{reason}, {size:,.1f} kB"
        )
    return "\n".join(lines)
