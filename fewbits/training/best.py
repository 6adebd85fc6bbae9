"""Keep the best deployed iterate: the one that ships is the one whose quantized model did best on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fewbits.data import TokenBlocks
from fewbits.evaluate import evaluate
from fewbits.training.averaging import WeightEMA, deployed, trained
from fewbits.training.metrics import MetricsFile

BEST_FILE = "fewbits_best.safetensors"


class KeepBest(TrainerCallback):
    """Scores what would ship (hard quantizer, eval mode, the average if there is one) now and then; ships the best.

    The start counts as an iterate: training that only does harm is undone. Of equal scores the earlier one is kept.
    The training stream and the weights that are trained are not touched. Memory: one copy of what is trained, on the
    CPU. Choose blocks that are neither trained nor reported on.

    Args:
        blocks: held-out text.
        interval: optimizer steps between looks; the last step is always looked at.
        teacher: for ``kl``.
        cross_entropy: weight of the cross-entropy in the score.
        kl: weight of the divergence from the teacher in the score.
        ema: the mean that ships, if any.
        metrics: where scores are written as ``keep_best/loss``.

    Raises:
        ValueError: for an interval below 1, or a score that is made of nothing.
    """

    def __init__(
        self,
        blocks: TokenBlocks,
        *,
        interval: int = 50,
        teacher: nn.Module | None = None,
        cross_entropy: float = 1.0,
        kl: float = 0.0,
        ema: WeightEMA | None = None,
        metrics: MetricsFile | None = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1")
        if cross_entropy + kl <= 0 or (kl > 0 and teacher is None):
            raise ValueError(f"a score of cross_entropy={cross_entropy} and kl={kl} needs a weight, and kl a teacher")
        self.blocks, self.interval, self.teacher = blocks, interval, teacher
        self.weights = cross_entropy, kl
        self.ema, self.metrics = ema, metrics
        self.best: dict[str, Tensor] = {}
        self.loss = float("inf")
        self.step = -1

    def score(self, model: nn.Module) -> float:
        """The score of the model as it is."""
        result = evaluate(model, self.blocks, teacher=self.teacher)
        return self.weights[0] * result.loss + self.weights[1] * (result.kl_to_teacher or 0.0)

    def look(self, model: nn.Module, step: int, optimizer: Any = None) -> float:
        """Score what would ship now, and keep it if it is better than what was kept."""
        with deployed(model, optimizer, self.ema):
            loss = self.score(model)
            if loss < self.loss:
                self.loss, self.step = loss, step
                self.best = {name: p.detach().to("cpu", copy=True) for name, p in trained(model).items()}
        if self.metrics is not None:
            self.metrics.write(step, {"keep_best/loss": loss, "keep_best/best_step": self.step})
        return loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The start is the first candidate, unless a checkpoint brought one."""
        if not self.best:
            self.look(extract_model_from_parallel(kwargs["model"]), state.global_step, kwargs.get("optimizer"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look if the interval is over, or the run."""
        step = state.global_step
        if step % self.interval == 0 or step == state.max_steps:
            self.look(extract_model_from_parallel(kwargs["model"]), step, kwargs.get("optimizer"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the best one beside the checkpoint."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tensors = {name: value.contiguous() for name, value in self.best.items()}
            save_file(tensors, folder / BEST_FILE, metadata={"loss": repr(self.loss), "step": str(self.step)})

    def load(self, folder: Path) -> None:
        """Read it back; a checkpoint without one starts afresh."""
        path = folder / BEST_FILE
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            self.loss, self.step = float(metadata["loss"]), int(metadata["step"])
            self.best = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, not a dict

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The best one is the result."""
        with torch.no_grad():
            for name, p in trained(extract_model_from_parallel(kwargs["model"])).items():
                p.copy_(self.best[name])
