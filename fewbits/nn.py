"""Layers that hold a weight, its scale and its surrogate's state. No mathematics lives here.

``QAT*`` layers train; ``Quantized*`` layers hold packed codes. Both keep the parameter names of the layer that they
replace (``weight``, ``bias``) and add only names with the prefix ``weight_``.

A layer whose weight is tied to another layer's owns nothing: it holds a reference to the owner and uses its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.activations.module import quantize_input
from fewbits.drives import Drive, NoDrive, driven_weight
from fewbits.fake_quant import fake_quantize, scale_as_function
from fewbits.grids import Codebook
from fewbits.numerics import STORED_DTYPE
from fewbits.packing import empty_packed, pack_codes, unpack_codes
from fewbits.parametrizations import LowRank, Tanh
from fewbits.qtensor import QTensor, initial_scale, quantize
from fewbits.scales import combine
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, Surrogate

STATE_PREFIX = "weight_state_"


class QATLayer(nn.Module):
    """Mixin of the three training layers: latent weight, raw scale, surrogate and its state.

    Attributes:
        scheme: the forward quantizer.
        surrogate: the backward rule.
        weight_scale: raw scales ``(R, G)`` fp32: a parameter if learned, a buffer if frozen, None if dynamic.
        drive: what moves the weight besides the gradient, or None; acts in training mode only.
        differentiate_scale: whether the gradient passes through a dynamic scale to the weights that make it.
        progress: share of the optimizer steps that is done, for drives with a schedule.
        owner: the layer whose weight is tied to this one, or None.
        parametrization: None, or what the weight is made of; ``weight`` is then the frozen base, in steps, and
            ``weight_a`` and ``weight_b`` are trained.
        transform: None, or the map from the trained weight to the latent one, which is quantized.
    """

    scheme: Scheme
    surrogate: Surrogate
    weight: Tensor
    weight_scale: Tensor | None
    transposed = False
    fake_quant_enabled = True
    drive: Drive | None = None
    differentiate_scale = False
    progress = 0.0
    parametrization: LowRank | None = None
    transform: Tanh | None = None
    weight_a: Tensor
    weight_b: Tensor
    _owner: tuple[QATLayer, ...] = ()

    def setup_(
        self,
        scheme: Scheme,
        surrogate: Surrogate,
        owner: QATLayer | None = None,
        *,
        scale: Tensor | None = None,
        drive: Drive | None = None,
        differentiate_scale: bool = False,
    ) -> None:
        """Attach scheme, surrogate and (unless tied to ``owner``) scale, state and drive; a scale of None is found."""
        self.scheme, self.surrogate = scheme, surrogate
        if owner is not None:
            self._owner = (owner,)  # in a tuple, so that torch does not register it as a submodule
            return
        self.drive = None if isinstance(drive, NoDrive) else drive
        self.differentiate_scale = differentiate_scale
        w = self.latent()
        scheme.check_shape(w.shape)
        mode = scheme.scale.mode
        if mode == "dynamic":
            scale = None
        elif scale is None:
            scale = initial_scale(w, scheme)
        if mode == "learned":
            assert scale is not None
            self.weight_scale = nn.Parameter(scale)
        else:
            self.register_buffer("weight_scale", scale)
        for key, value in surrogate.init_state(w.shape, w.device).items():
            self.hold_state_(key, value)

    def hold_state_(self, key: str, value: Tensor) -> None:
        """Keep a tensor of the surrogate's state: as a parameter if it is trained, else as a buffer."""
        if key in self.surrogate.trained:
            self.register_parameter(STATE_PREFIX + key, nn.Parameter(value))
        else:
            self.register_buffer(STATE_PREFIX + key, value)

    def parametrize_(
        self,
        parametrization: LowRank,
        name: str = "",
        *,
        base: Tensor | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Freeze and compress the weight and train low-rank factors instead; once, after :meth:`setup_`.

        Args:
            parametrization: rank, factor and storage.
            name: of the layer; the start of the factors depends on it.
            base: the compressed weight of a saved layer, ``(out_features, in_features)``; None computes it.
            factors: ``(A, B)`` of a saved layer; None starts them.

        Raises:
            ValueError: for a scale, drive or surrogate that needs the full weight, or too large a rank.
        """
        assert self.owner is self
        assert self.parametrization is None
        parametrization.check(self.scheme, self.surrogate, self.drive)
        w, weight = self.latent(), self.weight
        factors = parametrization.start(w.shape, name, weight) if factors is None else factors
        base = parametrization.compress(w, self.scheme, self.raw_scale()) if base is None else base
        self.weight = nn.Parameter(base.t().contiguous() if self.transposed else base, requires_grad=False)
        self.weight_a, self.weight_b = nn.Parameter(factors[0]), nn.Parameter(factors[1])
        self.parametrization = parametrization

    @property
    def owner(self) -> QATLayer:
        """The layer that holds the scale: itself, or the one that its weight is tied to."""
        return self._owner[0] if self._owner else self

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weight that the forward pass uses."""
        owner = self.owner
        return owner.weight.dtype if owner.parametrization is None else owner.weight_a.dtype

    def trained_weights(self) -> list[Tensor]:
        """The parameters that the latent weight is made of, without the scale: itself, or the low-rank factors."""
        owner = self.owner
        return [owner.weight] if owner.parametrization is None else [owner.weight_a, owner.weight_b]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Scheme]:
        assert self.weight_scale is not None  # no dynamic scales, see LowRank.check
        base = self.weight.t() if self.transposed else self.weight
        return base, self.weight_a, self.weight_b, self.weight_scale, self.scheme

    def latent(self) -> Tensor:
        """The latent weight as ``(out_features, in_features)``: the parameter itself, or what is made of it."""
        owner = self.owner
        if owner.parametrization is not None:
            return owner.parametrization.latent(*owner._parts())
        w = self.weight.t() if self.transposed else self.weight
        return w if owner.transform is None else owner.transform.apply(w)

    def state(self) -> dict[str, Tensor]:
        """The surrogate's tensors (the buffers and parameters themselves)."""
        held, skip = {**self.owner._buffers, **self.owner._parameters}, len(STATE_PREFIX)
        return {k[skip:]: v for k, v in held.items() if k.startswith(STATE_PREFIX) and v is not None}

    def raw_scale(self) -> Tensor:
        """Raw scales ``(R, G)``, found by the rule where they are dynamic."""
        scale = self.owner.weight_scale
        return initial_scale(self.owner.latent(), self.scheme) if scale is None else scale

    def quantized_weight(self) -> Tensor:
        """The weight that the forward pass uses, ``(out_features, in_features)``."""
        owner = self.owner
        if owner.parametrization is not None and owner.fake_quant_enabled:
            return owner.parametrization.weight(*owner._parts(), self.surrogate, self.state())
        w = owner.latent()
        if not owner.fake_quant_enabled:
            return w
        scale = scale_as_function(w, self.scheme) if owner.differentiate_scale else owner.raw_scale()
        parts = w, self.scheme, scale, self.surrogate, self.state()
        if owner.drive is None or not self.training:
            return fake_quantize(*parts)
        return driven_weight(owner.drive, *parts, progress=owner.progress)

    def operand(self) -> Tensor:
        """The weight as a linear layer multiplies it: left rotated where the scheme says so, as its input is then."""
        owner, rotation = self.owner, self.scheme.rotation
        if rotation.basis == "original" or not owner.fake_quant_enabled:
            return rotation.into_product(self.quantized_weight())
        w = owner.latent()
        scale = scale_as_function(w, self.scheme) if owner.differentiate_scale else owner.raw_scale()
        return fake_quantize(w, self.scheme, scale, self.surrogate, self.state(), rotated=True)

    @torch.no_grad()
    def forward_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight by training's own forward pass, not by way of the codes: in fp32, then cast."""
        owner = self.owner
        if owner.parametrization is not None:
            return owner.parametrization.weight(*owner._parts(), STE(), {}, dtype=torch.float32).to(dtype)
        return fake_quantize(owner.latent().detach().float(), self.scheme, self.raw_scale()).to(dtype)

    def qtensor(self) -> QTensor:
        """Codes and scales of the current weight."""
        owner = self.owner
        if owner.parametrization is not None:
            return owner.parametrization.qtensor(*owner._parts())
        return quantize(owner.latent(), self.scheme, self.raw_scale())


