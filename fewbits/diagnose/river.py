r"""The river and the walls: which directions stay cheap over the distance of a rounding error, and where errors point.

Two definitions of the river, side by side. (i) The displacement of a training, the paper's choice. (ii) What is left of
the gradient outside the leading eigenvectors :math:`U` of the Hessian *smoothed at the size of the rounding error*,
whose span is the normal space. The bottom eigenspace of the Hessian at ``w`` is neither.

Reference: arXiv:2606.09012.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.diagnose.losses import TokenLoss, batched_gradient, batched_hessian
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.geometry import (
    Width,
    combine,
    dot,
    moving,
    norm,
    normalized,
    river_direction,
    smoothing_deltas,
    split_displacement,
    top_eigenpairs,
    width,
)
from fewbits.geometry._result import Result
from fewbits.geometry.curvature import Operator
from fewbits.geometry.directions import Vector

SMOOTHED = "smoothed Hessian"
"""Name of the tangent of definition (ii)."""


@dataclass(frozen=True, kw_only=True)
class Along(Result):
    """A vector along a tangent and across it, units of ``w``; ``share`` is the squared-norm share along."""

    along: float
    across: float
    share: float


@dataclass(frozen=True, kw_only=True)
class TangentReport(Result):
    r"""One candidate of a river direction.

    ``length`` is that of the displacement it came from (1 for definition (ii)), ``curvature`` :math:`t^\top H_s t` of
    the unit tangent, ``curvature_ratio`` the same over the largest eigenvalue of :math:`H_s`; ``accepted`` if that is
    below 1e-2. ``width`` is the basin along it, slope subtracted.
    """

    length: float
    curvature: float
    curvature_ratio: float
    accepted: bool
    width: Width
    gradient_cosine: float
    splits: dict[str, Along]


@dataclass(frozen=True, kw_only=True)
class NormalShare(Result):
    r"""How much of a vector lies in the normal space.

    ``share`` is :math:`\|U^\top v\|^2 / \|v\|^2`, ``chance`` what a random vector has (``k / n``), ``energy`` is
    :math:`v^\top H_s v` and ``normal_energy`` its part inside the normal space, :math:`\sum \lambda_i \langle u_i,
    v\rangle^2`.
    """

    length: float
    share: float
    chance: float
    energy: float
    normal_energy: float


@dataclass(frozen=True, kw_only=True)
class RiverReport(Result):
    """Normal space, tangents and where the vectors point; eigenvalues in nats per squared unit of ``w``."""

    smoothed_at: str
    smoothing_per_coordinate: float
    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    gradient_in_normals: float
    tangents: dict[str, TangentReport]
    vectors: dict[str, NormalShare]


def smoothed_hessian(loss: TokenLoss, params: Sequence[Tensor], deltas: Sequence[Vector]) -> Operator:
    r"""The Hessian averaged over displacements, holding the graph of one batch at a time."""
    hessian = batched_hessian(loss, params)

    def apply(vector: Vector) -> Vector:
        parts = []
        with moving(params) as move:
            for delta in deltas:
                move((1.0, delta))
                parts.append((1 / len(deltas), hessian(vector)))
        return combine(*parts)

    return apply


def measure_river(
    loss: TokenLoss,
    params: Sequence[Tensor],
    smoothed_at: str,
    vectors: Mapping[str, Vector],
    displacements: Mapping[str, Vector],
    settings: DiagnosisSettings,
    *,
    tol: float,
) -> RiverReport:
    """Normal space by Lanczos on the smoothed Hessian, tangents by both definitions, and where each vector points.

    Args:
        loss: of the plain model, on few tokens: about ``num_lanczos_steps * num_deltas`` Hessian products.
        params: the weights that are rounded; restored bit for bit.
        smoothed_at: name of the vector whose size per tensor sets the smoothing, usually a rounding error.
        vectors: rounding errors by name.
        displacements: trainings by name; each is a tangent, and is asked like a vector where it points.
        settings: numbers of steps, normals, displacements, bisections.
        tol: band of the basin, nats.

    Raises:
        ValueError: if ``smoothed_at`` is not a vector, or the smoothed Hessian has no positive eigenvalue.
    """
    if smoothed_at not in vectors:
        raise ValueError(f"smoothed_at={smoothed_at!r} is not one of the vectors {sorted(vectors)}")
    generator = torch.Generator().manual_seed(settings.seed + 5)
    error = vectors[smoothed_at]
    operator = smoothed_hessian(loss, params, smoothing_deltas(error, settings.num_deltas, generator))
    pairs = top_eigenpairs(
        operator, params, settings.num_normals, generator=generator, num_steps=settings.num_lanczos_steps
    )
    grad, largest = batched_gradient(loss, params), pairs.values[0]
    found = river_direction(grad, pairs.vectors, operator, largest_eigenvalue=largest)
    size = norm(grad)
    tangents = {}
    for name, vector in {SMOOTHED: found.tangent, **displacements}.items():
        unit = normalized(vector)
        curvature = found.curvature if name == SMOOTHED else dot(unit, operator(unit))
        slope = dot(grad, unit)
        splits = {}
        for other, v in {**vectors, **displacements}.items():
            if other != name:
                split = split_displacement(v, [unit])
                splits[other] = Along(along=split.river_norm, across=split.normal_norm, share=split.river_share)
        tangents[name] = TangentReport(
            length=norm(vector),
            curvature=curvature,
            curvature_ratio=curvature / largest,
            accepted=curvature < 1e-2 * largest,
            width=width(
                loss, params, unit, tol=tol, start=norm(error) / 64, max_distance=1024 * norm(error),
                num_bisections=settings.num_bisections, slope=slope,
            ),
            gradient_cosine=slope / size if size > 0 else 0.0,
            splits=splits,
        )  # fmt: skip
    shares = {}
    total = sum(p.numel() for p in params)
    for name, vector in {**vectors, **displacements}.items():
        parts = [dot(u, vector) for u in pairs.vectors]
        shares[name] = NormalShare(
            length=norm(vector),
            share=sum(x * x for x in parts) / dot(vector, vector),
            chance=len(parts) / total,
            energy=dot(vector, operator(vector)),
            normal_energy=sum(x * x * value for x, value in zip(parts, pairs.values, strict=True)),
        )
    return RiverReport(
        smoothed_at=smoothed_at,
        smoothing_per_coordinate=norm(error) / math.sqrt(total),
        eigenvalues=pairs.values,
        residuals=pairs.residuals,
        gradient_in_normals=1 - found.gradient_share**2,
        tangents=tangents,
        vectors=shares,
    )
