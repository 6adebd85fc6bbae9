r"""Code-preserving windows on integer codes, and how well a gain predicts the moves of the deployed weights.

A window is a stretch of steps in which codes stay as they are. It is measured on *codes*: with scales that are learned,
or functions of the weights, the dequantized weight moves inside a window too.

Reference: JacQuant, arXiv:2605.25469 (its Assumption 1; the paper measures no window and gives no calibration).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fewbits.convert import owned_layers
from fewbits.nn import QATLayer
from fewbits.scales import GroupView, stored_scale
from fewbits.surrogates import JacQuant

WINDOWS_FILE = "windows.json"
CALIBRATION_GROUP = 128
"""Weights per group of the calibration where the surrogate has no groups of its own."""


@dataclass
class _Track:
    """Of one layer: codes now, codes before their last flip (-128: none yet), steps at which things happened."""

    codes: Tensor
    previous: Tensor
    last_flip: Tensor
    last_any: int
    flips: Tensor
    lengths: Tensor
    layer_windows: list[int]
    returns: int = 0


class CodeWindows:
    r"""Watches the codes of a model and tells how long they stay, how often they flip, and where.

    A window of one weight ends when its code changes; a window of a layer ends when any of its codes does. Look at
    every step for exact lengths; at longer intervals a flip there and back goes unseen, and lengths are multiples of
    the interval. Each look quantizes every layer once. Memory: seven bytes per quantized weight, on the CPU.

    Example:
        >>> from fewbits.convert import Rule, prepare
        >>> model = prepare(nn.Sequential(nn.Linear(64, 2, bias=False)), Rule(scheme="W2"))
        >>> windows = CodeWindows()
        >>> windows.start(model, step=0)
        >>> with torch.no_grad():
        ...     model[0].weight.neg_()  # doctest: +ELLIPSIS
        Parameter containing:...
        >>> windows.look(model, step=1)
        >>> windows.summary()["0"]["num_steps"]
        1
    """

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}
        self._start = self._now = 0

    @torch.no_grad()
    def start(self, model: nn.Module, *, step: int = 0) -> None:
        """Begin afresh with the codes of this moment."""
        self._start = self._now = step
        self._tracks = {}
        for name, layer in owned_layers(model):
            codes = layer.qtensor().codes.cpu()
            size = layer.scheme.grid.qmax - layer.scheme.grid.qmin + 1
            self._tracks[name] = _Track(
                codes=codes,
                previous=torch.full(codes.shape, -128, dtype=torch.int16),
                last_flip=torch.full(codes.shape, -1, dtype=torch.int32),
                last_any=step,
                flips=torch.zeros(size, size, dtype=torch.int64),
                lengths=torch.zeros(32, dtype=torch.int64),
                layer_windows=[],
            )

    @torch.no_grad()
    def look(self, model: nn.Module, *, step: int) -> None:
        """Compare the codes with those of the last look.

        Args:
            model: the one that :meth:`start` saw.
            step: optimizer steps done, larger than at the last look.

        Raises:
            ValueError: for a step that does not grow, or a layer that was not there at the start.
        """
        if step <= self._now:
            raise ValueError(f"step={step} must be larger than {self._now}, the step of the last look")
        for name, layer in owned_layers(model):
            if name not in self._tracks:
                raise ValueError(f"layer {name!r} was not there at the start; call start again")
            self._update(self._tracks[name], layer.qtensor().codes.cpu(), layer.scheme.grid.qmin, step)
        self._now = step

    @staticmethod
    def _update(t: _Track, codes: Tensor, qmin: int, step: int) -> None:
        where = codes != t.codes
        if not bool(where.any()):
            return
        old, new = t.codes[where].long() - qmin, codes[where].long() - qmin
        t.flips += torch.bincount(old * len(t.flips) + new, minlength=t.flips.numel()).view_as(t.flips)
        t.returns += int((t.previous[where] == codes[where]).sum())
        last = t.last_flip[where]
        lengths = step - last[last >= 0]  # a window that was open at the start has no length
        t.lengths += torch.bincount(lengths.double().log2().floor().long(), minlength=len(t.lengths))
        t.layer_windows.append(step - t.last_any)
        t.previous[where], t.last_flip[where] = t.codes[where].to(torch.int16), step
        t.codes, t.last_any = codes, step

    @property
    def steps(self) -> tuple[int, int]:
        """Optimizer steps at the start and at the last look."""
        return self._start, self._now

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per layer, what happened since the start.

        Returns:
            ``num_steps``; ``flip_rate``: flips per weight and step; ``mean_window``: steps per flip of one weight, the
            open windows counted (infinite without a flip); ``window_counts``: completed windows of single weights by
            length, entry k from :math:`2^k` to :math:`2^{k+1} - 1`; ``never_flipped``: share of weights;
            ``layer_window_mean`` and ``layer_window_max``: windows of the whole layer, in steps, the open one counted
            only in the maximum; ``flips``: counts from code (row) to code (column); ``outer_share``: share of the flips
            that enter or leave an outermost code; ``jump_share``: of flips by more than one code; ``return_share``: of
            flips back to the code before.
        """
        return {name: self._summary(t) for name, t in self._tracks.items()}

    def _summary(self, t: _Track) -> dict[str, Any]:
        num_steps, total = self._now - self._start, int(t.flips.sum())
        index = torch.arange(len(t.flips))
        distance = (index[:, None] - index).abs()
        ends = (index == 0) | (index == len(index) - 1)
        outer = ends[:, None] | ends
        share = {
            "outer_share": int(t.flips[outer].sum()) / max(1, total),
            "jump_share": int(t.flips[distance > 1].sum()) / max(1, total),
            "return_share": t.returns / max(1, total),
        }
        used = int(t.lengths.nonzero().max()) + 1 if bool(t.lengths.any()) else 0
        closed = t.layer_windows
        return {
            "num_steps": num_steps,
            "flip_rate": total / max(1, t.codes.numel() * num_steps),
            "mean_window": t.codes.numel() * num_steps / total if total else float("inf"),
            "window_counts": t.lengths[:used].tolist(),
            "never_flipped": float((t.last_flip < 0).float().mean()),
            "layer_window_mean": sum(closed) / len(closed) if closed else float("inf"),
            "layer_window_max": max([*closed, self._now - t.last_any]),
            "flips": t.flips.tolist(),
            **share,
        }


