"""QATTrainer: transformers' Trainer with parameter groups, distillation and a watch on the loss."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, default_data_collator

from fewbits.convert import owned_layers
from fewbits.data import TokenBlocks
from fewbits.objectives import Objective, TopKLogits, feature_distance
from fewbits.optim.build import build_optimizer, check_optimizer_name, is_schedule_free
from fewbits.optim.codebooks import CodebookFit
from fewbits.optim.variance_reduced import VarianceReduced, VarianceReduction
from fewbits.optim.zeroth_order import ZerothOrder, zeroth_order_optimizer
from fewbits.teacher_logits import BATCH_KEYS, DistilledBlocks
from fewbits.training.activation_noise import ActivationNoise
from fewbits.training.averaging import EMACallback, WeightEMA
from fewbits.training.best import KeepBest
from fewbits.training.callback import QATCallback, first_non_finite
from fewbits.training.codebooks import CodebookCallback, codebook_layers
from fewbits.training.consistency import CONSISTENCY_FILE, Consistency
from fewbits.training.curvature import curvature_of
from fewbits.training.variance import (
    FixedBatches,
    check_drives,
    collect_batches,
    load_variance,
    reference_indices,
    save_variance,
    the_same_batch,
)

logger = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the message names the step, the layer and the last good checkpoint."""


