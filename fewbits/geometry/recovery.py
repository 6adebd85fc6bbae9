r"""Did training bring the rounded model back? Recovery time, half-times, displacements, and the river/normal split.

Reference: arXiv:2606.09012. Its predictions: the loss of the *deployed* (rounded) weights recovers before the loss of
the latent ones; PTQ and QAT displacements stand at 92 to 95 degrees. In ``n`` dimensions two random directions do that
too, so an angle is read beside its null spread of ``57.3 / sqrt(n)`` degrees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fewbits.geometry._result import HIDDEN, Result
from fewbits.geometry.curvature import Operator
from fewbits.geometry.directions import Vector, combine, dot, norm, normalized, orthonormal, remove_span


def recovery_time(steps: Sequence[int], deployed: Sequence[float], *, reference: float, tol: float) -> int | None:
    r"""First entry :math:`T_{rec} = \min\{k : L(Q(w_k)) - L(w_{fp}) \le 2\,\mathrm{tol}\}`.

    Args:
        steps: step numbers, ascending.
        deployed: loss of the rounded weights at those steps, nats.
        reference: :math:`L(w_{fp})`, nats.
        tol: band of the basin, nats; twice, because rounded and reference points may sit at its two ends.

    Returns:
        A step number, or ``None`` if it never happened. Says nothing of later steps.

    Raises:
        ValueError: for a negative ``tol`` or curves of different length.

    Example:
        >>> recovery_time([0, 10, 20], [3.0, 1.0, 0.5], reference=0.4, tol=0.05)
        20

    Reference: arXiv:2606.09012.
    """
    _check_curve(steps, deployed)
    if not tol >= 0:
        raise ValueError(f"tol={tol} nats must not be negative")
    return next((k for k, value in zip(steps, deployed, strict=True) if value - reference <= 2 * tol), None)


def half_time(steps: Sequence[int], losses: Sequence[float]) -> float | None:
    r"""Step at which half of the drop from the first loss to the lowest one is done, linear between records.

    Args:
        steps: step numbers, ascending.
        losses: losses at those steps, nats.

    Returns:
        A step (fractional), or ``None`` for a curve that never falls below its first value.

    Raises:
        ValueError: for curves of different length, empty curves or steps that do not ascend.

    Example:
        >>> half_time([0, 10, 20], [4.0, 3.0, 1.0])
        12.5

    Reference: arXiv:2606.09012 (deployed before latent).
    """
    _check_curve(steps, losses)
    first, best = losses[0], min(losses)
    if not best < first:
        return None
    target = (first + best) / 2
    for index in range(1, len(losses)):
        before, after = losses[index - 1], losses[index]
        if after <= target:
            share = (before - target) / (before - after)
            return steps[index - 1] + share * (steps[index] - steps[index - 1])
    return None


def _check_curve(steps: Sequence[int], losses: Sequence[float]) -> None:
    if not steps or len(steps) != len(losses):
        raise ValueError(f"{len(steps)} steps and {len(losses)} losses must be equally many, at least one")
    if any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError("steps must ascend strictly")


@dataclass(frozen=True, kw_only=True)
class RecoveryReport(Result):
    """Recovery of one run; steps, nats. ``deployed_first`` is prediction 2, ``None`` where a curve never falls."""

    recovery_step: int | None
    deployed_half_time: float | None
    latent_half_time: float | None
    deployed_first: bool | None
    best_step: int
    best_deployed: float
    last_deployed: float


def recovery_report(
    steps: Sequence[int], deployed: Sequence[float], latent: Sequence[float], *, reference: float, tol: float
) -> RecoveryReport:
    """Recovery time and half-times of both curves; the best deployed iterate beside the last, which is often worse.

    Args:
        steps: step numbers, ascending.
        deployed: loss of the rounded weights, nats.
        latent: loss of the latent weights, nats.
        reference: loss of the full-precision model, nats.
        tol: band of the basin, nats.

    Raises:
        ValueError: from :func:`recovery_time` and :func:`half_time`.

    Example:
        >>> found = recovery_report([0, 1, 2], [2.0, 0.4, 0.5], [1.0, 0.9, 0.2], reference=0.3, tol=0.1)
        >>> found.recovery_step, found.deployed_first, found.best_step
        (1, True, 1)

    Reference: arXiv:2606.09012.
    """
    deployed_half, latent_half = half_time(steps, deployed), half_time(steps, latent)
    best = min(range(len(deployed)), key=deployed.__getitem__)
    return RecoveryReport(
        recovery_step=recovery_time(steps, deployed, reference=reference, tol=tol),
        deployed_half_time=deployed_half,
        latent_half_time=latent_half,
        deployed_first=None if deployed_half is None or latent_half is None else deployed_half < latent_half,
        best_step=steps[best],
        best_deployed=deployed[best],
        last_deployed=deployed[-1],
    )


@dataclass(frozen=True, kw_only=True)
class Displacements(Result):
    """Two displacements from one start; degrees, units of ``w``. ``null_sd_deg`` is the spread of random angles."""

    angle_deg: float
    null_sd_deg: float
    norm_a: float
    norm_b: float
    norm_ratio: float


def compare_displacements(a: Sequence[Tensor], b: Sequence[Tensor]) -> Displacements:
    r"""Angle :math:`\arccos \frac{\langle a, b\rangle}{\|a\|\|b\|}` and norm ratio :math:`\|a\| / \|b\|`.

    Args:
        a: e.g. the PTQ displacement ``q_ptq - w_fp``.
        b: e.g. the QAT displacement ``w_qat - w_fp`` or ``q_qat - w_fp``.

    Raises:
        ValueError: if one of them is zero.

    Example:
        >>> import torch
        >>> found = compare_displacements([torch.tensor([2.0, 0.0])], [torch.tensor([0.0, 1.0])])
        >>> found.angle_deg, found.norm_ratio
        (90.0, 2.0)

    Reference: arXiv:2606.09012.
    """
    norm_a, norm_b = norm(a), norm(b)
    if norm_a == 0 or norm_b == 0:
        raise ValueError(f"displacements of norms {norm_a} and {norm_b} have no angle; both must be nonzero")
    cosine = min(1.0, max(-1.0, dot(a, b) / (norm_a * norm_b)))
    return Displacements(
        angle_deg=math.degrees(math.acos(cosine)),
        null_sd_deg=math.degrees(1 / math.sqrt(sum(x.numel() for x in a))),
        norm_a=norm_a,
        norm_b=norm_b,
        norm_ratio=norm_a / norm_b,
    )


def flip_rate(codes_before: Sequence[Tensor], codes_after: Sequence[Tensor]) -> float:
    """Share of the integer codes that changed, in ``[0, 1]``.

    Example:
        >>> import torch
        >>> flip_rate([torch.tensor([0, 1, 1, -1])], [torch.tensor([0, 1, 0, -1])])
        0.25
    """
    total = sum(c.numel() for c in codes_before)
    if total == 0:
        raise ValueError("there are no codes to compare")
    changed = sum(int((a != b.to(a.device)).sum()) for a, b in zip(codes_before, codes_after, strict=True))
    return changed / total


@dataclass(frozen=True, kw_only=True)
class Split(Result):
    """A displacement along the river and across it; ``river_share`` is the squared-norm share along, in ``[0, 1]``."""

    river: Vector = field(repr=False, metadata=HIDDEN)
    normal: Vector = field(repr=False, metadata=HIDDEN)
    river_norm: float
    normal_norm: float
    river_share: float


def split_displacement(displacement: Sequence[Tensor], tangents: Sequence[Sequence[Tensor]]) -> Split:
    r"""Split into the span of the tangents and the rest, :math:`\delta = T T^\top \delta + (I - T T^\top)\delta`.

    Args:
        displacement: :math:`\delta`, e.g. a rounding error.
        tangents: one or more river directions, any norms, linearly independent: the displacement of full-precision
            training over its last few percent of steps, FP to QAT (the paper's choice), or :func:`river_direction`.
            Not the bottom eigenspace of the Hessian at ``w_fp``: in the paper's own example that is the normal.

    Raises:
        ValueError: for tangents that are zero or linearly dependent.

    Example:
        >>> import torch
        >>> found = split_displacement([torch.tensor([3.0, 4.0])], [[torch.tensor([2.0, 0.0])]])
        >>> found.river_norm, found.normal_norm, round(found.river_share, 2)
        (3.0, 4.0, 0.36)

    Reference: arXiv:2606.09012.
    """
    normal = remove_span(displacement, orthonormal(tangents))
    river = combine((1.0, displacement), (-1.0, normal))
    along, across = norm(river), norm(normal)
    total = along**2 + across**2
    return Split(
        river=river,
        normal=normal,
        river_norm=along,
        normal_norm=across,
        river_share=along**2 / total if total > 0 else 0.0,
    )


@dataclass(frozen=True, kw_only=True)
class RiverDirection(Result):
    r"""Unit tangent candidate, its smoothed curvature :math:`t^\top H_s t`, and whether that is small enough."""

    tangent: Vector = field(repr=False, metadata=HIDDEN)
    curvature: float
    largest_eigenvalue: float
    gradient_share: float
    accepted: bool


def river_direction(
    grad: Sequence[Tensor],
    normals: Sequence[Sequence[Tensor]],
    operator: Operator,
    *,
    largest_eigenvalue: float,
    max_ratio: float = 1e-2,
) -> RiverDirection:
    r"""River tangent as the gradient without its normal part, :math:`t \propto (I - U U^\top) \nabla L(w)`.

    Args:
        grad: gradient at ``w``.
        normals: orthonormal leading eigenvectors ``U`` of the *smoothed* Hessian.
        operator: the smoothed Hessian :math:`H_s`.
        largest_eigenvalue: its :math:`\lambda_{max} > 0`.
        max_ratio: accept if :math:`t^\top H_s t < \text{max\_ratio} \cdot \lambda_{max}`.

    Returns:
        The unit tangent with its verdict; ``gradient_share`` is the part of the gradient's norm it keeps.

    Raises:
        ValueError: if the gradient lies in the normal space, or the largest eigenvalue is not positive.

    Example:
        >>> import torch
        >>> curvature = torch.tensor([10.0, 0.05])
        >>> found = river_direction([torch.tensor([1.0, 1.0])], [[torch.tensor([1.0, 0.0])]],
        ...                         lambda v: [curvature * v[0]], largest_eigenvalue=10.0)
        >>> found.tangent, found.accepted
        ([tensor([0., 1.])], True)

    Reference: arXiv:2606.09012; the smoothing and the acceptance rule are this project's.
    """
    if not largest_eigenvalue > 0:
        raise ValueError(f"largest_eigenvalue={largest_eigenvalue} must be positive")
    rest = remove_span(grad, normals)
    kept, size = norm(rest), norm(grad)
    if not kept > 1e-12 * size:
        raise ValueError("the gradient lies in the span of the normals; there is no tangent left in it")
    tangent = normalized(rest)
    curvature = dot(tangent, operator(tangent))
    return RiverDirection(
        tangent=tangent,
        curvature=curvature,
        largest_eigenvalue=largest_eigenvalue,
        gradient_share=kept / size,
        accepted=curvature < max_ratio * largest_eigenvalue,
    )
