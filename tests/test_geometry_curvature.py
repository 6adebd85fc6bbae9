"""Hessian-vector products, smoothing and Hutchinson against the dense Hessian of a small network."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fewbits.geometry import (
    dot,
    hessian_operator,
    hutchinson,
    hvp,
    hvp_finite_difference,
    norm,
    perturbed,
    random_vector,
    smoothed_operator,
    smoothing_deltas,
)
from fewbits.geometry.spectrum import flatten, unflatten

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Small:
    """A tanh network with 2 x 5 + 5 + 5 x 3 + 3 = 33 parameters and a cross-entropy loss."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        g = generator(7)
        shapes = [(5, 2), (5,), (3, 5), (3,)]
        self.params = [torch.randn(s, generator=g, dtype=F64).to(dtype).requires_grad_() for s in shapes]
        self.x = torch.randn(16, 2, generator=g, dtype=F64).to(dtype)
        self.y = torch.randint(0, 3, (16,), generator=g)

    def loss_at(self, flat: Tensor) -> Tensor:
        a, b, c, d = self.split(flat)
        return nn.functional.cross_entropy(torch.tanh(self.x @ a.T + b) @ c.T + d, self.y)

    def split(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([p.numel() for p in self.params])
        return [x.reshape(p.shape) for x, p in zip(pieces, self.params, strict=True)]

    def loss(self) -> Tensor:
        return self.loss_at(torch.cat([p.reshape(-1) for p in self.params]))

    def dense(self, shift: Tensor | float = 0.0) -> Tensor:
        # Written as a pure function, with no parameter list, closure or in-place move: all that is under test.
        return torch.func.jacrev(torch.func.jacrev(self.loss_at))(flatten(self.params) + shift)


def matrix_of(operator: Callable[[list[Tensor]], list[Tensor]], template: list[Tensor]) -> Tensor:
    eye = torch.eye(sum(p.numel() for p in template), dtype=template[0].dtype)
    return torch.stack([flatten(operator(unflatten(row, template))) for row in eye], dim=1)


def test_hvp_equals_the_dense_hessian_column_by_column() -> None:
    net = Small()
    found = matrix_of(hessian_operator(net.loss, net.params), net.params)
    torch.testing.assert_close(found, net.dense(), rtol=0, atol=1e-13)


def test_hvp_is_symmetric_and_leaves_no_gradient_behind() -> None:
    net = Small()
    u, v = (random_vector(net.params, generator(s)) for s in (1, 2))
    assert dot(u, hvp(net.loss, net.params, v)) == pytest.approx(dot(v, hvp(net.loss, net.params, u)), rel=1e-12)
    assert all(p.grad is None and p.requires_grad for p in net.params)


def test_hvp_works_on_frozen_parameters_and_under_no_grad() -> None:
    net = Small()
    v = random_vector(net.params, generator())
    wanted = hvp(net.loss, net.params, v)
    for p in net.params:
        p.requires_grad_(False)
    with torch.no_grad():
        found = hvp(net.loss, net.params, v)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not any(p.requires_grad for p in net.params)


@pytest.mark.parametrize(("dtype", "tol"), [(F64, 1e-8), (torch.float32, 1e-2)])
def test_the_finite_difference_twin_agrees_and_restores(dtype: torch.dtype, tol: float) -> None:
    net = Small(dtype)
    before = [p.detach().clone() for p in net.params]
    v = random_vector(net.params, generator())
    exact, twin = hvp(net.loss, net.params, v), hvp_finite_difference(net.loss, net.params, v)
    assert norm([a - b for a, b in zip(exact, twin, strict=True)]) < tol * norm(exact)
    assert all(torch.equal(a, b) for a, b in zip(net.params, before, strict=True))


def test_the_finite_difference_error_falls_with_the_square_of_the_step() -> None:
    net = Small()
    v = random_vector(net.params, generator())
    exact = hvp(net.loss, net.params, v)

    def error(step: float) -> float:
        twin = hvp_finite_difference(net.loss, net.params, v, step=step)
        return norm([a - b for a, b in zip(exact, twin, strict=True)])

    assert error(2e-2) / error(1e-2) == pytest.approx(4, rel=0.05)


def test_hvp_is_zero_where_the_loss_is_linear_or_absent() -> None:
    w, other = torch.randn(4, 3, generator=generator()), torch.zeros(2)
    x = torch.randn(3, generator=generator(1))
    found = hvp(lambda: torch.relu(w @ x).sum(), [w, other], [torch.ones(4, 3), torch.ones(2)])
    assert torch.equal(found[0], torch.zeros(4, 3))
    assert torch.equal(found[1], torch.zeros(2))
    assert torch.equal(hvp(lambda: (w * x).sum(), [w], [w])[0], torch.zeros(4, 3))
    assert torch.equal(hvp_finite_difference(lambda: (w * x).sum(), [w], [w * 0])[0], torch.zeros(4, 3))


def test_hvp_passes_through_fused_attention() -> None:
    # The fused CPU kernel has no second derivative; hvp must use the mathematical form.
    w = torch.randn(8, 8, generator=generator(), dtype=F64)
    x = torch.randn(1, 2, 6, 8, generator=generator(1), dtype=F64)

    def loss() -> Tensor:
        y = x @ w
        return nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).square().mean()

    v = random_vector([w], generator(2))
    exact, twin = hvp(loss, [w], v), hvp_finite_difference(loss, [w], v)
    assert norm([exact[0] - twin[0]]) < 1e-6 * norm(exact)