@dataclass(frozen=True, kw_only=True)
class QATSettings:
    """What QAT needs beyond ``transformers.TrainingArguments`` (whose ``learning_rate`` is that of latent weights).

    Args:
        objective: the loss.
        scale_learning_rate: of learned scales; None means the latent weights' rate.
        rest_learning_rate: of norms, biases and embeddings in full precision; 0 leaves them fixed; None as above.
        telemetry_interval: optimizer steps between looks at the layers.
        optim: optimizer of latent weights, see :func:`fewbits.optim.build_optimizer`; None means ``args.optim``.
        rest_optim: optimizer of everything else; None means the same.
        optim_options: keyword arguments of the optimizer of latent weights.
        activation_noise: probability of :class:`~fewbits.training.activation_noise.ActivationNoise` per layer and pass.
        activation_noise_bits: of the notional quantizer whose step is the width of that noise.
        ema_decay: ship the mean :class:`~fewbits.training.averaging.WeightEMA` of the iterates; None ships the last.
        keep_best_interval: steps between looks of :class:`~fewbits.training.best.KeepBest`, if the trainer has blocks.
        codebooks: when codebooks are fitted; None leaves them as the schemes have them.
        calibration: also record how well the gain predicts the moves of the deployed weights, see
            :func:`fewbits.training.windows.calibration`.
        variance_reduction: a control variate around the optimizer, see :mod:`fewbits.optim.variance_reduced`; None is
            plain training, without a trace of it. On one process, without fp16.
        num_reference_batches: batches of its reference gradient, spread evenly over the training data; with ``saga``
            training sees these batches only.
        zeroth_order: estimate gradients from forward passes alone; None is backpropagation.

    Raises:
        ValueError: for negative rates, counts below 1, an unknown optimizer, or a mean beside a schedule-free one.
    """

    objective: Objective = field(default_factory=Objective)
    scale_learning_rate: float | None = None
    rest_learning_rate: float | None = None
    telemetry_interval: int = 100
    optim: str | None = None
    rest_optim: str | None = None
    optim_options: Mapping[str, Any] = field(default_factory=dict)
    activation_noise: float = 0.0
    activation_noise_bits: int = 8
    ema_decay: float | None = None
    keep_best_interval: int = 50
    codebooks: CodebookFit | None = None
    calibration: bool = False
    variance_reduction: VarianceReduction | None = None
    num_reference_batches: int = 16
    zeroth_order: ZerothOrder | None = None

    def __post_init__(self) -> None:
        for name in ("scale_learning_rate", "rest_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be a finite number >= 0")
        for name in ("telemetry_interval", "num_reference_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for chosen in (self.optim, self.rest_optim):
            if chosen is not None:
                check_optimizer_name(chosen)
        ActivationNoise(self.activation_noise, self.activation_noise_bits)
        if self.zeroth_order is not None and self.variance_reduction is not None:
            raise ValueError("variance_reduction corrects a backward pass, which zeroth_order does without; drop one")
        if self.ema_decay is not None:
            WeightEMA(self.ema_decay)
            if is_schedule_free(self.optim):
                raise ValueError(f"ema_decay={self.ema_decay} with optim={self.optim!r}, which has an average already")


class QATTrainer(Trainer):
    """``transformers.Trainer`` for a prepared model: DDP, resume, logging and accumulation are the Trainer's own.

    Args:
        model: a model after :func:`fewbits.prepare`.
        args: the Trainer's arguments; ``metrics.jsonl`` is written to ``args.output_dir``.
        teacher: frozen full-precision model for distillation; it is put into eval mode and gets no gradient. Training
            on :class:`~fewbits.teacher_logits.DistilledBlocks` needs none for ``kl``.
        settings: objective and learning rates.
        best_blocks: held-out text on which the deployed model is scored; the best iterate is the result.
        **kwargs: passed to ``Trainer`` (``train_dataset``, ``eval_dataset``, ``callbacks``, ...).

    Raises:
        ValueError: for a model that is not prepared, a missing teacher, or one that shares tensors with the model.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a per-batch mean

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        teacher: nn.Module | None = None,
        settings: QATSettings | None = None,
        best_blocks: TokenBlocks | None = None,
        **kwargs: Any,
    ) -> None:
        self.settings = settings or QATSettings()
        if not any(True for _ in owned_layers(model)):
            raise ValueError("the model has no prepared layer; call fewbits.prepare before training")
        cached = isinstance(kwargs.get("train_dataset"), DistilledBlocks) and not self.settings.objective.features
        if self.settings.objective.needs_teacher and teacher is None and not cached:
            raise ValueError(
                "the objective distils (kl > 0 or features > 0) but there is no teacher; pass teacher= (for example a "
                "deepcopy of the model before prepare) or Objective(cross_entropy=1, kl=0)"
            )
        if teacher is not None:
            shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in teacher.parameters()}
            if shared:
                raise ValueError("teacher and model share tensors; deepcopy the model before prepare")
            teacher.eval().requires_grad_(False)
        kwargs.setdefault("data_collator", default_data_collator)
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        self.qat_callback = QATCallback(
            Path(self.args.output_dir or ".") / "metrics.jsonl",
            telemetry_interval=self.settings.telemetry_interval,
            calibration=self.settings.calibration,
            curvature=curvature_of(self),
        )
        self.add_callback(self.qat_callback)
        self.variance: VarianceReduced | None = None
        self._waiting: list[Any] = []
        if self.settings.variance_reduction is not None:
            self._check_variance(model)
        self._loaders: list[Callable[[Path], None]] = [self.qat_callback.telemetry.load]
        self._add_codebooks(model, best_blocks)
        ActivationNoise(self.settings.activation_noise, self.settings.activation_noise_bits).attach(model)
        self._add_averages(best_blocks)

    def _add_codebooks(self, model: nn.Module, best_blocks: TokenBlocks | None) -> None:
        fit = self.settings.codebooks
        if fit is None:
            return
        if not codebook_layers(model):
            raise ValueError("codebooks are to be fitted, but no layer has one; use a scheme such as W2KG64")
        moves = fit.step > 0 or fit.refit_interval is not None
        averaged = self.settings.ema_decay is not None or self.settings.objective.consistency > 0
        if moves and (best_blocks is not None or averaged):
            raise ValueError(
                "an earlier or mean iterate has no codebook of its own: fit once, at step 0, or do without"
            )
        callback = CodebookCallback(fit)
        self.add_callback(callback)
        self._loaders.append(partial(callback.load, model=model))

    def _add_averages(self, best_blocks: TokenBlocks | None) -> None:
        s, ema = self.settings, None
        self.consistency: Consistency | None = None
        if s.objective.consistency > 0:
            o = s.objective
            self.consistency = Consistency(decay=o.consistency_decay, dropout=o.consistency_dropout)
            self.add_callback(EMACallback(self.consistency.ema, file=CONSISTENCY_FILE, deploy=False))
            self._loaders.append(partial(self.consistency.ema.load, file=CONSISTENCY_FILE))
        if s.ema_decay is not None:
            ema = WeightEMA(s.ema_decay)
            self.add_callback(EMACallback(ema))
            self._loaders.append(ema.load)
        if best_blocks is not None:
            distils = s.objective.kl > 0 and self.teacher is not None
            best = KeepBest(
                best_blocks,
                interval=s.keep_best_interval,
                teacher=self.teacher if distils else None,
                cross_entropy=s.objective.cross_entropy if distils else 1.0,
                kl=s.objective.kl if distils else 0.0,
                ema=ema,
                metrics=self.qat_callback.metrics,
            )
            self.add_callback(best)
            self._loaders.append(best.load)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the settings name, over latent weights, scales and the rest."""
        if self.optimizer is None:
            opt_model: Any = self.model if model is None else model
            s = self.settings
            build = build_optimizer if s.zeroth_order is None else partial(zeroth_order_optimizer, s.zeroth_order)
            self.optimizer = build(
                s.optim or str(getattr(self.args.optim, "value", self.args.optim)),
                opt_model,
                self.args,
                scale_learning_rate=s.scale_learning_rate,
                rest_learning_rate=s.rest_learning_rate,
                rest_optim=s.rest_optim,
                options=s.optim_options,
            )
            if s.variance_reduction is not None:
                self.variance = self._make_variance(opt_model, s.variance_reduction)
        return self.optimizer

    def _check_variance(self, model: nn.Module) -> None:
        """Refuse what the two passes of a step do not work with, before anything is allocated."""
        if self.args.world_size > 1 or self.args.n_gpu > 1 or self.args.fp16:
            raise ValueError(
                "variance reduction runs on one process and one device, without fp16; train plainly or use bf16"
            )
        if self.settings.objective.consistency > 0 or self.settings.codebooks is not None:
            raise ValueError(
                "variance reduction needs one loss along the run; consistency and fits of codebooks change it"
            )
        check_drives(model)
        self._reference_indices()

    def _reference_indices(self) -> list[list[int]]:
        size = len(self.train_dataset) if self.train_dataset is not None else 0  # type: ignore[arg-type]
        return reference_indices(size, self.args.per_device_train_batch_size, self.settings.num_reference_batches)

    def _make_variance(self, model: nn.Module, settings: VarianceReduction) -> VarianceReduced:
        assert self.optimizer is not None
        batches = collect_batches(self.train_dataset, self._reference_indices(), self.data_collator)
        reference = [self._prepare_inputs(batch) for batch in batches]
        variance = VarianceReduced(self.optimizer, model, reference, settings)
        logger.warning(
            "variance reduction (%s) keeps %.1f MiB more beside the weights and makes %.2f forward-and-backward "
            "passes per minibatch instead of 1",
            settings.form,
            variance.extra_bytes / 2**20,
            settings.expected_passes(len(reference)),
        )
        return variance

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the Trainer's; SAGA's batches stay the same from epoch to epoch."""
        s = self.settings.variance_reduction
        if s is None or s.form != "saga":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return FixedBatches(self._reference_indices(), seed=seed)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the Trainer's; with variance reduction the micro-batches of a step wait for the last one.

        All of them then run at the weights and again at the anchor; the logged loss is that at the weights. With the
        zeroth order there are pairs of forward passes and no backward pass.
        """
        if self.settings.zeroth_order is not None:
            return self._zeroth_order_step(model, inputs)
        if self.variance is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "train"):  # schedule-free optimizers, as in the Trainer's own step
            optimizer.train()
        self._waiting.append(self._prepare_inputs(inputs))
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._waiting = self._waiting, []
        if self.variance.settings.form == "saga":
            batches = [the_same_batch(batch, self.variance.reference) for batch in batches]

        def loss_of(batch: Any) -> Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, batch)

        return self.variance.gradient_(loss_of, *batches)

    def _zeroth_order_step(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        optimizer: Any = self.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no accumulate
        model.train()
        inputs = self._prepare_inputs(inputs)

        def loss() -> Tensor:
            with self.compute_loss_context_manager():
                value = self.compute_loss(model, inputs)
            mean: Tensor = self.accelerator.reduce(value, reduction="mean")  # the same directions on every rank
            return mean

        measured: Tensor = optimizer.accumulate(loss)
        return measured.to(self.args.device) / self.current_gradient_accumulation_steps

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.variance is not None:
            save_variance(self.variance, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.variance is not None and checkpoint is not None:
            load_variance(self.variance, Path(checkpoint))

    def _set_signature_columns_if_needed(self) -> None:
        """The collator may not drop what a teacher left on disk."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns.extend(key for key in BATCH_KEYS if key not in columns)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective; stops at the first loss that is not finite while training."""
        del num_items_in_batch
        labels = inputs["labels"]
        rest = {k: v for k, v in inputs.items() if k != "labels" and k not in BATCH_KEYS}
        objective = self.settings.objective
        states = {"output_hidden_states": True} if objective.features else {}
        outputs = model(**rest, **states)
        teacher_logits: Tensor | TopKLogits | None = None
        if "teacher_ids" in inputs:
            ids, log_probs, tail = (inputs[key] for key in BATCH_KEYS)
            teacher_logits = TopKLogits(ids=ids, log_probs=log_probs, tail=tail)
        elif self.teacher is not None and objective.needs_teacher:
            with torch.no_grad():
                taught = self.teacher(**rest, **states)
            teacher_logits = taught.logits
        loss = objective(outputs.logits, labels, teacher_logits)
        if objective.features:
            loss = loss + objective.features * feature_distance(
                outputs.hidden_states, taught.hidden_states, labels, objective.feature_layers
            )
        if self.consistency is not None and model.training:
            loss = loss + objective.consistency * self.consistency.loss(model, rest, labels)
        if model.training and not bool(torch.isfinite(loss)):
            raise TrainingDiverged(self._diagnosis(float(loss.detach())))
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def _diagnosis(self, loss: float) -> str:
        assert self.model is not None
        culprit = first_non_finite(self.model) or "no parameter; the activations overflow"
        folders = sorted(
            Path(self.args.output_dir or ".").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
        )
        kept = f"the last good checkpoint is {folders[-1].name}" if folders else "no checkpoint had been written"
        return (
            f"the loss is {loss} at step {self.state.global_step + 1}; first non-finite: {culprit}; {kept}. "
            "Lower learning_rate, warm up longer, or set max_grad_norm"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but a checkpoint that could not be finished (disk full) is removed."""
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:
            folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise OSError(f"checkpoint at step {self.state.global_step} could not be written: {error}") from error
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for load in self._loaders:
            load(Path(resume_from_checkpoint))
