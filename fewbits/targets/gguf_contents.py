"""What a GGUF file of ours says about itself, beyond what llama.cpp wants to know: the scheme of each layer.

llama.cpp ignores keys that it does not know, so the file stays whole when it is copied without its folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbits.scheme import Scheme
from fewbits.targets.base import owners, schemes, ties
from fewbits.targets.gguf_model import ARCHITECTURES, Architecture, gguf_name
from fewbits.targets.gguf_reader import GGUFFile, read_gguf

FILE = "model.gguf"
LAYERS_KEY = "fewbits.layers"
_FORMAT_VERSION = 1


def places_of(found: Architecture, model: Any) -> dict[str, str]:
    """GGUF name of every owner; of a tied pair, the embedding."""
    tied = {owner: name for name, owner in ties(model).items()}
    names = {name: tied.get(name, name) if name == "lm_head" else name for name in owners(model)}
    return {name: gguf_name(found, f"{place}.weight") for name, place in names.items()}


def describe_layers(model: Any, places: dict[str, str]) -> str:
    """JSON of the layers: each with its tensor and the number of its scheme."""
    kinds: list[Scheme] = []
    layers = {}
    for name, (scheme, _) in schemes(model).items():
        if scheme not in kinds:
            kinds.append(scheme)
        layers[name] = [places[name], kinds.index(scheme)]
    data = {"format_version": _FORMAT_VERSION, "schemes": [scheme.to_dict() for scheme in kinds], "layers": layers}
    return json.dumps(data)


def described_layers(file: GGUFFile) -> dict[str, tuple[str, Scheme]]:
    """Inverse of :func:`describe_layers`, checked against the tensors of the file."""
    where = f"{file.path}: metadata {LAYERS_KEY}"
    try:
        data = json.loads(str(file.metadata.get(LAYERS_KEY, "")))
        version, layers = data["format_version"], dict(data["layers"])
        kinds = [Scheme.from_dict(scheme) for scheme in data["schemes"]]
        found = {name: (str(tensor), kinds[index]) for name, (tensor, index) in layers.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} is missing or damaged: {error!r}") from None
    if version != _FORMAT_VERSION:
        raise ValueError(f"{where} has format version {version!r}; this fewbits reads {_FORMAT_VERSION}; upgrade it")
    tensors = [tensor for tensor, _ in found.values()]
    if missing := sorted(set(tensors) - set(file.tensors)):
        raise ValueError(f"{where} names the tensor {missing[0]!r}, which the file does not have")
    if len(set(tensors)) != len(tensors):
        raise ValueError(f"{where} names a tensor twice")
    return found


def open_export(folder: Path) -> tuple[GGUFFile, Architecture]:
    """The checked file of an export, and the architecture that it names.

    Raises:
        ValueError: for a missing, damaged or foreign file.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is this a GGUF export?")
    file = read_gguf(path)
    name = file.metadata.get("general.architecture")
    for found in ARCHITECTURES.values():
        if found.name == name:
            return file, found
    raise ValueError(f"{path} has the architecture {name!r}, which fewbits does not write")
