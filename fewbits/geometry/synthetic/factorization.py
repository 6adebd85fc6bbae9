r"""Matrix factorization, the smallest problem with a curved river: :math:`f(X) = \|X X^\top - M\|_F^2`.

The minima form a manifold (rotations of ``X``), rounding kicks ``X`` off it, and straight-through training finds
another codeword near it. The default run reproduces the paper's figures digit for digit, and repeating it over seeds
shows that the published seed is a favourable one. Reference: arXiv:2606.09012, Example 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fewbits.geometry._result import Result

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FactorizationRun(Result):
    """Losses of the rounded factors, norms of the two displacements and their angle in degrees."""

    fp_loss: float
    ptq_loss: float
    qat_loss: float
    best_qat_loss: float
    ptq_norm: float
    qat_norm: float
    angle_deg: float
    _derived: ClassVar[tuple[str, ...]] = ("reduction",)

    @property
    def reduction(self) -> float:
        """Share of the PTQ loss that the last QAT iterate removed; negative if QAT made it worse."""
        return 1 - self.qat_loss / self.ptq_loss


def factorization_loss(x: Matrix, target: Matrix) -> float:
    r""":math:`\|X X^\top - M\|_F^2` for ``x`` ``(d, r)`` and ``target`` ``(d, d)``."""
    return float(np.square(x @ x.T - target).sum())


def factorization_gradient(x: Matrix, target: Matrix) -> Matrix:
    r""":math:`4 (X X^\top - M) X` for a symmetric ``M``, multiplied out so that ``X X^T`` is never formed."""
    return 4 * (x @ (x.T @ x) - target @ x)


def factorization_run(
    rng: np.random.Generator,
    *,
    dim: int = 100,
    rank: int = 5,
    init_std: float = 0.30,
    pitch: float = 0.30,
    fp_eta: float = 0.020,
    fp_steps: int = 4000,
    qat_eta: float = 0.010,
    qat_steps: int = 1500,
) -> FactorizationRun:
    r"""Train full precision by gradient descent, round, then train straight through with a cosine schedule.

    ``M`` is the identity on the first ``rank`` coordinates and 0 elsewhere. The QAT step size at step ``k`` is
    :math:`\tfrac12 \eta (1 + \cos(\pi k / K))`.

    Args:
        rng: draws :math:`X_0 \sim \text{init\_std} \cdot N(0, I)`; ``default_rng(0)`` is the paper's run.
        dim: rows of ``X``.
        rank: columns of ``X`` and rank of ``M``, at most ``dim``.
        init_std: of the start.
        pitch: grid pitch of the rounding.
        fp_eta: step size of gradient descent.
        fp_steps: its steps.
        qat_eta: first step size of QAT.
        qat_steps: its steps, at least 1.

    Returns:
        Losses, norms, angle. Both displacements lead from ``X_fp`` to rounded points, ``Q(X_fp)`` and ``Q(X_qat)``.

    Raises:
        ValueError: for a rank above the dimension or a pitch that is not positive.

    Example:
        >>> run = factorization_run(np.random.default_rng(0), dim=10, rank=2, fp_steps=500, qat_steps=100)
        >>> run.fp_loss < 1e-20, run.best_qat_loss <= run.qat_loss
        (True, True)

    Reference: arXiv:2606.09012, Example 2.
    """
    if not 1 <= rank <= dim:
        raise ValueError(f"rank={rank} must lie in 1..dim={dim}")
    if not pitch > 0 or qat_steps < 1:
        raise ValueError(f"pitch={pitch} must be positive and qat_steps={qat_steps} at least 1")
    target = np.zeros((dim, dim))
    target[:rank, :rank] = np.eye(rank)

    def rounded(x: Matrix) -> Matrix:
        return pitch * np.round(x / pitch)

    fp = init_std * rng.standard_normal((dim, rank))
    for _ in range(fp_steps):
        fp = fp - fp_eta * factorization_gradient(fp, target)
    latent, best = fp, math.inf
    for step in range(qat_steps):
        rate = qat_eta * 0.5 * (1 + math.cos(math.pi * step / qat_steps))
        latent = latent - rate * factorization_gradient(rounded(latent), target)
        best = min(best, factorization_loss(rounded(latent), target))
    ptq_move, qat_move = rounded(fp) - fp, rounded(latent) - fp
    ptq_norm, qat_norm = float(np.linalg.norm(ptq_move)), float(np.linalg.norm(qat_move))
    # A start on the grid has no PTQ displacement, hence no angle.
    cosine = float((ptq_move * qat_move).sum()) / (ptq_norm * qat_norm) if ptq_norm * qat_norm > 0 else math.nan
    return FactorizationRun(
        fp_loss=factorization_loss(fp, target),
        ptq_loss=factorization_loss(rounded(fp), target),
        qat_loss=factorization_loss(rounded(latent), target),
        best_qat_loss=best,
        ptq_norm=ptq_norm,
        qat_norm=qat_norm,
        angle_deg=math.degrees(math.acos(min(1.0, max(-1.0, cosine)))) if math.isfinite(cosine) else math.nan,
    )
