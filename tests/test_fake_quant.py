"""The one autograd function: what trains is what ships, and every gradient against loops and closed forms."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.fake_quant import fake_quantize, scale_gradient_factor
from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.qtensor import initial_scale, quantize
from fewbits.rotations import Rotation
from fewbits.scales import ScaleSpec
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, ClippedSTE, JacQuant, StableQAT
from fewbits.testing.oracles import dense_hadamard, scale_gradient_loop

SUM_OF_FP32 = 1e-5
"""A sum of about a hundred fp32 products of order 1, against float64."""
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
some_grids = pytest.mark.parametrize(
    "grid", [Binary(), Ternary(), Int(2), HalfShifted(2), Codebook.lloyd_max(4)], ids=str
)
GROUPS: list[dict[str, Any]] = [
    {"granularity": "per_tensor"},
    {"granularity": "per_channel"},
    {"granularity": "per_group", "group_size": 32},
    {"granularity": "per_group", "group_size": 64},
    {"granularity": "per_group", "group_size": 32, "superblock": 64, "multiplier_bits": 4},
]
ROTATIONS = [Rotation(), Rotation(kind="hadamard", block_size=32), Rotation(kind="random_hadamard")]


# forward ------------------------------------------------------------------------------------------------------------


@every_grid
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(grid: AnyGrid) -> None:
    """All granularities (100 columns: ragged groups), dtypes, rotations, stored scales and double quantization."""
    for groups, rotation, dtype in product(GROUPS, ROTATIONS, (torch.float32, torch.bfloat16)):
        for stored in ("portable", "fp32") if rotation.kind == "none" else ("portable",):
            scheme = Scheme(grid=grid, scale=ScaleSpec(dtype=stored, rule="gaussian", **groups), rotation=rotation)
            w = torch.randn(3, 100).to(dtype)
            scale = initial_scale(w, scheme)
            expected = quantize(w, scheme, scale).dequantize(dtype)
            assert torch.equal(fake_quantize(w, scheme, scale), expected), scheme
            assert torch.equal(fake_quantize(w, scheme), expected), scheme


@pytest.mark.parametrize("rule", ["absmax", "absmax_cover", "absmax_qmax", "absmean", "mse", "gaussian", "rms"])
def test_every_rule_trains_what_it_ships(rule: Any) -> None:
    scheme = Scheme.parse("W2HG32", rule=rule)
    w = torch.randn(4, 100)
    assert torch.equal(fake_quantize(w, scheme), quantize(w, scheme).dequantize())


def test_the_scale_is_rounded_to_its_stored_dtype_inside_the_forward_pass() -> None:
    w = torch.tensor([[1.0, -1.0, 0.1, 0.2]])
    raw = torch.tensor([[1.0013]])
    assert fake_quantize(w, Scheme.parse("W1", dtype="portable"), raw).unique().tolist() == [-1.0, 1.0]
    assert fake_quantize(w, Scheme.parse("W1", dtype="fp16"), raw)[0, 0].item() == raw.half().float().item()
    assert fake_quantize(w, Scheme.parse("W1", dtype="fp32"), raw)[0, 0].item() == raw.item()


def test_a_diverged_weight_is_seen() -> None:
    w = torch.ones(2, 64)
    w[0, 0] = float("nan")
    assert bool(fake_quantize(w, Scheme.parse("W2"), torch.ones(2, 1)).isnan().any())
    assert bool(fake_quantize(torch.ones(2, 64), Scheme.parse("W2"), torch.full((2, 1), torch.nan)).isnan().all())


# gradient of the scale ----------------------------------------------------------------------------------------------


def gradients(w: Tensor, scheme: Scheme, scale: Tensor, surrogate: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
    w, scale = w.clone().requires_grad_(), scale.clone().requires_grad_()
    return torch.autograd.grad(fake_quantize(w, scheme, scale, surrogate), (w, scale), upstream)  # type: ignore[return-value]


@every_grid
@pytest.mark.parametrize(
    ("layout", "groups"), [(g["granularity"], g) for g in GROUPS if "superblock" not in g], ids=["t", "c", "g32", "g64"]
)
def test_scale_gradient_equals_the_loop(grid: AnyGrid, layout: Any, groups: dict[str, Any]) -> None:
    """With the count of each group in its factor, also where the last group is ragged."""
    scheme = Scheme(grid=grid, scale=ScaleSpec(rule="gaussian", dtype="fp32", **groups))
    w, upstream = torch.randn(2, 72), torch.randn(2, 72)
    scale = 0.6 * initial_scale(w, scheme)  # so that some weights saturate
    expected = scale_gradient_loop(w, upstream, scale, grid, layout, groups.get("group_size"))
    found = gradients(w, scheme, scale, STE(), upstream)[1]
    torch.testing.assert_close(found.double(), expected, rtol=SUM_OF_FP32, atol=SUM_OF_FP32 * grid.num_levels)


def test_the_factor_counts_each_group() -> None:
    factor = scale_gradient_factor(Scheme.parse("W4A16G32"), torch.Size((2, 72)))
    assert factor.tolist() == pytest.approx([(32 * 7) ** -0.5, (32 * 7) ** -0.5, (8 * 7) ** -0.5])
    for name, qp in (("W1", 1), ("W1.58", 1), ("W2", 1), ("W2H", 1), ("W3H", 3), ("W8", 127)):
        factor = scale_gradient_factor(Scheme.parse(name), torch.Size((2, 50)))
        assert factor.tolist() == pytest.approx([(50 * qp) ** -0.5]), name


W = torch.tensor([[-1.3, -0.6, -0.2, 0.05, 0.12, 0.45, 0.9, 2.0]])


@pytest.mark.parametrize(
    ("grid", "alpha", "steps_per_alpha", "slopes", "tolerance"),
    [  # origin: methods.md 0.4, d(w_hat)/d(alpha); ternary SEQ with the self-consistent outer slope 2/3 instead of 1
        (Int(2), 0.5, 1, [-2, 0.2, 0.4, -0.1, -0.24, 0.1, 1, 1], 1e-6),
        (Int(3), 0.32, 1, [-4, -0.125, -0.375, -0.15625, -0.375, -0.40625, 0.1875, 3], 2e-6),
        (Ternary(), 1.0, 1.5, [-2 / 3, -0.06667, 0.2, -0.05, -0.12, 0.21667, -0.23333, 2 / 3], 5e-6),
        (HalfShifted(2), 1.0, 2, [-0.75, -0.15, -0.05, 0.2, 0.13, -0.2, -0.15, 0.75], 1e-6),
        (Binary(), 0.7025, 1, [-1, -1, -1, 1, 1, 1, 1, 1], 0),
    ],
    ids=["lsq2", "lsq3", "seq1.58", "seq2", "sign"],
)
def test_golden_slopes(
    grid: AnyGrid, alpha: float, steps_per_alpha: float, slopes: list[float], tolerance: float
) -> None:
    scheme = Scheme(grid=grid, scale=ScaleSpec(dtype="fp32"))
    scale = torch.tensor([[alpha / steps_per_alpha]])
    factor = scale_gradient_factor(scheme, W.shape).item()
    found = [gradients(W, scheme, scale, STE(), row[None])[1].item() / factor / steps_per_alpha for row in torch.eye(8)]
    assert found == pytest.approx(slopes, abs=max(tolerance, 1e-6))
    total = gradients(W, scheme, scale, STE(), torch.ones(1, 8))[1].item() / factor / steps_per_alpha
    assert total == pytest.approx(sum(slopes), abs=8 * max(tolerance, 1e-6))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_both_gradients_equal_autograd_of_the_detached_round(bits: int) -> None:
    """s (clip v + (round(clip v) - clip v).detach()): LSQ as it is usually written."""
    grid = Int(bits)
    w = torch.randn(4, 64).requires_grad_()
    scale = torch.rand(4, 1).add_(0.2).requires_grad_()
    upstream = torch.randn(4, 64)
    v = (w / scale).clamp(grid.qmin, grid.qmax)
    expected = torch.autograd.grad(scale * (v + (v.round() - v).detach()), (w, scale), upstream)
    scheme = Scheme(grid=grid, scale=ScaleSpec(dtype="fp32"))
    grad_w, grad_scale = gradients(w.detach(), scheme, scale.detach(), ClippedSTE(), upstream)
    torch.testing.assert_close(grad_w, expected[0], rtol=1e-6, atol=1e-6)
    factor = scale_gradient_factor(scheme, w.shape)
    torch.testing.assert_close(grad_scale, expected[1] * factor, rtol=SUM_OF_FP32, atol=SUM_OF_FP32)


DYADIC = [g for g in GRIDS if not isinstance(g, Binary) and all((8 * level).is_integer() for level in g.levels)]


@pytest.mark.parametrize("grid", DYADIC, ids=lambda g: f"{g.kind}{g.num_levels}")
def test_euler_identity(grid: AnyGrid) -> None:
    """Q is homogeneous of degree 1 in (w, s), so w dQ/dw + s dQ/ds = Q, weight by weight, where the two edges agree.

    One weight per scale and dyadic numbers: no rounding anywhere, so the equality is exact.
    """
    edge: Any = "bin" if grid.scale_edge == grid.bin_edge else "level"
    scheme = Scheme(grid=grid, scale=ScaleSpec(dtype="fp32"))
    w = torch.randint(-4096, 4096, (2000, 1)) / 4096 * max(1.0, grid.max_level)
    w = (w * 1024).round() / 1024
    scale = torch.full((2000, 1), 0.5)
    grad_w, grad_scale = gradients(w, scheme, scale, ClippedSTE(edge=edge), torch.ones(2000, 1))
    assert grad_w.unique().tolist() == [0.0, 1.0], "weights on both sides of the edge"
    slope = (fake_quantize(w, scheme, scale) - w * grad_w) / scale  # what the identity says dQ/ds must be
    assert torch.equal(grad_scale, slope * scale_gradient_factor(scheme, w.shape))


@some_grids
def test_slope_is_the_finite_difference_less_the_straight_through_part(grid: AnyGrid) -> None:
    """With the codes held, d(w_hat)/ds is the level; LSQ's slope subtracts v inside, what the STE sends through."""
    scheme = Scheme(grid=grid, scale=ScaleSpec(dtype="fp32"))
    w = 2 * torch.randn(500, 1)
    scale, step = torch.full((500, 1), 0.5), 2.0**-13
    low, high = quantize(w, scheme, scale - step), quantize(w, scheme, scale + step)
    same = (low.codes == high.codes).flatten()
    difference = (high.dequantize() - low.dequantize()) / (2 * step)
    v = w / scale
    inside = (v >= grid.scale_edge[0]) & (v <= grid.scale_edge[1])
    expected = difference - (v * inside if grid.scale_gradient == "lsq" else 0)
    found = gradients(w, scheme, scale, STE(), torch.ones(500, 1))[1] / scale_gradient_factor(scheme, w.shape)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(found[same], expected[same], rtol=0, atol=2e-3)


