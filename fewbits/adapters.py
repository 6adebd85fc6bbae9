"""Adapter files: only what low-rank training moved, beside the checkpoint that it started from.

A folder holds ``adapter_model.safetensors`` (``NAME.weight_a``, ``NAME.weight_b`` and ``NAME.weight_scale`` of every
low-rank layer) and ``fewbits_adapter.json``: rank and scheme of every layer, and a digest of the frozen base
that the codes were trained on. The base itself is not in it. It is made again by :func:`fewbits.prepare` with the same
rules from the same checkpoint, and another base is refused: on it the factors would give other codes, without a sign.

Whatever else was trained (norms, say) is not in an adapter; use a whole checkpoint, or ``rest_learning_rate: 0``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbits.convert import owned_layers
from fewbits.io import ADAPTER_FILE, atomic_folder, read_json_object, write_json
from fewbits.nn import QATLayer
from fewbits.weight_files import check_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
METHOD = "fewbits_low_rank"
FORMAT_VERSION = 1
"""Of ``fewbits_adapter.json``; a newer one is refused."""

_PARTS = ("weight_a", "weight_b", "weight_scale")


def base_digest(layer: QATLayer) -> str:
    """SHA-256 of a layer's frozen base: dtype, shape and bytes.

    Raises:
        ValueError: for a layer whose full weight is trained.
    """
    if layer.owner.parametrization is None:
        raise ValueError("the layer has no frozen base: its full weight is trained")
    base = layer.owner.weight.detach().cpu().contiguous()
    head = f"{base.dtype} {tuple(base.shape)} ".encode()
    return hashlib.sha256(head + base.view(torch.uint8).numpy().tobytes()).hexdigest()


def _layers(model: nn.Module) -> dict[str, QATLayer]:
    found = {name: layer for name, layer in owned_layers(model) if layer.parametrization is not None}
    if not found:
        raise ValueError("the model has no low-rank layer; prepare it with Rule(parametrization='low_rank')")
    return found


def _describe(layer: QATLayer) -> dict[str, Any]:
    assert layer.parametrization is not None
    parts = {"parametrization": layer.parametrization.to_dict(), "scheme": layer.scheme.to_dict()}
    return json.loads(json.dumps({**parts, "base_sha256": base_digest(layer)}))  # tuples as the file gives them back


def save_adapter(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write factors, scales and a description of every low-rank layer as a folder, whole or not at all.

    Args:
        model: a prepared model with low-rank layers.
        folder: of the adapter.
        overwrite: replace an adapter that fewbits wrote before.

    Raises:
        ValueError: for a model without low-rank layers, or a taken folder.
        OSError: if the disk is full; nothing is left behind.
    """
    layers = _layers(model)
    tensors = {
        f"{name}.{part}": getattr(layer, part).detach().cpu().contiguous()
        for name, layer in layers.items()
        for part in _PARTS
    }
    config = {
        "method": METHOD,
        "format_version": FORMAT_VERSION,
        "layers": {name: _describe(layer) for name, layer in layers.items()},
    }
    with atomic_folder(folder, overwrite=overwrite) as partial:
        save_file(tensors, partial / WEIGHTS_FILE)
        write_json(partial / ADAPTER_FILE, config)
    return Path(folder)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put an adapter into a model that was prepared with the same rules from the same checkpoint, in place.

    Everything is checked before the first tensor is written, so a refused adapter leaves the model as it was.

    Returns:
        The same model; its low-rank layers hold what the saved ones held, bit for bit.

    Raises:
        ValueError: for a folder that holds no adapter, a newer format, a damaged file, other layers, another rank,
            factor, storage or scheme, or a base that differs.
    """
    folder = Path(folder)
    layers = _layers(model)
    described = _read_config(folder / ADAPTER_FILE)
    if strange := sorted(set(described) ^ set(layers)):
        where = "the adapter" if strange[0] in described else "the model"
        raise ValueError(f"{folder} does not fit: {strange[0]} is a low-rank layer of {where} only")
    check_safetensors(folder / WEIGHTS_FILE)
    tensors = load_file(folder / WEIGHTS_FILE)
    if strange := sorted(set(tensors) ^ {f"{name}.{part}" for name in layers for part in _PARTS}):
        raise ValueError(f"{folder / WEIGHTS_FILE}: the tensor {strange[0]} is missing or belongs to no layer")
    for name, layer in layers.items():
        _check(folder, name, layer, described[name], tensors)
    for name, layer in layers.items():
        for part in _PARTS:
            getattr(layer, part).copy_(tensors[f"{name}.{part}"])
    return model


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    data = read_json_object(path)
    if data.get("method") != METHOD:
        raise ValueError(f"{path} describes an adapter of type {data.get('method')!r}; {METHOD!r} is needed")
    version = data.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}; this fewbits reads 1 to {FORMAT_VERSION}; upgrade it")
    layers = data.get("layers")
    keys = {"parametrization", "scheme", "base_sha256"}
    if not isinstance(layers, dict) or not all(isinstance(x, dict) and set(x) == keys for x in layers.values()):
        raise ValueError(f"{path} is damaged: every layer needs exactly the keys {', '.join(sorted(keys))}")
    return layers


def _check(folder: Path, name: str, layer: QATLayer, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    ours = _describe(layer)
    for key in ("parametrization", "scheme"):
        if ours[key] != described[key]:
            raise ValueError(f"{folder}: {name} was trained with {key} {described[key]}, the model has {ours[key]}")
    if ours["base_sha256"] != described["base_sha256"]:
        raise ValueError(
            f"{folder}: {name} was trained on another base (SHA-256 {described['base_sha256'][:12]}.., the model's is "
            f"{ours['base_sha256'][:12]}..), so it would give other codes; prepare the checkpoint that it came from "
            "with the same rules"
        )
    for part in _PARTS:
        value, own = tensors[f"{name}.{part}"], getattr(layer, part)
        if value.shape != own.shape or value.dtype != own.dtype:
            raise ValueError(
                f"{folder}: {name}.{part} is {value.dtype} {tuple(value.shape)}; "
                f"{own.dtype} {tuple(own.shape)} is needed"
            )
