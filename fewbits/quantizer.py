"""Packed models in Transformers: ``quant_method: "fewbits"``, registered when fewbits is imported.

After ``import fewbits``, ``AutoModelForCausalLM.from_pretrained(folder)`` on an export of the target ``hf`` builds the
model with :class:`~fewbits.nn.QuantizedLinear` and ``QuantizedEmbedding`` layers that hold the packed codes, and
``save_pretrained`` writes them back as they are. ``config.json`` says what was packed how::

    "quantization_config": {
      "quant_method": "fewbits",
      "format_version": 1,
      "groups": [{"scheme": {..}, "modules": {"model.layers.0.mlp.up_proj": [96, 64], ..}}, ..],
      "tied": {"lm_head": "model.embed_tokens"}
    }

Where activations are quantized, ``"activations"`` and ``"kv_cache"`` hold lists of
``{"scheme": {..}, "modules": [..]}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbits.activations.kv_cache import quantize_kv_
from fewbits.activations.module import add_input_quantizer_, input_quantizer
from fewbits.activations.scheme import ActivationScheme
from fewbits.convert import closest_names, drop_buffers_, empty_quantized, is_quantizable, replace_modules_
from fewbits.nn import QuantizedLayer
from fewbits.scheme import Scheme
from fewbits.weight_files import safetensors_header

METHOD = "fewbits"
FORMAT_VERSION = 1
"""Of the packed format; a newer one is refused."""

ByModule = Mapping[str, ActivationScheme]
_FILE_DTYPE = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

Packed = dict[str, tuple[Scheme, tuple[int, int]]]
"""By module name: scheme and shape ``(out_features, in_features)``."""


class FewbitsConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed model.

    Args:
        groups: scheme and modules (name to ``[out_features, in_features]``), one entry for each scheme.
        tied: module name to the name of the module whose codes it uses.
        format_version: of the packed format.
        quant_method: ``"fewbits"``.
        activations: scheme and modules whose input is quantized, one entry for each scheme.
        kv_cache: scheme and attention modules whose keys and values are, likewise.

    Raises:
        ValueError: for an unknown key, a newer format, a bad scheme or shape, a module named twice, a tie to a module
            that is not packed, or a quantized input of one.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]] = (),
        tied: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        activations: Sequence[Mapping[str, Any]] = (),
        kv_cache: Sequence[Mapping[str, Any]] = (),
        **unknown: Any,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method is {quant_method!r}; this is the config of {METHOD!r}")
        if not isinstance(format_version, int) or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"the model is packed in format version {format_version!r}; this fewbits reads 1 to {FORMAT_VERSION}; "
                "upgrade fewbits"
            )
        if unknown:
            raise ValueError(f"quantization_config has the unknown key {min(unknown)!r}; is it of a newer fewbits?")
        self.quant_method: Any = METHOD
        self.format_version = format_version
        self.groups = [{"scheme": dict(g["scheme"]), "modules": dict(g["modules"])} for g in map(_group, groups)]
        self.tied = dict(tied or {})
        for key, entries in (("activations", activations), ("kv_cache", kv_cache)):
            if entries:  # a model without them keeps the config that it always had
                setattr(self, key, [{"scheme": dict(g["scheme"]), "modules": list(g["modules"])} for g in entries])
        packed = self.packed()
        for name in sorted(set(self.by_module("activations")) - set(packed) - set(self.tied)):
            raise ValueError(f"quantization_config quantizes the input of {name}, which is not packed")
        for name, owner in self.tied.items():
            if owner not in packed or name in packed:
                raise ValueError(
                    f"quantization_config ties {name} to {owner}, which must be packed while {name} is not"
                )

    @classmethod
    def from_packed(
        cls, packed: Packed, tied: Mapping[str, str], activations: ByModule | None = None, kv: ByModule | None = None
    ) -> FewbitsConfig:
        """Group modules of equal scheme."""
        groups: dict[Scheme, dict[str, list[int]]] = {}
        for name, (scheme, shape) in packed.items():
            groups.setdefault(scheme, {})[name] = list(shape)
        weights = [{"scheme": scheme.to_dict(), "modules": modules} for scheme, modules in groups.items()]
        return cls(weights, tied, activations=_grouped(activations or {}), kv_cache=_grouped(kv or {}))

    def by_module(self, key: str) -> dict[str, ActivationScheme]:
        """Activation schemes by module: of layer inputs (``"activations"``), or of keys and values (``"kv_cache"``).

        Raises:
            ValueError: for a bad scheme.
        """
        found: dict[str, ActivationScheme] = {}
        for group in getattr(self, key, ()):
            scheme = ActivationScheme.parse(group["scheme"])
            found |= {str(name): scheme for name in group["modules"] if scheme is not None}
        return found

    def packed(self) -> Packed:
        """Scheme and shape of every packed module.

        Raises:
            ValueError: for what the class docstring lists.
        """
        found: Packed = {}
        for group in self.groups:
            with torch.device(
                "cpu"
            ):  # Transformers builds models under the meta device, where a codebook has no values
                scheme = Scheme.from_dict(group["scheme"])
            for name, shape in group["modules"].items():
                if name in found:
                    raise ValueError(f"quantization_config names {name} twice")
                if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(isinstance(n, int) for n in shape):
                    raise ValueError(f"quantization_config: the shape of {name} is {shape!r}; two integers are needed")
                scheme.check_shape(shape, name=name)
                found[name] = (scheme, (shape[0], shape[1]))
        return found


def _grouped(schemes: ByModule) -> list[dict[str, Any]]:
    groups: dict[ActivationScheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    return [{"scheme": scheme.to_dict(), "modules": names} for scheme, names in groups.items()]


def _group(group: Any) -> Mapping[str, Any]:
    if (
        not isinstance(group, Mapping)
        or set(group) != {"scheme", "modules"}
        or not isinstance(group["modules"], Mapping)
    ):
        raise ValueError(
            f"quantization_config: a group needs exactly the keys scheme and modules, got {str(group)[:200]}"
        )
    return group


class FewbitsHfQuantizer(HfQuantizer):
    """Builds the layers that hold packed codes, before Transformers reads the weights into them."""

    requires_calibration = True  # a float model is not packed on the fly: prepare, train and export make the codes

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Codes and scales are ordinary buffers."""
        del safe_serialization
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient; train the prepared model."""
        return False

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """None: packed files always use the names of the state dict, whatever the architecture once used."""
        del weight_conversions, model
        return []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        del kwargs
        config = self.quantization_config
        assert isinstance(config, FewbitsConfig)
        pack_layers_(model, config)
        if checkpoint_files is not None:
            check_files(config, model, checkpoint_files)


def pack_layers_(model: PreTrainedModel, config: FewbitsConfig) -> None:
    """Put empty packed layers where the config says, in place, and keep Transformers from tying their weights.

    Raises:
        ValueError: for a module that the model lacks, or one of another shape.
    """
    owners: dict[str, QuantizedLayer] = {}
    inputs = config.by_module("activations")
    places: dict[str, nn.Module] = {}
    for name, (scheme, shape) in config.packed().items():
        place = _find(model, name)
        if place is None:
            continue
        module = model.get_submodule(place)
        new = empty_quantized(module, scheme, _dtype(module), device="meta")
        if new.shape != shape:
            raise ValueError(f"{name} has shape {new.shape} in the model and {shape} in quantization_config")
        _add_input_(new, inputs.get(name))
        owners[name] = places[place] = new
    for name, owner in config.tied.items():
        place = _find(model, name)
        if place is not None and owner in owners:
            module = model.get_submodule(place)
            new = empty_quantized(module, owners[owner].scheme, _dtype(module), device="meta")
            drop_buffers_(new, owners[owner])
            _add_input_(new, inputs.get(name))
            places[place] = new
    replace_modules_(model, places)
    quantize_kv_(model, _placed(model, config.by_module("kv_cache")))
    forget_ties_(model)


def _add_input_(layer: QuantizedLayer, scheme: ActivationScheme | None) -> None:
    """An input quantizer whose numbers the file will bring."""
    add_input_quantizer_(layer, scheme, device="meta")
    if (quantizer := input_quantizer(layer)) is not None:
        quantizer.ready = True


def _placed(model: PreTrainedModel, schemes: ByModule) -> dict[str, ActivationScheme]:
    """The schemes by the names that a bare base model has for its modules."""
    base = model.base_model is model
    return {name.removeprefix(f"{model.base_model_prefix}.") if base else name: s for name, s in schemes.items()}


def _dtype(module: nn.Module) -> torch.dtype:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.dtype


def _find(model: PreTrainedModel, name: str) -> str | None:
    """The module's name in this model, which may be the bare base model; None for a head that a base model lacks."""
    base = model.base_model is model
    place = name.removeprefix(f"{model.base_model_prefix}.") if base else name
    try:
        module = model.get_submodule(place)
        if place and (is_quantizable(module) or isinstance(module, QuantizedLayer)):
            return place
    except AttributeError:  # no such module
        pass
    if base and not name.startswith(f"{model.base_model_prefix}."):
        return None
    raise ValueError(
        f"quantization_config packs {name}, which this {type(model).__name__} lacks; near names: "
        f"{closest_names(name, dict(model.named_modules()))}"
    )