def test_hvp_of_a_straight_through_loss_is_the_hessian_at_the_rounded_weights() -> None:
    w = torch.randn(6, generator=generator(), dtype=F64).requires_grad_()

    def smooth(q: Tensor) -> Tensor:
        return (q**4).sum() + (q[0] * q[1]) ** 2

    def deployed() -> Tensor:
        return smooth(w + (w.round() - w).detach())

    v = random_vector([w], generator(1))
    q = w.detach().round()
    assert torch.equal(hvp(deployed, [w], v)[0], hvp(lambda: smooth(q), [q], v)[0])


def test_a_wide_finite_difference_sees_through_a_hard_staircase() -> None:
    # Gradient of 2 * round(w) * w-like stairs: locally its derivative is 0, over many steps it is 2.
    w = torch.zeros(1, dtype=F64)

    class Stairs(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 2 * (x / 0.01).round() * 0.01

    def loss() -> Tensor:
        return Stairs.apply(w).sum()

    v = [torch.ones(1, dtype=F64)]
    assert hvp_finite_difference(loss, [w], v, step=1e-4)[0].item() == 0
    assert hvp_finite_difference(loss, [w], v, step=0.5)[0].item() == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("method", ["autograd", "finite_difference"])
def test_the_smoothed_operator_is_the_mean_of_dense_hessians(method: str) -> None:
    net = Small()
    before = [p.detach().clone() for p in net.params]
    error = [0.3 * e for e in random_vector(net.params, generator(5))]
    deltas = smoothing_deltas(error, 4, generator(6))
    wanted = torch.stack([net.dense(flatten(d)) for d in deltas]).mean(0)
    found = matrix_of(smoothed_operator(net.loss, net.params, deltas, method=method), net.params)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13 if method == "autograd" else 1e-8)
    assert (wanted - net.dense()).norm() > 0.1 * wanted.norm()  # smoothing did something
    assert all(torch.equal(a, b) for a, b in zip(net.params, before, strict=True))


def test_smoothing_by_nothing_is_the_plain_hessian() -> None:
    net = Small()
    v = random_vector(net.params, generator())
    nothing = [[torch.zeros_like(p) for p in net.params]]
    for a, b in zip(smoothed_operator(net.loss, net.params, nothing)(v), hvp(net.loss, net.params, v), strict=True):
        assert torch.equal(a, b)


def test_smoothing_deltas_have_the_size_of_the_error_per_tensor() -> None:
    error = [torch.full((100, 50), 0.1), torch.zeros(3), torch.full((4000,), 2.0)]
    deltas = smoothing_deltas(error, 4, generator())
    assert len(deltas) == 4
    for delta in deltas:
        assert norm([delta[0]]) == pytest.approx(norm([error[0]]), rel=0.05)
        assert norm([delta[1]]) == 0
        assert norm([delta[2]]) == pytest.approx(norm([error[2]]), rel=0.05)
    assert torch.equal(deltas[2][0], -deltas[3][0])
    assert not torch.equal(deltas[0][0], deltas[2][0])
    free = smoothing_deltas(error, 3, generator(), antithetic=False)
    assert not torch.equal(free[1][0], -free[0][0])
    with pytest.raises(ValueError, match="even"):
        smoothing_deltas(error, 3, generator())


