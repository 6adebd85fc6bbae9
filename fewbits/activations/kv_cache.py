"""Fake quantization of keys and values, where attention reads them: after rotary embeddings, per head and token.

Transformers dispatches attention by name. The names ``fewbits_kv_sdpa`` and ``fewbits_kv_eager`` registered here call
the plain implementation with quantized keys and values, for attention modules that hold a ``kv_quantizer``; others pass
untouched. The cache keeps full precision and every read quantizes the same numbers in the same way, so a model with a
cache (generation), one without (training) and a memory that stored the codes give the same result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fewbits.activations.module import KV, InputQuantizer
from fewbits.activations.scheme import ActivationScheme

PREFIX = "fewbits_kv_"
BASES = ("sdpa", "eager")
"""Attention implementations that can be wrapped."""


def _wrapped(base: str) -> Callable[..., Any]:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        quantizer = module._modules.get(KV)
        if quantizer is not None:
            key, value = quantizer(key), quantizer(value)
        plain = _plain(base, module)
        return plain(module, query, key, value, *args, **kwargs)

    return attention


def _plain(base: str, module: nn.Module) -> Callable[..., Any]:
    """The implementation itself; eager attention is a function of each model's own file."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


for _base in BASES:
    AttentionInterface.register(PREFIX + _base, _wrapped(_base))
    AttentionMaskInterface.register(PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules that dispatch through Transformers' interface, by name."""
    found = {}
    for name, module in model.named_modules():
        kind = type(module)
        dispatches = hasattr(sys.modules[kind.__module__], "eager_attention_forward")
        if "Attention" in kind.__name__ and dispatches and hasattr(module, "layer_idx"):
            found[name] = module
    return found


def choose_kv(model: nn.Module, layers: Mapping[str, ActivationScheme | None]) -> dict[str, ActivationScheme]:
    """Attention modules whose keys and values are to be quantized: those that hold a layer with a scheme.

    Args:
        model: a model.
        layers: by the name of every chosen layer, what its rule says of keys and values.

    Raises:
        ValueError: if the layers of one attention module disagree, or a scheme reaches no attention module.
    """
    wanted = {scheme for scheme in layers.values() if scheme is not None}
    found: dict[str, ActivationScheme] = {}
    for name in attention_modules(model) if wanted else ():
        schemes = {scheme for layer, scheme in layers.items() if layer.startswith(f"{name}.")}
        if len(schemes) > 1:
            raise ValueError(f"rules disagree on kv_cache inside {name}; give one value to all layers of an attention")
        if schemes and (scheme := schemes.pop()) is not None:
            found[name] = scheme
    for scheme in wanted - set(found.values()):
        raise ValueError(
            f"kv_cache={scheme.summary!r} reaches no attention module that dispatches through Transformers' attention "
            "interface; the rule must choose a layer inside one"
        )
    return found


def quantize_kv_(model: nn.Module, schemes: Mapping[str, ActivationScheme]) -> None:
    """Quantize the keys and values of these attention modules from now on, in place.

    Args:
        model: a Transformers model with attention ``sdpa`` or ``eager``.
        schemes: by name of the attention module; dynamic, per token (which is: per head and token).

    Raises:
        ValueError: for another scheme, a name that is no attention module, or another attention implementation.

    Example:
        >>> from fewbits.testing.tiny import tiny_llama
        >>> model = tiny_llama()
        >>> quantize_kv_(model, {"model.layers.0.self_attn": ActivationScheme(num_bits=4)})
        >>> model.config._attn_implementation
        'fewbits_kv_sdpa'
    """
    if not schemes:
        return
    modules = attention_modules(model)
    config: Any = getattr(model, "config", None)
    for name, scheme in schemes.items():
        if name not in modules:
            known = ", ".join(list(modules)[:3]) or "none that dispatches through Transformers' attention interface"
            raise ValueError(f"{name!r} is no attention module whose keys and values can be quantized; known: {known}")
        if scheme.mode != "dynamic" or scheme.granularity != "token":
            raise ValueError(f"keys and values are quantized per head and token, dynamically; got {scheme.summary!r}")
        if scheme.rotation.basis == "rotated":
            raise ValueError("keys and values are rotated back after rounding; use rotation basis 'original' for them")
        scheme.check_width(int(getattr(modules[name], "head_dim", 2)), name=f"{name}: head_dim")
    current = str(config._attn_implementation)
    if not current.startswith(PREFIX):
        if current not in BASES:
            raise ValueError(
                f"the model's attention is {current!r}; keys and values can be quantized with {' or '.join(BASES)}: "
                "load it with attn_implementation='sdpa'"
            )
        for module in model.modules():
            own: Any = getattr(module, "config", None)
            if own is not None and getattr(own, "_attn_implementation", None) == current:
                own._attn_implementation_internal = PREFIX + current
    for name, scheme in schemes.items():
        modules[name].add_module(KV, InputQuantizer(scheme))


def plain_attention(implementation: str | None) -> str | None:
    """The implementation under the wrapper.

    Example:
        >>> plain_attention("fewbits_kv_sdpa"), plain_attention("eager")
        ('sdpa', 'eager')
    """
    return None if implementation is None else implementation.removeprefix(PREFIX)
