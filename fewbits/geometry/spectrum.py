r"""Eigenvalues of an operator that can only be applied: Lanczos, leading eigenpairs, stochastic Lanczos quadrature.

Lanczos builds an orthonormal basis :math:`Q` of the Krylov space and a tridiagonal :math:`T = Q^\top A Q`, whose
eigenvalues (Ritz values) approach the ends of the spectrum first. Without reorthogonalisation rounding errors bring
back directions already found ("ghosts"), so every new vector is orthogonalised against all earlier ones, twice.
Memory: ``num_steps`` weight-sized vectors. Reference: arXiv:2606.09012; spectra as in WinQ, arXiv:2605.17471.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.geometry._result import HIDDEN, Result
from fewbits.geometry.curvature import Operator
from fewbits.geometry.directions import Vector, random_vector


def flatten(vector: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """All coordinates in one 1-D tensor, on the device of the first tensor.

    Example:
        >>> flatten([torch.ones(1, 2), torch.zeros(1)])
        tensor([1., 1., 0.])
    """
    device = vector[0].device
    return torch.cat([x.detach().to(device=device, dtype=dtype or x.dtype).reshape(-1) for x in vector])


def unflatten(flat: Tensor, template: Sequence[Tensor]) -> Vector:
    """Inverse of :func:`flatten`; shapes, dtypes and devices of ``template``."""
    pieces = flat.split([x.numel() for x in template])
    return [p.reshape(x.shape).to(device=x.device, dtype=x.dtype) for p, x in zip(pieces, template, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Tridiagonal(Result):
    r"""Outcome of ``m`` Lanczos steps: diagonal (m), off-diagonal (m - 1), basis ``(m, n)`` and the last residual.

    ``residual`` is :math:`\beta_m`: a Ritz vector :math:`Q s` has :math:`\|A Q s - \theta Q s\| = \beta_m |s_m|`.
    It is 0 if the Krylov space closed, and then every Ritz value is an eigenvalue.
    """

    diagonal: tuple[float, ...]
    off_diagonal: tuple[float, ...]
    residual: float
    basis: Tensor = field(repr=False, metadata=HIDDEN)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values ``(m,)`` in ascending order and eigenvectors of ``T`` ``(m, m)`` in columns, float64."""
        matrix = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64))
        if self.off_diagonal:
            off = torch.tensor(self.off_diagonal, dtype=torch.float64)
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors


