"""What a drive is: whatever moves the latent weight, or the weight of the forward pass, besides the gradient.

A drive is a frozen value without state. It acts at four places, all of them in training mode only:

1. ``perturb`` and ``perturb_scale``: noise *before* the quantizer, so the gradient is taken at a noisy latent point;
2. ``forward_weight``: a softer weight in place of the hard one in the forward pass;
3. ``gradient_pull``: a pull toward the grid as a part of the gradient, before the optimizer;
4. ``after_step_``: a pull of the latent weight toward the grid, after optimizer and scheduler.

Evaluation and conversion never see any of it: what ships is the hard quantizer at the latent weight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class DriveContext:
    """What a drive may know of the quantizer in the forward pass.

    Attributes:
        scheme: grid, scale and rotation.
        scale: scales as stored, fp32 ``(R, G)``, units of ``w`` per step.
        progress: share of the optimizer steps that is done, in [0, 1].
    """

    scheme: Scheme
    scale: Tensor
    progress: float


@dataclass(frozen=True, kw_only=True)
class Drive:
    """Base of all drives; it moves nothing. Subclasses are final."""

    name: ClassVar[str]

    @property
    def perturbs(self) -> bool:
        """Whether :meth:`perturb` or :meth:`perturb_scale` does anything; if not, neither is called."""
        return False

    def perturb(self, w: Tensor, pitch: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latent weight with noise. The noise is a constant: the gradient passes as it is.

        Args:
            w: latent weight in the basis in which the quantizer rounds, any floating dtype.
            pitch: distance of neighbouring levels in units of ``w``, broadcastable to ``w``, > 0.
            generator: None is torch's own stream, which checkpoints save and activation checkpointing replays.
        """
        del pitch, generator
        return w

    def perturb_scale(self, scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The raw scales with noise; the gradient passes as it is."""
        del generator
        return scale

    def forward_weight(self, w: Tensor, quantized: Tensor, context: DriveContext) -> Tensor:
        """The weight that the forward pass uses in training.

        Args:
            w: latent weight ``(out_features, in_features)`` as it entered the quantizer.
            quantized: what the hard quantizer made of it, with its gradients (surrogate for ``w``, LSQ for the scale).
            context: scheme, scales and progress.

        Returns:
            ``quantized``, or another value with *its* gradients.
        """
        del w, context
        return quantized

    def gradient_pull(self, *, step: int, total_steps: int) -> float:
        """Factor >= 0 of ``w - Q(w)`` in the gradient of this step; 0 is no pull and costs nothing.

        Args:
            step: the optimizer step that is about to be made: 1 to ``total_steps``.
            total_steps: of the run.
        """
        del step, total_steps
        return 0.0

    def pull(self, *, step: int, total_steps: int, lr: float) -> float:
        """How far to move toward the grid after this step, in [0, 1]; 0 is not at all and costs nothing.

        Args:
            step: optimizer steps done, the last one included: 1 to ``total_steps``.
            total_steps: of the run.
            lr: learning rate of the latent weights after the scheduler's step.
        """
        del step, total_steps, lr
        return 0.0

    @torch.no_grad()
    def after_step_(self, w: Tensor, quantized: Tensor, *, step: int, total_steps: int, lr: float) -> bool:
        r"""Pull the latent weight in place, :math:`w \leftarrow (1 - a) w + a\,Q(w)` with a of :meth:`pull`.

        With a nearest-level quantizer at a stored scale no code changes, and the distance to the grid shrinks by
        exactly 1 - a. A scale that is found anew from the weight (mode ``dynamic``) moves with it.

        Args:
            w: latent weight; overwritten.
            quantized: the hard quantizer's output at ``w``, same shape.
            step: optimizer steps done, the last one included.
            total_steps: of the run.
            lr: learning rate of the latent weights after the scheduler's step.

        Returns:
            Whether the weight was moved.
        """
        amount = self.pull(step=step, total_steps=total_steps, lr=lr)
        if amount == 0:
            return False
        w.lerp_(quantized.to(w.dtype), amount)
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :func:`fewbits.drives.drive_from_dict` is the inverse."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class NoDrive(Drive):
    """Nothing moves the weight but the gradient.

    Example:
        >>> NoDrive().pull(step=1, total_steps=2, lr=0.1)
        0.0
    """

    name: ClassVar[str] = "none"


def draw(law: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal or uniform [0, 1) numbers of the shape, dtype and device of ``like``."""
    device = like.device if generator is None else generator.device
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    function = torch.randn if law == "normal" else torch.rand
    return function(like.shape, generator=generator, device=device, dtype=dtype).to(like.device)