class QATLinear(QATLayer, nn.Linear):
    """``nn.Linear`` with a fake-quantized weight, and a fake-quantized input where it has an ``input_quantizer``."""

    def forward(self, input: Tensor) -> Tensor:
        """``Q(input) @ Q(weight).T + bias``."""
        return nn.functional.linear(quantize_input(self, input, self.scheme.rotation), self.operand(), self.bias)


class QATConv1D(QATLayer, Conv1D):
    """GPT-2's transposed linear layer, weight ``(in_features, out_features)``, with a fake-quantized weight."""

    transposed = True
    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """``Q(x) @ Q(weight) + bias``."""
        return nn.functional.linear(quantize_input(self, x, self.scheme.rotation), self.operand(), self.bias)


class QATEmbedding(QATLayer, nn.Embedding):
    """``nn.Embedding`` (Gemma's scaled one too) with a fake-quantized table; rows are channels."""

    embed_scale = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the quantized table."""
        return _scaled(nn.functional.embedding(input, self.quantized_weight(), self.padding_idx), self.embed_scale)


def _scaled(rows: Tensor, embed_scale: float) -> Tensor:
    """Gemma's factor, rounded to the rows' dtype first, as the original layer does."""
    return rows if embed_scale == 1.0 else rows * torch.tensor(embed_scale, dtype=rows.dtype, device=rows.device)


class QuantizedLayer(nn.Module):
    """Mixin of layers that hold packed codes; the weight is dequantized in the canonical order at every use.

    Attributes:
        scheme: the forward quantizer.
        shape: ``(out_features, in_features)``.
        dtype: what the dequantized weight is cast to.
    """

    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    weight_packed: Tensor
    weight_scale: Tensor
    weight_super_scale: Tensor
    weight_multipliers: Tensor
    weight_codebook: Tensor
    _owner: tuple[QuantizedLayer, ...] = ()

    def setup_(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        owner: QuantizedLayer | None = None,
        device: Any = None,
    ) -> None:
        """Attach the description and (unless tied to ``owner``) empty buffers."""
        self.scheme, self.shape, self.dtype = scheme, (int(shape[0]), int(shape[1])), dtype
        if owner is not None:
            self._owner = (owner,)
            return
        for key, value in empty_packed(scheme, self.shape, device).items():
            self.register_buffer(key, value)

    @property
    def owner(self) -> QuantizedLayer:
        """The layer that holds the codes."""
        return self._owner[0] if self._owner else self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.to(..)``: a new dtype changes what the weight is cast to, never the stored scales.

        The buffers pass as bytes, since ``model.to(torch.bfloat16)`` would round fp16 and fp32 scales for good.
        """
        stored = {key: value.dtype for key, value in self._buffers.items() if value is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        try:
            self._view_buffers_(dict.fromkeys(stored, torch.uint8))
            return super()._apply(fn, recurse)
        finally:
            self._view_buffers_(stored)

    def _view_buffers_(self, dtypes: dict[str, torch.dtype]) -> None:
        for key, dtype in dtypes.items():
            value = self._buffers[key]
            assert value is not None
            self._buffers[key] = value.view(dtype)

    def load_qtensor_(self, q: QTensor) -> None:
        """Fill the buffers from codes and scales."""
        stored = STORED_DTYPE[self.scheme.scale.dtype]
        self.weight_packed = pack_codes(q.codes, self.scheme.grid)
        if q.super_scale is None or q.multipliers is None:
            self.weight_scale = q.scale.to(stored)
        else:
            self.weight_super_scale, self.weight_multipliers = q.super_scale.to(stored), q.multipliers

    def qtensor(self) -> QTensor:
        """Unpacked codes and scales.

        Raises:
            ValueError: if the buffers hold codes or scales that the scheme does not allow (a damaged file).
        """
        owner = self.owner
        codes = unpack_codes(owner.weight_packed, self.shape[1], self.scheme.grid)
        if isinstance(self.scheme.grid, Codebook):
            held = tuple(owner.weight_codebook.float().tolist())
            if held != self.scheme.grid.codebook:
                raise ValueError(f"the stored codebook {held} differs from the scheme's {self.scheme.grid.codebook}")
        spec = self.scheme.scale
        if spec.superblock is None:
            return QTensor(codes, owner.weight_scale.float(), self.scheme)
        super_scale, multipliers = owner.weight_super_scale.float(), owner.weight_multipliers
        return QTensor(codes, combine(super_scale, multipliers, spec), self.scheme, super_scale, multipliers)

    def quantized_weight(self) -> Tensor:
        """The dequantized weight in ``dtype``, ``(out_features, in_features)``."""
        return self.qtensor().dequantize(self.dtype)

    def operand(self) -> Tensor:
        """The weight as a linear layer multiplies it, see :meth:`QATLayer.operand`."""
        return self.qtensor().dequantize(self.dtype, rotated=self.scheme.rotation.basis == "rotated")

    @property
    def weight(self) -> Tensor:
        """The dequantized weight; there is no latent one any more."""
        return self.quantized_weight()


class QuantizedLinear(QuantizedLayer):
    """A linear layer on packed codes; ``bias`` keeps its name; an ``input_quantizer`` quantizes what goes in."""

    def __init__(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = int(shape[0]), int(shape[1])
        self.setup_(scheme, shape, dtype, device=device)
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``."""
        return nn.functional.linear(quantize_input(self, input, self.scheme.rotation), self.operand(), self.bias)

    def extra_repr(self) -> str:
        """Shape and scheme."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}"


class QuantizedEmbedding(QuantizedLayer):
    """An embedding on packed codes."""

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = int(shape[0]), int(shape[1])
        self.padding_idx, self.embed_scale = padding_idx, embed_scale
        self.setup_(scheme, shape, dtype, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the dequantized table."""
        return _scaled(nn.functional.embedding(input, self.quantized_weight(), self.padding_idx), self.embed_scale)

    def extra_repr(self) -> str:
        """Shape and scheme."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"
