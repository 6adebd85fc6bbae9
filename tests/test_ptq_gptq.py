"""GPTQ and RTN as pure tensors: limit cases, the slow optimum of every step, order of errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ptq_common import over
from torch import Tensor

from fewbits.ptq import gptq, hessian_of, output_error, rtn
from fewbits.qtensor import quantize
from fewbits.rotations import Rotation
from fewbits.scales import find_scale
from fewbits.scheme import Scheme

SCHEMES = [
    Scheme.parse(text, **options)
    for text, options in [
        ("W4", {}),
        ("W2G32", {}),
        ("W3", {"granularity": "per_tensor"}),
        ("W2HG32", {}),
        ("W1.58G32", {}),
        ("W1G32", {"dtype": "fp16"}),
        ("W2KG32", {}),
        ("W2G32", {"superblock": 64}),
        ("W2HG32", {"rotation": Rotation(kind="random_hadamard", block_size=32)}),
        ("W2G64", {"mode": "frozen", "dtype": "fp32"}),
    ]
]
every_scheme = over(SCHEMES)


def data(rows: int = 6, width: int = 80, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs (six common factors and noise, of rising size) and their Hessian."""
    x = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, width, dtype=torch.float64)
    x = (x + torch.randn(400, width, dtype=torch.float64)) * torch.linspace(0.3, 3, width, dtype=torch.float64)
    return torch.randn(rows, width, dtype=torch.float64).to(dtype) * 0.05, x, hessian_of(x)


@every_scheme
def test_the_identity_hessian_is_rtn(scheme: Scheme) -> None:
    w, _, _ = data()
    expected = rtn(w, scheme)
    for damping in (0.0, 0.01):
        found = gptq(w, scheme, hessian=3.0 * torch.eye(80), damping=damping)
        assert torch.equal(found.qtensor.codes, expected.qtensor.codes)
        assert torch.equal(found.qtensor.scale, expected.qtensor.scale)
    ordered = gptq(w, scheme, hessian=3.0 * torch.eye(80), act_order=True, static_groups=True)
    assert torch.equal(ordered.qtensor.codes, expected.qtensor.codes)


def test_two_columns_by_hand() -> None:
    h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    result = gptq(torch.tensor([[0.3, 0.1]]), Scheme.parse("W4"), hessian=h, scale=torch.ones(1, 1), damping=0.0)
    torch.testing.assert_close(result.latent, torch.tensor([[0.3, 0.25]]))  # 0.1 + (1/2) * 0.3
    assert result.qtensor.codes.tolist() == [[0, 0]]
    far = gptq(torch.tensor([[0.3, 0.4]]), Scheme.parse("W4"), hessian=h, scale=torch.ones(1, 1), damping=0.0)
    assert far.qtensor.codes.tolist() == [[0, 1]]  # 0.4 + 0.15 is nearer to 1


def optimum(w: Tensor, q: Tensor, h: Tensor, j: int) -> Tensor:
    """Columns j.. that are best once the columns before have become q: the normal equations, solved densely."""
    delta = torch.linalg.solve(h[j:, j:], h[j:, :j] @ (q[:, :j] - w[:, :j]).t()).t()
    return w[:, j:] - delta


@every_scheme
def test_every_column_is_at_its_optimum_when_it_is_rounded(scheme: Scheme) -> None:
    w, _, h = data(dtype=torch.float64)
    damping = 0.01
    result = gptq(w, scheme, hessian=h, damping=damping)
    turn = scheme.rotation.apply
    x, h = turn(w), turn(turn(h).t()).t()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h))
    view = scheme.scale.view(w.shape)
    q = (result.qtensor.levels() * view.expand(result.qtensor.scale)).double()
    steps = view.expand(result.qtensor.scale).double()
    for j in range(w.shape[1]):
        column = optimum(x, q, h, j)[:, 0]
        assert torch.equal(scheme.grid.encode(column / steps[:, j]), result.qtensor.codes[:, j]), j
    if scheme.rotation.kind == "none":
        rounded = torch.stack([optimum(x, q, h, j)[:, 0] for j in range(w.shape[1])], dim=1)
        torch.testing.assert_close(result.latent, rounded, atol=1e-6, rtol=1e-5)


def test_without_damping_the_last_column_solves_the_normal_equations() -> None:
    w, _, h = data(dtype=torch.float64)
    result = gptq(w, Scheme.parse("W2"), hessian=h, damping=0.0)
    delta = result.qtensor.dequantize(torch.float64) - w
    delta[:, -1] = result.latent[:, -1] - w[:, -1]
    residual = (delta @ h)[:, -1]
    assert residual.abs().max() < 1e-6 * (delta.abs() @ h.abs())[:, -1].max()