def lanczos(
    operator: Operator,
    start: Sequence[Tensor],
    num_steps: int,
    *,
    dtype: torch.dtype | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tridiagonal:
    r"""Lanczos with full reorthogonalisation.

    .. math:: \beta_j q_{j+1} = A q_j - \alpha_j q_j - \beta_{j-1} q_{j-1}, \qquad \alpha_j = q_j^\top A q_j.

    Args:
        operator: symmetric ``v -> A v``.
        start: first direction, not zero; need not be normalized.
        num_steps: :math:`m \ge 1`; cut at the dimension, and where the Krylov space closes.
        dtype: of the basis; default fp32, or fp64 for fp64 parameters. The recurrence is as exact as the operator.
        on_step: called with the number of finished steps, to show progress.

    Returns:
        The tridiagonal matrix and the basis.

    Raises:
        ValueError: for ``num_steps < 1``, a zero start or an operator that returns numbers that are not finite.

    Example:
        >>> scale = torch.tensor([1.0, 2.0, 5.0])
        >>> found = lanczos(lambda v: [scale * v[0]], [torch.ones(3)], 3)
        >>> [round(x, 4) for x in found.ritz()[0].tolist()]
        [1.0, 2.0, 5.0]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    if dtype is None:
        dtype = torch.float64 if all(x.dtype == torch.float64 for x in start) else torch.float32
    q = flatten(start, dtype)
    length = torch.linalg.vector_norm(q)
    if not (torch.isfinite(length) and length > 0):
        raise ValueError(f"the start vector has norm {float(length)}; it must be finite and not zero")
    q = q / length
    num_steps = min(num_steps, q.numel())
    basis = q.new_zeros(num_steps, q.numel())
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    residual = 0.0
    for step in range(num_steps):
        basis[step] = q
        image = flatten(operator(unflatten(q, start)), dtype)
        alpha = float(q @ image)
        if not math.isfinite(alpha):
            raise ValueError(f"the operator returned numbers that are not finite at step {step}")
        diagonal.append(alpha)
        used = basis[: step + 1]
        for _ in range(2):
            image = image - used.T @ (used @ image)
        residual = float(torch.linalg.vector_norm(image))
        size = max(map(abs, diagonal + off_diagonal))
        if on_step is not None:
            on_step(step + 1)
        # What is left is rounding noise of A q: the Krylov space is closed, its Ritz values are exact.
        if residual <= 8 * torch.finfo(dtype).eps * size or step + 1 == q.numel():
            residual = 0.0
            break
        if step + 1 < num_steps:
            off_diagonal.append(residual)
            q = image / residual
    steps = len(diagonal)
    return Tridiagonal(
        diagonal=tuple(diagonal), off_diagonal=tuple(off_diagonal), residual=residual, basis=basis[:steps]
    )


@dataclass(frozen=True, kw_only=True)
class EigenPairs(Result):
    """Eigenvalues (largest first), their residual norms, and unit eigenvectors shaped as the parameters."""

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    num_steps: int
    vectors: list[Vector] = field(repr=False, metadata=HIDDEN)


def top_eigenpairs(
    operator: Operator,
    template: Sequence[Tensor],
    num_pairs: int,
    *,
    generator: torch.Generator,
    num_steps: int | None = None,
    by_magnitude: bool = False,
    dtype: torch.dtype | None = None,
) -> EigenPairs:
    r"""Leading eigenpairs from one Lanczos run with a random start.

    A repeated eigenvalue is found once: one start vector holds one direction of its eigenspace.

    Args:
        operator: symmetric ``v -> A v``.
        template: gives shapes, dtypes and devices.
        num_pairs: how many; at most ``num_steps``.
        generator: draws the start vector.
        num_steps: default ``max(4 * num_pairs, num_pairs + 40)``; look at ``residuals`` to see whether it was enough.
        by_magnitude: order by absolute value instead of by value.
        dtype: as in :func:`lanczos`.

    Returns:
        Up to ``num_pairs`` pairs (fewer if the Krylov space closes earlier); ``residuals`` are
        :math:`\|A v - \theta v\|`, an upper bound on the distance of each value to an eigenvalue.

    Raises:
        ValueError: for ``num_pairs < 1`` or more pairs than steps.

    Example:
        >>> scale = torch.arange(1.0, 9.0)
        >>> found = top_eigenpairs(lambda v: [scale * v[0]], [scale], 2, generator=torch.Generator().manual_seed(0))
        >>> [round(x, 3) for x in found.values]
        [8.0, 7.0]

    Reference: arXiv:2606.09012.
    """
    if num_steps is None:
        num_steps = max(4 * num_pairs, num_pairs + 40)
    if not 1 <= num_pairs <= num_steps:
        raise ValueError(f"num_pairs={num_pairs} must lie in 1..num_steps={num_steps}")
    found = lanczos(operator, random_vector(template, generator), num_steps, dtype=dtype)
    values, vectors = found.ritz()
    order = (values.abs() if by_magnitude else values).argsort(descending=True)[:num_pairs]
    chosen = vectors[:, order]
    pairs = (chosen.T.to(found.basis)) @ found.basis
    return EigenPairs(
        values=tuple(values[order].tolist()),
        residuals=tuple((found.residual * chosen[-1].abs()).tolist()),
        num_steps=len(found.diagonal),
        vectors=[unflatten(row, template) for row in pairs],
    )


@dataclass(frozen=True, kw_only=True)
class Spectrum(Result):
    r"""Spectral measure from ``num_probes`` Gauss quadratures: per probe, nodes (Ritz values) and weights summing to 1.

    Averages over probes estimate :math:`\frac1n \sum_i f(\lambda_i)`. With ``m`` steps the moments up to
    :math:`2m - 1` of each probe are exact.
    """

    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    dim: int
    _derived: ClassVar[tuple[str, ...]] = ("largest", "smallest", "max_abs")

    def _flat(self) -> tuple[Tensor, Tensor]:
        nodes = torch.tensor([x for row in self.nodes for x in row], dtype=torch.float64)
        weights = torch.tensor([x for row in self.weights for x in row], dtype=torch.float64) / len(self.nodes)
        return nodes, weights

    @property
    def largest(self) -> float:
        """Largest Ritz value seen; a lower bound on the largest eigenvalue."""
        return max(map(max, self.nodes))

    @property
    def smallest(self) -> float:
        """Smallest Ritz value seen; an upper bound on the smallest eigenvalue."""
        return min(map(min, self.nodes))

    @property
    def max_abs(self) -> float:
        """Largest absolute Ritz value, the number that WinQ tabulates."""
        return max(abs(self.largest), abs(self.smallest))

    def moment(self, order: int) -> float:
        r"""Estimate of :math:`\frac1n \sum_i \lambda_i^{order}`; ``dim * moment(1)`` is the Hutchinson trace."""
        nodes, weights = self._flat()
        return float((weights * nodes**order).sum())

    def mass(self, low: float, high: float) -> float:
        """Share of the eigenvalues in the closed interval ``[low, high]``, in ``[0, 1]``."""
        nodes, weights = self._flat()
        return float(weights[(nodes >= low) & (nodes <= high)].sum())

    def zero_share(self, threshold: float = 1e-3) -> float:
        """Share of the eigenvalues that count as zero, ``|lambda| < threshold`` (WinQ: 1e-3), in ``[0, 1]``."""
        nodes, weights = self._flat()
        return float(weights[nodes.abs() < threshold].sum())

    def density(self, xs: Sequence[float], *, bandwidth: float | None = None) -> tuple[float, ...]:
        r"""Smooth density :math:`\sum_k w_k N(x; \lambda_k, \sigma^2)` for drawing; integrates to 1.

        Args:
            xs: eigenvalues at which to evaluate.
            bandwidth: :math:`\sigma`, units of the eigenvalues; default: a hundredth of the spread of the nodes.

        Raises:
            ValueError: for a bandwidth that is not positive.
        """
        if bandwidth is None:
            bandwidth = (self.largest - self.smallest) / 100 or max(self.max_abs, 1.0) / 100
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth} must be positive, in units of the eigenvalues")
        nodes, weights = self._flat()
        z = (torch.tensor(list(xs), dtype=torch.float64)[:, None] - nodes) / bandwidth
        kernel = torch.exp(-z.square() / 2) / (bandwidth * math.sqrt(2 * math.pi))
        return tuple((kernel @ weights).tolist())


def lanczos_spectrum(
    operator: Operator,
    template: Sequence[Tensor],
    *,
    generator: torch.Generator,
    num_probes: int = 200,
    num_steps: int = 100,
    law: str = "rademacher",
    dtype: torch.dtype | None = None,
    on_probe: Callable[[int], None] | None = None,
) -> Spectrum:
    r"""Stochastic Lanczos quadrature of the whole spectrum; defaults as in WinQ (200 Rademacher vectors, 100 steps).

    For a probe ``v`` with unit-variance coordinates,
    :math:`v^\top f(A) v / \|v\|^2 \approx \sum_k \tau_k^2 f(\theta_k)` with Ritz values :math:`\theta_k` and
    :math:`\tau_k` the first components of the eigenvectors of ``T``; its mean over probes is
    :math:`\mathrm{tr} f(A) / n`.

    Args:
        operator: symmetric ``v -> A v``.
        template: gives shapes, dtypes and devices.
        generator: draws the probes.
        num_probes: number of Lanczos runs, at least 1.
        num_steps: products per run.
        law: ``rademacher`` or ``gaussian``.
        dtype: as in :func:`lanczos`.
        on_probe: called with the number of finished probes, to show progress.

    Returns:
        Nodes and weights; at fewer steps than distinct eigenvalues the interior of the spectrum is blurred.

    Raises:
        ValueError: for ``num_probes < 1``.

    Example:
        >>> scale = torch.tensor([0.0, 0.0, 0.0, 4.0])
        >>> found = lanczos_spectrum(lambda v: [scale * v[0]], [scale], generator=torch.Generator().manual_seed(0),
        ...                          num_probes=2, num_steps=4)
        >>> round(found.zero_share(), 6), round(found.moment(1), 6), round(found.largest, 6)
        (0.75, 1.0, 4.0)

    Reference: WinQ, arXiv:2605.17471; arXiv:2606.09012.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes={num_probes} must be at least 1")
    nodes, weights = [], []
    for probe in range(num_probes):
        run = lanczos(operator, random_vector(template, generator, law=law), num_steps, dtype=dtype)
        values, vectors = run.ritz()
        nodes.append(tuple(values.tolist()))
        weights.append(tuple(vectors[0].square().tolist()))
        if on_probe is not None:
            on_probe(probe + 1)
    return Spectrum(nodes=tuple(nodes), weights=tuple(weights), dim=sum(x.numel() for x in template))
