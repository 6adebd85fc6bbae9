"""The iterate that ships: a running mean of the weights, a schedule-free average, or the weights as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EMA_FILE = "fewbits_ema.safetensors"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient: latent weights, learned scales and what else is not frozen."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class WeightEMA:
    r"""Exponential moving average of everything that is trained.

    .. math:: \bar\theta_t = m\,\bar\theta_{t-1} + (1 - m)\,\theta_t
              = (1 - m) \sum_{k=0}^{t-1} m^k\,\theta_{t-k} + m^t\,\theta_0

    The mean is of *latent* weights and raw scales, so what is evaluated and shipped is :math:`Q(\bar\theta)`, a point
    of the grid, and not the mean of quantized weights. Kept in fp32 (float64 for float64 weights) on the weights'
    device.

    Args:
        decay: m in [0, 1); 0 is the last iterate itself.

    Raises:
        ValueError: for a decay out of range.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> ema = WeightEMA(0.75)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(0.0)
        ...     ema.start(layer)
        ...     _ = layer.weight.fill_(1.0)
        >>> ema.update(layer)
        >>> with ema.swapped(layer):
        ...     print(layer.weight.item())
        0.25
    """

    def __init__(self, decay: float) -> None:
        if not (math.isfinite(decay) and 0 <= decay < 1):
            raise ValueError(f"decay={decay} is outside [0, 1); use 0.99 to 0.9999, or no average at all")
        self.decay = decay
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Begin at the weights of this moment, unless there is a mean already (read from a checkpoint)."""
        for name, p in trained(model).items():
            mean = self.mean.get(name, p)
            self.mean[name] = mean.detach().to(p.device, torch.promote_types(p.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        for name, p in trained(model).items():
            self.mean[name].lerp_(p.detach().to(self.mean[name].dtype), 1 - self.decay)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the mean; afterwards its own weights, untouched. No graph may cross the border."""
        own = {name: p.data for name, p in trained(model).items()}
        try:
            for name, p in trained(model).items():
                p.data = self.mean[name].to(p.dtype)
            yield
        finally:
            for name, p in trained(model).items():
                p.data = own[name]

    @torch.no_grad()
    def copy_to_(self, model: nn.Module) -> None:
        """Put the mean into the model for good."""
        for name, p in trained(model).items():
            p.copy_(self.mean[name])

    def save(self, folder: Path, file: str = EMA_FILE) -> None:
        """Write the mean into a checkpoint folder."""
        save_file({name: mean.contiguous().clone() for name, mean in self.mean.items()}, folder / file)

    def load(self, folder: Path, file: str = EMA_FILE) -> None:
        """Read it back; a checkpoint of a run without a mean starts afresh."""
        if (folder / file).exists():
            self.mean = load_file(folder / file)


class EMACallback(TrainerCallback):
    """Averages along any transformers Trainer and leaves the mean in the model when training ends.

    Put it behind :class:`~fewbits.training.QATCallback`, so that it sees weights after their drives.
    ``QATSettings(ema_decay=..)`` does so.

    Args:
        ema: the mean.
        file: its name in checkpoint folders.
        deploy: whether the mean is what the run ends with.
    """

    def __init__(self, ema: WeightEMA, *, file: str = EMA_FILE, deploy: bool = True) -> None:
        self.ema, self.file, self.deploy = ema, file, deploy

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the weights, or from what a checkpoint gave."""
        self.ema.start(extract_model_from_parallel(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take in the step."""
        self.ema.update(extract_model_from_parallel(kwargs["model"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the mean beside the checkpoint."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.ema.save(folder, self.file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The mean is the result."""
        if self.deploy:
            self.ema.copy_to_(extract_model_from_parallel(kwargs["model"]))


def switches_modes(optimizer: Any) -> bool:
    """Whether an optimizer (wrapped by accelerate or not) evaluates at other weights than it trains: schedule-free."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))


@contextmanager
def deployed(model: nn.Module, optimizer: Any = None, ema: WeightEMA | None = None) -> Iterator[None]:
    """Inside, the model has the weights that would ship now; afterwards those that it trains, bit for bit.

    Args:
        model: a prepared model.
        optimizer: of the run; only a schedule-free one matters.
        ema: the mean that ships, if any.
    """
    if ema is not None:
        with ema.swapped(model):
            yield
        return
    if not switches_modes(optimizer):
        yield
        return
    kept = {name: p.detach().clone() for name, p in trained(model).items()}
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():  # there and back is not exact in floating point
            for name, p in trained(model).items():
                p.copy_(kept[name])
