"""Lanczos, leading eigenpairs and quadrature against eigh."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbits.geometry import (
    Spectrum,
    dot,
    hessian_operator,
    hutchinson,
    hvp,
    lanczos,
    lanczos_spectrum,
    norm,
    random_vector,
    top_eigenpairs,
)
from fewbits.geometry.spectrum import flatten, unflatten

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    n = eigenvalues.numel()
    q = torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=F64)).Q
    return ((q * eigenvalues.to(F64)) @ q.T).to(eigenvalues.dtype)


def apply(matrix: Tensor):
    return lambda v: unflatten(matrix @ flatten(v), v)


def template(n: int, dtype: torch.dtype = F64) -> list[Tensor]:
    return [torch.zeros(n - 4, dtype=dtype), torch.zeros(2, 2, dtype=dtype)]


class Small:
    """A quartic loss of 20 parameters in two tensors: an indefinite, dense Hessian with distinct eigenvalues."""

    def __init__(self) -> None:
        self.params = [
            torch.randn(16, generator=generator(1), dtype=F64),
            torch.randn(2, 2, generator=generator(2), dtype=F64),
        ]
        self.mix = torch.randn(20, 20, generator=generator(3), dtype=F64) / 4

    def loss_at(self, flat: Tensor) -> Tensor:
        return torch.sin(self.mix @ flat).pow(3).sum() + 0.05 * flat.pow(4).sum()

    def loss(self) -> Tensor:
        return self.loss_at(torch.cat([p.reshape(-1) for p in self.params]))

    def dense(self) -> Tensor:
        return torch.func.jacrev(torch.func.jacrev(self.loss_at))(flatten(self.params))

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.dense()).flip(0)


def test_flatten_and_unflatten_are_inverse() -> None:
    v = random_vector([torch.zeros(2, 3), torch.zeros(0), torch.zeros((), dtype=F64)], generator())
    flat = flatten(v, F64)
    assert flat.shape == (7,)
    back = unflatten(flat, v)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(v, back, strict=True))


def test_full_lanczos_is_an_orthogonal_tridiagonalisation() -> None:
    matrix = symmetric(torch.linspace(-3, 7, 30, dtype=F64))
    found = lanczos(apply(matrix), random_vector(template(30), generator()), 50)
    assert len(found.diagonal) == 30
    assert found.residual == 0
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(30, dtype=F64), rtol=0, atol=1e-13)
    t = torch.diag(torch.tensor(found.diagonal, dtype=F64))
    off = torch.tensor(found.off_diagonal, dtype=F64)
    t += torch.diag(off, 1) + torch.diag(off, -1)
    torch.testing.assert_close(found.basis @ matrix @ found.basis.T, t, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.ritz()[0], torch.linspace(-3, 7, 30, dtype=F64), rtol=0, atol=1e-12)


def plain_lanczos(matrix: Tensor, start: Tensor, steps: int) -> Tensor:
    """The three-term recurrence without reorthogonalisation, as in a textbook; returns its basis."""
    q, previous, beta = start / start.norm(), torch.zeros_like(start), torch.zeros(())
    rows = []
    for _ in range(steps):
        rows.append(q)
        w = matrix @ q - beta * previous
        w = w - (q @ w) * q
        beta, previous = w.norm(), q
        q = w / beta
    return torch.stack(rows)


def test_reorthogonalisation_keeps_the_fp32_basis_orthogonal_where_the_recurrence_loses_it() -> None:
    spectrum = torch.cat([torch.tensor([1000.0, 300.0, 100.0]), torch.logspace(0, -4, 117)])
    matrix = symmetric(spectrum)
    start = torch.randn(120, generator=generator(5))
    eye = torch.eye(60)
    bare = plain_lanczos(matrix, start, 60)
    assert (bare @ bare.T - eye).abs().max() > 0.5
    found = lanczos(apply(matrix), unflatten(start, template(120, torch.float32)), 60)
    assert found.basis.dtype == torch.float32
    kept = found.basis.shape[0]
    assert (found.basis @ found.basis.T - torch.eye(kept)).abs().max() < 2e-6
    # No ghosts: each of the three large eigenvalues appears exactly once.
    values = found.ritz()[0].flip(0)
    torch.testing.assert_close(values[:3], torch.tensor([1000.0, 300.0, 100.0], dtype=F64), rtol=1e-5, atol=0)
    assert values[3] < 2


def test_lanczos_stops_where_the_krylov_space_closes() -> None:
    eigenvalues = torch.zeros(25, dtype=F64)
    eigenvalues[:3] = torch.tensor([5.0, 3.0, -2.0])
    found = lanczos(apply(symmetric(eigenvalues)), random_vector(template(25), generator()), 20)
    # Three eigenvalues and zero close the space after 4 steps; rounding may add a step or two in the kernel.
    assert 4 <= len(found.diagonal) <= 6
    assert found.residual == 0
    values = sorted({round(x, 9) + 0.0 for x in found.ritz()[0].tolist()})
    assert values == [-2, 0, 3, 5]
    nothing = lanczos(lambda v: [0 * x for x in v], random_vector(template(9), generator()), 5)
    assert nothing.diagonal == (0.0,)


def test_the_residual_is_that_of_the_ritz_vectors() -> None:
    matrix = symmetric(torch.linspace(0, 1, 40, dtype=F64).pow(3))
    found = lanczos(apply(matrix), random_vector(template(40), generator()), 8)
    values, vectors = found.ritz()
    for value, s in zip(values, vectors.T, strict=True):
        y = found.basis.T @ s
        assert (matrix @ y - value * y).norm().item() == pytest.approx(found.residual * abs(s[-1].item()), abs=1e-12)


def test_progress_is_reported() -> None:
    seen: list[int] = []
    lanczos(
        apply(torch.diag(torch.arange(9.0, dtype=F64))), random_vector(template(9), generator()), 4, on_step=seen.append
    )
    assert seen == [1, 2, 3, 4]


def test_top_eigenpairs_of_a_loss_match_eigh() -> None:
    net = Small()
    operator = hessian_operator(net.loss, net.params)
    wanted = net.eigenvalues()
    found = top_eigenpairs(operator, net.params, 4, generator=generator())
    torch.testing.assert_close(torch.tensor(found.values, dtype=F64), wanted[:4], rtol=0, atol=1e-10)
    assert max(found.residuals) < 1e-8
    for value, vector in zip(found.values, found.vectors, strict=True):
        assert [v.shape for v in vector] == [p.shape for p in net.params]
        assert norm(vector) == pytest.approx(1)
        image = hvp(net.loss, net.params, vector)
        assert norm([a - value * b for a, b in zip(image, vector, strict=True)]) < 1e-8
    assert dot(found.vectors[0], found.vectors[1]) == pytest.approx(0, abs=1e-10)
    by_size = top_eigenpairs(operator, net.params, 20, generator=generator(), by_magnitude=True)
    assert sorted(wanted.tolist(), key=abs, reverse=True) == pytest.approx(list(by_size.values), abs=1e-9)


def test_top_eigenvalues_converge_from_below_within_their_residuals() -> None:
    eigenvalues = torch.linspace(0, 1, 200, dtype=F64).pow(6) * 50
    found = top_eigenpairs(apply(symmetric(eigenvalues)), template(200), 2, generator=generator(), num_steps=25)
    for value, residual, exact in zip(found.values, found.residuals, eigenvalues.flip(0).tolist(), strict=False):
        assert exact - residual - 1e-10 <= value <= exact + 1e-10
    for value, residual, vector in zip(found.values, found.residuals, found.vectors, strict=True):
        y = flatten(vector)
        assert (symmetric(eigenvalues) @ y - value * y).norm().item() == pytest.approx(residual, abs=1e-10)
    assert found.residuals[1] > 1e-6  # not yet converged, so the residual is a number and not noise
    assert found.values[0] == pytest.approx(50, rel=1e-4)


def test_quadrature_of_a_loss_gives_its_moments_and_extremes() -> None:
    net = Small()
    wanted = net.eigenvalues()
    arguments = {"generator": generator(), "num_steps": 20}
    found = lanczos_spectrum(apply(net.dense()), net.params, num_probes=200, **arguments)
    through_the_loss = lanczos_spectrum(hessian_operator(net.loss, net.params), net.params, num_probes=2, **arguments)
    assert through_the_loss.largest == pytest.approx(wanted[0].item(), abs=1e-9)
    # 20 steps in 20 dimensions see every eigenvalue; only the weights are random.
    assert found.largest == pytest.approx(wanted[0].item(), abs=1e-9)
    assert found.smallest == pytest.approx(wanted[-1].item(), abs=1e-9)
    assert found.max_abs == pytest.approx(wanted.abs().max().item(), abs=1e-9)
    assert found.moment(0) == pytest.approx(1, abs=1e-12)
    for order in (1, 2, 4):
        assert found.moment(order) == pytest.approx(
            wanted.pow(order).mean().item(), abs=0.1 * wanted.abs().pow(order).mean().item()
        )
    assert found.dim == 20


def test_moments_up_to_2m_minus_1_are_exact_for_each_probe() -> None:
    matrix = symmetric(torch.linspace(-1, 2, 30, dtype=F64))
    m = 3
    found = lanczos_spectrum(apply(matrix), template(30), generator=generator(8), num_probes=1, num_steps=m)
    v = flatten(random_vector(template(30), generator(8), law="rademacher"))
    for order in range(2 * m):
        exact = (v @ torch.linalg.matrix_power(matrix, order) @ v).item() / 30
        assert found.moment(order) == pytest.approx(exact, abs=1e-12)
    wrong = (v @ torch.linalg.matrix_power(matrix, 2 * m) @ v).item() / 30
    assert abs(found.moment(2 * m) - wrong) > 1e-4  # the identity ends where the theory says


def test_the_first_moment_is_the_hutchinson_trace_of_the_same_probes() -> None:
    matrix = symmetric(torch.linspace(0, 5, 30, dtype=F64))
    found = lanczos_spectrum(apply(matrix), template(30), generator=generator(1), num_probes=6, num_steps=2)
    trace = hutchinson(apply(matrix), template(30), generator=generator(1), num_samples=6).trace
    assert 30 * found.moment(1) == pytest.approx(trace, rel=1e-12)


def test_masses_count_eigenvalues() -> None:
    eigenvalues = torch.cat([torch.zeros(60), torch.full((30,), 1e-4), torch.linspace(1, 2, 10)]).to(F64)
    found = lanczos_spectrum(
        apply(symmetric(eigenvalues)), template(100), generator=generator(), num_probes=150, num_steps=20
    )
    assert found.zero_share() == pytest.approx(0.9, abs=0.02)  # WinQ counts |lambda| < 1e-3 as zero
    assert found.zero_share(5e-5) == pytest.approx(0.6, abs=0.03)
    assert found.mass(0.9, 2.1) == pytest.approx(0.1, abs=0.02)
    assert found.mass(-math.inf, math.inf) == pytest.approx(1)


def test_the_drawn_density_integrates_to_one_and_peaks_at_the_nodes() -> None:
    found = Spectrum(nodes=((0.0, 2.0),), weights=((0.75, 0.25),), dim=4)
    xs = torch.linspace(-1, 3, 4001, dtype=F64)
    density = torch.tensor(found.density(xs.tolist()), dtype=F64)
    assert torch.trapezoid(density, xs).item() == pytest.approx(1, abs=1e-9)
    assert xs[density.argmax()].item() == pytest.approx(0, abs=1e-3)
    assert found.density([2.0], bandwidth=0.1)[0] == pytest.approx(0.25 / (0.1 * math.sqrt(2 * math.pi)))
    single = Spectrum(nodes=((3.0,),), weights=((1.0,),), dim=1)
    assert math.isfinite(single.density([3.0])[0])
    with pytest.raises(ValueError, match="bandwidth"):
        found.density([0.0], bandwidth=0.0)


def test_seeds_give_equal_spectra() -> None:
    matrix = symmetric(torch.linspace(0, 1, 12, dtype=F64))
    a, b = (
        lanczos_spectrum(apply(matrix), template(12), generator=generator(3), num_probes=2, num_steps=5) for _ in "ab"
    )
    assert a == b


def test_wrong_arguments_are_refused() -> None:
    v = template(8)
    with pytest.raises(ValueError, match="num_steps=0"):
        lanczos(lambda x: x, random_vector(v, generator()), 0)
    with pytest.raises(ValueError, match="norm 0"):
        lanczos(lambda x: x, v, 3)
    with pytest.raises(ValueError, match="not finite at step 0"):
        lanczos(lambda x: [a * math.nan for a in x], random_vector(v, generator()), 3)
    with pytest.raises(ValueError, match="num_pairs=5"):
        top_eigenpairs(lambda x: x, v, 5, generator=generator(), num_steps=4)
    with pytest.raises(ValueError, match="num_probes"):
        lanczos_spectrum(lambda x: x, v, generator=generator(), num_probes=0)
