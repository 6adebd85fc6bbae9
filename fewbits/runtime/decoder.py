"""Decode one sequence of a runtime model token by token: all blocks in one call of C, a static key-value cache.

``transformers`` spends more time between the products than a small packed model spends in them. Its forward pass
stays the slow twin: it takes in the prompt, and runs every model that :func:`refusal` names a reason for.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.activations.module import input_quantizers, kv_schemes
from fewbits.runtime.build import Block, Stack, load_kernels
from fewbits.runtime.linear import RuntimeLinear

_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MODELS = ("llama", "mistral", "qwen2", "qwen3")
_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles do not depend on the length of the sequence."""


def _projections(block: Any) -> list[Any]:
    return [getattr(block.self_attn if name in _LAYERS[:4] else block.mlp, name) for name in _LAYERS]


def refusal(model: Any) -> str | None:
    """None if :class:`Decoder` runs this model, else the reason why not.

    It runs models in fp32 of the Llama family (Llama, Mistral, Qwen2, Qwen3) whose blocks are packed whole, without
    rotations, by :func:`~fewbits.runtime.to_runtime`, with attention to every position.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in _MODELS or not hasattr(model, "lm_head"):
        return f"a model of type {kind!r}; the decoder knows {', '.join(_MODELS)}"
    if {p.dtype for p in model.parameters()} != {torch.float32} or model.dtype != torch.float32:
        return "the model is not in fp32"
    if kind == "mistral" and config.sliding_window is not None:
        return f"attention to a window of {config.sliding_window} tokens"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "some layers attend to a window"
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in _ROPE or (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return f"rotary embedding of kind {rope!r}"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation function {config.hidden_act!r}"
    if kv_schemes(model) or any(True for _ in input_quantizers(model)):
        return "its activations, or keys and values, are quantized as they were in training"
    for index, block in enumerate(model.model.layers):
        for name, layer in zip(_LAYERS, _projections(block), strict=True):
            if not isinstance(layer, RuntimeLinear):
                return f"layer {index}'s {name} is not packed"
            if layer.packed.kernel == "torch" or layer.packed.scheme.rotation.kind != "none":
                return f"layer {index}'s {name} has a rotation or no compiled kernel"
    return None


class Decoder:
    r"""One sequence in a static cache.

    Against the forward pass of transformers, logits differ by the order of sums only (of the same products): the same
    bound as :func:`~fewbits.runtime.packed.rounding_bound`, layer by layer.

    Args:
        model: after :func:`~fewbits.runtime.to_runtime`; its weights are shared, not copied.
        max_length: tokens that the cache holds, the prompt included.
        num_threads: ``torch.get_num_threads()`` at each step if None. Threads change no bit of the result.

    Attributes:
        length: tokens in the cache.

    Raises:
        ValueError: for a model that :func:`refusal` names a reason for, or a ``max_length`` below 1.
    """

    def __init__(self, model: Any, max_length: int, *, num_threads: int | None = None) -> None:
        if reason := refusal(model):
            raise ValueError(f"the decoder cannot run this model: {reason}; use the model itself")
        if max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        self.model, self.max_length, self.num_threads, self.length = model, max_length, num_threads, 0
        config, blocks = model.config, model.model.layers
        self._kv_heads = config.num_key_value_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (len(blocks), 2, self._kv_heads, max_length, self._head_dim)
        self._cache = torch.zeros(shape)
        with torch.inference_mode():
            angles = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(max_length)[None])
        self._cos, self._sin = (a[0].float().contiguous() for a in angles)
        self._kept: list[Any] = []
        self._blocks = (Block * len(blocks))(*map(self._block, blocks, self._cache))
        self._stack = Stack(
            blocks=ctypes.cast(self._blocks, ctypes.c_void_p),
            num_blocks=len(blocks),
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            max_length=max_length,
            eps=config.rms_norm_eps,
            scale=blocks[0].self_attn.scaling,
        )

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _block(self, block: Any, cache: Tensor) -> Block:
        layers, attention = _projections(block), block.self_attn
        norms = [block.input_layernorm, block.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._kept += [layer.packed for layer in layers]
        return Block(
            (ctypes.c_void_p * len(_LAYERS))(*(ctypes.addressof(layer.packed.layer) for layer in layers)),
            (ctypes.c_void_p * len(_LAYERS))(*(self._address(layer.bias) for layer in layers)),
            (ctypes.c_void_p * len(norms))(*(self._address(None if n is None else n.weight) for n in norms)),
            cache[0].data_ptr(),
            cache[1].data_ptr(),
            (ctypes.c_int32 * len(_LAYERS))(*(layer.packed.activations == "int8" for layer in layers)),
        )

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Start a sequence: the prompt goes through the model's own forward pass.

        Args:
            ids: integers ``(length,)``.

        Returns:
            Logits after the last token, fp32 ``(vocab_size,)``.

        Raises:
            ValueError: for no token, or more than ``max_length``.
        """
        if not 1 <= len(ids) <= self.max_length:
            raise ValueError(f"{len(ids)} tokens; the cache holds 1 to {self.max_length}")
        output = self.model(input_ids=ids[None], use_cache=True, logits_to_keep=1)
        for own, layer in zip(self._cache, output.cache.layers, strict=True):
            own[0, :, : len(ids)] = layer.keys[0]
            own[1, :, : len(ids)] = layer.values[0]
        self.length = len(ids)
        return output.logits[0, -1].float()

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Append one token.

        Returns:
            Logits after it, fp32 ``(vocab_size,)``.

        Raises:
            ValueError: if the cache is full.
            IndexError: for a token outside the vocabulary.
        """
        if self.length >= self.max_length:
            raise ValueError(f"the cache is full after max_length={self.max_length} tokens")
        model, at = self.model, self.length
        threads = torch.get_num_threads() if self.num_threads is None else self.num_threads
        x = model.model.embed_tokens(torch.tensor([token]))[0].float().clone()
        library: Any = load_kernels()
        cosine, sine = self._cos[at].data_ptr(), self._sin[at].data_ptr()
        if library.fb_decode(self._stack, x.data_ptr(), cosine, sine, at, threads):
            raise MemoryError(f"no memory for one token of {len(x)} features")
        self.length = at + 1
        logits: Tensor = model.lm_head(model.model.norm(x[None]))[0]
        return logits


def greedy(model: nn.Module, ids: Tensor, num_tokens: int, *, num_threads: int | None = None) -> list[int]:
    """``num_tokens`` tokens after a prompt by the largest logit; the end-of-text token does not stop it.

    Args:
        model: after :func:`~fewbits.runtime.to_runtime`.
        ids: integers ``(length,)``.
        num_tokens: >= 1.
        num_threads: see :class:`Decoder`.

    Raises:
        ValueError: as :class:`Decoder`.
    """
    decoder = Decoder(model, len(ids) + num_tokens, num_threads=num_threads)
    tokens = [int(decoder.prefill(ids).argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(decoder.step(tokens[-1]).argmax()))
    return tokens
