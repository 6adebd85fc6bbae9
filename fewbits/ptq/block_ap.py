r"""Block-AP (EfficientQAT): train the weights and scales of one transformer block for the block's output.

Straight-through rounding, Adam, mean squared error against what the full-precision block gives. One block is trained at
a time, so that gradients and optimizer state never cover more than one. Afterwards all scales are trained together on
the task with the codes fixed (:class:`FixedCodes`, the paper's E2E-QP).

Learning rates are in units of the weight's rms and of the starting scale: the published 2e-5 (at 2 bits) and 1e-4 are
about 1e-3 and 5e-3 for a language model's usual weights.

Reference: Chen et al., arXiv:2407.11062.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.fake_quant import fake_quantize
from fewbits.ptq._base import PTQResult, check_scale, check_weight, finish, resolve_hessian
from fewbits.qtensor import initial_scale, quantize
from fewbits.scales import stored_scale
from fewbits.scheme import Scheme
from fewbits.surrogates import ClippedSTE

_SURROGATE = ClippedSTE(edge="bin")
_MAX_GRAD_NORM = 0.3
_SMALLEST_MULTIPLIER = 0.05


class TrainedWeight:
    """One weight whose latent values (in units of its rms) and scales (in units of their start) are trained.

    Args:
        w: ``(out_features, in_features)``.
        scheme: grid, scale and rotation.
        scale: raw scales ``(R, G)`` to start from.
    """

    def __init__(self, w: Tensor, scheme: Scheme, scale: Tensor) -> None:
        self.scheme, self.start, self.dtype = scheme, scale, w.dtype
        self.rms = w.detach().float().square().mean().sqrt().clamp_min(1e-12)
        self.latent = (w.detach().float() / self.rms).requires_grad_()
        self.multiplier = torch.ones_like(scale, requires_grad=True)

    def weight(self) -> Tensor:
        """The quantized weight in the dtype of ``w``."""
        return fake_quantize(self._latent(), self.scheme, self.start * self.multiplier, _SURROGATE)

    def _latent(self) -> Tensor:
        return (self.latent * self.rms).to(self.dtype)

    def state(self) -> list[Tensor]:
        """Copies of both variables."""
        return [self.latent.detach().clone(), self.multiplier.detach().clone()]

    @torch.no_grad()
    def load_(self, state: Sequence[Tensor]) -> None:
        """Back to an earlier :meth:`state`."""
        self.latent.copy_(state[0])
        self.multiplier.copy_(state[1])

    @torch.no_grad()
    def result(self) -> PTQResult:
        """Codes, scales and the trained latent weight."""
        latent, scale = self._latent(), self.start * self.multiplier
        codes = quantize(latent, self.scheme, scale).codes
        return finish(self.scheme.rotation.apply(latent.float()), codes, scale, self.scheme, latent)


class FixedCodes:
    """One quantized weight of which only the scales are trained, in units of their start.

    Args:
        result: codes and scales to start from.
    """

    def __init__(self, result: PTQResult) -> None:
        self.result_before = result
        self.levels = result.qtensor.levels()
        self.multiplier = torch.ones_like(result.scale, requires_grad=True)

    def weight(self) -> Tensor:
        """The quantized weight; rounding of the scale to its stored dtype is straight-through."""
        scheme, before = self.result_before.qtensor.scheme, self.result_before
        raw = before.scale * self.multiplier
        s = raw + (stored_scale(raw.detach(), scheme.scale) - raw.detach())
        view = scheme.scale.view(self.levels.shape)
        product = view.merge(view.split(self.levels) * s[..., None])
        return scheme.rotation.invert(product).to(before.latent.dtype)

    def state(self) -> list[Tensor]:
        """A copy of the multipliers."""
        return [self.multiplier.detach().clone()]

    @torch.no_grad()
    def load_(self, state: Sequence[Tensor]) -> None:
        """Back to an earlier :meth:`state`."""
        self.multiplier.copy_(state[0])

    @torch.no_grad()
    def result(self) -> PTQResult:
        """The same codes with the trained scales; the latent weight keeps its place in its cell."""
        before = self.result_before
        scheme, scale = before.qtensor.scheme, before.scale * self.multiplier
        view = scheme.scale.view(self.levels.shape)
        ratio = view.expand(stored_scale(scale, scheme.scale) / before.qtensor.scale)
        target = scheme.rotation.apply(before.latent.float()) * ratio
        return finish(target, before.qtensor.codes, scale, scheme, before.latent)


def descend(
    weights: Sequence[TrainedWeight | FixedCodes],
    loss: Callable[[int], Tensor],
    score: Callable[[], float],
    *,
    iterations: int,
    learning_rate: float,
    scale_learning_rate: float,
    num_scores: int = 10,
) -> float:
    """Adam with a cosine schedule on all variables, which are left where the score was best.

    Args:
        weights: what is trained.
        loss: differentiable loss of one step, given its number.
        score: what counts; asked before the first step, ``num_scores`` times on the way, and after the last.
        iterations: steps, >= 1.
        learning_rate: of latent weights, in units of their rms.
        scale_learning_rate: of the scales, in units of their start.
        num_scores: see ``score``.

    Returns:
        The best score; never worse than at the start.

    Raises:
        ValueError: for a number out of range.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    if not (learning_rate >= 0 and scale_learning_rate >= 0):
        raise ValueError(f"learning rates {learning_rate} and {scale_learning_rate} must be >= 0")
    scales = [weight.multiplier for weight in weights]
    latents = [weight.latent for weight in weights if isinstance(weight, TrainedWeight)]
    groups: list[dict[str, Any]] = [{"params": scales, "lr": scale_learning_rate}]
    groups += [{"params": latents, "lr": learning_rate}] if latents else []
    optimizer = torch.optim.Adam(groups)
    start = [group["lr"] for group in optimizer.param_groups]
    best, states = score(), [weight.state() for weight in weights]
    every = max(1, iterations // max(1, num_scores))
    for step in range(iterations):
        for group, rate in zip(optimizer.param_groups, start, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / iterations))
        variables = scales + latents
        gradients = torch.autograd.grad(loss(step), variables, allow_unused=True)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        torch.nn.utils.clip_grad_norm_(variables, _MAX_GRAD_NORM)
        optimizer.step()
        with torch.no_grad():
            for multiplier in scales:
                multiplier.clamp_min_(_SMALLEST_MULTIPLIER)
        if (step + 1) % every == 0 or step + 1 == iterations:
            value = score()
            if value < best:
                best, states = value, [weight.state() for weight in weights]
    for weight, state in zip(weights, states, strict=True):
        weight.load_(state)
    return best


