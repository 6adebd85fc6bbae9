"""QTensor: codes and values against loops, invariants, idempotence, equivariance, level count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.numerics import is_representable
from fewbits.qtensor import QTensor, initial_scale, quantize
from fewbits.rotations import Rotation
from fewbits.scales import ScaleSpec, combine
from fewbits.scheme import Scheme
from fewbits.testing.oracles import quantize_loop

GRIDS: list[AnyGrid] = [
    Binary(),
    Ternary(),
    *(Int(b) for b in range(1, 9)),
    *(HalfShifted(b) for b in range(1, 9)),
    Codebook((-3.0, -1.0, 1.0, 7.0)),
    Codebook.lloyd_max(3),
    Codebook.lloyd_max(16),
]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.kind}{g.num_levels}")
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("per_tensor", {"granularity": "per_tensor"}),
    ("per_channel", {"granularity": "per_channel"}),
    ("per_group", {"granularity": "per_group", "group_size": 32}),
    ("per_group", {"granularity": "per_group", "group_size": 32, "superblock": 64, "multiplier_bits": 6}),
]


@every_grid
@pytest.mark.parametrize(("layout", "fields"), LAYOUTS, ids=["tensor", "channel", "group", "super"])
def test_codes_and_values_equal_the_loop(grid: AnyGrid, layout: Any, fields: dict[str, Any]) -> None:
    scheme = Scheme(grid=grid, scale=ScaleSpec(rule="gaussian", **fields))
    w = torch.randn(2, 75)
    q = quantize(w, scheme)
    codes, values = quantize_loop(w, q.scale, grid, layout, fields.get("group_size"))
    assert torch.equal(q.codes.long(), codes)
    assert torch.equal(q.dequantize(), values)
    assert q.codes.is_contiguous()


@every_grid
@pytest.mark.parametrize(
    "rotation", [Rotation(), Rotation(kind="random_hadamard", block_size=32)], ids=lambda r: r.kind
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantizing_twice_with_the_scale_held_changes_nothing(
    grid: AnyGrid, rotation: Rotation, dtype: torch.dtype
) -> None:
    scheme = Scheme(grid=grid, scale=ScaleSpec(granularity="per_group", group_size=32), rotation=rotation)
    first = quantize(torch.randn(4, 96).to(dtype), scheme)
    second = quantize(first.dequantize(dtype), scheme, first.scale)
    assert torch.equal(second.codes, first.codes)
    assert torch.equal(second.dequantize(dtype), first.dequantize(dtype))


@every_grid
def test_a_row_holds_no_more_values_than_levels_and_reaches_them_all(grid: AnyGrid) -> None:
    w = torch.linspace(-1, 1, 4096)[None].repeat(2, 1)
    largest = max(abs(grid.min_level), abs(grid.max_level))
    values = quantize(w, Scheme(grid=grid), torch.full((2, 1), 0.9 / largest)).dequantize()
    for row in values:
        assert len(row.unique()) == grid.num_levels


@every_grid
@pytest.mark.parametrize("factor", [2.0**-6, 4.0])
def test_scaling_the_weight_scales_everything_but_the_codes(grid: AnyGrid, factor: float) -> None:
    """Powers of two round nothing, so the equality is exact."""
    scheme = Scheme(grid=grid, scale=ScaleSpec(granularity="per_group", group_size=64, dtype="fp32"))
    w = torch.randn(4, 100)
    q, scaled = quantize(w, scheme), quantize(factor * w, scheme)
    assert torch.equal(scaled.codes, q.codes)
    assert torch.equal(scaled.scale, factor * q.scale)
    assert torch.equal(scaled.dequantize(), factor * q.dequantize())


@pytest.mark.parametrize("grid", [Binary(), Ternary(), HalfShifted(2), HalfShifted(4), Codebook.lloyd_max(8)], ids=str)
def test_symmetric_grids_commute_with_the_sign(grid: AnyGrid) -> None:
    scheme = Scheme(grid=grid)
    w = torch.randn(4, 100)
    assert torch.equal(quantize(-w, scheme).dequantize(), -quantize(w, scheme).dequantize())


@pytest.mark.parametrize("dtype", ["portable", "fp16", "bf16", "fp32"])
def test_scales_are_stored_exactly(dtype: Any) -> None:
    scheme = Scheme.parse("W2A16G32", dtype=dtype)
    w = torch.randn(4, 100)
    q = quantize(w, scheme)
    assert is_representable(q.scale, dtype)
    assert torch.equal(quantize(w, scheme, initial_scale(w, scheme)).codes, q.codes)


def test_double_quantized_scales_are_products() -> None:
    scheme = Scheme.parse("W3A16G32", superblock=256, multiplier_bits=6)
    q = quantize(torch.randn(4, 600), scheme)
    assert q.super_scale is not None
    assert q.multipliers is not None
    assert q.super_scale.shape == (4, 3)
    assert q.multipliers.dtype == torch.uint8
    assert 1 <= int(q.multipliers.min()) <= int(q.multipliers.max()) <= 63
    assert torch.equal(q.scale, combine(q.super_scale, q.multipliers, scheme.scale))


def test_a_zero_row_is_quantized_without_a_division_by_zero() -> None:
    w = torch.zeros(2, 64)
    for name in ("W1.58", "W2", "W4A16G32"):
        assert not quantize(w, Scheme.parse(name)).dequantize().any()
    tiny = quantize(w, Scheme.parse("W2H")).dequantize()
    assert bool(torch.isfinite(tiny).all())
    assert tiny.abs().max() <= 2.0**-15


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = torch.ones(2, 64)
    w[0, 3] = bad
    with pytest.raises(ValueError, match=r"weight of shape \(2, 64\) has 1 non-finite entries"):
        quantize(w, Scheme.parse("W2"))


def test_a_scale_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale has shape \(1, 1\); W2A16G32 of \(2, 64\) needs \(2, 2\)"):
        quantize(torch.ones(2, 64), Scheme.parse("W2A16G32"), torch.ones(1, 1))


GOOD = quantize(torch.linspace(-1, 1, 128).view(2, 64), Scheme.parse("W2A16G32"))
DOUBLE = quantize(torch.linspace(-1, 1, 256).view(2, 128), Scheme.parse("W2A16G32", superblock=64))


@pytest.mark.parametrize(
    ("q", "changes", "message"),
    [
        (GOOD, {"codes": GOOD.codes.long()}, "codes have dtype torch.int64"),
        (GOOD, {"codes": GOOD.codes + 2}, r"codes run from 0 to 3; Int\(num_bits=2\) allows -2 to 1"),
        (GOOD, {"codes": GOOD.codes[0]}, "a matrix"),
        (GOOD, {"scale": GOOD.scale[:1]}, r"float32 \(2, 2\) is needed"),
        (GOOD, {"scale": GOOD.scale.double()}, r"float32 \(2, 2\) is needed"),
        (GOOD, {"scale": GOOD.scale * 1.001}, "not exact in 'portable'"),
        (GOOD, {"scale": -GOOD.scale}, "not positive"),
        (GOOD, {"scale": GOOD.scale * float("nan")}, "not finite"),
        (GOOD, {"super_scale": GOOD.scale}, "belong to schemes with a superblock"),
        (DOUBLE, {"multipliers": None}, "belong to schemes with a superblock"),
        (DOUBLE, {"super_scale": None, "multipliers": None}, "belong to schemes with a superblock"),
        (DOUBLE, {"scale": 2 * DOUBLE.scale}, r"scale differs from super_scale \* multipliers"),
    ],
)
def test_broken_invariants_are_named(q: QTensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(q, **changes)


def test_bits_per_weight_and_shape() -> None:
    assert GOOD.shape == (2, 64)
    assert GOOD.bits_per_weight == 2.5
    assert torch.equal(GOOD.levels(), GOOD.codes.float())