class WindowsCallback(TrainerCallback):
    """Puts :class:`CodeWindows` into any transformers Trainer; read ``callback.windows.summary()`` afterwards.

    A resumed run starts anew: windows that were open at the interruption have no length.

    Args:
        interval: optimizer steps between looks, >= 1; 1 gives exact lengths.

    Raises:
        ValueError: for an interval below 1.
    """

    def __init__(self, interval: int = 1) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1")
        self.interval = interval
        self.windows = CodeWindows()

    def to_dict(self) -> dict[str, Any]:
        """What a run folder keeps: the interval, the steps that were watched, and the summary of every layer."""
        first, last = self.windows.steps
        return {
            "interval": self.interval,
            "first_step": first,
            "last_step": last,
            "layers": self.windows.summary(),
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the codes."""
        self.windows.start(extract_model_from_parallel(kwargs["model"]), step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the codes if the interval is over."""
        if state.global_step % self.interval == 0:
            self.windows.look(extract_model_from_parallel(kwargs["model"]), step=state.global_step)


@torch.no_grad()
def calibration(layer: QATLayer, old: Tensor) -> dict[str, float]:
    r"""How well the gain B predicts the move of the deployed weights, from the latent move since an old copy.

    With :math:`dW = W - W_{old}` and :math:`dQ = Q(W) - Q(W_{old})`, both at the present scale and in the quantizer's
    own (rotated) coordinates, per group g:

    .. math:: \mathrm{cal}_g = \frac{\|dQ_g - b_g\,dW_g\|^2}{\|dW_g\|^2}, \qquad
              \mathrm{slope}_g = \frac{\langle dQ_g, dW_g\rangle}{\|dW_g\|^2}, \qquad
              \mathrm{cal}_g = \frac{\|dQ_g\|^2}{\|dW_g\|^2} - 2 b_g\,\mathrm{slope}_g + b_g^2.

    The best gain is the slope itself; what it leaves, for weights spread evenly over their cells and moves of size
    :math:`\sigma \ll D`, is :math:`\approx .8 D/\sigma - 1`: small moves of a hard quantizer are predicted by no gain.

    Args:
        layer: a layer; its JacQuant gain counts as it is now, so measure before it is refreshed (gains of saturated
            weights only: saturated at the old copy; b is then the group's mean). Other surrogates are measured against
            ``b = 1`` (the identity STE) in groups of 128.
        old: latent weight ``(out_features, in_features)`` of an earlier step.

    Returns:
        Means over the groups that moved: ``cal`` (with b), ``cal_identity`` (b = 1), ``cal_best`` (b = slope), all >= 0
        and dimensionless; ``slope_mean``, ``slope_std``; ``slope_gain_corr``, where both vary; ``moved_share``: share
        of groups that moved at all (alone if it is 0).

    Example:
        >>> from fewbits.convert import Rule, prepare
        >>> model = prepare(nn.Sequential(nn.Linear(64, 4)), Rule(scheme="W2"))
        >>> calibration(model[0], model[0].weight.detach().clone())
        {'moved_share': 0.0}
    """
    scheme, surrogate = layer.scheme, layer.surrogate
    new = layer.latent()
    s = scheme.scale.view(new.shape).expand(stored_scale(layer.raw_scale(), scheme.scale))

    def parts(w: Tensor) -> tuple[Tensor, Tensor]:
        x = scheme.rotation.apply(w.detach().to(new.device).float())
        return x, scheme.grid.project_(x / s) * s

    (x1, q1), (x0, q0) = parts(new), parts(old)
    view, gains = GroupView(tuple(new.shape), "per_group", CALIBRATION_GROUP), torch.ones_like(x1)
    if isinstance(surrogate, JacQuant):
        size = 1 if surrogate.granularity == "element" else surrogate.group_size
        view = GroupView(tuple(new.shape), "per_group", size)
        gains = surrogate.scale_by_gain(gains, layer.state(), x0 / s, scheme.grid)
    dw, dq = view.split(x1 - x0).double(), view.split(q1 - q0).double()
    moved = dw.square().sum(-1) > 0
    result = {"moved_share": float(moved.double().mean())}
    if not bool(moved.any()):
        return result
    size2 = dw.square().sum(-1)[moved]
    slope, ratio = (dq * dw).sum(-1)[moved] / size2, dq.square().sum(-1)[moved] / size2
    per_weight = view.split(gains).double()
    b = (per_weight.sum(-1) / view.counts().to(per_weight.device))[moved]
    cal = (dq - per_weight * dw).square().sum(-1)[moved] / size2
    result |= {
        "cal": float(cal.mean()),
        "cal_identity": float((ratio - 2 * slope + 1).mean()),
        "cal_best": float((ratio - slope * slope).mean()),
        "slope_mean": float(slope.mean()),
        "slope_std": float(slope.std(correction=0)),
    }
    if float(b.std(correction=0)) > 0 and float(slope.std(correction=0)) > 0:
        result["slope_gain_corr"] = float(torch.corrcoef(torch.stack([slope, b]))[0, 1])
    return result
