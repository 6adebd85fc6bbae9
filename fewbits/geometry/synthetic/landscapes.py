r"""Synthetic landscapes on which every claim about rounding and recovery can be computed by hand.

:class:`Valley` is the flat-floored, steep-walled valley in which the Hessian proxy of PTQ fails; :class:`RadialWall` is
a bowl with a flat disc, for the recovery theorem in any dimension. Both are callable on tensors ``(..., d)``, so that
slices, curvature and recovery routines run on them. The straight-through recursion is :func:`straight_through`.
Reference: arXiv:2606.09012, Examples 1 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbits.geometry._result import HIDDEN, Result
from fewbits.geometry.basin import normal_cdf
from fewbits.geometry.theorem import RecoveryTheorem


def nearest(w: Tensor, pitch: float = 1.0, offset: float = 0.0) -> Tensor:
    r"""Nearest point of the grid :math:`\Delta (\mathbb Z + \text{offset})^d`; ties to the even code.

    Args:
        w: any shape, floating point.
        pitch: :math:`\Delta > 0`, units of ``w``.
        offset: phase of the grid in steps.

    Example:
        >>> nearest(torch.tensor([0.7, -0.2]), pitch=0.5)
        tensor([0.5000, 0.0000])
    """
    if not pitch > 0:
        raise ValueError(f"pitch={pitch} must be positive")
    return ((w / pitch - offset).round() + offset) * pitch


@dataclass(frozen=True, kw_only=True)
class Valley:
    r"""Example 1/3: a river along :math:`\tau` between two walls at :math:`|z| = r`.

    .. math:: f(w) = \tfrac12 (t + u)^2 + \tfrac\mu2 \max(|z| - r, 0)^2, \quad
              t = \langle \tau, w - w_0\rangle, \; z = \langle \nu, w - w_0\rangle, \; w_0 = (1, 0),

    with :math:`\tau = (\cos\theta, \sin\theta)`, :math:`\nu = (-\sin\theta, \cos\theta)`. The tube ``|z| <= R`` with
    :math:`R = r + \sqrt{2 \epsilon / \mu}` holds losses within :math:`\epsilon` of the river's. At ``w_fp`` the Hessian
    is :math:`\tau \tau^\top`: blind across the valley, where the walls are. The defaults are the project's instance X.

    Args:
        theta: :math:`\theta` in ``[pi/6, pi/4)``, radians.
        u: place of the minimum on the river, in ``(alpha / 2, alpha)``, :math:`\alpha = \cos\theta - \sin\theta`.
        mu: wall stiffness, positive.
        r: half-width of the flat floor, positive.
        eps: :math:`\epsilon`, flatness of the tube in loss, positive; ``R < delta`` is required.

    Raises:
        ValueError: for constants outside these ranges, where the paper's statements do not hold.

    Example:
        >>> valley = Valley()
        >>> round(float(valley(torch.tensor([0.0, 1.0], dtype=torch.float64))), 4), round(valley.radius, 6)
        (3.7542, 0.6)

    Reference: arXiv:2606.09012.
    """

    theta: float = math.pi / 6
    u: float = 0.2745
    mu: float = 10.0
    r: float = 0.5
    eps: float = 0.05

    def __post_init__(self) -> None:
        if not math.pi / 6 <= self.theta < math.pi / 4:
            raise ValueError(f"theta={self.theta} must lie in [pi/6, pi/4)")
        if not self.alpha / 2 < self.u < self.alpha:
            raise ValueError(f"u={self.u} must lie in (alpha / 2, alpha) = ({self.alpha / 2:.4f}, {self.alpha:.4f})")
        for name in ("mu", "r", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not self.radius < self.delta:
            raise ValueError(f"R = r + sqrt(2 eps / mu) = {self.radius:.4f} must be below delta = {self.delta:.4f}")

    @property
    def alpha(self) -> float:
        r""":math:`\cos\theta - \sin\theta`."""
        return math.cos(self.theta) - math.sin(self.theta)

    @property
    def delta(self) -> float:
        r""":math:`\cos\theta + \sin\theta`, the height ``|z|`` of the codeword ``(0, 1)``."""
        return math.cos(self.theta) + math.sin(self.theta)

    @property
    def radius(self) -> float:
        r"""Tube radius :math:`R = r + \sqrt{2 \epsilon / \mu}`."""
        return self.r + math.sqrt(2 * self.eps / self.mu)

    @property
    def c_perp(self) -> float:
        r"""Least inward slope outside the tube, :math:`\sqrt{2 \mu \epsilon}`."""
        return math.sqrt(2 * self.mu * self.eps)

    @property
    def tau(self) -> Tensor:
        """River direction, float64, shape ``(2,)``."""
        return torch.tensor([math.cos(self.theta), math.sin(self.theta)], dtype=torch.float64)

    @property
    def nu(self) -> Tensor:
        """Normal direction, float64, shape ``(2,)``."""
        return torch.tensor([-math.sin(self.theta), math.cos(self.theta)], dtype=torch.float64)

    @property
    def w_fp(self) -> Tensor:
        r"""Full-precision minimum :math:`w_0 - u \tau`, float64, shape ``(2,)``; its loss is 0."""
        return torch.tensor([1.0, 0.0], dtype=torch.float64) - self.u * self.tau

    def coordinates(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """River and normal coordinates ``(t, z)`` of points ``(..., 2)``."""
        offset = w - torch.tensor([1.0, 0.0], dtype=w.dtype)
        return offset @ self.tau.to(w.dtype), offset @ self.nu.to(w.dtype)

    def __call__(self, w: Tensor) -> Tensor:
        """Loss of points ``(..., 2)``; shape ``(...)``."""
        t, z = self.coordinates(w)
        return 0.5 * (t + self.u).square() + 0.5 * self.mu * torch.relu(z.abs() - self.r).square()

    def gradient(self, w: Tensor) -> Tensor:
        """Closed-form gradient at points ``(..., 2)``."""
        t, z = self.coordinates(w)
        wall = self.mu * z.sign() * torch.relu(z.abs() - self.r)
        return (t + self.u)[..., None] * self.tau.to(w.dtype) + wall[..., None] * self.nu.to(w.dtype)

    def inside(self, w: Tensor) -> Tensor:
        """Whether points ``(..., 2)`` are in the tube, ``|z| <= R``."""
        return self.coordinates(w)[1].abs() <= self.radius

    def proxy(self, q: Tensor) -> Tensor:
        r"""What PTQ minimises, :math:`\tfrac12 (q - w_{fp})^\top H (q - w_{fp})` with the Hessian at ``w_fp``."""
        return 0.5 * (self.coordinates(q)[0] + self.u).square()

    def smoothed_curvature(self, s: float) -> tuple[float, float]:
        r"""Curvatures (river, normal) of the loss at ``w_fp`` after a Gaussian blur of ``s`` per coordinate.

        The second derivative of the walls is :math:`\mu` where :math:`|z| > r`, so the blurred one is
        :math:`2 \mu (1 - \Phi(r / s))`; the river keeps 1. At ``s = 0`` the order is reversed: 1 and 0.

        Example:
            >>> [round(Valley().smoothed_curvature(s)[1], 2) for s in (0.1, 0.3, 0.6, 1.0)]
            [0.0, 0.96, 4.05, 6.17]
        """
        if not s >= 0:
            raise ValueError(f"s={s} must not be negative")
        return 1.0, 2 * self.mu * normal_cdf(-self.r / s) if s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class RadialWall:
    r"""A flat disc with a radial wall, :math:`f(y) = \tfrac\mu2 \max(\|y\| - r, 0)^2`; the river is the origin.

    Args:
        r: radius of the flat disc, positive.
        radius: tube radius :math:`R > r`.
        mu: stiffness, positive.

    Raises:
        ValueError: for constants outside these ranges.

    Example:
        >>> RadialWall(r=1.0, radius=2.0)(torch.tensor([3.0, 4.0]))
        tensor(8.)

    Reference: arXiv:2606.09012 (an instance of its assumptions with ``H = I``).
    """

    r: float = 1.0
    radius: float = 2.0
    mu: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.r < self.radius or not self.mu > 0:
            raise ValueError(f"need 0 < r={self.r} < radius={self.radius} and mu={self.mu} > 0")

    def __call__(self, y: Tensor) -> Tensor:
        """Loss of points ``(..., d)``; shape ``(...)``."""
        return 0.5 * self.mu * torch.relu(torch.linalg.vector_norm(y, dim=-1) - self.r).square()

    def gradient(self, y: Tensor) -> Tensor:
        """Closed-form gradient at points ``(..., d)``; 0 in the disc."""
        size = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        return self.mu * torch.relu(size - self.r) * y / size.clamp_min(self.r)

    def inside(self, y: Tensor) -> Tensor:
        """Whether points ``(..., d)`` are in the tube, ``|y| <= R``."""
        return torch.linalg.vector_norm(y, dim=-1) <= self.radius

    def theorem(self, *, pitch: float, dim: int) -> RecoveryTheorem:
        r"""Constants for nearest rounding to :math:`\Delta \mathbb Z^d`.

        :math:`\rho = \Delta \sqrt d / 2`, :math:`G = \mu (R + \rho - r)`, :math:`c_\perp = \mu (R - r)`, and
        :math:`L_P = 0`, since the projection on a single point is constant.
        """
        rho = pitch * math.sqrt(dim) / 2
        return RecoveryTheorem(
            c_perp=self.mu * (self.radius - self.r),
            radius=self.radius,
            rho=rho,
            grad_bound=self.mu * (self.radius + rho - self.r),
            lipschitz_projection=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class StraightThroughRun(Result):
    r"""Outcome of :func:`straight_through` for a batch ``(...)`` of starts.

    ``steps`` ``(...)`` holds the first ``k`` at which :math:`Q(w_k)` was inside, or -1; ``trajectory`` the latent
    points ``(number of steps taken + 1, ..., d)``, those after the recovery of one start included; ``final`` its last.
    """

    steps: Tensor
    final: Tensor
    trajectory: Tensor = field(repr=False, metadata=HIDDEN)


def straight_through(
    gradient: Callable[[Tensor], Tensor],
    quantize: Callable[[Tensor], Tensor],
    inside: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    eta: float | Sequence[float],
    num_steps: int,
    stop_when_inside: bool = True,
) -> StraightThroughRun:
    r"""The recursion of the theorem, :math:`w_{k+1} = w_k - \eta_k \nabla f(Q(w_k))`.

    With ``quantize`` the identity it is plain gradient descent, the control.

    Args:
        gradient: of the landscape, ``(..., d) -> (..., d)``.
        quantize: ``(..., d) -> (..., d)``.
        inside: ``(..., d) -> (...)`` bool, asked of the quantized point.
        start: :math:`w_0`, ``(..., d)``.
        eta: step size, positive; or one per step.
        num_steps: most steps taken, ``>= 0``.
        stop_when_inside: end once every start of the batch has been inside.

    Raises:
        ValueError: for a step size that is not positive or a schedule of the wrong length.

    Example:
        >>> valley = Valley()
        >>> run = straight_through(valley.gradient, nearest, valley.inside, valley.w_fp - 0.49 * valley.nu, eta=1e-3,
        ...                        num_steps=100)
        >>> int(run.steps), nearest(run.final).tolist()
        (19, [1.0, 0.0])

    Reference: arXiv:2606.09012.
    """
    etas = [float(eta)] * num_steps if isinstance(eta, int | float) else [float(e) for e in eta]
    if len(etas) != num_steps or not all(e > 0 for e in etas):
        raise ValueError(f"eta must be one positive number, or num_steps={num_steps} of them; got {len(etas)}")
    w = start.clone()
    points = [w]
    q = quantize(w)
    first = torch.where(inside(q), 0, -1)
    for step, rate in enumerate(etas, start=1):
        if stop_when_inside and bool((first >= 0).all()):
            break
        w = w - rate * gradient(q)
        points.append(w)
        q = quantize(w)
        first = torch.where((first < 0) & inside(q), step, first)
    return StraightThroughRun(steps=first, final=w, trajectory=torch.stack(points))
