r"""SignRound (AutoRound): learn where to round by signed gradient descent.

.. math:: \hat w = s\,\mathrm{nearest}(w / s + V), \qquad V \in [-\tfrac12, \tfrac12], \qquad s = m\,s_0.

V starts at 0 and m at 1, both move by the sign of their gradient times a learning rate that falls from 1/n to 0 over n
steps: 0.5025 in all at n = 200, so that a code can reach its neighbour and no further. The published min and max
multipliers are one number m here: our grids have a scale and no zero point.

Reference: Cheng et al., arXiv:2309.05516.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewbits.ptq._base import (
    PTQResult,
    check_scale,
    check_weight,
    finish,
    resolve_hessian,
    rotate_hessian,
)
from fewbits.qtensor import initial_scale
from fewbits.scales import stored_scale
from fewbits.scheme import Scheme
from fewbits.surrogates._base import inside

MULTIPLIER_RANGE = (0.5, 1.5)
"""Where m may go."""


class SignRoundWeight:
    """One weight with its V and m; :meth:`weight` is differentiable in both, by straight-through rounding.

    Args:
        w: ``(out_features, in_features)``.
        scheme: grid, scale and rotation.
        scale: raw scales ``(R, G)`` to start from.
        learn_scale: whether m moves.
    """

    def __init__(self, w: Tensor, scheme: Scheme, scale: Tensor, *, learn_scale: bool = True) -> None:
        self.w, self.scheme, self.start = w.detach(), scheme, scale
        self.rotated = scheme.rotation.apply(self.w.float())
        self.offset = torch.zeros_like(self.rotated, requires_grad=True)
        self.multiplier = torch.ones_like(scale, requires_grad=learn_scale)

    def variables(self) -> list[Tensor]:
        """V, and m if it is learned."""
        return [self.offset, self.multiplier] if self.multiplier.requires_grad else [self.offset]

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Stored scales ``(R, G)``, and v = w / s + V in groups; the rounding of the scale is straight-through."""
        raw = self.start * self.multiplier
        s = raw + (stored_scale(raw.detach(), self.scheme.scale) - raw.detach())
        view = self.scheme.scale.view(self.w.shape)
        return s, view.split(self.rotated) / s[..., None] + view.split(self.offset)

    def rounded(self) -> Tensor:
        """The quantized weight in the rotated basis, fp32."""
        s, v = self._steps()
        grid = self.scheme.grid
        held = v.detach()
        levels = grid.project_(held.clone()) + (v - held) * inside(held, grid, "bin")
        return self.scheme.scale.view(self.w.shape).merge(levels * s[..., None])

    def weight(self) -> Tensor:
        """The quantized weight in the dtype of ``w``."""
        return self.scheme.rotation.invert(self.rounded()).to(self.w.dtype)

    @torch.no_grad()
    def step_(self, gradients: Sequence[Tensor | None], learning_rate: float) -> None:
        """One signed step, kept within the ranges."""
        for variable, gradient in zip(self.variables(), gradients, strict=True):
            if gradient is not None:
                variable -= learning_rate * gradient.sign()
        self.offset.clamp_(-0.5, 0.5)
        self.multiplier.clamp_(*MULTIPLIER_RANGE)

    def state(self) -> tuple[Tensor, Tensor]:
        """Copies of V and m."""
        return self.offset.detach().clone(), self.multiplier.detach().clone()

    @torch.no_grad()
    def load_(self, state: tuple[Tensor, Tensor]) -> None:
        """Back to an earlier :meth:`state`."""
        self.offset.copy_(state[0])
        self.multiplier.copy_(state[1])

    @torch.no_grad()
    def result(self) -> PTQResult:
        """Codes, scales, and the latent weight s (w / s + V)."""
        s, v = self._steps()
        view = self.scheme.scale.view(self.w.shape)
        codes = view.merge(self.scheme.grid.encode(v))
        return finish(view.merge(v * s[..., None]), codes, self.start * self.multiplier, self.scheme, self.w)


def default_learning_rate(iterations: int, scheme: Scheme) -> float:
    """1/n; 2/n for long runs at 3 bits or less, as published."""
    return (2.0 if iterations >= 1000 and scheme.grid.num_bits <= 3 else 1.0) / iterations


