r"""The recovery theorem of arXiv:2606.09012 as numbers: its conditions, its drift margin, its bound.

It is sufficient, not necessary, and loose: by a factor of 2 to 10 on radial walls and 17 on the worked 1-D staircase,
and by hundreds if :math:`L_P` is set to the generic 1 where the river is a point (:math:`L_P = 0`). On real networks
the margin is mostly negative (:math:`\rho` grows with :math:`\sqrt d`, ``R`` does not), which means *no
guarantee*, not *no recovery*. Never use it as a schedule; report its sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fewbits.geometry._result import Result


@dataclass(frozen=True, kw_only=True)
class RecoveryTheorem(Result):
    r"""Constants of the theorem for the recursion :math:`w_{k+1} = w_k - \eta \nabla f(Q(w_k))`.

    .. math:: M = c_\perp \sqrt{\lambda_d}\, R - \lambda_1 (1 + L_P) \rho G, \qquad
              \eta \le \min\Bigl\{\frac{M}{\lambda_1 (1 + L_P) G^2}, \frac{\rho}{G}\Bigr\} \;\Rightarrow\;
              T_{rec} \le 1 + \frac{\max\{d_0^2 - (R - \sqrt{\lambda_1} \rho (1 + L_P))^2, 0\}}{\eta M}.

    Args:
        c_perp: :math:`c_\perp`, least inward slope outside the tube, loss per unit length, positive.
        radius: :math:`R`, tube radius in the ``H`` norm, positive.
        rho: :math:`\rho`, largest rounding error :math:`\|Q(w) - w\|`, positive.
        grad_bound: :math:`G \ge \|\nabla f\|` on the neighbourhood that the iterates and their codes visit, positive.
        h_max: :math:`\lambda_1`, largest eigenvalue of the metric ``H``.
        h_min: :math:`\lambda_d`, smallest one, in ``(0, h_max]``.
        lipschitz_projection: :math:`L_P \ge 0` of the projection on the river; 0 if the river is one point.

    Raises:
        ValueError: for constants outside these ranges.

    Example:
        >>> found = RecoveryTheorem(c_perp=1.0, radius=2.0, rho=0.3, grad_bound=1.3, lipschitz_projection=0.0)
        >>> round(found.margin, 6), found.guaranteed, round(found.max_eta, 6)
        (1.61, True, 0.230769)

    Reference: arXiv:2606.09012, Theorem 1.
    """

    c_perp: float
    radius: float
    rho: float
    grad_bound: float
    h_max: float = 1.0
    h_min: float = 1.0
    lipschitz_projection: float = 1.0
    _derived: ClassVar[tuple[str, ...]] = ("margin", "guaranteed", "max_eta")

    def __post_init__(self) -> None:
        for name in ("c_perp", "radius", "rho", "grad_bound", "h_max"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite")
        if not 0 < self.h_min <= self.h_max:
            raise ValueError(f"h_min={self.h_min} must lie in (0, h_max={self.h_max}]")
        if not self.lipschitz_projection >= 0:
            raise ValueError(f"lipschitz_projection={self.lipschitz_projection} must not be negative")

    @property
    def margin(self) -> float:
        """Drift margin ``M``; half the squared distance falls by at least ``eta * M / 2`` a step while outside."""
        noise = self.h_max * (1 + self.lipschitz_projection) * self.rho * self.grad_bound
        return self.c_perp * math.sqrt(self.h_min) * self.radius - noise

    @property
    def guaranteed(self) -> bool:
        r"""Condition A2 (iii), lower part: ``M > 0`` and :math:`\rho (1 + L_P) \sqrt{\lambda_1} < R`."""
        return self.margin > 0 and self.rho * (1 + self.lipschitz_projection) * math.sqrt(self.h_max) < self.radius

    @property
    def max_eta(self) -> float:
        """Largest step size that the theorem covers; 0 where nothing is guaranteed."""
        if not self.guaranteed:
            return 0.0
        curvature = self.h_max * (1 + self.lipschitz_projection) * self.grad_bound**2
        return min(self.margin / curvature, self.rho / self.grad_bound)

    def bound(self, start_distance: float, eta: float) -> float:
        r"""Bound on the number of steps until :math:`Q(w_k)` is first in the tube.

        Args:
            start_distance: :math:`d_0 = \|w_0 - P(w_0)\|_H`, at most ``radius``.
            eta: step size in ``(0, max_eta]``.

        Raises:
            ValueError: where the theorem does not apply.

        Example:
            >>> RecoveryTheorem(c_perp=1.0, radius=2.0, rho=0.3, grad_bound=1.3).bound(1.0, 0.01)
            1.0
        """
        if not self.guaranteed:
            raise ValueError(f"the theorem guarantees nothing: margin={self.margin:.3g}, rho={self.rho} is too large")
        if not 0 < eta <= self.max_eta:
            raise ValueError(f"eta={eta} must lie in (0, {self.max_eta:.6g}]")
        if not 0 <= start_distance <= self.radius:
            raise ValueError(f"start_distance={start_distance} must lie in [0, radius={self.radius}]")
        inner = self.radius - math.sqrt(self.h_max) * self.rho * (1 + self.lipschitz_projection)
        return 1 + max(start_distance**2 - inner**2, 0.0) / (eta * self.margin)
