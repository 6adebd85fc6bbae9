"""Target ``gguf``: one file for llama.cpp, tokenizer and chat template inside, for Llama, Qwen and Gemma models.

``gguf`` takes for every layer the smallest type that is exact and that llama.cpp is fast with on x86; ``gguf:q2_0`` and
the like use one type for all layers; ``gguf:f32`` holds the dequantized weights, as a control of everything but the
types. Nothing is ever quantized again: a layer goes in bit for bit, or the export is refused with the condition that
fails. What was not quantized stays exact too: norms and biases in fp32, matrices in the smallest float type that holds
every value.

``tensors.json`` beside the file says which type each layer got and why; the file itself carries, under
``fewbits.layers``, the scheme of each layer, so that codes and scales can be read back.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from fewbits.io import write_json
from fewbits.nn import QATLayer
from fewbits.pretrained import from_pretrained, refuse_missing
from fewbits.qtensor import QTensor
from fewbits.scheme import Scheme
from fewbits.targets.base import model_codes, owners, plain_tensors, schemes
from fewbits.targets.dequantized import reference_fp32
from fewbits.targets.engine import EngineCheck
from fewbits.targets.gguf_codec import dequantize
from fewbits.targets.gguf_contents import FILE, LAYERS_KEY, describe_layers, described_layers, open_export, places_of
from fewbits.targets.gguf_engine import llamacpp_checks
from fewbits.targets.gguf_file import GGUFTensor, MetaValue, write_gguf
from fewbits.targets.gguf_layer import (
    Order,
    choose_layer_type,
    exact_float_type,
    float_tensor,
    pack_layer,
    unpack_layer,
)
from fewbits.targets.gguf_model import (
    ROPE_FREQS,
    Architecture,
    Heads,
    architecture,
    gguf_name,
    is_shifted,
    model_metadata,
    parameter_name,
    rope_factors,
    row_order,
)
from fewbits.targets.gguf_tokenizer import tokenizer_metadata
from fewbits.targets.gguf_types import F32, U8, gguf_type

TENSORS_FILE = "tensors.json"
TYPES = ("tq2_0", "tq1_0", "q2_0", "q1_0", "q2_k", "q3_k", "q4_0", "q4_1", "q5_0", "q8_0", "f32")
"""What may follow ``gguf:``."""
_HF_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0")
_HF_MODELS = ("llama", "qwen2", "qwen3", "gemma3_text")
_CONFIG = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "head_dim", "vocab_size", "rope_parameters", "layer_types", "sliding_window",
           "query_pre_attn_scalar", "attention_bias", "mlp_bias", "tie_word_embeddings", "hidden_act",
           "hidden_activation")  # fmt: skip


@dataclass(frozen=True)
class GGUF:
    """One file for llama.cpp.

    Args:
        type: the GGUF type of every quantized layer, one of :data:`TYPES`; None chooses for each.

    Raises:
        ValueError: for another type.

    Example:
        >>> GGUF().name, GGUF("q2_0").name
        ('gguf', 'gguf:q2_0')
        >>> GGUF("q8_0").holds(Scheme.parse("W8A16G32"), (8, 100))
        'Q8_0 cannot hold it: in_features=100 is not a multiple of the block of 32; use a type with a smaller block ...'
    """

    type: str | None = None

    def __post_init__(self) -> None:
        if self.type is not None and self.type not in TYPES:
            raise ValueError(f"GGUF type {self.type!r} is no target; use one of {', '.join(TYPES)}")

    @property
    def name(self) -> str:
        """``gguf`` or ``gguf:TYPE``."""
        return "gguf" if self.type is None else f"gguf:{self.type}"

    @property
    def has_codes(self) -> bool:
        """Whether layers keep their codes."""
        return self.type is None or gguf_type(self.type).codes is not None

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None if there is a type that holds every ordinary weight of this scheme, else the condition that fails."""
        try:
            self.choose(scheme, shape)
        except ValueError as error:
            return str(error)
        return None

    def choose(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[str, str]:
        """GGUF type of a layer, and the reason.

        Raises:
            ValueError: naming the condition that fails.
        """
        return choose_layer_type(scheme, shape, self.type)

    def choices(self, model: Any) -> dict[str, tuple[str, str]]:
        """Type and reason by layer name.

        Raises:
            ValueError: naming layer and condition.
        """
        found = {}
        for name, (scheme, shape) in schemes(model).items():
            try:
                found[name] = self.choose(scheme, shape)
            except ValueError as error:
                raise ValueError(f"{name} ({scheme.name}): {error}") from None
        return found

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """``model.gguf`` and ``tensors.json``.

        Raises:
            ValueError: without a tokenizer; for an architecture, tokenizer or layer that llama.cpp does not hold.
        """
        if tokenizer is None:
            raise ValueError("a GGUF file needs the tokenizer inside it: llama.cpp ends itself without one; pass it")
        config = model.config
        found = architecture(config)
        metadata: dict[str, MetaValue] = model_metadata(found, config)
        metadata |= tokenizer_metadata(tokenizer, config.vocab_size)
        choices = self.choices(model)
        places = places_of(found, model)
        if self.has_codes:
            metadata[LAYERS_KEY] = describe_layers(model, places)
        write_gguf(folder / FILE, metadata, _tensors(self, found, model, places, choices))
        rows = [
            {"layer": name, "tensor": places[name], "type": kind,
             "bits_per_weight": gguf_type(kind).bits_per_weight, "reason": reason}
            for name, (kind, reason) in choices.items()
        ]  # fmt: skip
        write_json(folder / TENSORS_FILE, rows)

    def read_codes(self, folder: Path) -> dict[str, QTensor] | None:
        """Codes and scales by layer name, from the bytes of the file; None for ``gguf:f32``.

        Raises:
            ValueError: for a missing, damaged or foreign file.
        """
        if not self.has_codes:
            return None
        file, found = open_export(folder)
        heads = Heads.read(found, file.metadata)
        layers = {}
        for name, (tensor, scheme) in described_layers(file).items():
            info = file.tensors[tensor]
            try:
                order = row_order(found, tensor, heads)
                layers[name] = unpack_layer(file.read(tensor), scheme, info.gguf_type, order)
            except ValueError as error:
                raise ValueError(f"{folder / FILE}: {name}: {error}") from None
        return layers

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Every tensor without codes, by the name of its parameter, in fp32.

        Raises:
            ValueError: for a missing, damaged or foreign file.
        """
        file, found = open_export(folder)
        heads = Heads.read(found, file.metadata)
        quantized = {tensor for tensor, _ in described_layers(file).values()} if self.has_codes else set()
        tensors = {}
        for name, info in file.tensors.items():
            if name in quantized:
                continue
            if gguf_type(info.gguf_type).codes is not None:
                raise ValueError(f"{folder / FILE} holds {name} as {info.gguf_type}, but describes no scheme for it")
            values = torch.from_numpy(dequantize(info.gguf_type, file.read(name)).reshape(info.shape))
            order = None if name == ROPE_FREQS else row_order(found, name, heads)
            if order is not None:
                if len(order) != len(values):
                    raise ValueError(f"{folder / FILE}: {name} has {len(values)} rows; its heads have {len(order)}")
                values = values[torch.from_numpy(np.argsort(order))]
            tensors[name if name == ROPE_FREQS else parameter_name(found, name)] = values
        return tensors

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """Parameters without codes in fp32, norms of Gemma plus 1; for ``gguf:f32`` also the fake-quantized weights."""
        found = architecture(model.config)
        expected = {}
        for name, value in plain_tensors(model).items():
            shifted = is_shifted(found, gguf_name(found, name))
            expected[name] = 1.0 + value.detach().float() if shifted else value.detach().float()
        if not self.has_codes:
            for name, layer in owners(model).items():
                key = parameter_name(found, places_of(found, model)[name])
                with torch.no_grad():
                    expected[key] = (
                        layer.forward_weight(torch.float32)
                        if isinstance(layer, QATLayer)
                        else layer.qtensor().dequantize()
                    ) + 0.0  # of -0.0, which rounding leaves of small negative weights, and codes do not know
        factors = rope_factors(model.config)
        return expected if factors is None else expected | {ROPE_FREQS: torch.from_numpy(factors)}

    def load(self, folder: Path, like: Any) -> nn.Module | None:
        """Transformers' own GGUF reader in fp32, where it knows the types, the architecture and all of its options."""
        file, _ = open_export(folder)
        readable = all(info.gguf_type in _HF_TYPES for info in file.tensors.values())
        if not readable or like.config.model_type not in _HF_MODELS or importlib.util.find_spec("gguf") is None:
            return None
        config = AutoConfig.from_pretrained(str(folder), gguf_file=FILE)
        if any(getattr(config, key, None) != getattr(like.config, key, None) for key in _CONFIG):
            return None
        attention = getattr(like.config, "_attn_implementation", None)
        model, info = from_pretrained(folder, gguf_file=FILE, dtype=torch.float32, attn_implementation=attention)
        refuse_missing(folder, info["missing_keys"])
        return model

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """llama.cpp: its dequantizer, an F32 file of the same weights as a control, and the file itself."""
        return llamacpp_checks(folder, quantized=self.has_codes)

    def reference(self, model: Any) -> nn.Module:
        """The trained model itself, or (of a model in bf16) the model of its dequantized weights in fp32."""
        return reference_fp32(model)


def _tensors(
    target: GGUF, found: Architecture, model: Any, places: dict[str, str], choices: dict[str, tuple[str, str]]
) -> Iterator[GGUFTensor]:
    heads = Heads.of(model.config)
    for name, value in plain_tensors(model).items():
        place = gguf_name(found, name)
        make = functools.partial(_stored, value, is_shifted(found, place), row_order(found, place, heads))
        kind = "F32" if value.ndim == 1 or not target.has_codes else exact_float_type(make())
        yield float_tensor(place, tuple(value.shape), kind, make)
    if (factors := rope_factors(model.config)) is not None:
        yield float_tensor(ROPE_FREQS, factors.shape, "F32", lambda: factors)
    for name, q in model_codes(model).items():
        order, kind = row_order(found, places[name], heads), choices[name][0]
        if target.has_codes:
            data: Callable[[], U8] = functools.partial(_pack, name, q, kind, order)
            yield GGUFTensor(name=places[name], shape=tuple(q.shape), gguf_type=kind, data=data)
        else:
            yield float_tensor(places[name], tuple(q.shape), kind, functools.partial(_dequantized, q, order))


def _stored(value: Tensor, shifted: bool, order: Order) -> F32:
    values: F32 = value.detach().float().cpu().numpy()
    values = values + np.float32(1) if shifted else values
    return values if order is None else values[order]


def _dequantized(q: QTensor, order: Order) -> F32:
    return _stored(q.dequantize(), False, order)


def _pack(name: str, q: QTensor, kind: str, order: Order) -> U8:
    try:
        return pack_layer(q, kind, order)
    except ValueError as error:
        raise ValueError(f"{name} ({q.scheme.name}) does not go into {kind} without loss: {error}") from None
