"""What a target is, and what every target takes from a model: its codes and the tensors that stay in floating point."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fewbits.activations.module import INPUT, input_quantizers, kv_schemes
from fewbits.activations.scheme import ActivationScheme
from fewbits.convert import qat_layers, quantized_layers
from fewbits.io import read_json_object
from fewbits.nn import QATLayer, QuantizedLayer
from fewbits.pretrained import from_pretrained, refuse_missing
from fewbits.qtensor import QTensor
from fewbits.scheme import Scheme
from fewbits.targets.engine import EngineCheck

Layer = QATLayer | QuantizedLayer
ROTATED_INPUTS = (
    "inputs are rotated at run time, for which plain weights leave no place (a weight rotated back gives equal logits "
    "up to rounding only); use target 'hf', or train with rotation basis 'original'"
)
"""Why a format without fewbits' own layers cannot hold a weight that stays rotated."""


class Target(Protocol):
    """A format that a trained model leaves in. Implementations are frozen; they hold no model."""

    @property
    def name(self) -> str:
        """As the command line spells it: ``hf``, ``dequantized``, ``gguf:q2_0``."""
        ...

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None if a weight ``(out_features, in_features)`` of this scheme fits without loss, else the reason."""
        ...

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """Write a prepared or converted model into an existing empty folder; the model is left as it was.

        Raises:
            ValueError: for a model that the format cannot hold.
        """
        ...

    def read_codes(self, folder: Path) -> dict[str, QTensor] | None:
        """Codes and scales by layer name (owners of tied weights only), read strictly; None if the format has no codes.

        Raises:
            ValueError: for a missing, damaged or foreign file.
        """
        ...

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Every other tensor of the file, by the name that :meth:`expected_tensors` gives it.

        Raises:
            ValueError: for a missing, damaged or foreign file.
        """
        ...

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """What :meth:`read_tensors` must return for this model, found from the trained layers themselves."""
        ...

    def load(self, folder: Path, like: Any) -> nn.Module | None:
        """The file as a module to compare logits with, built as users build it; None if only the engine can run it.

        Args:
            folder: the export.
            like: the trained model, whose attention implementation is used.
        """
        ...

    def reference(self, model: Any) -> nn.Module:
        """The module whose logits :meth:`load`'s module must match bit for bit (often ``model`` itself)."""
        ...

    def engine_checks(self, folder: Path) -> Sequence[EngineCheck]:
        """What to ask the engine about a file that :meth:`read_codes` and :meth:`read_tensors` found right.

        Empty where the engine is Transformers, which :meth:`load` asks, or where no engine can be installed beside it.
        """
        ...


def trained_layers(model: nn.Module) -> dict[str, Layer]:
    """Prepared or converted layers by name, tied ones included.

    Raises:
        ValueError: for a model that has none, or whose fake quantization is switched off.
    """
    layers: dict[str, Layer] = {**dict(qat_layers(model)), **dict(quantized_layers(model))}
    if not layers:
        raise ValueError("the model has no quantized layer; call prepare (and train) first")
    for name, layer in layers.items():
        if isinstance(layer.owner, QATLayer) and not layer.owner.fake_quant_enabled:
            raise ValueError(f"{name} has fake quantization switched off, so what would ship is not what it computes")
    return layers


def owners(model: nn.Module) -> dict[str, Layer]:
    """The layers of :func:`trained_layers` that own their weight."""
    return {name: layer for name, layer in trained_layers(model).items() if layer.owner is layer}


def ties(model: nn.Module) -> dict[str, str]:
    """By the name of a layer that owns nothing, the name of the layer whose weight it uses."""
    layers = trained_layers(model)
    names = {id(layer): name for name, layer in layers.items()}
    return {name: names[id(layer.owner)] for name, layer in layers.items() if layer.owner is not layer}


