"""CAGE: a small pull toward the grid after every step of the late phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from fewbits.drives._base import Drive


@dataclass(frozen=True, kw_only=True)
class CAGE(Drive):
    r"""Decoupled proximal pull :math:`w \leftarrow w - \eta \lambda_t (w - Q(w))` after optimizer *and* scheduler.

    With r the share of steps done and s the silence, :math:`\lambda_t = 0` for :math:`r \le s`, then
    :math:`\lambda (r - s)/(1 - s)` (``ramp``) or :math:`\lambda` (``constant``). Plain STE has no limit point; with the
    pull it has one, where :math:`\nabla f(Q(w)) + \lambda (w - Q(w)) = 0`. A large pull from the start would freeze
    every weight in its first cell: hence silence and ramp.

    ``coupled`` adds :math:`\lambda_t (w - Q(w))` to the gradient before the optimizer's step instead: under Adam it is
    divided by the root of the second moment, a diagonal curvature. The stationary points are the same; under plain SGD
    at a step size eta the coupled step stays where the equation above holds exactly, the decoupled one where the
    gradient counts :math:`1 - \eta\lambda` times.

    Args:
        strength: lambda >= 0; 0 is no pull. ``lr * strength`` must stay at most 1 (1 puts the weight on the grid), and
            should be far below. Coupled, it is weighed against the gradient, of any size.
        silence: s in [0, 1): share of the run without pull.
        schedule: ``ramp`` (linear) or ``constant``.
        coupled: through the gradient and the optimizer, after clipping, in place of a pull after the step.

    Raises:
        ValueError: for values out of range, and by :meth:`pull` if ``lr * strength`` exceeds 1.

    Example:
        >>> cage = CAGE(strength=10.0, silence=0.8)
        >>> [round(cage.pull(step=t, total_steps=100, lr=1e-3), 4) for t in (80, 90, 100)]
        [0.0, 0.005, 0.01]

    Reference: arXiv:2510.18784.
    """

    name: ClassVar[str] = "cage"
    strength: float = 10.0
    silence: float = 0.8
    schedule: Literal["ramp", "constant"] = "ramp"
    coupled: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"strength={self.strength} must be finite and at least 0")
        if not 0 <= self.silence < 1:
            raise ValueError(f"silence={self.silence} is outside [0, 1); it is the share of the run without pull")
        if self.schedule not in ("ramp", "constant"):
            raise ValueError(f"schedule={self.schedule!r} is unknown; use 'ramp' or 'constant'")

        if not isinstance(self.coupled, bool):
            raise ValueError(f"coupled={self.coupled!r} must be true or false")

    def _strength_at(self, step: int, total_steps: int) -> float:
        done = step / total_steps
        if done <= self.silence:
            return 0.0
        return self.strength * ((done - self.silence) / (1 - self.silence) if self.schedule == "ramp" else 1.0)

    def gradient_pull(self, *, step: int, total_steps: int) -> float:
        """``lambda_t`` if coupled, else 0."""
        return self._strength_at(step, total_steps) if self.coupled else 0.0

    def pull(self, *, step: int, total_steps: int, lr: float) -> float:
        """``lr * lambda_t``, or 0 if coupled."""
        if self.coupled:
            return 0.0
        amount = lr * self._strength_at(step, total_steps)
        if amount > 1:
            raise ValueError(
                f"CAGE pulls by lr * strength = {amount:.3g} at step {step}, beyond the grid; "
                f"use strength <= {1 / lr:.3g}"
            )
        return amount
