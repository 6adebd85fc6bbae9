r"""Three ways to the same bits, side by side: round, fine-tune and round, train through the rounding.

Each arm is a pair of points: latent weights ``w`` and deployed weights ``q``. The same numbers are asked of every arm.
Reference: arXiv:2606.09012 (equal-budget control, angles, inward slope).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fewbits.diagnose.after import Triple
from fewbits.diagnose.losses import TokenLoss, batched_hessian
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.geometry import (
    Displacements,
    InwardReport,
    compare_displacements,
    difference,
    inward_report,
    kappa_rand,
    loss_value,
    norm,
    placed,
    random_like,
    restrict,
    width,
)
from fewbits.geometry._result import Result
from fewbits.geometry.directions import Vector

PTQ = "rounding alone"
CONTROL = "full-precision fine-tuning, then rounding"
QAT = "trained through the rounding"


@dataclass(frozen=True, kw_only=True)
class Arm(Result):
    r"""One arm; losses in nats per token, lengths in units of ``w``.

    ``moved`` is the length of :math:`w - w_{fp}` over the weights with codes and ``angle`` compares it with the
    rounding error of the original, :math:`q_{ptq} - w_{fp}` (None where nothing moved). ``random_width`` is the median
    basin width around *this* arm's latent weights, ``kappa_rand`` its rounding error in units of it. ``inward`` is
    measured at its deployed weights about its latent ones, with both controls.
    """

    loss_latent: float
    loss_deployed: float
    moved: float
    error_norm: float
    random_width: float
    kappa_rand: float
    angle: Displacements | None
    inward: InwardReport


@dataclass(frozen=True, kw_only=True)
class ArmsReport(Result):
    """The arms by name; ``objective`` says what the control minimized, ``num_steps`` for how long."""

    arms: dict[str, Arm]
    objective: str
    num_steps: int
    learning_rate: float
    verdict: str


def measure_arm(
    loss: TokenLoss,
    points: Triple,
    latent: Vector,
    deployed: Vector,
    settings: DiagnosisSettings,
    *,
    tol: float,
) -> Arm:
    """All numbers of one arm; the model of the loss is restored bit for bit.

    Args:
        loss: of the plain fp model.
        points: the fp model and its rounding; its parameters hold fp.
        latent: the arm before rounding, a point over all parameters.
        deployed: the arm after rounding.
        settings: ``num_random`` directions, bisections, seed.
        tol: band of the basin, nats.

    Raises:
        ValueError: where rounding changes nothing.
    """
    params = points.params
    error = restrict(difference(deployed, latent), points.quantized)
    length = norm(error)
    if length == 0:
        raise ValueError("the arm's weights are on the grid already; there is no rounding error to measure")
    moved = points.codes_only(difference(latent, params))
    first_error = points.codes_only(difference(points.ptq, params))
    angle = compare_displacements(first_error, moved) if norm(moved) > 0 else None
    with placed(params, deployed):
        loss_deployed = loss_value(loss)
    generator = torch.Generator().manual_seed(settings.seed + 7)
    with placed(params, latent):
        loss_latent = loss_value(loss)
        widths = [
            width(
                loss, params, random_like(error, generator), tol=tol, num_bisections=settings.num_bisections
            ).first
            for _ in range(settings.num_random)
        ]  # fmt: skip
        inward = inward_report(loss, params, deployed, batched_hessian(loss, params))
    return Arm(
        loss_latent=loss_latent,
        loss_deployed=loss_deployed,
        moved=norm(moved),
        error_norm=length,
        random_width=statistics.median(widths),
        kappa_rand=kappa_rand(length, widths),
        angle=angle,
        inward=inward,
    )


def compare_arms(
    arms: dict[str, Arm], *, objective: str, num_steps: int, learning_rate: float, loss_fp: float, tol: float
) -> ArmsReport:
    """The arms with a verdict in words: did the extra training help, or the training through the rounding?

    Args:
        arms: of :data:`PTQ`, :data:`CONTROL` and :data:`QAT`.
        objective: what the control minimized.
        num_steps: of both trainings.
        learning_rate: of both trainings.
        loss_fp: loss of the original, nats.
        tol: band of the basin, nats.
    """
    ptq, control, qat = (arms[name].loss_deployed - loss_fp for name in (PTQ, CONTROL, QAT))
    text = [
        f"Against the original, rounding alone costs {ptq:+.4f} nats; {num_steps} steps of full-precision fine-tuning "
        f"and then rounding {control:+.4f}; the same steps through the rounding {qat:+.4f}."
    ]
    if qat < control - tol:
        text.append("The gain is that of training through the rounding: the same steps without it do not bring it.")
    elif qat <= control + tol:
        text.append("The two trainings end within the basin's tolerance of each other: the steps help, not the path.")
    else:
        text.append("Fine-tuning and then rounding is better here; training through the rounding does not pay.")
    return ArmsReport(
        arms=arms, objective=objective, num_steps=num_steps, learning_rate=learning_rate, verdict=" ".join(text)
    )


def plain_point(model: nn.Module, like: Sequence[torch.Tensor]) -> Vector:
    """The parameters of a plain model as a point, in the dtype and on the device of another's."""
    return [p.detach().to(q).clone() for p, q in zip(model.parameters(), like, strict=True)]