def test_scales_of_a_group_are_found_when_it_starts() -> None:
    scheme = Scheme.parse("W2G32")
    w, _, h = data(dtype=torch.float64)
    result = gptq(w, scheme, hessian=h)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    q = result.qtensor.dequantize(torch.float64)
    for group, (start, end) in enumerate([(0, 32), (32, 64), (64, 80)]):
        now = optimum(w, q, damped, start)[:, : end - start]
        found = find_scale(now, scheme.grid, scheme.scale)
        torch.testing.assert_close(result.scale[:, [group]], found, rtol=1e-5, atol=0)
    static = gptq(w, scheme, hessian=h, static_groups=True)
    torch.testing.assert_close(static.scale, find_scale(w, scheme.grid, scheme.scale), rtol=0, atol=0)


def test_given_scales_are_used() -> None:
    scheme = Scheme.parse("W2G32")
    w, _, h = data()
    scale = torch.full((6, 3), 0.0625)
    result = gptq(w, scheme, hessian=h, scale=scale)
    assert torch.equal(result.qtensor.scale, scale)
    with pytest.raises(ValueError, match=r"scale has shape \(6, 2\)"):
        gptq(w, scheme, hessian=h, scale=scale[:, :2])


@every_scheme
def test_it_loses_to_rtn_on_weights_and_wins_on_outputs(scheme: Scheme) -> None:
    w, x, h = data(rows=16)
    ours, plain = gptq(w, scheme, inputs=x), rtn(w, scheme)
    a, b = ours.qtensor.dequantize(), plain.qtensor.dequantize()
    assert output_error(w, a, h) < 0.9 * output_error(w, b, h)
    assert (a - w).square().sum() > (b - w).square().sum()
    direct = (x @ (a.double() - w.double()).t()).square().sum() / len(x)
    assert output_error(w, a, h) == pytest.approx(float(direct), rel=1e-9)


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_latent_weight_holds_the_codes(scheme: Scheme, dtype: torch.dtype) -> None:
    w, _, h = data(dtype=dtype)
    for options in ({}, {"act_order": True, "static_groups": True}):
        result = gptq(w, scheme, hessian=h, **options)
        again = quantize(result.latent, scheme, result.scale)
        assert result.latent.dtype == dtype
        assert torch.equal(again.codes, result.qtensor.codes)
        assert torch.equal(again.scale, result.qtensor.scale)


def test_act_order_does_not_depend_on_how_the_columns_are_numbered() -> None:
    scheme = Scheme.parse("W3")
    w, _, h = data(dtype=torch.float64)
    p = torch.randperm(80)
    first = gptq(w, scheme, hessian=h, act_order=True)
    second = gptq(w[:, p], scheme, hessian=h[p][:, p], act_order=True)
    assert torch.equal(first.qtensor.codes[:, p], second.qtensor.codes)


@pytest.mark.parametrize("options", [{}, {"block_size": 1}, {"block_size": 7}])
def test_the_block_size_changes_nothing(options: dict[str, int]) -> None:
    w, _, h = data(dtype=torch.float64)
    expected = gptq(w, Scheme.parse("W2H"), hessian=h, block_size=1000)
    found = gptq(w, Scheme.parse("W2H"), hessian=h, **options)
    assert torch.equal(found.qtensor.codes, expected.qtensor.codes)


def test_rotation_is_gptq_in_the_rotated_basis() -> None:
    rotation = Rotation(kind="hadamard", block_size=16)
    scheme = Scheme.parse("W2HG32", rotation=rotation)
    w, x, _ = data(dtype=torch.float64)
    outside = gptq(rotation.apply(w), replace(scheme, rotation=Rotation()), inputs=rotation.apply(x))
    assert torch.equal(gptq(w, scheme, inputs=x).qtensor.codes, outside.qtensor.codes)


def test_dead_inputs_are_rounded_to_nearest() -> None:
    scheme = Scheme.parse("W2")
    w, x, _ = data()
    x[:, [3, 70]] = 0
    scale = find_scale(w, scheme.grid, scheme.scale)
    result, plain = gptq(w, scheme, inputs=x, scale=scale), rtn(w, scheme, scale=scale)
    assert torch.equal(result.qtensor.codes[:, [3, 70]], plain.qtensor.codes[:, [3, 70]])
    everything_dead = gptq(w, scheme, hessian=torch.zeros(80, 80), damping=0.0)
    assert torch.equal(everything_dead.qtensor.codes, plain.qtensor.codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping=-1.0 must be >= 0"),
        ({"block_size": 0}, "block_size=0"),
        ({"act_order": True}, "pass static_groups=True"),
        ({"hessian": None}, "exactly one of hessian"),
        ({"inputs": torch.ones(2, 80)}, "exactly one of hessian"),
        ({"hessian": torch.eye(3)}, r"has shape \(3, 3\)"),
        ({"hessian": torch.full((80, 80), torch.nan)}, "not finite"),
        ({"hessian": torch.ones(80, 80), "damping": 0.0}, "not positive definite with damping=0.0"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    w, _, h = data()
    with pytest.raises(ValueError, match=message):
        gptq(w, Scheme.parse("W2G32"), **{"hessian": h, **options})  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="1 non-finite"):
        rtn(torch.tensor([[1.0, torch.inf]]), Scheme.parse("W2"))