def test_the_gradient_passes_the_rounding_of_the_scale() -> None:
    """Rounding is flat almost everywhere, yet raw scales learn: the gradient at the rounded scale is passed on."""
    w, upstream = torch.randn(3, 96), torch.randn(3, 96)
    raw = torch.rand(3, 3) + 0.5
    scheme = Scheme.parse("W2A16G32")
    rounded = quantize(w, scheme, raw).scale
    assert not torch.equal(raw, rounded)
    assert torch.equal(gradients(w, scheme, raw, STE(), upstream)[1], gradients(w, scheme, rounded, STE(), upstream)[1])
    double = Scheme.parse("W2A16G32", superblock=64)
    held = quantize(w, double, raw).scale
    expected = gradients(w, Scheme.parse("W2A16G32", dtype="fp32"), held, STE(), upstream)[1]
    assert torch.equal(gradients(w, double, raw, STE(), upstream)[1], expected)


@some_grids
def test_the_scale_gradient_never_sees_the_surrogate(grid: AnyGrid) -> None:
    scheme = Scheme(grid=grid)
    w, upstream = torch.randn(4, 100), torch.randn(4, 100)
    scale = initial_scale(w, scheme)
    expected = gradients(w, scheme, scale, STE(), upstream)[1]
    for surrogate in (ClippedSTE(), StableQAT(), JacQuant()):
        assert torch.equal(gradients(w, scheme, scale, surrogate, upstream)[1], expected)


