"""JacQuant: a learned block-diagonal Jacobian, one scalar per group of weights (or per weight)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fewbits.grids import AnyGrid
from fewbits.scales import GroupView, stored_scale
from fewbits.scheme import Scheme
from fewbits.surrogates._base import State, Surrogate, inside
from fewbits.surrogates.sensitivity import Law, check_law, dither_exact, needs_refresh, probe_products

Mode = Literal["dither_exact", "dither_crn", "probe"]


@dataclass(frozen=True, kw_only=True)
class JacQuant(Surrogate):
    r"""Gradient :math:`B v` with a gain B that follows the measured sensitivity of the quantizer.

    Every ``interval`` optimizer steps, per group g of ``group_size`` consecutive weights of a row,

    .. math:: b_g \leftarrow (1 - \beta)\,b_g + \beta\,\hat b_g,

    where :math:`\hat b_g` comes from one of three estimators at frozen scale: ``dither_exact`` (no noise; its mean is
    the share of weights inside the outermost levels), ``dither_crn`` (finite difference under common dither) or
    ``probe`` (finite difference of the hard quantizer). The EMA is of the raw estimate, clamped on use; B starts at 1.

    The gain in use is :math:`c_g = \mathrm{clamp}(b_g, \mathrm{gain\_min}, 1)^{\mathrm{power}}`, or its size relative
    to a mean, so that only a part of it acts:

    ========== ===================================== ==========================================================
    relative   gain in use at refresh n              what is left
    ========== ===================================== ==========================================================
    ``none``   :math:`c_{g,n}`                       all (the paper)
    ``time``   :math:`c_{g,n} / M_{g,n}`, with       its change in time: 1 at the first refresh, 1 for a gain
               :math:`M_{g,n} = M_{g,n-1} +          that stays, at most n
               (c_{g,n} - M_{g,n-1}) / n`
    ``layer``  :math:`c_{g,n} /` mean over the       its place: every layer keeps its mean step, groups share
               layer's groups                        it out
    ========== ===================================== ==========================================================

    (0 / 0 counts as 1.) With ``where="saturated"`` only weights beyond the outermost levels get the gain and all others
    1: between the identity (gain 1) and the clipped STE (gain 0), at a place that follows ``v`` at every step.

    When a layer refreshes: every ``interval`` steps, or at multiples of ``check_interval`` if its weights have moved
    (``refresh="drift"``: mean abs(w - w_last) exceeds ``drift_steps`` cells) or its codes have (``"flips"``: the share
    of codes that differ from those of the last refresh exceeds ``flip_share``). The first check always refreshes. Drift
    keeps an fp32 copy of the weight, flips one byte per weight and quantizes the layer at each check.

    Args:
        mode: the estimator.
        granularity: ``group`` (one scalar per group) or ``element``.
        group_size: weights per gain, any positive number; the last group of a row may be short.
        sigma: probe size, > 0; in steps (``sigma_unit="step"``) or in units of ``w`` (``"absolute"``).
        num_probes: probes averaged per refresh.
        law: smoothing law of ``dither_exact``: ``uniform`` (the paper), ``triangular`` or ``gaussian``.
        law_width: width of the law in cells (standard deviation for the Gaussian); None is the natural one (1, 2, 1/2),
            see :func:`~fewbits.surrogates.sensitivity.dither_exact`.
        interval: optimizer steps between refreshes, K.
        refresh: ``interval`` (fixed K), ``drift`` or ``flips``.
        drift_steps: threshold of the drift, in cells, > 0.
        flip_share: threshold of the changed codes, a share in [0, 1).
        check_interval: optimizer steps between looks at the drift or the codes.
        beta: weight of the *new* estimate in the EMA, (0, 1].
        clip_first: clip the estimate to [0, 1] before the EMA (the paper's literal order; biased, see the docs).
        gain_min: lower clamp of the gain on use, in [0, 1].
        power: exponent of the clamped gain, finite and not 0; towards 0 the gain becomes the identity's 1, above 1 it
            is sharper, below 0 (only with ``gain_min > 0``) it favours what the estimate damps.
        relative: ``none``, ``time`` or ``layer``, see above; other than ``none`` the gain may exceed 1.
        where: ``all`` weights, or ``saturated`` ones only.
        compose_mask: multiply by the clip mask at the outermost levels too.
        apply: ``grad`` multiplies the gradient (the paper); ``update`` multiplies the optimizer's step, which an
            adaptive optimizer cannot cancel.
        control: ``none``, or a control experiment that keeps how large the gain is but not where: ``constant`` uses
            the layer's mean gain everywhere, ``shuffled`` permutes the gains within the layer, anew at each refresh. If
            a control trains as well as JacQuant, the gain is a step size or noise, not sensitivity.
        seed: of the estimator's own random stream.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> JacQuant.preset("paper_literal").sigma
        0.0001

    Reference: arXiv:2605.25469.
    """

    name: ClassVar[str] = "jacquant"
    mode: Mode = "dither_exact"
    granularity: Literal["group", "element"] = "group"
    group_size: int = 128
    sigma: float = 0.5
    sigma_unit: Literal["step", "absolute"] = "step"
    num_probes: int = 1
    law: Law = "uniform"
    law_width: float | None = None
    interval: int = 100
    refresh: Literal["interval", "drift", "flips"] = "interval"
    drift_steps: float = 0.05
    flip_share: float = 0.05
    check_interval: int = 10
    beta: float = 0.1
    clip_first: bool = False
    gain_min: float = 0.0
    power: float = 1.0
    relative: Literal["none", "time", "layer"] = "none"
    where: Literal["all", "saturated"] = "all"
    compose_mask: bool = False
    apply: Literal["grad", "update"] = "grad"
    control: Literal["none", "constant", "shuffled"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "mode": get_args(Mode),
            "granularity": ("group", "element"),
            "sigma_unit": ("step", "absolute"),
            "apply": ("grad", "update"),
            "refresh": ("interval", "drift", "flips"),
            "relative": ("none", "time", "layer"),
            "where": ("all", "saturated"),
            "control": ("none", "constant", "shuffled"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r} is unknown; use one of {', '.join(allowed)}")
        for key in ("group_size", "num_probes", "interval", "check_interval"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        check_law(self.law, self.law_width)
        if self.mode != "dither_exact" and (self.law != "uniform" or self.law_width is not None):
            raise ValueError(
                f"law={self.law!r}, law_width={self.law_width} only act in mode 'dither_exact', not {self.mode!r}"
            )
        if not self.drift_steps > 0:
            raise ValueError(
                f"drift_steps={self.drift_steps} must be positive; use refresh='interval' for a fixed period"
            )
        if not self.sigma > 0:
            raise ValueError(f"sigma={self.sigma} must be positive")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} is outside [0, 1]; it is the weight of the new estimate")
        if not 0 <= self.gain_min <= 1:
            raise ValueError(f"gain_min={self.gain_min} is outside [0, 1]")
        if not 0 <= self.flip_share < 1:
            raise ValueError(f"flip_share={self.flip_share} is outside [0, 1); it is a share of the codes")
        if not math.isfinite(self.power) or self.power == 0 or (self.power < 0 and self.gain_min == 0):
            raise ValueError(
                f"power={self.power} must be finite and not 0 (that is STE), and positive unless gain_min > 0"
            )
        if self.where == "saturated" and self.compose_mask:
            raise ValueError("where='saturated' with compose_mask has no effect: the mask zeroes the saturated weights")

    @classmethod
    def preset(cls, preset: str, **changes: Any) -> JacQuant:
        """``recommended``, ``probe_rel``, ``paper_literal`` or ``paper_decay``, with some fields changed."""
        literal = cls(mode="probe", sigma=1e-4, sigma_unit="absolute", clip_first=True, beta=0.9)
        presets = {
            "recommended": cls(),
            "probe_rel": cls(mode="probe"),
            "paper_literal": literal,
            "paper_decay": replace(literal, beta=0.1),
        }
        if preset not in presets:
            raise ValueError(f"unknown preset {preset!r}; known presets: {', '.join(presets)}")
        return replace(presets[preset], **changes)

    @property
    def needs_v(self) -> bool:  # type: ignore[override]
        """Only the composed mask and the gradient gain of saturated weights read ``v``."""
        return self.compose_mask or (self.where == "saturated" and self.apply == "grad")

    @property
    def _used_is_kept(self) -> bool:
        """Whether ``gain`` holds the gain in use, and ``measured`` the average that it is made of."""
        return self.relative != "none" or self.power != 1

    def _view(self, shape: Sequence[int]) -> GroupView:
        return GroupView(tuple(shape), "per_group", 1 if self.granularity == "element" else self.group_size)

    def init_state(self, shape: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """``gain``, fp32 ones: ``(rows, ceil(in_features / group_size))``, or the weight's shape per element.

        With ``refresh="drift"`` also ``w_last``, the weight at the last refresh, fp32; infinite before the first one.
        With ``refresh="flips"`` also ``codes_last``, int8, and ``num_refreshes``. With a control, a power or a relative
        gain also ``measured``, the EMA without them; with ``relative="time"`` also ``mean`` and ``num_refreshes``.
        """
        state = {"gain": torch.ones(self._view(shape).scale_shape, device=device)}
        if self.control != "none" or self._used_is_kept:
            state["measured"] = torch.ones_like(state["gain"])
        if self.relative == "time":
            state["mean"] = torch.zeros_like(state["gain"])
        if self.relative == "time" or self.refresh == "flips":
            state["num_refreshes"] = torch.zeros((), dtype=torch.int64, device=device)
        if self.refresh == "drift":
            state["w_last"] = torch.full(tuple(shape), torch.inf, device=device)
        if self.refresh == "flips":
            state["codes_last"] = torch.zeros(tuple(shape), dtype=torch.int8, device=device)
        return state

    def gain(self, state: State) -> Tensor:
        """The gain in use, shape of the groups: the EMA clamped to ``[gain_min, 1]`` unless it is relative."""
        return state["gain"] if self._used_is_kept else state["gain"].clamp(self.gain_min, 1.0)

    def scale_by_gain(self, x: Tensor, state: State, v: Tensor | None = None, grid: AnyGrid | None = None) -> Tensor:
        """``x`` times the gain of its group; ``where="saturated"`` needs ``v`` and ``grid`` and leaves the rest."""
        view = self._view(x.shape)
        scaled = view.merge(view.split(x) * self.gain(state)[..., None])
        if self.where == "all":
            return scaled
        assert v is not None
        assert grid is not None
        return torch.where(inside(v, grid, "level"), x, scaled)

    def pullback(self, grad: Tensor, v: Tensor | None, grid: AnyGrid, state: State) -> Tensor:
        """``B * grad`` (times the clip mask if ``compose_mask``); ``grad`` itself if the gain goes to the update."""
        if self.apply == "grad":
            grad = self.scale_by_gain(grad, state, v, grid)
        if self.compose_mask:
            assert v is not None
            grad = grad * inside(v, grid, "level").to(grad.dtype)
        return grad

    @torch.no_grad()
    def estimate(self, w: Tensor, scale: Tensor, scheme: Scheme, generator: torch.Generator) -> Tensor:
        """The raw estimate, same shape as the gain; the scale is frozen at its stored value.

        Args:
            w: latent weight ``(out_features, in_features)``; cast to fp32, since a bf16 ``w + d`` may equal ``w``.
            scale: raw scales ``(R, G)``.
            scheme: the forward quantizer.
            generator: CPU generator of the estimator's own stream.
        """
        v, s = steps_of(w, scale, scheme)
        view = self._view(w.shape)
        if self.mode == "dither_exact":
            exact = dither_exact(v, scheme.grid, law=self.law, law_width=self.law_width)
            return view.split(exact).sum(-1) / view.counts().to(v.device)
        sigma: Tensor | float = self.sigma if self.sigma_unit == "absolute" else self.sigma * scheme.grid.step * s
        num, den = probe_products(
            v,
            s,
            scheme.grid,
            sigma=sigma,
            num_probes=self.num_probes,
            generator=generator,
            common_dither=self.mode == "dither_crn",
        )
        num, den = view.split(num).sum(-1), view.split(den).sum(-1)
        return num / (den + 1e-12 * den.mean())

    @torch.no_grad()
    def is_due(self, step: int, state: State, w: Tensor, scale: Tensor, scheme: Scheme) -> bool:
        """Whether the gain is to be refreshed after this many optimizer steps; costs nothing between checks.

        The drift is that of the latent weight itself: a rotation changes single entries, not the size of a move.

        Args:
            step: optimizer steps done, >= 1.
            state: what :meth:`init_state` made.
            w: latent weight ``(out_features, in_features)``.
            scale: raw scales ``(R, G)``.
            scheme: the forward quantizer.
        """
        if self.refresh == "interval":
            return step % self.interval == 0
        if step % self.check_interval:
            return False
        if self.refresh == "flips":
            if int(state["num_refreshes"]) == 0:
                return True
            codes = codes_of(w, scale, scheme)
            return float((codes != state["codes_last"]).double().mean()) > self.flip_share
        s = scheme.scale.view(w.shape).expand(stored_scale(scale.detach(), scheme.scale))
        return needs_refresh(w.detach(), state["w_last"], s, scheme.grid, drift_steps=self.drift_steps)

    @torch.no_grad()
    def refresh_(
        self, state: State, w: Tensor, scale: Tensor, scheme: Scheme, generator: torch.Generator
    ) -> dict[str, float]:
        """One EMA step of the gain in place; returns statistics of the raw estimate and of the gain in use."""
        raw = self.estimate(w, scale, scheme, generator)
        new = raw.clamp(0, 1) if self.clip_first else raw
        measured = state.get("measured", state["gain"])
        measured.mul_(1 - self.beta).add_(new, alpha=self.beta)
        if "num_refreshes" in state:
            state["num_refreshes"].add_(1)
        used = self._in_use(measured, state) if self._used_is_kept else measured
        if self.control == "constant":  # the mean of the gains in use: the same mean step
            state["gain"].fill_((used if self._used_is_kept else used.clamp(self.gain_min, 1.0)).mean())
        elif self.control == "shuffled":
            order = torch.randperm(used.numel(), generator=generator).to(used.device)
            state["gain"].copy_(used.flatten()[order].view_as(used))
        elif self._used_is_kept:
            state["gain"].copy_(used)
        if self.refresh == "drift":
            state["w_last"].copy_(w)
        elif self.refresh == "flips":
            state["codes_last"].copy_(codes_of(w, scale, scheme))
        return gain_statistics(raw, self.gain(state))

    def _in_use(self, measured: Tensor, state: State) -> Tensor:
        """The gain that acts, by ``power`` and ``relative``; advances the running mean."""
        clamped = measured.clamp(self.gain_min, 1.0)
        gain = clamped if self.power == 1 else clamped.pow(self.power)
        if self.relative == "none":
            return gain
        if self.relative == "layer":
            mean = gain.mean()
        else:
            mean = state["mean"].add_((gain - state["mean"]) / state["num_refreshes"])
        return torch.where(mean > 0, gain / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)


def steps_of(w: Tensor, scale: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """``(v, s)``: a latent weight in steps, in the quantizer's own (rotated) coordinates, and the scale of each."""
    x = scheme.rotation.apply(w.detach().float())
    s = scheme.scale.view(w.shape).expand(stored_scale(scale.detach(), scheme.scale))
    return x / s, s


def codes_of(w: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Codes as int8 (eight-bit unsigned ones wrap, which keeps them distinct)."""
    return scheme.grid.encode(steps_of(w, scale, scheme)[0]).to(torch.int8)


def gain_statistics(raw: Tensor, gain: Tensor) -> dict[str, float]:
    """Mean, standard deviation and quantiles of the gain in use, and the share of zero raw estimates."""
    flat = gain.flatten().float()
    if flat.numel() > 1_000_000:  # torch.quantile refuses more than 2**24 values; a regular sample is enough
        flat = flat[:: flat.numel() // 1_000_000 + 1]
    marks = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=flat.device)
    quantiles = torch.quantile(flat, marks).tolist()
    return {
        "gain_mean": float(gain.mean()),
        "gain_std": float(gain.std(correction=0)),
        **{f"gain_q{q:02d}": value for q, value in zip((5, 25, 50, 75, 95), quantiles, strict=True)},
        "zero_share": float((raw == 0).float().mean()),
        "raw_mean": float(raw.mean()),
    }