def sign_descent(
    weights: Sequence[SignRoundWeight],
    loss: Callable[[int], Tensor],
    *,
    iterations: int,
    score: Callable[[], float] | None = None,
    num_scores: int = 10,
    learning_rate: float | None = None,
) -> float:
    """Move V and m of all weights together, and leave them where the score was best.

    Args:
        weights: what moves.
        loss: differentiable loss of one step, given its number.
        iterations: n, >= 1.
        score: what counts; None takes the loss of every step.
        num_scores: how often ``score`` is asked, spread over the steps; also before the first and after the last one.
        learning_rate: of the first step; None is :func:`default_learning_rate`.

    Returns:
        The best score; never worse than round-to-nearest's.

    Raises:
        ValueError: for less than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    variables = [variable for weight in weights for variable in weight.variables()]
    sizes = [len(weight.variables()) for weight in weights]
    best, states = float("inf"), [weight.state() for weight in weights]
    every = max(1, iterations // max(1, num_scores))

    def consider(value: float) -> None:
        nonlocal best, states
        if value < best:
            best, states = value, [weight.state() for weight in weights]

    for step in range(iterations):
        if score is not None and step % every == 0:
            consider(score())
        value = loss(step)
        if score is None:
            consider(float(value.detach()))
        gradients = list(torch.autograd.grad(value, variables, allow_unused=True))
        for weight, size in zip(weights, sizes, strict=True):
            rate = default_learning_rate(iterations, weight.scheme) if learning_rate is None else learning_rate
            weight.step_(gradients[:size], rate * (1 - step / iterations))
            del gradients[:size]
    with torch.no_grad():
        consider(float(loss(iterations)) if score is None else score())
    for weight, state in zip(weights, states, strict=True):
        weight.load_(state)
    return best


def signround(
    w: Tensor,
    scheme: Scheme,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    scale: Tensor | None = None,
    iterations: int = 200,
    learning_rate: float | None = None,
    learn_scale: bool = True,
) -> PTQResult:
    r"""SignRound of one layer for its own output, :math:`\min \mathrm{tr}(\Delta H \Delta^\top)`.

    On a model the published method takes the output of a whole transformer block instead, with all its layers at once:
    that is what ``apply_ptq(.., "signround")`` does.

    Args:
        w: ``(out_features, in_features)``.
        scheme: grid, scale and rotation.
        hessian: ``(in_features, in_features)`` of the layer's inputs.
        inputs: ``(.., in_features)`` instead of the Hessian.
        scale: raw scales ``(R, G)`` to start from; None finds them by the scheme's rule.
        iterations: n, >= 1.
        learning_rate: of the first step; None is :func:`default_learning_rate`.
        learn_scale: whether the multipliers of the scales move too; if not, every code is round-to-nearest's or a
            neighbour of it.

    Returns:
        :class:`PTQResult`; the output error is never above that of round-to-nearest.

    Raises:
        ValueError: for a bad option, or a missing or bad Hessian.

    Example:
        >>> from fewbits.ptq import output_error, rtn
        >>> w, x, scheme = torch.randn(8, 32), torch.randn(100, 4) @ torch.randn(4, 32), Scheme.parse("W2")
        >>> h = x.t() @ x
        >>> errors = [output_error(w, f(w, scheme, hessian=h).qtensor.dequantize(), h) for f in (signround, rtn)]
        >>> errors[0] < errors[1]
        True
    """
    w = check_weight(w, scheme)
    h = rotate_hessian(resolve_hessian(w, hessian, inputs), scheme).float()
    h = h / h.diagonal().mean().clamp_min(1e-30)
    scale = initial_scale(w, scheme) if scale is None else check_scale(w, scheme, scale)
    variable = SignRoundWeight(w, scheme, scale, learn_scale=learn_scale)

    def loss(step: int) -> Tensor:
        del step
        delta = variable.rounded() - variable.rotated
        return ((delta @ h) * delta).sum()

    sign_descent([variable], loss, iterations=iterations, learning_rate=learning_rate)
    return variable.result()