# gradient of the weight ---------------------------------------------------------------------------------------------


def test_identity_ste_passes_the_gradient_bit_for_bit() -> None:
    w, upstream = torch.randn(4, 100), torch.randn(4, 100)
    for name in ("W1", "W1.58", "W2A16G64", "W3H", "W4K"):
        scheme = Scheme.parse(name)
        assert torch.equal(gradients(w, scheme, initial_scale(w, scheme), None, upstream)[0], upstream)


@pytest.mark.parametrize("surrogate", [STE(), ClippedSTE(), StableQAT()], ids=lambda s: s.name)
def test_rotated_gradients_equal_the_dense_formula(surrogate: Any) -> None:
    """R^-1 (gain(v) * R G) with R a matrix; the scale's gradient is the one of the rotated problem."""
    width = 64
    rotation = Rotation(kind="random_hadamard", block_size=32, seed=5)
    scheme = Scheme(grid=Int(2), scale=ScaleSpec(dtype="fp32"), rotation=rotation)
    block = dense_hadamard(32)
    matrix = rotation._signs(width, torch.ones(1)).double()[:, None] * torch.block_diag(block, block)
    w, upstream = torch.randn(3, width), torch.randn(3, width)
    scale = initial_scale(w, scheme)
    rotated_w, rotated_g = (w.double() @ matrix).float(), (upstream.double() @ matrix).float()
    plain = gradients(rotated_w, Scheme(grid=Int(2), scale=ScaleSpec(dtype="fp32")), scale, surrogate, rotated_g)
    found = gradients(w, scheme, scale, surrogate, upstream)
    torch.testing.assert_close(found[0], (plain[0].double() @ matrix.t()).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-5)


