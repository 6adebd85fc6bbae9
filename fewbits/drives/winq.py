"""WinQ: now and then a pull toward the grid, and gradients at a noisy latent point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.drives._base import Drive, draw


@dataclass(frozen=True, kw_only=True)
class WinQ(Drive):
    r"""Every K steps :math:`w \leftarrow (1 - a) w + a\,Q(w)`; in every forward pass :math:`Q(w + \sigma U)`, U normal.

    The pull is an implicit step on :math:`\frac{\gamma}{2}\|w - Q(w)\|^2` with :math:`a = \eta\gamma/(1 + \eta\gamma)`.
    The noise smooths the staircase: on a sign quantizer the mean weight is :math:`s\,\mathrm{erf}(w/(\sigma\sqrt2))`.
    The surrogate's mask is taken at the noisy point and its gradient goes to the latent weight.

    Args:
        toward_grid: a in [0, 1], the weight of Q(w) as in the paper: 1 puts the weight on the grid, 0 is no pull. (The
            published code's ``reinitialize_alpha`` is 1 - a.)
        interval: optimizer steps between pulls, K; None is a quarter of the run (the paper's 60k of 240k). No pull
            follows the last step, where it could change nothing.
        noise: sigma >= 0; in units of ``w`` (``absolute``, the paper: .001) or in cells (``step``).
        noise_unit: of ``noise`` and ``scale_noise``.
        scale_noise: standard deviation of noise on the raw scale: in units of ``w`` per step, or relative to the scale
            (``step``). The published code adds .001 to its clip value, 2**(b-1) steps long, which is
            ``scale_noise=.001 / 2**(b-1)`` here; the paper's formula has none.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> w, q = torch.tensor([-1.3, 0.9]), torch.tensor([-1.0, 0.5])
        >>> WinQ(toward_grid=0.4, interval=10).after_step_(w, q, step=10, total_steps=100, lr=0.0), w
        (True, tensor([-1.1800,  0.7400]))

    Reference: arXiv:2605.17471.
    """

    name: ClassVar[str] = "winq"
    toward_grid: float = 0.4
    interval: int | None = None
    noise: float = 0.001
    noise_unit: Literal["absolute", "step"] = "absolute"
    scale_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.toward_grid <= 1:
            raise ValueError(f"toward_grid={self.toward_grid} is outside [0, 1]; it is the weight of Q(w)")
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"interval={self.interval} must be at least 1 step, or None for a quarter of the run")
        for key in ("noise", "scale_noise"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(f"{key}={getattr(self, key)} must be finite and at least 0")
        if self.noise_unit not in ("absolute", "step"):
            raise ValueError(f"noise_unit={self.noise_unit!r} is unknown; use 'absolute' or 'step'")

    @property
    def perturbs(self) -> bool:
        """Whether there is noise."""
        return self.noise > 0 or self.scale_noise > 0

    def perturb(self, w: Tensor, pitch: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``w`` plus Gaussian noise."""
        if self.noise == 0:
            return w
        noise = draw("normal", w, generator) * (self.noise if self.noise_unit == "absolute" else self.noise * pitch)
        return w + noise.to(w.dtype)

    def perturb_scale(self, scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The raw scale plus Gaussian noise; a scale that turns negative is stored as the smallest positive one."""
        if self.scale_noise == 0:
            return scale
        size = self.scale_noise if self.noise_unit == "absolute" else self.scale_noise * scale.detach()
        return scale + draw("normal", scale, generator) * size

    def pull(self, *, step: int, total_steps: int, lr: float) -> float:
        """``toward_grid`` at multiples of the interval, else 0; the learning rate plays no part."""
        del lr
        interval = max(1, total_steps // 4) if self.interval is None else self.interval
        return 0.0 if step % interval or step >= total_steps else self.toward_grid
