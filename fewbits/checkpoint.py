"""Prepared models to folders and back, bit for bit.

A prepared model is saved as an ordinary Hugging Face folder: the latent weights under their own names, beside each
``NAME.weight_scale`` (raw), ``NAME.weight_state_*`` (what the surrogate remembers) and ``NAME.input_quantizer.*``
(static activation scales), and ``fewbits_qat.json`` with scheme and surrogate of every layer. A low-rank layer has
``NAME.weight_base``, ``weight_a`` and ``weight_b`` besides. Loading never runs a scale rule: learned scales are taken
as they are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.activations.kv_cache import quantize_kv_
from fewbits.activations.module import INPUT, add_input_quantizer_, input_quantizer, kv_schemes
from fewbits.activations.scheme import ActivationScheme
from fewbits.activations.text import read_schemes
from fewbits.convert import closest_names, is_quantizable, qat_layers, replace_module_, training_layer
from fewbits.drives import Drive, drive_from_dict
from fewbits.io import QAT_FILE, atomic_folder, read_json_object, write_json
from fewbits.nn import STATE_PREFIX, QATLayer
from fewbits.parametrizations import Parametrization, Tanh, parametrization_from_dict
from fewbits.pretrained import from_pretrained, has_tokenizer, load_model, load_tokenizer, refuse_missing
from fewbits.scheme import Scheme
from fewbits.surrogates import Surrogate, surrogate_from_dict
from fewbits.weight_files import read_folder

BASE, FACTORS = "weight_base", ("weight_a", "weight_b")
FORMAT_VERSION = 1
"""Of ``fewbits_qat.json``; a newer one is refused."""


def describe(model: nn.Module) -> dict[str, Any]:
    """What ``fewbits_qat.json`` says of a prepared model.

    Raises:
        ValueError: for a model without prepared layers, or with a static activation scale that has no value yet.
    """
    names = {id(layer): name for name, layer in qat_layers(model)}
    if not names:
        raise ValueError("the model has no prepared layer; call prepare first")
    layers: dict[str, Any] = {}
    for name, layer in qat_layers(model):
        layers[name] = {"scheme": layer.scheme.to_dict(), "surrogate": layer.surrogate.to_dict()}
        if (quantizer := input_quantizer(layer)) is not None:
            quantizer.stored()
            layers[name]["activation"] = quantizer.scheme.to_dict()
        if layer.owner is not layer:
            layers[name]["tied_to"] = names[id(layer.owner)]
            continue
        if layer.drive is not None:
            layers[name]["drive"] = layer.drive.to_dict()
        if layer.differentiate_scale:
            layers[name]["differentiate_scale"] = True
        if layer.parametrization is not None:
            layers[name]["parametrization"] = layer.parametrization.to_dict()
        if layer.transform is not None:
            layers[name]["parametrization"] = layer.transform.to_dict()
        if not layer.fake_quant_enabled:
            layers[name]["fake_quant_enabled"] = False
    description: dict[str, Any] = {"format_version": FORMAT_VERSION, "layers": layers}
    if kv := kv_schemes(model):
        description["kv_cache"] = {name: scheme.to_dict() for name, scheme in kv.items()}
    return description


def save_prepared(model: Any, tokenizer: Any | None, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a prepared Transformers model (and its tokenizer) as a folder, whole or not at all.

    Raises:
        ValueError: for a model that is not prepared, or a taken folder.
        OSError: if the disk is full; nothing is left behind.
    """
    description = describe(model)
    with atomic_folder(folder, overwrite=overwrite) as partial:
        state = _with_latent_weights(model)
        model.save_pretrained(partial, state_dict=state, save_original_format=False)  # names as in the state dict
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_json(partial / QAT_FILE, description)
    return Path(folder)


def _with_latent_weights(model: Any) -> dict[str, Tensor] | None:
    """The state dict, in which the base of a low-rank layer has a name of its own and the weight's place is its own.

    None if no layer is parametrized: the model's state is the file's.
    """
    layers = {name: layer for name, layer in qat_layers(model) if layer.owner.parametrization is not None}
    if not layers:
        return None
    state = dict(model.state_dict())
    whole: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, layer in layers.items():
            owner = layer.owner
            if layer is owner:
                state[f"{name}.{BASE}"] = state[f"{name}.weight"]
            if id(owner) not in whole:
                w = owner.latent()
                whole[id(owner)] = (w.t() if owner.transposed else w).contiguous()
            state[f"{name}.weight"] = whole[id(owner)]
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for key, source in ties.items():  # with both in the file, Transformers would not tie them again
        if key.removesuffix(".weight") in layers and source in state:
            del state[key]
    return state


