r"""Curvature without a Hessian: Hessian-vector products, the smoothed Hessian, the Hutchinson trace.

The Hessian :math:`H = \nabla^2 L(w)` (nats per squared unit of ``w``) is only ever applied to vectors. An *operator*
takes a vector and returns :math:`H v`; every routine here and in ``spectrum.py`` works on any operator, so a projected,
weighted or smoothed Hessian needs no code of its own. Reference: arXiv:2606.09012.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewbits.geometry._result import Result
from fewbits.geometry.directions import (
    Loss,
    Vector,
    check_like,
    combine,
    dot,
    gradient,
    moving,
    norm,
    normalized,
    random_vector,
    tracked,
)

Operator = Callable[[Vector], Vector]
"""A symmetric linear map on weight space, ``v -> H v``; shapes and dtypes of the parameters."""


def hvp(loss: Loss, params: Sequence[Tensor], vector: Sequence[Tensor]) -> Vector:
    r"""Exact Hessian-vector product by double backward, :math:`H v = \nabla_w \langle \nabla_w L, v \rangle`.

    Attention runs in its plain mathematical form inside, because the fused kernels have no second derivative. Where the
    loss is piecewise linear, or does not touch a parameter, the product is zero. A fake-quantized model is legal (its
    surrogate must be twice differentiable), but its second derivative is that of the surrogate; a question about the
    deployed loss at scale ``h`` is one for :func:`hvp_finite_difference` or :func:`smoothed_operator`.

    Args:
        loss: loss closure, nats; one forward and two backward passes.
        params: leaf tensors.
        vector: :math:`v`, shapes of ``params``.

    Returns:
        :math:`H v`, nats per unit of ``w`` for a ``v`` in units of ``w``.

    Raises:
        ValueError: if the loss has no graph, or the vector does not fit.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> hvp(lambda: (w**3).sum(), [w], [torch.tensor([1.0, 0.0])])
        [tensor([6., 0.])]

    Reference: Pearlmutter's trick; arXiv:2606.09012.
    """
    return gradient_and_products(loss, params, [vector])[1][0]


def gradient_and_products(
    loss: Loss, params: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]]
) -> tuple[Vector, list[Vector]]:
    r"""The gradient and :math:`H v` for several vectors, from one forward pass and one backward pass; see :func:`hvp`.

    Args:
        loss: loss closure, nats.
        params: leaf tensors.
        vectors: at least one, each of the shapes of ``params``; one more backward pass for each.

    Returns:
        ``(gradient, [H v, ...])``, detached, zeros for parameters that the loss does not touch.

    Raises:
        ValueError: if the loss has no graph, or a vector does not fit.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> gradient_and_products(lambda: (w**3).sum(), [w], [[torch.tensor([1.0, 0.0])]])
        ([tensor([ 3., 12.])], [[tensor([6., 0.])]])
    """
    leaves = list(params)
    for vector in vectors:
        check_like(leaves, vector)
    products: list[Vector] = []
    with tracked(leaves), sdpa_kernel(SDPBackend.MATH):
        value = loss()
        if not value.requires_grad:
            raise ValueError("loss() has no graph: it must be computed from the parameters, outside torch.no_grad()")
        grads = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        for index, vector in enumerate(vectors):
            inner = [(g * v.detach().to(g)).sum() for g, v in zip(grads, vector, strict=True) if g is not None]
            inner = [part for part in inner if part.requires_grad]
            if not inner:
                products.append([torch.zeros_like(p) for p in leaves])
                continue
            # Summed as Python objects, so that parameters on several devices work.
            total = sum((part.to(inner[0].device) for part in inner[1:]), start=inner[0])
            last = index == len(vectors) - 1
            second = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=not last)
            products.append(_filled(second, leaves))
    return _filled(grads, leaves), products


def _filled(found: Sequence[Tensor | None], params: Sequence[Tensor]) -> Vector:
    return [torch.zeros_like(p) if x is None else x.detach() for x, p in zip(found, params, strict=True)]


def hvp_finite_difference(
    loss: Loss, params: Sequence[Tensor], vector: Sequence[Tensor], *, step: float | None = None
) -> Vector:
    r"""Hessian-vector product by a central difference of gradients.

    .. math:: H v \approx \frac{\nabla L(w + h \hat v) - \nabla L(w - h \hat v)}{2 h} \|v\|,
              \qquad \hat v = v / \|v\|, \qquad \text{error } O(h^2) + O(\epsilon / h).

    The slow twin of :func:`hvp`, and the only one that sees the curvature of a *hard* quantizer or of any loss whose
    second derivative is zero almost everywhere: there ``step`` must span several grid steps.

    Args:
        loss: loss closure, nats; two forward and backward passes.
        params: leaf tensors; restored bit for bit.
        vector: :math:`v`; a zero vector gives zeros.
        step: :math:`h`, a length in units of ``w``; default: cube root of the machine precision times the larger of
            the norm of ``w`` and 1, which balances the two errors for losses of order 1.

    Raises:
        ValueError: for a step that is not positive.

    Example:
        >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> [round(x, 6) for x in hvp_finite_difference(lambda: (w**3).sum(), [w], [w * 0 + 1])[0].tolist()]
        [6.0, 12.0]
    """
    length = norm(vector)
    if length == 0:
        return [torch.zeros_like(p) for p in params]
    if step is None:
        step = max(torch.finfo(p.dtype).eps for p in params) ** (1 / 3) * max(norm(params), 1.0)
    if not step > 0:
        raise ValueError(f"step={step} must be positive; it is the length of the move in units of w")
    unit = normalized(vector)
    with moving(params) as move:
        move((step, unit))
        ahead = gradient(loss, params)
        move((-step, unit))
        behind = gradient(loss, params)
    factor = length / (2 * step)
    return combine((factor, ahead), (-factor, behind))


def hessian_operator(
    loss: Loss, params: Sequence[Tensor], *, method: str = "autograd", step: float | None = None
) -> Operator:
    """The Hessian at the current parameters as an operator.

    Args:
        loss: loss closure, nats.
        params: leaf tensors; the operator reads them each time it is applied.
        method: ``autograd`` (:func:`hvp`) or ``finite_difference`` (:func:`hvp_finite_difference`).
        step: for the finite difference only, units of ``w``.

    Raises:
        ValueError: for an unknown method, or a ``step`` that the method would ignore.

    Example:
        >>> w = torch.zeros(2)
        >>> hessian_operator(lambda: (w * w).sum(), [w])([torch.tensor([1.0, 0.0])])
        [tensor([2., 0.])]
    """
    if method == "autograd":
        if step is not None:
            raise ValueError(f"step={step} has no meaning for method='autograd'; leave it out")
        return lambda v: hvp(loss, params, v)
    if method == "finite_difference":
        return lambda v: hvp_finite_difference(loss, params, v, step=step)
    raise ValueError(f"method {method!r} is unknown; use 'autograd' or 'finite_difference'")


def smoothing_deltas(
    error: Sequence[Tensor], num_deltas: int, generator: torch.Generator, *, antithetic: bool = True
) -> list[Vector]:
    r"""Fixed Gaussian displacements of the size of a rounding error, for :func:`smoothed_operator`.

    Coordinates of tensor ``i`` are :math:`N(0, \|e_i\|^2 / n_i)`, so :math:`E\|\delta_i\|^2 = \|e_i\|^2`: the smoothing
    scale *per coordinate*, the one that appears in closed forms, is :math:`s = \|e\| / \sqrt n`, not the norm.

    Args:
        error: rounding error ``q - w``; sets the size tensor by tensor.
        num_deltas: 4 to 8 in practice; even if ``antithetic``.
        generator: source of randomness.
        antithetic: return pairs :math:`\pm\delta`, which cancels the third derivative of the loss.

    Raises:
        ValueError: if ``num_deltas`` is not positive, or odd with ``antithetic``.

    Example:
        >>> up, down = smoothing_deltas([torch.ones(3)], 2, torch.Generator().manual_seed(0))
        >>> torch.equal(up[0], -down[0])
        True
    """
    if num_deltas < 1 or (antithetic and num_deltas % 2):
        raise ValueError(f"num_deltas={num_deltas} must be positive, and even when antithetic; use e.g. 8")
    sizes = [norm([e]) / math.sqrt(max(e.numel(), 1)) for e in error]
    deltas: list[Vector] = []
    for _ in range(num_deltas // 2 if antithetic else num_deltas):
        delta = [s * g for s, g in zip(sizes, random_vector(error, generator), strict=True)]
        deltas.append(delta)
        if antithetic:
            deltas.append([-d for d in delta])
    return deltas


def smoothed_operator(
    loss: Loss, params: Sequence[Tensor], deltas: Sequence[Sequence[Tensor]], *, method: str = "autograd"
) -> Operator:
    r"""Hessian averaged over fixed displacements, :math:`H_s v = \frac1m \sum_i \nabla^2 L(w + \delta_i)\, v`.

    This is the Hessian of the loss blurred at the quantization scale: it sees a wall that stands one rounding error
    away, where the Hessian at ``w`` sees a flat floor. With fixed :math:`\delta_i` it is one fixed symmetric matrix, as
    Lanczos needs. As the displacements shrink to 0 it becomes the plain Hessian.

    Args:
        loss: loss closure, nats; ``m`` products per application.
        params: leaf tensors; restored bit for bit.
        deltas: displacements, e.g. from :func:`smoothing_deltas`.
        method: as in :func:`hessian_operator`.

    Raises:
        ValueError: without displacements.

    Example:
        >>> w = torch.zeros(1)
        >>> wall = lambda: torch.relu(w.abs() - 0.5).square().sum()
        >>> e = [torch.ones(1)]
        >>> hvp(wall, [w], e), smoothed_operator(wall, [w], [[torch.ones(1)], [torch.zeros(1)]])(e)
        ([tensor([0.])], [tensor([1.])])

    Reference: arXiv:2606.09012 (the flat-band example, in which the raw Hessian orders the directions wrongly).
    """
    if not deltas:
        raise ValueError("deltas is empty; pass at least one displacement (a zero one gives the plain Hessian)")
    hessian = hessian_operator(loss, params, method=method)

    def apply(vector: Vector) -> Vector:
        total: Vector | None = None
        with moving(params) as move:
            for delta in deltas:
                move((1.0, delta))
                part = hessian(vector)
                total = part if total is None else combine((1.0, total), (1.0, part))
        assert total is not None
        return combine((1 / len(deltas), total))

    return apply


@dataclass(frozen=True, kw_only=True)
class TraceEstimate(Result):
    r"""Hutchinson estimates for a symmetric operator ``A`` (``H``, or ``S H S`` with weights ``S``).

    ``trace`` estimates :math:`\mathrm{tr} A` with standard error ``standard_error``; ``square_trace`` estimates
    :math:`\mathrm{tr} A^2 = \sum \lambda^2`; ``diagonal_square`` estimates :math:`\sum_j A_{jj}^2`, clipped to the
    range ``[trace**2 / dim, square_trace]`` in which it must lie.
    """

    trace: float
    standard_error: float
    square_trace: float
    diagonal_square: float
    dim: int
    num_samples: int
    _derived: ClassVar[tuple[str, ...]] = ("mean_curvature",)

    @property
    def mean_curvature(self) -> float:
        """Average eigenvalue, ``trace / dim``."""
        return self.trace / self.dim


def hutchinson(
    operator: Operator,
    template: Sequence[Tensor],
    *,
    num_samples: int,
    generator: torch.Generator,
    law: str = "rademacher",
    weights: Sequence[Tensor] | None = None,
) -> TraceEstimate:
    r"""Trace, squared trace and squared diagonal of :math:`A = S H S` from products with random vectors.

    With independent coordinates of mean 0 and variance 1 in ``v``,

    .. math:: E\, v^\top A v = \mathrm{tr} A, \qquad E \|A v\|^2 = \mathrm{tr} A^2, \qquad
              E\, v \odot A v = \mathrm{diag} A.

    The squared diagonal uses products of *different* samples only, so it carries no noise bias. For a diagonal ``A``
    and Rademacher vectors the trace is exact after one sample. With ``weights`` = pitch per coordinate, ``trace`` is
    :math:`\sum_j h_{jj} \Delta_j^2`, the groupwise form of the rounding energy.

    Args:
        operator: ``v -> H v``.
        template: gives shapes, dtypes and devices.
        num_samples: number of products, at least 2.
        generator: source of randomness.
        law: ``rademacher`` or ``gaussian``.
        weights: diagonal of ``S``, shapes broadcastable to ``template``; none is the identity.

    Raises:
        ValueError: for fewer than two samples (no standard error exists).

    Example:
        >>> double = lambda v: [2 * x for x in v]
        >>> found = hutchinson(double, [torch.zeros(8)], num_samples=2, generator=torch.Generator().manual_seed(0))
        >>> found.trace, found.standard_error, found.square_trace, found.diagonal_square
        (16.0, 0.0, 32.0, 32.0)

    Reference: Hutchinson's estimator; used on arXiv:2606.09012's critical pitch.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples={num_samples} gives no standard error; use at least 2")
    dim = sum(x.numel() for x in template)
    traces, squares, own = [], [], 0.0
    diagonal_sum: Vector = [torch.zeros_like(x) for x in template]
    for _ in range(num_samples):
        v = random_vector(template, generator, law=law)
        image = operator(_weighted(v, weights))
        image = _weighted(image, weights)
        product = [a * b for a, b in zip(v, image, strict=True)]
        traces.append(dot(v, image))
        squares.append(dot(image, image))
        own += dot(product, product)
        for total, part in zip(diagonal_sum, product, strict=True):
            total.add_(part)
    trace = sum(traces) / num_samples
    variance = sum((t - trace) ** 2 for t in traces) / (num_samples - 1)
    square_trace = sum(squares) / num_samples
    diagonal = (dot(diagonal_sum, diagonal_sum) - own) / (num_samples * (num_samples - 1))
    return TraceEstimate(
        trace=trace,
        standard_error=math.sqrt(variance / num_samples),
        square_trace=square_trace,
        diagonal_square=min(max(diagonal, trace * trace / dim), square_trace),
        dim=dim,
        num_samples=num_samples,
    )


def _weighted(vector: Vector, weights: Sequence[Tensor] | None) -> Vector:
    if weights is None:
        return vector
    return [v * s.to(v) for v, s in zip(vector, weights, strict=True)]