def block_ap(
    w: Tensor,
    scheme: Scheme,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    scale: Tensor | None = None,
    iterations: int = 200,
    learning_rate: float = 1e-3,
    scale_learning_rate: float = 5e-3,
) -> PTQResult:
    r"""The method for a block of one linear layer: train for its output, :math:`\mathrm{tr}(\Delta H \Delta^\top)`.

    Args:
        w: ``(out_features, in_features)``.
        scheme: grid, scale and rotation.
        hessian: ``(in_features, in_features)`` of the layer's inputs.
        inputs: ``(.., in_features)`` instead of the Hessian.
        scale: raw scales ``(R, G)`` to start from; None finds them by the scheme's rule.
        iterations: steps, >= 1.
        learning_rate: of the weights, in units of their rms.
        scale_learning_rate: in units of the starting scales.

    Returns:
        :class:`PTQResult`; the output error is never above that of round-to-nearest.

    Raises:
        ValueError: for a bad option, or a missing or bad Hessian.
    """
    w = check_weight(w, scheme)
    h = resolve_hessian(w, hessian, inputs).float()
    h = h / h.diagonal().mean().clamp_min(1e-30) / w.float().square().mean().clamp_min(1e-30) / w.numel()
    scale = initial_scale(w, scheme) if scale is None else check_scale(w, scheme, scale)
    trained = TrainedWeight(w, scheme, scale)

    def loss(step: int) -> Tensor:
        del step
        delta = trained.weight().float() - w.float()
        return ((delta @ h) * delta).sum()

    def score() -> float:
        with torch.no_grad():
            return float(loss(0))

    descend(
        [trained],
        loss,
        score,
        iterations=iterations,
        learning_rate=learning_rate,
        scale_learning_rate=scale_learning_rate,
    )
    return trained.result()
