"""Layers of a converted model that compute from packed memory. Inference only."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fewbits.activations.module import INPUT, input_quantizer, quantize_input
from fewbits.nn import QuantizedEmbedding, QuantizedLinear
from fewbits.runtime.packed import PackedWeight


class RuntimeLayer(nn.Module):
    """Mixin: a packed weight, shared by tied layers, outside torch's parameters and buffers.

    The weight is kept out of ``state_dict``, ``to`` and ``half`` because the kernels hold its addresses; saving a
    runtime model therefore raises instead of writing a file without weights.

    Attributes:
        packed: the weight.
        num_threads: threads of its kernels; ``torch.get_num_threads()`` at each call if None.
        dtype: of the dequantized weight (rows of an embedding).
    """

    packed: PackedWeight
    num_threads: int | None
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, all of it: for inspection, not for the forward pass."""
        rows = self.packed.lookup(torch.arange(self.packed.shape[0]), self.num_threads)
        return self.packed.scheme.rotation.invert(rows).to(self.dtype)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("a runtime model holds no state to save; save the converted model before to_runtime")

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        p = self.packed
        note = f" ({p.reason})" if p.reason else ""
        return f"shape={p.shape}, scheme={p.scheme.name}, activations={p.activations}, kernel={p.kernel}{note}"


class RuntimeLinear(RuntimeLayer):
    r"""``input @ weight.T + bias`` from packed codes, in fp32 whatever the dtype of the input.

    A rotated weight :math:`R^{-1}(s \ell)` is applied as :math:`(s \ell) \cdot R x`, in either basis. Against
    :class:`~fewbits.nn.QuantizedLinear` the result differs by at most
    :func:`~fewbits.runtime.packed.rounding_bound` (times :math:`\sum |x \hat w|`) in an fp32 model; in a bf16 or fp16
    model the kernels keep the fp32 weight that ``QuantizedLinear`` rounds to the model's dtype, and round once at the
    end.

    Args:
        layer: the converted layer; its bias is shared.
        packed: its weight (shared by tied layers).
        num_threads: see :class:`RuntimeLayer`.

    Example:
        >>> from fewbits.convert import Rule, convert, prepare
        >>> layer = convert(prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2A16G64")))[0]
        >>> fast = RuntimeLinear(layer, PackedWeight(layer))
        >>> x = torch.linspace(-1, 1, 64)[None]
        >>> with torch.inference_mode():
        ...     torch.allclose(fast(x), layer(x), atol=1e-5)
        True
    """

    def __init__(self, layer: QuantizedLinear, packed: PackedWeight, *, num_threads: int | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed, self.num_threads, self.dtype = packed, num_threads, layer.dtype
        self.bias = layer.bias
        if (quantizer := input_quantizer(layer)) is not None:
            self.add_module(INPUT, quantizer)
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``.

        Raises:
            RuntimeError: if a gradient is asked for.
            ValueError: for an input on another device or of another width.
        """
        if input.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("runtime layers have no gradient; run under torch.inference_mode() or torch.no_grad()")
        if input.shape[-1] != self.in_features or input.device.type != "cpu":
            raise ValueError(
                f"input is {tuple(input.shape)} on {input.device}; (.., {self.in_features}) on the CPU is needed"
            )
        rotation = self.packed.scheme.rotation
        x = quantize_input(self, input.detach(), rotation).reshape(-1, self.in_features).float()
        y = self.packed.linear(x if rotation.basis == "rotated" else rotation.apply(x), self.num_threads)
        if self.bias is not None:
            y += self.bias.detach().float()
        return y.view(*input.shape[:-1], self.out_features).to(input.dtype)


class RuntimeEmbedding(RuntimeLayer):
    """Rows of a packed table; equal bit for bit to :class:`~fewbits.nn.QuantizedEmbedding`, which unpacks all of it.

    Args:
        layer: the converted embedding.
        packed: its table (shared with a tied head).
        num_threads: see :class:`RuntimeLayer`.
    """

    def __init__(self, layer: QuantizedEmbedding, packed: PackedWeight, *, num_threads: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx, self.embed_scale = layer.padding_idx, layer.embed_scale
        self.packed, self.num_threads, self.dtype = packed, num_threads, layer.dtype
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table.

        Raises:
            IndexError: for an id outside the table.
        """
        rows = self.packed.lookup(input, self.num_threads)
        rows = self.packed.scheme.rotation.invert(rows).to(self.dtype)
        return rows if self.embed_scale == 1.0 else rows * torch.tensor(self.embed_scale, dtype=rows.dtype)
