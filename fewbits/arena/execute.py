"""Run one cell: start, train, score. A function of recipe, text and model alone; it leaves nothing but its result."""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, default_data_collator

from fewbits.arena.cells import Cell, CellResult, fingerprint
from fewbits.arena.methods import Method, split_scheme
from fewbits.arena.settings import ArenaSettings
from fewbits.arena.shared import load_texts, read_start
from fewbits.arena.table import METHODS
from fewbits.checkpoint import load_model
from fewbits.convert import Rule, owned_layers, prepare
from fewbits.data import TokenBlocks
from fewbits.evaluate import EvalResult, evaluate, versions
from fewbits.inspection import inspect_model
from fewbits.pipeline import CALIBRATION_BLOCKS, freeze_, model_source
from fewbits.ptq import apply_ptq
from fewbits.recipe import Recipe
from fewbits.training import QATTrainer, TrainingDiverged
from fewbits.training.from_recipe import hold_out_best, training_arguments, training_settings


class Batches:
    """A collator that hashes the batches of the run; what the loader reads ahead beyond it does not count."""

    def __init__(self, num_batches: int) -> None:
        self.left = num_batches
        self.num_tokens = 0
        self._hash = hashlib.sha256()

    def __call__(self, features: list[Any]) -> dict[str, Tensor]:
        """A batch of blocks."""
        batch = default_data_collator(features)
        if self.left > 0:
            self.left -= 1
            self.num_tokens += batch["input_ids"].numel()
            self._hash.update(batch["input_ids"].numpy().tobytes())
        return batch

    @property
    def digest(self) -> str:
        """SHA-256 over the token ids in their order."""
        return self._hash.hexdigest()


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step, from the begin of one to the begin of the next.

    On a GPU by the clock; on a CPU the processor time of all threads, which other cells beside this one hardly change.
    """

    def __init__(self) -> None:
        self.marks: list[float] = []

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
        else:
            self.marks.append(time.process_time())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self._mark()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is over."""
        self._mark()

    @property
    def median(self) -> float | None:
        """Median over the steps but the first, which warms up; None before the first."""
        times = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return statistics.median(times[1:] or times) if times else None


def run_cell(settings: ArenaSettings, cell: Cell, folder: Path) -> CellResult:
    """Measure one cell; the caller writes the result.

    Args:
        settings: of the arena.
        cell: which one.
        folder: of the arena, with text and start.

    Raises:
        ValueError: for a method that does not exist at the scheme, or a damaged folder.
    """
    start = read_start(folder)
    texts = load_texts(folder, start)
    recipe = settings.recipe(cell.scheme, cell.method, cell.learning_rate, cell.seed)
    method = METHODS[cell.method].at(split_scheme(cell.scheme)[0])
    torch.set_num_threads(settings.threads)
    memory = PeakMemory()
    cpu = time.process_time()
    torch.manual_seed(cell.seed)
    model = load_model(model_source(recipe.model)).to("cuda" if torch.cuda.is_available() else "cpu")
    teacher = copy.deepcopy(model)
    batches = Batches(recipe.train.max_steps * recipe.train.gradient_accumulation_steps)
    times, message = StepTimes(), ""
    try:
        model = train_method(recipe, method, model, teacher, texts["train"], batches, times)
    except TrainingDiverged as error:
        message = str(error)
    used, peak = time.process_time() - cpu, memory.peak()
    scores: dict[str, EvalResult | None] = {"tuning": None, "report": None}
    if not message:
        try:
            scores = {name: evaluate(model, texts[name], teacher=teacher) for name in scores}
        except ValueError as error:  # the loss is not finite
            message = str(error)
    bits = inspect_model(load_model(model_source(recipe.model)), [r.build() for r in recipe.rules])
    assert bits.quantized_bits_per_weight is not None
    return CellResult(
        scheme=cell.scheme,
        method=cell.method,
        learning_rate=cell.learning_rate,
        seed=cell.seed,
        fingerprint=fingerprint(settings, cell, start),
        status="diverged" if message else "ok",
        tuning=None if message else scores["tuning"],
        report=None if message else scores["report"],
        num_steps=recipe.train.max_steps,
        num_tokens=batches.num_tokens,
        batches_digest=batches.digest,
        bits_per_weight=bits.quantized_bits_per_weight,
        seconds_per_step=times.median,
        cpu_seconds=used,
        peak_memory=peak,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=settings.threads,
        versions=versions(),
        message=message,
    )


def train_method(
    recipe: Recipe,
    method: Method,
    model: nn.Module,
    teacher: nn.Module,
    text: TokenBlocks,
    batches: Batches,
    times: StepTimes,
) -> nn.Module:
    """Start and train as the method says, in place; the model that a cell ends with, prepared and in eval mode."""
    rules = [rule.build() for rule in recipe.rules]
    if method.stage == "fp_then_ptq":
        _start(recipe, rules, model, "rtn", text)
        for _, layer in owned_layers(model):
            layer.fake_quant_enabled = False
    else:
        _start(recipe, rules, model, recipe.init, text)
    freeze_(model, recipe.train.freeze)
    if recipe.train.max_steps == 0:
        return model.eval()
    text, best = hold_out_best(recipe, text)
    with tempfile.TemporaryDirectory() as folder:
        trainer = QATTrainer(
            model,
            training_arguments(recipe, Path(folder), quiet=True),
            teacher=teacher,
            settings=training_settings(recipe),
            best_blocks=best,
            train_dataset=text,
            data_collator=batches,
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)  # the arena has its own progress
        trainer.train()
    if method.stage == "fp_then_ptq":
        trained = model.state_dict()
        model = copy.deepcopy(teacher)
        model.load_state_dict({name: trained[name] for name in model.state_dict()})
        model.requires_grad_(True)
        _start(recipe, rules, model, recipe.init, text)
    return model.eval()


def _start(recipe: Recipe, rules: list[Rule], model: nn.Module, method: str, text: TokenBlocks) -> None:
    """Prepare the model in place, by rounding to nearest or as a post-training method says."""
    if method == "rtn":
        prepare(model, rules, ignore=recipe.ignore)
    else:
        options = {"num_blocks": CALIBRATION_BLOCKS} | recipe.init_options
        apply_ptq(model, rules, method, text, ignore=recipe.ignore, **options)


class PeakMemory:
    """Peak memory of this process above its level at construction.

    On a GPU what torch allocated; else the resident memory, whose high-water mark Linux lets a process reset. The level
    is exact in a process of its own; in one that ran cells before, freed memory may be used again.
    """

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._level: int | None = torch.cuda.memory_allocated()
            return
        try:
            Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")
            self._level = _resident("VmRSS")
        except OSError:
            self._level = None

    def peak(self) -> int | None:
        """Bytes, or None where the system does not tell."""
        if self._level is None:
            return None
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self._level
        high = _resident("VmHWM")
        return None if high is None else max(0, high - self._level)


def _resident(key: str) -> int | None:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return None