def test_hutchinson_is_exact_for_a_diagonal_operator() -> None:
    h = [torch.tensor([1.0, -2.0, 5.0], dtype=F64), torch.tensor([[4.0]], dtype=F64)]
    found = hutchinson(lambda v: [a * b for a, b in zip(h, v, strict=True)], h, num_samples=3, generator=generator())
    assert found.trace == pytest.approx(8, abs=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-12)
    assert found.square_trace == pytest.approx(46)
    assert found.diagonal_square == pytest.approx(46)
    assert (found.dim, found.mean_curvature) == (4, pytest.approx(2))


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
@pytest.mark.parametrize("weighted", [False, True])
def test_hutchinson_matches_the_dense_hessian_within_its_error(law: str, weighted: bool) -> None:
    net = Small()
    dense = net.dense()
    weights = [torch.rand(p.shape, generator=generator(3), dtype=F64) + 0.5 for p in net.params] if weighted else None
    if weights is not None:
        s = flatten(weights)
        dense = s[:, None] * dense * s
    num = 400
    plain = net.dense()
    found = hutchinson(
        lambda v: unflatten(plain @ flatten(v), net.params),
        net.params,
        num_samples=num,
        generator=generator(1),
        law=law,
        weights=weights,
    )
    assert abs(found.trace - dense.trace().item()) < 4 * found.standard_error
    # The standard error itself: Var v'Av = 2 (tr A^2 - sum a_ii^2) for signs, 2 tr A^2 for Gaussians.
    square, diagonal = dense.square().sum().item(), dense.diagonal().square().sum().item()
    variance = 2 * (square - diagonal) if law == "rademacher" else 2 * square
    assert found.standard_error == pytest.approx(math.sqrt(variance / num), rel=0.2)
    assert found.square_trace == pytest.approx(square, rel=0.15)
    assert found.diagonal_square == pytest.approx(diagonal, rel=0.25)


def test_the_squared_diagonal_carries_no_noise_bias_even_from_few_samples() -> None:
    dense = Small().dense()
    dense = dense @ dense  # positive, so that the clipping range is wide
    diagonal, square = dense.diagonal().square().sum().item(), dense.square().sum().item()
    num, found = 8, []
    for seed in range(300):
        run = hutchinson(
            lambda v: unflatten(dense @ flatten(v), v),
            Small().params,
            num_samples=num,
            generator=generator(seed),
        )
        found.append(run.diagonal_square)
    naive_bias = (square - diagonal) / num
    assert naive_bias > 0.2 * diagonal
    assert sum(found) / 300 == pytest.approx(diagonal, rel=0.1)


def test_hutchinson_on_the_network_itself_and_with_a_seed() -> None:
    net = Small()
    runs = [
        hutchinson(hessian_operator(net.loss, net.params), net.params, num_samples=30, generator=generator(4))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert abs(runs[0].trace - net.dense().trace().item()) < 4 * runs[0].standard_error
    with pytest.raises(ValueError, match="at least 2"):
        hutchinson(lambda v: v, net.params, num_samples=1, generator=generator())


def test_the_operator_follows_the_parameters() -> None:
    net = Small()
    operator = hessian_operator(net.loss, net.params)
    v = random_vector(net.params, generator())
    with perturbed(net.params, v, 0.5):
        found = operator(v)
    wanted = net.dense(0.5 * flatten(v)) @ flatten(v)
    torch.testing.assert_close(flatten(found), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: hvp(lambda: torch.ones(()), [w], [w]), "no graph"),
        (lambda w: hvp(lambda: (w * w).sum(), [w], [torch.ones(1)]), "shape"),
        (lambda w: hvp_finite_difference(lambda: (w * w).sum(), [w], [w], step=0.0), "step"),
        (lambda w: hessian_operator(lambda: w.sum(), [w], method="magic"), "magic"),
        (lambda w: hessian_operator(lambda: w.sum(), [w], step=0.1), "no meaning"),
        (lambda w: smoothed_operator(lambda: w.sum(), [w], []), "empty"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3))