def forget_ties_(model: PreTrainedModel) -> None:
    """Remove ties between weights of packed layers from Transformers' books: the layers share codes by themselves."""
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}

    def kept(ties: Mapping[str, str], prefix: str = "") -> dict[str, str]:
        return {
            a: b for a, b in ties.items() if not {prefix + a.rpartition(".")[0], prefix + b.rpartition(".")[0]} & packed
        }

    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(getattr(module, "_tied_weights_keys", None), dict):
            module._tied_weights_keys = kept(module._tied_weights_keys, prefix)
        if isinstance(getattr(module, "all_tied_weights_keys", None), dict):
            module.all_tied_weights_keys = kept(module.all_tied_weights_keys, prefix)


def check_files(config: FewbitsConfig, model: PreTrainedModel, files: Sequence[str]) -> None:
    """Every code and scale must be in the files, in its own dtype: Transformers would only log a missing one.

    Raises:
        ValueError: naming the first tensor that is missing or of another dtype.
    """
    found: dict[str, str] = {}
    for path in files:
        if Path(path).suffix == ".safetensors":
            found.update({name: dtype for name, (dtype, _) in safetensors_header(path).items()})
    for name in config.packed():
        place = _find(model, name)
        if place is None:
            continue
        for key, value in model.get_submodule(place).named_buffers():
            dtype = found.get(f"{name}.{key}")
            if dtype is None:
                raise ValueError(f"the weights lack {name}.{key}; the file is not the one that config.json describes")
            if dtype != _FILE_DTYPE[value.dtype]:
                raise ValueError(f"{name}.{key} is {dtype} in the file; {_FILE_DTYPE[value.dtype]} is needed")


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(FewbitsConfig)
    register_quantizer(METHOD)(FewbitsHfQuantizer)