def check_activations(
    target: Target, inputs: Mapping[str, ActivationScheme | None], kv: Mapping[str, ActivationScheme | None]
) -> None:
    """Refuse quantized activations unless the target computes with exactly them.

    Args:
        target: a target; one that keeps some has methods ``holds_input`` and ``holds_kv`` that take a scheme and return
            None, or the reason why not.
        inputs: by layer, the scheme of its input.
        kv: by module, the scheme of keys and values.

    Raises:
        ValueError: naming the first module.
    """
    for method, what, found in (("holds_input", "activations", inputs), ("holds_kv", "keys and values", kv)):
        for name, scheme in found.items():
            holds = getattr(target, method, _weights_alone)
            if scheme is not None and (reason := holds(scheme)):
                raise ValueError(
                    f"target {target.name!r} cannot hold the quantized {what} of {name} ({scheme.summary}): {reason}"
                )


def _weights_alone(_: ActivationScheme) -> str:
    return (
        "its files describe weights alone, so an engine would compute something else than what was trained; use target "
        "'hf', or train with A16 and without KV"
    )


def activations_of(model: nn.Module) -> tuple[dict[str, ActivationScheme], dict[str, ActivationScheme]]:
    """Schemes of all quantized layer inputs, and of keys and values, of a model, by module."""
    return {name: quantizer.scheme for name, quantizer in input_quantizers(model)}, kv_schemes(model)


def schemes(model: nn.Module) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and shape ``(out_features, in_features)`` of every owner."""
    found = {}
    for name, layer in owners(model).items():
        shape = layer.latent().shape if isinstance(layer, QATLayer) else layer.shape
        found[name] = layer.scheme, (int(shape[0]), int(shape[1]))
    return found


def model_codes(model: nn.Module) -> dict[str, QTensor]:
    """Codes and scales of every owner.

    Raises:
        ValueError: naming the layer whose weight or scale cannot be quantized (not finite, say).
    """
    found = {}
    for name, layer in owners(model).items():
        try:
            found[name] = layer.qtensor()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def plain_tensors(model: Any) -> dict[str, Tensor]:
    """The state dict without weights, scales and states of quantized layers; their biases stay.

    Of tensors that Transformers ties, the one that it keeps in files.
    """
    layers = trained_layers(model)
    state = {}
    for key, value in model.state_dict().items():
        name, _, leaf = key.rpartition(".")
        if (name not in layers or leaf == "bias") and not name.endswith(f".{INPUT}"):
            state[key] = value
    return drop_ties(model, state)


def drop_ties(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the names that Transformers fills from another tensor when it loads the file."""
    declared = type(model)._tied_weights_keys  # of the class: a packed model has forgotten its own
    for tied, source in declared.items() if isinstance(declared, dict) else ():
        if tied in state and source in state and state[tied].data_ptr() == state[source].data_ptr():
            del state[tied]
    return state


def save_plain(model: Any, state: dict[str, Tensor], tokenizer: Any | None, folder: Path, **options: Any) -> None:
    """``save_pretrained`` of exactly these tensors: a packed model's quantizer would put its own in their place."""
    quantizer = model.__dict__.pop("hf_quantizer", None)
    config = model.config.__dict__.pop("quantization_config", None)
    try:
        model.save_pretrained(folder, state_dict=state, **options)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
        if config is not None:
            model.config.quantization_config = config
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def patch_config(folder: Path, **changes: Any) -> None:
    """Change top-level keys of a folder's ``config.json``; ``dtype`` also where a part has its own."""
    config = read_json_object(folder / "config.json") | changes
    for part in config.values():
        if isinstance(part, dict) and "dtype" in part and "dtype" in changes:
            part["dtype"] = changes["dtype"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_whole(folder: Path, like: Any) -> nn.Module:
    """Load an exported folder as users do, in its own dtype; nothing may be missing or left over.

    Raises:
        ValueError: otherwise.
    """
    attention = getattr(like.config, "_attn_implementation", None)
    model, info = from_pretrained(folder, dtype="auto", attn_implementation=attention)
    refuse_missing(folder, info["missing_keys"])
    if info["unexpected_keys"]:
        raise ValueError(f"{folder} holds the tensor {min(info['unexpected_keys'])}, which the model does not have")
    return model
