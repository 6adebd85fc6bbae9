r"""Weight space as a vector space: vectors are lists of tensors, one per parameter tensor.

A *loss closure* ``loss()`` returns the scalar loss (nats) of the model at the current values of its parameters; nothing
else about the model is known here. It must be deterministic: a fixed batch set, dropout off. All lengths are Euclidean,
in units of ``w``. Sums over coordinates run in float64, so that a direction of a billion fp32 coordinates still has its
norm to seven digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
"""Returns the scalar loss at the current parameters, with a graph where gradients are enabled."""
Vector = list[Tensor]
"""One tensor per parameter tensor, in the order of the parameter list."""
Mover = Callable[..., None]
"""``move((t, direction), ...)`` puts the parameters at ``start + sum t * direction``."""


def check_params(params: Sequence[Tensor]) -> None:
    """Refuse a parameter list on which weight-space arithmetic would be wrong.

    Raises:
        ValueError: if the list is empty, or a tensor is not floating point, is not a leaf, or appears twice (a tied
            weight would be moved twice).
    """
    if not params:
        raise ValueError("the parameter list is empty; pass at least one tensor")
    if len({id(p) for p in params}) != len(params):
        raise ValueError("a parameter appears twice in the list; tied weights must be listed once")
    for index, p in enumerate(params):
        if not p.is_floating_point():
            raise ValueError(f"parameter {index} has dtype {p.dtype}; only floating point tensors can be moved")
        if not p.is_leaf:
            raise ValueError(f"parameter {index} is the result of a computation; pass the leaf tensor it came from")


def check_like(params: Sequence[Tensor], direction: Sequence[Tensor]) -> None:
    """Refuse a vector whose tensors do not have the shapes of ``params``, which would broadcast silently.

    Raises:
        ValueError: naming the tensor and both shapes.
    """
    if len(params) != len(direction):
        raise ValueError(f"a direction of {len(direction)} tensors does not fit {len(params)} parameters")
    for index, (p, d) in enumerate(zip(params, direction, strict=True)):
        if p.shape != d.shape:
            raise ValueError(f"tensor {index} of the direction has shape {tuple(d.shape)}, not {tuple(p.shape)}")


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    r"""Inner product :math:`\langle a, b\rangle = \sum_i \sum_j a_{ij} b_{ij}`, accumulated in float64.

    Args:
        a: vector; any floating dtype.
        b: vector of the same shapes.

    Returns:
        The inner product, in the product of the two units.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> dot([torch.ones(2), torch.ones(3)], [torch.ones(2), 2 * torch.ones(3)])
        8.0
    """
    check_like(a, b)
    parts = [(x.detach().double() * y.detach().double().to(x.device)).sum().cpu() for x, y in zip(a, b, strict=True)]
    return float(torch.stack(parts).sum()) if parts else 0.0


def norm(a: Sequence[Tensor]) -> float:
    r"""Euclidean norm :math:`\sqrt{\langle a, a\rangle}` in the units of ``a``.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        5.0
    """
    return math.sqrt(dot(a, a))


def combine(*terms: tuple[float, Sequence[Tensor]]) -> Vector:
    r"""Linear combination :math:`\sum_k c_k a_k` as a new vector.

    Args:
        terms: pairs ``(c, a)``; at least one.

    Returns:
        A new vector with the shapes and dtypes of the first term.

    Raises:
        ValueError: without terms, or if shapes differ.

    Example:
        >>> combine((2.0, [torch.tensor([1.0])]), (-1.0, [torch.tensor([0.5])]))
        [tensor([1.5000])]
    """
    if not terms:
        raise ValueError("combine needs at least one (coefficient, vector) pair")
    result = [terms[0][0] * part.detach() for part in terms[0][1]]
    for coefficient, vector in terms[1:]:
        check_like(result, vector)
        for total, part in zip(result, vector, strict=True):
            total.add_(part.detach().to(total), alpha=coefficient)
    return result


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> Vector:
    """``a - b`` as a new vector, e.g. the rounding error ``q - w`` or a training displacement."""
    return combine((1.0, a), (-1.0, b))


def normalized(a: Sequence[Tensor]) -> Vector:
    r"""Unit vector :math:`a / \|a\|`.

    Raises:
        ValueError: if the norm is zero or not finite, which no direction has.

    Example:
        >>> normalized([torch.tensor([3.0, 4.0])])
        [tensor([0.6000, 0.8000])]
    """
    length = norm(a)
    if not 0 < length < math.inf:
        raise ValueError(f"a vector of norm {length} has no direction; it must be finite and not zero")
    return combine((1 / length, a))


def restrict(a: Sequence[Tensor], indices: Sequence[int]) -> Vector:
    """The same vector with every tensor outside ``indices`` set to zero: the direction of one layer.

    Example:
        >>> restrict([torch.ones(1), torch.ones(1)], [1])
        [tensor([0.]), tensor([1.])]
    """
    keep = set(indices)
    if not keep <= set(range(len(a))):
        raise ValueError(f"indices {sorted(keep)} must lie in 0..{len(a) - 1}")
    return [x.detach().clone() if i in keep else torch.zeros_like(x) for i, x in enumerate(a)]


def copy_of(params: Sequence[Tensor]) -> Vector:
    """A detached copy of the parameters: a point of weight space."""
    return [p.detach().clone() for p in params]


@contextmanager
def moving(params: Sequence[Tensor]) -> Iterator[Mover]:
    r"""Let the parameters walk, and put them back **bit for bit**, whatever happens inside.

    Yields ``move``: ``move((t, d), (s, e))`` sets the parameters to :math:`w_0 + t d + s e`, always from the saved
    start, so rounding never builds up. The start is a copy (one weight-sized memory), not undone arithmetic: in
    floating point ``(w + d) - d`` is not ``w``.

    Args:
        params: leaf tensors, changed in place while inside.

    Raises:
        ValueError: from :func:`check_params`, or when a direction does not fit.

    Example:
        >>> w = torch.tensor([0.1], requires_grad=True)
        >>> with moving([w]) as move:
        ...     move((2.0, [torch.tensor([1.0])]))
        ...     print(round(w.item(), 6))
        2.1
        >>> w.item() == torch.tensor(0.1).item()
        True
    """
    check_params(params)
    start = copy_of(params)

    def move(*terms: tuple[float, Sequence[Tensor]]) -> None:
        for _, direction in terms:
            check_like(params, direction)
        with torch.no_grad():
            for index, (p, saved) in enumerate(zip(params, start, strict=True)):
                p.copy_(saved)
                for t, direction in terms:
                    p.add_(direction[index].detach().to(p), alpha=t)

    try:
        yield move
    finally:
        with torch.no_grad():
            for p, saved in zip(params, start, strict=True):
                p.copy_(saved)


@contextmanager
def perturbed(params: Sequence[Tensor], direction: Sequence[Tensor], t: float = 1.0) -> Iterator[None]:
    r"""Hold the parameters at :math:`w + t d` inside the block and restore them bit for bit after it.

    Args:
        params: leaf tensors.
        direction: :math:`d`, shapes of ``params``.
        t: step, dimensionless (the unit is that of ``d``).

    Example:
        >>> w = torch.zeros(1)
        >>> with perturbed([w], [torch.ones(1)], 0.5):
        ...     print(w.item())
        0.5
        >>> w.item()
        0.0
    """
    with moving(params) as move:
        move((t, direction))
        yield


@contextmanager
def placed(params: Sequence[Tensor], point: Sequence[Tensor]) -> Iterator[None]:
    """Hold the parameters exactly at ``point`` (no arithmetic) inside the block; restore them bit for bit after it."""
    with moving(params):
        check_like(params, point)
        with torch.no_grad():
            for p, value in zip(params, point, strict=True):
                p.copy_(value)
        yield


@contextmanager
def tracked(params: Sequence[Tensor]) -> Iterator[None]:
    """Switch gradients on, for frozen parameters too, and give every ``requires_grad`` flag back afterwards."""
    check_params(params)
    flags = [p.requires_grad for p in params]
    try:
        for p in params:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in zip(params, flags, strict=True):
            p.requires_grad_(flag)


def random_vector(template: Sequence[Tensor], generator: torch.Generator, *, law: str = "gaussian") -> Vector:
    r"""Independent coordinates of mean 0 and variance 1.

    Args:
        template: gives shapes, dtypes and devices; values are not read.
        generator: drawn from on its own device, so one seed gives one vector on every machine.
        law: ``gaussian`` (:math:`N(0, 1)`) or ``rademacher`` (:math:`\pm 1`, smaller variance in trace estimates).

    Raises:
        ValueError: for an unknown law.

    Example:
        >>> random_vector([torch.zeros(3)], torch.Generator().manual_seed(0), law="rademacher")[0].abs()
        tensor([1., 1., 1.])
    """
    draws = []
    for x in template:
        # Draw in fp32 or wider: a Gaussian drawn in bf16 has only 8 bits and a slightly wrong variance.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if law == "gaussian":
            value = torch.randn(x.shape, generator=generator, device=generator.device, dtype=dtype)
        elif law == "rademacher":
            bits = torch.randint(0, 2, x.shape, generator=generator, device=generator.device)
            value = bits.to(dtype).mul_(2).sub_(1)
        else:
            raise ValueError(f"law {law!r} is unknown; use 'gaussian' or 'rademacher'")
        draws.append(value.to(device=x.device, dtype=x.dtype))
    return draws


def random_like(reference: Sequence[Tensor], generator: torch.Generator) -> Vector:
    r"""Random direction whose per-tensor norms equal those of ``reference``.

    :math:`d_i = \|e_i\| \, g_i / \|g_i\|` with Gaussian :math:`g_i`. The null direction for a rounding error ``e``: it
    moves every tensor exactly as far, but knows nothing of the weights (``kappa_rand`` of arXiv:2606.09012's slices).

    Args:
        reference: the error direction; a zero tensor stays zero.
        generator: source of randomness.

    Returns:
        A vector with the shapes, dtypes and per-tensor norms of ``reference``.

    Example:
        >>> d = random_like([torch.tensor([3.0, 4.0]), torch.zeros(2)], torch.Generator().manual_seed(0))
        >>> round(norm(d[:1]), 5), norm(d[1:])
        (5.0, 0.0)

    Reference: arXiv:2606.09012.
    """
    draws = random_vector(reference, generator)
    return [g * (norm([e]) / max(norm([g]), 1e-300)) for g, e in zip(draws, reference, strict=True)]


def loss_value(loss: Loss) -> float:
    """The loss as a number, computed without a graph; nats."""
    with torch.no_grad():
        return float(loss())


def gradient(loss: Loss, params: Sequence[Tensor]) -> Vector:
    r"""Gradient direction :math:`\nabla L(w)` at the current parameters, nats per unit of ``w``.

    Parameters that the loss does not touch get zeros. Frozen parameters are tracked for the time of the call; the
    ``.grad`` fields stay as they were.

    Raises:
        ValueError: if the loss has no graph at all, e.g. because the closure runs under ``no_grad``.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> gradient(lambda: (w * w).sum(), [w])
        [tensor([2., 4.])]
    """
    with tracked(params):
        value = loss()
        if not value.requires_grad:
            raise ValueError("loss() has no graph: it must be computed from the parameters, outside torch.no_grad()")
        grads = torch.autograd.grad(value, list(params), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(params, grads, strict=True)]


def orthonormal(vectors: Sequence[Sequence[Tensor]], *, tol: float = 1e-6) -> list[Vector]:
    r"""Gram-Schmidt, applied twice so that fp32 vectors end up orthogonal to working precision.

    Args:
        vectors: at least one vector.
        tol: a vector that keeps less than this share of its norm is linearly dependent.

    Raises:
        ValueError: if a vector lies in the span of those before it.

    Example:
        >>> orthonormal([[torch.tensor([2.0, 0.0])], [torch.tensor([1.0, 1.0])]])
        [[tensor([1., 0.])], [tensor([0., 1.])]]
    """
    basis: list[Vector] = []
    for index, vector in enumerate(vectors):
        unit = normalized(vector)
        rest = remove_span(unit, basis)
        if norm(rest) < tol:
            raise ValueError(f"vector {index} lies in the span of the vectors before it; drop it")
        basis.append(normalized(remove_span(normalized(rest), basis)))
    return basis


def remove_span(vector: Sequence[Tensor], basis: Sequence[Sequence[Tensor]]) -> Vector:
    r"""Component orthogonal to an orthonormal basis, :math:`(I - U U^\top) v`.

    Example:
        >>> remove_span([torch.tensor([1.0, 2.0])], [[torch.tensor([1.0, 0.0])]])
        [tensor([0., 2.])]
    """
    return combine((1.0, vector), *((-dot(vector, unit), unit) for unit in basis))