def is_prepared_folder(folder: str | Path) -> bool:
    """Whether :func:`save_prepared` wrote this folder."""
    return (Path(folder) / QAT_FILE).is_file()


def find_prepared(path: str | Path) -> Path:
    """The prepared model behind a run folder (``RUN/model``) or the folder itself.

    Raises:
        ValueError: for a folder that is neither, or a run that is not finished.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if is_prepared_folder(folder):
            return folder
    if not path.is_dir():
        raise ValueError(f"the folder {path} does not exist")
    if (path / "recipe.yaml").is_file():
        raise ValueError(f"{path} is a run that is not finished: it has no model/ yet")
    raise ValueError(f"{path} is neither a run folder nor a prepared model (no {QAT_FILE} in it or in model/)")


def load_prepared(folder: str | Path) -> tuple[Any, Any | None]:
    """Load what :func:`save_prepared` wrote; its logits are those of the saved model, bit for bit.

    Returns:
        The prepared model in evaluation mode, in the dtype it was saved in, and its tokenizer (None if the folder has
        none).

    Raises:
        ValueError: for a folder that holds no prepared model, a newer format, a damaged file, or tensors that do not
            fit the description.
    """
    folder = Path(folder)
    if not is_prepared_folder(folder):
        raise ValueError(f"{folder} holds no prepared model: it has no {QAT_FILE}")
    layers, disabled, kv = _read_description(folder / QAT_FILE)
    tensors = read_folder(folder)
    extra = {k: v for k, v in tensors.items() if _layer_of(k) in layers}
    with _only_errors():  # the extra tensors are expected; everything else is checked below
        model, info = from_pretrained(folder, dtype="auto")
    refuse_missing(folder, info["missing_keys"])
    if strange := sorted(set(info["unexpected_keys"]) - set(extra)):
        raise ValueError(f"{folder} holds the tensor {strange[0]}, which the model does not have")
    for name, value in model.state_dict().items():  # a model of mixed dtypes: from_pretrained casts to one
        if name in tensors and value.dtype != tensors[name].dtype:
            model.get_parameter_or_buffer(name).data = tensors[name]
    restore(model, layers, extra)
    quantize_kv_(model, kv)
    for name, layer in qat_layers(model):
        layer.fake_quant_enabled = name not in disabled
    return model, load_tokenizer(folder) if has_tokenizer(folder) else None


def model_digest(model: nn.Module) -> str:
    """SHA-256 over names, types and bytes of every tensor.

    Example:
        >>> len(model_digest(nn.Linear(2, 2)))
        64
    """
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _layer_of(tensor: str) -> str | None:
    """The layer that an extra tensor of a prepared model belongs to."""
    name, _, leaf = tensor.rpartition(".")
    if name.endswith(f".{INPUT}"):
        return name.removesuffix(f".{INPUT}")
    return name if leaf in ("weight_scale", BASE, *FACTORS) or leaf.startswith(STATE_PREFIX) else None


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """How one layer was prepared; ``tied_to`` names the layer that owns its weight (None for itself)."""

    scheme: Scheme
    surrogate: Surrogate
    drive: Drive | None = None
    parametrization: Parametrization | None = None
    tied_to: str | None = None
    activation: ActivationScheme | None = None
    differentiate_scale: bool = False


_KEYS = {"scheme", "surrogate", "drive", "parametrization", "tied_to"} | {
    "fake_quant_enabled",
    "activation",
    "differentiate_scale",
}


def _read_description(path: Path) -> tuple[dict[str, LayerPlan], set[str], dict[str, ActivationScheme]]:
    data = read_json_object(path)
    version = data.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}; this fewbits reads 1 to {FORMAT_VERSION}; upgrade it")
    if extra := sorted(set(data) - {"format_version", "layers", "kv_cache"}):
        raise ValueError(f"{path} has the unknown key {extra[0]!r}")
    layers: dict[str, LayerPlan] = {}
    disabled = set()
    for name, entry in (data.get("layers") or {}).items():
        if not isinstance(entry, dict) or not {"scheme", "surrogate"} <= set(entry):
            raise ValueError(f"{path}: layer {name} needs the keys scheme and surrogate")
        if extra := sorted(set(entry) - _KEYS):
            raise ValueError(f"{path}: layer {name} has the unknown key {extra[0]!r}")
        layers[name] = LayerPlan(
            scheme=Scheme.from_dict(entry["scheme"]),
            surrogate=surrogate_from_dict(entry["surrogate"]),
            drive=drive_from_dict(entry["drive"]) if "drive" in entry else None,
            parametrization=(
                parametrization_from_dict(entry["parametrization"]) if "parametrization" in entry else None
            ),
            tied_to=entry.get("tied_to"),
            activation=ActivationScheme.parse(entry.get("activation")),
            differentiate_scale=bool(entry.get("differentiate_scale", False)),
        )
        if not entry.get("fake_quant_enabled", True):
            disabled.add(name)
    if not layers:
        raise ValueError(f"{path} describes no layer")
    return layers, disabled, read_schemes(data.get("kv_cache"), f"{path}: kv_cache")


@contextmanager
def _only_errors() -> Iterator[None]:
    """Silence the loading report; by a filter, since a raised level makes Transformers check sharding plans instead."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def restore(model: nn.Module, layers: Mapping[str, LayerPlan], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Make a saved prepared model again, in place: scales and states come from ``tensors``, no rule is run.

    Args:
        model: the plain model with the latent weights.
        layers: by name, how each was prepared.
        tensors: ``NAME.weight_scale`` and ``NAME.weight_state_*`` of every owner, and the parts of low-rank ones.

    Returns:
        The same model.

    Raises:
        ValueError: for a layer that the model lacks or that is not tied as described, and for tensors that are
            missing, of the wrong shape, or left over.
    """
    modules, left = dict(model.named_modules()), dict(tensors)
    made: dict[str, QATLayer] = {}
    owners_first = sorted(layers.items(), key=lambda item: item[1].tied_to is not None)
    with torch.no_grad():
        for name, plan in owners_first:
            module = modules.get(name)
            if module is None or not is_quantizable(module):
                near = closest_names(name, modules)
                raise ValueError(f"the model has no layer {name} to quantize; near names: {near}")
            owner = plan.tied_to
            if owner is not None and (owner not in made or modules[owner].weight is not module.weight):
                raise ValueError(f"{name} should share the weight of {owner}, but in this model it does not")
            made[name] = new = training_layer(module)
            if owner is not None:
                new.setup_(plan.scheme, plan.surrogate, made[owner])
            else:
                _set_up_(new, name, plan, left)
            add_input_quantizer_(new, plan.activation, device=new.weight.device)
            _fill_input_(new, name, left)
            new.train(module.training)
    if left:
        raise ValueError(f"the saved tensor {next(iter(left))} belongs to no layer of the description")
    for name, new in made.items():
        if new.owner.parametrization is not None:
            new.weight = new.owner.weight
        replace_module_(model, name, new)
    return model


def _set_up_(layer: QATLayer, name: str, plan: LayerPlan, left: dict[str, Tensor]) -> None:
    spec, device = plan.scheme.scale, layer.weight.device
    scale = None
    if spec.mode != "dynamic":
        scale = _take(left, f"{name}.weight_scale", spec.view(layer.latent().shape).scale_shape).to(device)
    layer.setup_(
        plan.scheme, plan.surrogate, scale=scale, drive=plan.drive, differentiate_scale=plan.differentiate_scale
    )
    for key, value in layer.state().items():
        layer.hold_state_(key, _take(left, f"{name}.{STATE_PREFIX}{key}", value.shape).to(device))
    how = plan.parametrization
    if isinstance(how, Tanh):
        layer.transform = how
    elif how is not None:
        rows, columns = layer.latent().shape
        shapes = (rows, how.rank), (how.rank, columns)
        a, b = (_take(left, f"{name}.{key}", shape).to(device) for key, shape in zip(FACTORS, shapes, strict=True))
        base = _take(left, f"{name}.{BASE}", layer.weight.shape).to(device)
        if base.dtype != how.storage_dtype:
            raise ValueError(f"the saved tensor {name}.{BASE} is {base.dtype}; {how.storage_dtype} is needed")
        layer.parametrize_(how, name, base=base.t() if layer.transposed else base, factors=(a, b))


def _fill_input_(layer: QATLayer, name: str, left: dict[str, Tensor]) -> None:
    quantizer, prefix = input_quantizer(layer), f"{name}.{INPUT}."
    values = {key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)}
    if quantizer is None and values:
        raise ValueError(f"the saved tensor {prefix}{min(values)} belongs to no layer of the description")
    if quantizer is not None and quantizer.scheme.mode == "static":
        try:
            quantizer.load_(values)
        except ValueError as error:
            raise ValueError(f"the input quantizer of {name}: {error}") from None


def _take(left: dict[str, Tensor], key: str, shape: Sequence[int]) -> Tensor:
    if key not in left:
        raise ValueError(f"the saved tensor {key} is missing")
    value = left.pop(key)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"the saved tensor {key} has shape {tuple(value.shape)}; {tuple(shape)} is needed")
    return value


__all__ = [
    "describe",
    "is_prepared_folder",
    "load_model",
    "load_prepared",
    "load_tokenizer",
    "model_digest",
    "restore",
    "save_prepared",
]
