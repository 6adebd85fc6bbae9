"""What the folders of engine formats share: the scheme of every layer in a file of its own, and only linear layers.

The formats say how codes are stored, not what grid they were trained on, so ``fewbits_layers.json`` says that: it is
what :class:`~fewbits.quantizer.FewbitsConfig` holds, and engines do not look at it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewbits.convert import qat_layers, quantized_layers
from fewbits.io import read_json_object, write_json
from fewbits.nn import QATEmbedding, QuantizedEmbedding
from fewbits.qtensor import QTensor
from fewbits.quantizer import ByModule, FewbitsConfig, Packed
from fewbits.targets.base import model_codes, ties
from fewbits.targets.dequantized import transposed
from fewbits.weight_files import read_folder

LAYERS_FILE = "fewbits_layers.json"


def require(module: str, extra: str) -> ModuleType:
    """Import a package of an extra.

    Raises:
        ImportError: with the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        line = f"pip install 'fewbits[{extra}]'"
        raise ImportError(f"this needs the package {module.partition('.')[0]}; run: {line} ({error})") from error


def write_layers(
    folder: Path, codes: dict[str, QTensor], tied: dict[str, str] | None = None, inputs: ByModule | None = None
) -> None:
    """Write scheme and shape of every layer, and how its input is quantized."""
    packed: Packed = {name: (q.scheme, (q.shape[0], q.shape[1])) for name, q in codes.items()}
    write_json(folder / LAYERS_FILE, FewbitsConfig.from_packed(packed, tied or {}, inputs).to_dict())


def layers_config(folder: Path) -> FewbitsConfig:
    """What :func:`write_layers` wrote.

    Raises:
        ValueError: for a missing or damaged file.
    """
    config = FewbitsConfig(**read_json_object(folder / LAYERS_FILE))
    if not config.packed():
        raise ValueError(f"{folder / LAYERS_FILE} lists no layer")
    return config


def read_layers(folder: Path) -> Packed:
    """Scheme and shape of every layer.

    Raises:
        ValueError: for a missing or damaged file.
    """
    return layers_config(folder).packed()


def linear_codes(model: Any, target: str) -> dict[str, QTensor]:
    """Codes of a model whose quantized layers are all linear.

    Raises:
        ValueError: naming an embedding (or a head tied to one) or a Conv1D that is quantized.
    """
    embeddings = (QATEmbedding, QuantizedEmbedding)
    layers = [*qat_layers(model), *quantized_layers(model)]
    if found := sorted(name for name, layer in layers if isinstance(layer, embeddings)):
        raise ValueError(f"target {target!r} holds linear layers only, but {found[0]} is a quantized embedding")
    if tied := sorted(ties(model)):
        raise ValueError(f"target {target!r} has no tied codes, but {tied[0]} uses the codes of another layer")
    if turned := sorted(transposed(model)):
        raise ValueError(f"target {target!r} holds linear layers only, but {turned[0]} is a Conv1D")
    return model_codes(model)


def other_tensors(folder: Path, packed: Iterable[str]) -> dict[str, Tensor]:
    """Every tensor of a folder that is no code, scale or zero of a packed layer."""
    names = set(packed)
    return {
        key: value
        for key, value in read_folder(folder).items()
        if key.rpartition(".")[0] not in names or key.endswith(".bias")
    }


def stored_tensor(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a file, of exactly this dtype (None: any floating one) and shape.

    Raises:
        ValueError: otherwise.
    """
    value = tensors.get(key)
    if value is None:
        raise ValueError(f"the tensor {key} is missing")
    right = value.is_floating_point() if dtype is None else value.dtype == dtype
    if not right or tuple(value.shape) != shape:
        needed = "a floating-point tensor" if dtype is None else str(dtype)
        raise ValueError(f"the tensor {key} is {value.dtype} {tuple(value.shape)}; {needed} {shape} is needed")
    return value
