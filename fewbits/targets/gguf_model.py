r"""Which model llama.cpp runs and what it wants to know of it: tensor names, row order, metadata.

llama.cpp's ``llama`` rotates neighbours (2j, 2j + 1) where Transformers rotates (j, j + head_dim / 2), so the rows of
its query and key matrices are stored in another order: a permutation of whole rows, of their codes and scales alike.
Gemma stores ``1 + w`` for its norms, rounded once in fp32, which is the number that Gemma's forward pass makes too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.targets.gguf_file import MetaValue

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_PROJ = tuple(name for name in _BLOCK if name.endswith("_proj"))
_QKV = _PROJ[:3]
_QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
_IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
ROPE_FREQS = "rope_freqs.weight"
"""Factors by which Llama 3 divides its rotary frequencies; the only tensor that no parameter stands behind."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp's graph of one kind of model fixes.

    Args:
        name: ``general.architecture``.
        block: GGUF name of every module of a layer that has parameters.
        activations: what ``hidden_act`` may be.
        permuted: whether rows of queries and keys are stored in llama.cpp's order.
        shifted_norms: whether norms are stored as ``1 + w``.
        tied: whether the graph has no output matrix of its own.
        biases: modules of a layer that may have a bias.
        sliding_pattern: every so manieth layer attends to everything and the others to a window; None for no windows.
    """

    name: str
    block: dict[str, str]
    activations: tuple[str, ...] = _SILU
    permuted: bool = False
    shifted_norms: bool = False
    tied: bool = False
    biases: tuple[str, ...] = ()
    sliding_pattern: int | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(name="llama", block=_BLOCK, permuted=True, biases=_PROJ),
    "qwen2": Architecture(name="qwen2", block=_BLOCK, biases=_QKV),
    "qwen3": Architecture(name="qwen3", block=_BLOCK | _QK_NORM),
    "gemma": Architecture(name="gemma", block=_BLOCK, activations=_GELU, shifted_norms=True, tied=True),
    "gemma3_text": Architecture(
        name="gemma3", block=_BLOCK | _QK_NORM | _SANDWICH, activations=_GELU, shifted_norms=True, sliding_pattern=6
    ),
}
"""By the ``model_type`` of a Transformers configuration."""


def architecture(config: Any) -> Architecture:
    """What llama.cpp calls this model, after checking that its graph computes the same.

    Raises:
        ValueError: naming the option of the configuration that llama.cpp has no counterpart for.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"GGUF export knows the model types {known}, not {config.model_type!r}; use target hf")
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "hidden_act": (getattr(config, "hidden_act", getattr(config, "hidden_activation", None)), found.activations),
        "final_logit_softcapping": (getattr(config, "final_logit_softcapping", None), (None,)),
        "attn_logit_softcapping": (getattr(config, "attn_logit_softcapping", None), (None,)),
        "use_bidirectional_attention": (getattr(config, "use_bidirectional_attention", None), (None, False)),
        "tie_word_embeddings": (bool(config.tie_word_embeddings), (True,) if found.tied else (True, False)),
        "layer_types": (_layer_types(config), (_expected_layer_types(found, config.num_hidden_layers),)),
        "query_pre_attn_scalar": (getattr(config, "query_pre_attn_scalar", None), (None, _query_scalar(config))),
    }
    for option, (value, allowed) in wanted.items():
        if value not in allowed:
            raise ValueError(
                f"{option}={value!r}: llama.cpp's {found.name} computes only {allowed[-1]!r}; use target hf"
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Number of query heads and of key heads, and the size of one."""

    num: int
    num_kv: int
    dim: int

    @classmethod
    def of(cls, config: Any) -> Heads:
        """From a Transformers configuration."""
        num = int(config.num_attention_heads)
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // num)
        return cls(num=num, num_kv=int(config.num_key_value_heads), dim=dim)

    @classmethod
    def read(cls, found: Architecture, metadata: Mapping[str, MetaValue]) -> Heads:
        """From the metadata of a file.

        Raises:
            ValueError: if they are missing, no counts, or beyond reason.
        """
        values = []
        for key in ("attention.head_count", "attention.head_count_kv", "attention.key_length"):
            value = metadata.get(f"{found.name}.{key}")
            if not isinstance(value, np.uint32) or not 1 <= value <= 2**16:
                raise ValueError(f"metadata {found.name}.{key} is {value!r}; a uint32 from 1 to 65536 is needed")
            values.append(int(value))
        return cls(num=values[0], num_kv=values[1], dim=values[2])


def _query_scalar(config: Any) -> float:
    """Queries are divided by the root of this; llama.cpp takes the 62 layers of Gemma 3 27B as the sign of another."""
    return config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else Heads.of(config).dim


def _layer_types(config: Any) -> list[str]:
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def _expected_layer_types(found: Architecture, num_layers: int) -> list[str]:
    every = found.sliding_pattern
    return ["full_attention" if every is None or i % every == every - 1 else "sliding_attention"
            for i in range(num_layers)]  # fmt: skip


def gguf_name(found: Architecture, name: str) -> str:
    """The GGUF name of a parameter.

    Raises:
        ValueError: for a parameter that the architecture does not have.

    Example:
        >>> gguf_name(ARCHITECTURES["llama"], "model.layers.3.mlp.down_proj.weight")
        'blk.3.ffn_down.weight'
    """
    module, _, leaf = name.rpartition(".")
    if module in _TOP and leaf == "weight" and not (found.tied and module == "lm_head"):
        return f"{_TOP[module]}.weight"
    match = _IN_BLOCK.fullmatch(name)
    if match is None or match[2] not in (found.block if match[3] == "weight" else found.biases):
        raise ValueError(f"llama.cpp's {found.name} has no place for the tensor {name}")
    return f"blk.{match[1]}.{found.block[match[2]]}.{match[3]}"


def parameter_name(found: Architecture, gguf: str) -> str:
    """Inverse of :func:`gguf_name`.

    Raises:
        ValueError: for a name that :func:`gguf_name` does not give.

    Example:
        >>> parameter_name(ARCHITECTURES["qwen3"], "blk.3.attn_q_norm.weight")
        'model.layers.3.self_attn.q_norm.weight'
    """
    stem, _, leaf = gguf.rpartition(".")
    top = {g: name for name, g in _TOP.items()}
    if stem in top and leaf == "weight":
        return f"{top[stem]}.weight"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    block = {g: name for name, g in found.block.items()}
    if match is None or match[2] not in block or leaf not in ("weight", "bias"):
        raise ValueError(f"the tensor {gguf!r} belongs to no parameter of {found.name}")
    return f"model.layers.{match[1]}.{block[match[2]]}.{leaf}"


def row_order(found: Architecture, gguf: str, heads: Heads) -> NDArray[np.int64] | None:
    r"""The order of rows in the file: stored row i is row ``order[i]`` of the parameter; None if nothing moves.

    Within a head, stored rows 2j and 2j + 1 are rows j and j + head_dim / 2.

    Example:
        >>> row_order(ARCHITECTURES["llama"], "blk.0.attn_q.weight", Heads(num=1, num_kv=1, dim=4)).tolist()
        [0, 2, 1, 3]
    """
    kind = gguf.split(".")[-2]
    if not found.permuted or kind not in ("attn_q", "attn_k"):
        return None
    rows = np.arange((heads.num if kind == "attn_q" else heads.num_kv) * heads.dim)
    return rows.reshape(-1, 2, heads.dim // 2).swapaxes(1, 2).reshape(-1)


def is_shifted(found: Architecture, gguf: str) -> bool:
    """Whether the file holds ``1 + w`` in the place of this parameter."""
    return found.shifted_norms and gguf.endswith("norm.weight")


def model_metadata(found: Architecture, config: Any) -> dict[str, MetaValue]:
    """``general.*`` and the architecture's own keys.

    Raises:
        ValueError: for a rotary embedding that llama.cpp does not compute.
    """
    rope = _rope_of(config, "full_attention")
    heads = Heads.of(config)
    size = np.uint32(heads.dim)
    keys: dict[str, MetaValue] = {
        "vocab_size": np.uint32(config.vocab_size),
        "context_length": np.uint32(config.max_position_embeddings),
        "embedding_length": np.uint32(config.hidden_size),
        "block_count": np.uint32(config.num_hidden_layers),
        "feed_forward_length": np.uint32(config.intermediate_size),
        "attention.head_count": np.uint32(heads.num),
        "attention.head_count_kv": np.uint32(heads.num_kv),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "rope.dimension_count": size,
        "rope.freq_base": np.float32(rope["rope_theta"]),
    } | _rope_scaling(rope)
    if found.sliding_pattern is not None:
        sliding = _rope_of(config, "sliding_attention")
        if sliding.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type={sliding['rope_type']!r} in sliding layers; llama.cpp scales only the others")
        keys["attention.sliding_window"] = np.uint32(config.sliding_window)
        keys["rope.freq_base_swa"] = np.float32(sliding["rope_theta"])
    general: dict[str, MetaValue] = {
        "general.architecture": found.name,
        "general.type": "model",
        "general.quantization_version": np.uint32(2),
    }
    return general | {f"{found.name}.{key}": value for key, value in keys.items()}


def _rope_of(config: Any, layer_type: str) -> dict[str, Any]:
    rope: dict[str, Any] = config.rope_parameters
    rope = rope.get(layer_type, rope)
    if (partial := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={partial}: llama.cpp rotates whole heads; use target hf")
    return rope


def _rope_scaling(rope: dict[str, Any]) -> dict[str, MetaValue]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope_type={kind!r}: llama.cpp is given default, linear, llama3 and yarn; use target hf")
    keys: dict[str, MetaValue] = {"rope.scaling.type": kind, "rope.scaling.factor": np.float32(rope["factor"])}
    if kind == "yarn":
        standard = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True,
                    "beta_fast": 32, "beta_slow": 1}  # fmt: skip
        for option, value in standard.items():
            given = rope.get(option)
            if given is not None and given != value:
                raise ValueError(f"yarn with {option}={given!r}: llama.cpp computes it only with {value!r}")
        keys["rope.scaling.original_context_length"] = np.uint32(rope["original_max_position_embeddings"])
    return keys


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    r"""Of Llama 3's scaled rotary embedding: what each frequency is divided by, ``(head_dim / 2,)``; else None.

    With wavelength :math:`\lambda` and context :math:`n`: 1 for :math:`\lambda < n/h`, ``factor`` for
    :math:`\lambda > n/l`, and between them :math:`1 / ((1 - t)/f + t)` with :math:`t = (n/\lambda - l)/(h - l)`.
    """
    rope = _rope_of(config, "full_attention")
    if rope.get("rope_type") != "llama3":
        return None
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    dim = Heads.of(config).dim
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
