"""Layers: what they register, what their forward pass uses, how packed layers move, and what damage they report."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.convert import empty_quantized, training_layer
from fewbits.grids import Codebook
from fewbits.nn import QATEmbedding, QATLayer, QATLinear, QuantizedEmbedding, QuantizedLayer, QuantizedLinear
from fewbits.qtensor import quantize
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, ClippedSTE, JacQuant

SCHEMES = [
    Scheme.parse("W1"),
    Scheme.parse("W1.58A16G32"),
    Scheme.parse("W2A16G64"),
    Scheme.parse("W3H", dtype="bf16"),
    Scheme.parse("W4K", dtype="fp32"),
    Scheme.parse("W2A16G32", superblock=64, multiplier_bits=6),
    Scheme.parse("W8", granularity="per_tensor", dtype="fp16"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)


def trained(module: nn.Module, scheme: Scheme, surrogate: Any = None) -> QATLayer:
    layer = training_layer(module)
    with torch.no_grad():
        layer.setup_(scheme, surrogate or STE())
    return layer


def packed(layer: QATLayer, dtype: torch.dtype = torch.float32) -> QuantizedLayer:
    new = empty_quantized(layer, layer.scheme, dtype)
    new.load_qtensor_(layer.qtensor())
    if getattr(layer, "bias", None) is not None:
        new.bias = layer.bias
    return new


# training layers ----------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_uses_the_dequantized_weight(scheme: Scheme, bias: bool) -> None:
    plain = nn.Linear(96, 8, bias=bias)
    layer = trained(plain, scheme)
    x = torch.randn(3, 96)
    weight = quantize(plain.weight, scheme).dequantize()
    expected = nn.functional.linear(x, weight, plain.bias)
    assert torch.equal(layer(x), expected)
    assert layer.weight is plain.weight
    assert torch.equal(layer.qtensor().dequantize(), weight)
    assert torch.equal(packed(layer)(x), expected)


@every_scheme
def test_a_transposed_layer_quantizes_along_its_inputs(scheme: Scheme) -> None:
    plain = Conv1D(8, 96)
    nn.init.normal_(plain.bias)
    layer = trained(plain, scheme)
    x = torch.randn(3, 96)
    weight = quantize(plain.weight.t().contiguous(), scheme).dequantize()
    assert torch.equal(layer.quantized_weight(), weight)
    torch.testing.assert_close(layer(x), x @ weight.t() + plain.bias)
    assert torch.equal(packed(layer)(x), layer(x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (96, 8)


@every_scheme
def test_an_embedding_looks_up_dequantized_rows(scheme: Scheme) -> None:
    plain = nn.Embedding(20, 96, padding_idx=3)
    layer = trained(plain, scheme)
    ids = torch.tensor([[0, 3, 19]])
    assert torch.equal(layer(ids), quantize(plain.weight, scheme).dequantize()[ids])
    assert torch.equal(packed(layer)(ids), layer(ids))
    layer(ids).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[3].any(), "the padding row gets no gradient"
    assert layer.weight.grad[0].any()


@pytest.mark.parametrize(
    ("mode", "kind"), [("learned", nn.Parameter), ("frozen", torch.Tensor), ("dynamic", type(None))]
)
def test_scale_modes(mode: Any, kind: type) -> None:
    layer = trained(nn.Linear(64, 8), Scheme.parse("W2A16G32", mode=mode))
    assert type(layer.weight_scale) is kind
    names = {"weight", "bias"} | ({"weight_scale"} if mode != "dynamic" else set())
    assert set(layer.state_dict()) == names
    before = layer.qtensor().scale
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer.qtensor().scale, 2 * before if mode == "dynamic" else before)


def test_the_surrogate_state_is_the_layers_own_buffers() -> None:
    layer = trained(nn.Linear(100, 8), Scheme.parse("W2"), JacQuant(group_size=32))
    assert set(layer.state()) == {"gain"}
    assert layer.state()["gain"] is layer._buffers["weight_state_gain"]
    layer.state()["gain"].fill_(0.5)
    layer(torch.ones(1, 100)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((8, 100), 0.5))  # type: ignore[arg-type]


def test_fake_quantization_can_be_switched_off() -> None:
    plain = nn.Linear(64, 8)
    layer = trained(plain, Scheme.parse("W2"))
    x = torch.randn(2, 64)
    layer.fake_quant_enabled = False
    assert torch.equal(layer(x), plain(x))
    layer.fake_quant_enabled = True
    assert not torch.equal(layer(x), plain(x))


def test_a_tied_layer_owns_nothing_and_follows_its_owner() -> None:
    table = trained(nn.Embedding(20, 64), Scheme.parse("W2A16G32"), ClippedSTE())
    head = QATLinear(64, 20, bias=False)
    head.weight = table.weight
    head.setup_(table.scheme, table.surrogate, owner=table)
    assert head.owner is table
    assert set(head.state_dict()) == {"weight"}
    assert torch.equal(head.quantized_weight(), table.quantized_weight())
    both = copy.deepcopy(nn.ModuleList([table, head]))
    assert both[1].owner is both[0], "a copy is tied to the copy"


def test_layers_drop_the_scale_gradient_factor_on_no_one_but_the_scale() -> None:
    layer = trained(nn.Linear(64, 8, bias=False), Scheme.parse("W2A16G32"))
    layer(torch.randn(4, 64)).square().sum().backward()
    assert isinstance(layer.weight_scale, nn.Parameter)
    assert layer.weight_scale.grad is not None
    assert layer.weight_scale.grad.shape == (8, 2)


# packed layers ------------------------------------------------------------------------------------------------------


@every_scheme
def test_packed_layers_load_their_own_state_dict(scheme: Scheme) -> None:
    layer = packed(trained(nn.Linear(96, 8), scheme))
    fresh = QuantizedLinear(scheme, (8, 96), torch.float32, bias=True)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(fresh.weight, layer.weight)
    assert all(name == "bias" or name.startswith("weight_") for name in layer.state_dict())


@every_scheme
def test_packed_layers_are_as_small_as_promised(scheme: Scheme) -> None:
    layer = packed(trained(nn.Linear(96, 40, bias=False), scheme))
    size = 8 * sum(b.numel() * b.element_size() for name, b in layer.named_buffers() if "codebook" not in name)
    promised = scheme.bits_per_weight((40, 96)) * 40 * 96
    rows_end_on_a_byte = 40 * 8
    multipliers_take_a_byte = 40 * 3 * 8 if scheme.scale.superblock else 0
    assert promised - 1e-6 <= size <= promised + rows_end_on_a_byte + multipliers_take_a_byte


@every_scheme
def test_moving_a_packed_layer_to_a_dtype_casts_the_weight_and_keeps_the_scales(scheme: Scheme) -> None:
    layer = packed(trained(nn.Linear(96, 8), scheme))
    expected = layer.qtensor()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        layer.to(dtype)
        assert layer.weight.dtype == dtype
        assert layer.bias.dtype == dtype
        assert torch.equal(layer.qtensor().scale, expected.scale)
        assert torch.equal(layer.weight, expected.dequantize(dtype))


def test_packed_embeddings_keep_their_factor_and_description() -> None:
    scheme = Scheme.parse("W4A16G32")
    table = QATEmbedding(20, 64)
    with torch.no_grad():
        table.setup_(scheme, STE())
    table.embed_scale = 8.0
    new = packed(table, torch.bfloat16)
    assert isinstance(new, QuantizedEmbedding)
    assert new.embed_scale == 8.0
    assert new(torch.tensor([1])).dtype == torch.bfloat16
    assert "20, 64, scheme=W4A16G32" in repr(new)
    assert "in_features=64, out_features=8, scheme=W2A16" in repr(
        QuantizedLinear(Scheme.parse("W2"), (8, 64), torch.float32)
    )


def test_damaged_buffers_are_reported() -> None:
    ternary = packed(trained(nn.Linear(64, 8), Scheme.parse("W1.58")))
    ternary.weight_packed[0, 0] = 255
    with pytest.raises(ValueError, match="255 is not five trits"):
        ternary(torch.ones(1, 64))
    scaled = packed(trained(nn.Linear(64, 8), Scheme.parse("W2")))
    scaled.weight_scale[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        scaled(torch.ones(1, 64))
    table = packed(trained(nn.Linear(64, 8), Scheme.parse("W2K")))
    table.weight_codebook[0] = -7.0
    with pytest.raises(ValueError, match=r"stored codebook .* differs from the scheme's"):
        table(torch.ones(1, 64))
    assert isinstance(table.scheme.grid, Codebook)


def test_fresh_packed_layers_hold_no_scale_and_say_so() -> None:
    with pytest.raises(ValueError, match="not positive"):
        QuantizedLinear(Scheme.parse("W2"), (8, 64), torch.float32).qtensor()
