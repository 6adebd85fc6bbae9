"""QATCallback: everything that fewbits does around an optimizer step, for any transformers Trainer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fewbits.convert import owned_layers
from fewbits.nn import QATLayer
from fewbits.optim.driving import add_pulls_to_gradients_, apply_drives_, set_progress_
from fewbits.surrogates import JacQuant
from fewbits.surrogates.jacquant import steps_of
from fewbits.training.curvature import CurvatureRefresh, scheduled_layers
from fewbits.training.metrics import MetricsFile
from fewbits.training.telemetry import Telemetry


def refresh_generator(seed: int, layer: str, step: int) -> torch.Generator:
    """The estimator's own random stream: a function of seed, layer and step, so that ranks and resumed runs agree."""
    digest = hashlib.sha256(f"{seed}/{layer}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class QATCallback(TrainerCallback):
    """Refreshes JacQuant's gain and EWGS's delta, applies gains to updates, and records telemetry.

    Put it into the ``callbacks`` of your own Trainer; :class:`~fewbits.training.QATTrainer` brings it along.

    Args:
        metrics_path: ``metrics.jsonl`` to append to, or None.
        telemetry_interval: optimizer steps between looks at layers whose surrogate has no interval of its own.
        calibration: also record how well the gain predicts the moves of the deployed weights (a copy of the weights on
            the CPU, no extra pass); ``QATTrainer(...).qat_callback.telemetry.calibration = True`` does the same.
        curvature: measures EWGS's delta; needed if a layer's EWGS has a Hessian schedule.

    Example:
        >>> QATCallback(telemetry_interval=50).telemetry_interval
        50
    """

    def __init__(
        self,
        metrics_path: str | Path | None = None,
        *,
        telemetry_interval: int = 100,
        calibration: bool = False,
        curvature: CurvatureRefresh | None = None,
    ) -> None:
        if telemetry_interval < 1:
            raise ValueError(f"telemetry_interval={telemetry_interval} must be at least 1")
        self.metrics = None if metrics_path is None else MetricsFile(metrics_path)
        self.telemetry_interval = telemetry_interval
        self.telemetry = Telemetry(calibration=calibration)
        self.curvature = curvature
        self.last: dict[str, dict[str, float]] = {}
        self._before: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the start; after a resume, drop metrics of steps that will run again."""
        model = extract_model_from_parallel(kwargs["model"])
        if not any(True for _ in owned_layers(model)):
            raise ValueError("the model has no prepared layer; call fewbits.prepare before training")
        if self.curvature is None and (waiting := scheduled_layers(model)):
            raise ValueError(
                f"{next(iter(waiting))}: ewgs with a Hessian schedule needs the loss; use QATTrainer, or give "
                "QATCallback(curvature=CurvatureRefresh(loss, batches))"
            )
        set_progress_(model, state.global_step / max(1, state.max_steps))
        self.telemetry.start(model)
        if self.metrics is not None and state.is_world_process_zero:
            self.metrics.resume_at(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add coupled pulls to gradients, and keep the weights whose update is to be multiplied by the gain."""
        model = extract_model_from_parallel(kwargs["model"])
        add_pulls_to_gradients_(model, step=state.global_step + 1, total_steps=state.max_steps)
        self._before = {name: layer.weight.detach().clone() for name, layer in owned_layers(model) if _on_update(layer)}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Multiply the optimizer's step by the gain: ``w <- w0 + b (w - w0)``."""
        if not self._before:
            return
        model = extract_model_from_parallel(kwargs["model"])
        with torch.no_grad():
            for name, layer in owned_layers(model):
                if name in self._before:
                    scale_update_(layer, self._before[name])
        self._before = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refresh gains and look at layers whose interval is over."""
        step = state.global_step
        model = extract_model_from_parallel(kwargs["model"])
        apply_drives_(model, step=step, total_steps=state.max_steps, lr=latent_learning_rate(kwargs.get("optimizer")))
        measured = {} if self.curvature is None else self.curvature.refresh_(model, step)
        looked: dict[str, dict[str, float]] = {}
        for name, layer in owned_layers(model):
            if name not in measured and not self._is_due(step, layer):
                continue
            looked[name] = self.telemetry.look(name, layer) | measured.get(name, {})
            if isinstance(layer.surrogate, JacQuant):
                generator = refresh_generator(layer.surrogate.seed, name, step)
                looked[name] |= layer.surrogate.refresh_(
                    layer.state(), layer.latent(), layer.raw_scale(), layer.scheme, generator
                )
        if looked:
            self.last = looked
            if self.metrics is not None and state.is_world_process_zero:
                self.metrics.write(step, {**mean_over_layers(looked), "layers": looked})

    def _is_due(self, step: int, layer: QATLayer) -> bool:
        if isinstance(layer.surrogate, JacQuant):
            return layer.surrogate.is_due(step, layer.state(), layer.latent(), layer.raw_scale(), layer.scheme)
        return step % self.telemetry_interval == 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A schedule-free optimizer leaves its average in the model, which is what it evaluates and deploys."""
        optimizer = kwargs.get("optimizer")
        if callable(getattr(optimizer, "eval", None)):
            optimizer.eval()  # type: ignore[union-attr]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the trainer's own logs."""
        if self.metrics is not None and logs and state.is_world_process_zero and "train_runtime" not in logs:
            self.metrics.write(state.global_step, dict(logs))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the telemetry's state beside the checkpoint."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.telemetry.save(folder)


def latent_learning_rate(optimizer: Any) -> float:
    """The latent weights' current rate: of the group with that name, or of the first group of another optimizer."""
    groups = [] if optimizer is None else optimizer.param_groups
    named = [group["lr"] for group in groups if group.get("name") == "latent"]
    return float((named or [group["lr"] for group in groups] or [0.0])[0])


def _on_update(layer: QATLayer) -> bool:
    return isinstance(layer.surrogate, JacQuant) and layer.surrogate.apply == "update" and layer.weight.requires_grad


@torch.no_grad()
def scale_update_(layer: QATLayer, before: Tensor) -> None:
    """Replace the step that the optimizer just made by the gain times that step, in place.

    The gain belongs to the quantizer's own (rotated) coordinates; what is saturated is decided by the weights before
    the step at the present scale.
    """
    assert isinstance(layer.surrogate, JacQuant)
    w, rotation = layer.weight, layer.scheme.rotation
    old = before.t() if layer.transposed else before
    update = rotation.apply((layer.latent() - old).float())
    v = None
    if layer.surrogate.where == "saturated":
        v, _ = steps_of(old, layer.raw_scale(), layer.scheme)
    update = rotation.invert(layer.surrogate.scale_by_gain(update, layer.state(), v, layer.scheme.grid))
    w.copy_(before + (update.t() if layer.transposed else update).to(w.dtype))


def mean_over_layers(looked: dict[str, dict[str, float]]) -> dict[str, float]:
    """Plain mean over layers of every statistic, with the prefix ``qat/``."""
    keys = sorted({key for values in looked.values() for key in values})
    result = {}
    for key in keys:
        values = [v[key] for v in looked.values() if key in v]
        result[f"qat/{key}"] = sum(values) / len(values)
    return result


def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first parameter that holds a NaN or an infinity, or whose gradient does; None if all are finite."""
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            return name
    for name, p in model.named_parameters():
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            return f"gradient of {name}"
    return None