def test_bf16_weights_get_bf16_gradients_and_fp32_scale_gradients() -> None:
    scheme = Scheme.parse("W2A16G32")
    w = torch.randn(4, 64).bfloat16()
    grads = gradients(w, scheme, initial_scale(w, scheme), ClippedSTE(), torch.randn(4, 64).bfloat16())
    assert (grads[0].dtype, grads[1].dtype) == (torch.bfloat16, torch.float32)


def test_only_what_needs_a_gradient_gets_one() -> None:
    scheme = Scheme.parse("W2")
    w = torch.randn(2, 64)
    scale = initial_scale(w, scheme)
    assert not fake_quantize(w, scheme, scale).requires_grad
    only_scale = scale.clone().requires_grad_()
    fake_quantize(w, scheme, only_scale).sum().backward()
    assert only_scale.grad is not None
    only_weight = w.clone().requires_grad_()
    fake_quantize(only_weight, scheme, scale).sum().backward()
    assert torch.equal(only_weight.grad, torch.ones(2, 64))  # type: ignore[arg-type]
    assert scale.grad is None


def test_a_transposed_weight_trains_too() -> None:
    """GPT-2 stores its linear weights transposed; the codebook must take the non-contiguous view."""
    for name in ("W2", "W2H", "W2K", "W1.58"):
        scheme = Scheme.parse(name)
        stored = torch.randn(64, 8)
        out = fake_quantize(stored.t().requires_grad_(), scheme, surrogate=StableQAT())
        assert torch.equal(out, quantize(stored.t().contiguous(), scheme).dequantize())
        out.sum().backward()


# memory and higher derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "surrogate", [STE(), ClippedSTE(), StableQAT(), JacQuant(compose_mask=True)], ids=lambda s: s.name
)
def test_backward_saves_the_weight_and_the_scale_and_nothing_else(surrogate: Any) -> None:
    scheme = Scheme.parse("W2A16G64")
    w = torch.randn(8, 256).requires_grad_()
    scale = initial_scale(w, scheme).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = fake_quantize(w, scheme, scale, surrogate)
    assert {t.data_ptr() for t in saved} == {w.data_ptr(), scale.data_ptr()}
    assert len(saved) == 2
    assert not [value for value in vars(out.grad_fn).values() if isinstance(value, Tensor)], "nothing kept aside either"


def test_double_backward_of_the_straight_through_quantizer() -> None:
    """For L = (x . Q(w))^2 / 2 the STE Hessian is x x^T whatever Q is: a Hessian-vector product is exact."""
    scheme = Scheme.parse("W2", dtype="fp32")
    x, direction = torch.randn(2, 64), torch.randn(2, 64)
    w = torch.randn(2, 64).requires_grad_()
    loss = (x * fake_quantize(w, scheme)).sum().square() / 2
    (grad,) = torch.autograd.grad(loss, w, create_graph=True)
    (product,) = torch.autograd.grad((grad * direction).sum(), w)
    torch.testing.assert_close(product, x * (x * direction).sum(), rtol=1e-5, atol=1e-5)


def test_double_backward_of_a_clipped_quantizer_keeps_the_mask() -> None:
    scheme = Scheme.parse("W2", dtype="fp32")
    w = torch.randn(2, 64).requires_grad_()
    scale = torch.full((2, 1), 0.3)
    mask = ClippedSTE().gain(w.detach() / scale, Int(2))
    out = fake_quantize(w, scheme, scale, ClippedSTE())
    (grad,) = torch.autograd.grad(out.square().sum() / 2, w, create_graph=True)
    assert torch.equal(grad, out * mask)
    (second,) = torch.autograd.grad(grad.sum(), w)
    assert torch.equal(second, mask)


# refusals -----------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="a matrix"):
        fake_quantize(torch.ones(64), Scheme.parse("W2"))
    with pytest.raises(ValueError, match="group_size=128 is larger than its in_features=64"):
        fake_quantize(torch.ones(2, 64), Scheme.parse("W2A16G128"))
    with pytest.raises(ValueError, match=r"scale has shape \(2,\); W2A16 of \(2, 64\) needs \(2, 1\)"):
        fake_quantize(torch.ones(2, 64), Scheme.parse("W2"), torch.ones(2))
