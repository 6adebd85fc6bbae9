"""A cell: one model x scheme x method x learning rate x seed, and the file that holds what it measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fewbits.arena.settings import ArenaSettings
from fewbits.arena.shared import Start
from fewbits.arena.table import METHODS
from fewbits.evaluate import EvalResult
from fewbits.io import write_json
from fewbits.recipe import Recipe

CELLS_FOLDER = "cells"
_FIRST_FIELDS = {
    "": "model teacher trust_remote_code target rules ignore init init_options data objective train seed",
    "rules": "pattern scheme options surrogate embeddings drive",
    "data": "source path name split column eval_path block_size max_tokens eval_tokens holdout",
    "objective": "cross_entropy kl temperature",
    "train": "max_steps batch_size gradient_accumulation_steps learning_rate scale_learning_rate rest_learning_rate "
    "weight_decay lr_scheduler_type warmup_steps max_grad_norm optim save_steps save_total_limit logging_steps "
    "telemetry_interval activation_checkpointing bf16 freeze",
}
"""Recipe fields by part that every fingerprint has; a younger field counts where it is not at its default."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Which measurement; ``learning_rate`` is None for methods that do not train.

    Example:
        >>> Cell(scheme="W2G64", method="ste", learning_rate=6e-4, seed=1).path
        'W2G64/ste/lr0.0006-seed1.json'
    """

    scheme: str
    method: str
    learning_rate: float | None
    seed: int

    @property
    def path(self) -> str:
        """Its file below the folder of the cells."""
        rate = "" if self.learning_rate is None else f"lr{self.learning_rate!r}-"
        return f"{self.scheme}/{self.method}/{rate}seed{self.seed}.json"

    @property
    def name(self) -> str:
        """For people."""
        rate = "" if self.learning_rate is None else f" at {self.learning_rate:g}"
        return f"{self.scheme} {self.method}{rate}, seed {self.seed}"


class CellResult(BaseModel):
    """What one cell measured.

    Attributes:
        scheme: of the cell.
        method: of the cell.
        learning_rate: of the cell, None without training.
        seed: of the cell.
        fingerprint: of recipe, text and start, see :func:`fingerprint`.
        status: ``ok``, or ``diverged`` if the loss was not finite; a diverged cell is finished and has no scores.
        tuning: score on the text that chooses learning rates.
        report: score on the text that is reported.
        num_steps: optimizer steps made.
        num_tokens: tokens that training saw.
        batches_digest: SHA-256 over the batches in their order.
        bits_per_weight: of the quantized weights, scales counted.
        seconds_per_step: median; processor time on a CPU, by the clock on a GPU; None without training.
        cpu_seconds: processor time of start and training together, all threads.
        peak_memory: bytes above the level before the cell (CPU: resident memory; GPU: allocated); None if unknown.
        device: ``cpu``, or the name of the GPU.
        threads: CPU threads.
        versions: of the libraries, and the commit.
        message: of a diverged cell.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str
    method: str
    learning_rate: float | None
    seed: int
    fingerprint: str
    status: Literal["ok", "diverged"] = "ok"
    tuning: EvalResult | None
    report: EvalResult | None
    num_steps: int
    num_tokens: int
    batches_digest: str
    bits_per_weight: float
    seconds_per_step: float | None
    cpu_seconds: float
    peak_memory: int | None
    device: str
    threads: int
    versions: dict[str, str]
    message: str = ""

    @property
    def cell(self) -> Cell:
        """Which measurement it is."""
        return Cell(scheme=self.scheme, method=self.method, learning_rate=self.learning_rate, seed=self.seed)


def fingerprint(settings: ArenaSettings, cell: Cell, start: Start) -> str:
    """SHA-256 of everything that decides what the cell measures: its recipe, the text, the start, the stage.

    The place of model and text does not count, their content does.
    """
    recipe = identity(settings.recipe(cell.scheme, cell.method, cell.learning_rate, cell.seed))
    recipe["model"] = start.model_digest
    recipe["data"]["path"] = start.text_digest
    parts = [recipe, METHODS[cell.method].stage, False]  # once a flag that recipes say themselves by now
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data, without young fields at their default, so that a new field changes no old fingerprint.

    Example:
        >>> "optim_options" in identity(Recipe())["train"]
        False
    """
    data = _identity(recipe, "")
    data["rules"] = [_identity(rule, "rules") for rule in recipe.rules]
    data |= {part: _identity(getattr(recipe, part), part) for part in ("data", "objective", "train")}
    return data


def _identity(part: BaseModel, name: str) -> dict[str, Any]:
    old, young = part.model_dump(mode="json"), part.model_dump(mode="json", exclude_defaults=True)
    return {key: value for key, value in old.items() if key in _FIRST_FIELDS[name].split() or key in young}


def write_cell(folder: Path, result: CellResult) -> None:
    """Whole or not at all."""
    write_json(folder / CELLS_FOLDER / result.cell.path, result.model_dump())


def read_cell(folder: Path, cell: Cell) -> CellResult | None:
    """The finished cell, or None: a missing file, or one that is not a whole result, is not a finished cell."""
    path = folder / CELLS_FOLDER / cell.path
    try:
        result = CellResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
    return result if result.cell == cell else None


def finished_cell(folder: Path, settings: ArenaSettings, cell: Cell, start: Start) -> CellResult | None:
    """The same for a cell of these settings.

    Raises:
        ValueError: if the cell was measured with another recipe, text or start.
    """
    result = read_cell(folder, cell)
    if result is not None and result.fingerprint != fingerprint(settings, cell, start):
        raise ValueError(
            f"{folder / CELLS_FOLDER / cell.path} was measured with another recipe, text or model; "
            "use another folder, or delete that cell"
        )
    return result


def learning_rates(settings: ArenaSettings, method: str) -> tuple[float | None, ...]:
    """Rates that the search tries: the same for every method that trains."""
    return (None,) if METHODS[method].stage == "ptq" else settings.learning_rates


def tuning_cells(settings: ArenaSettings, scheme: str, method: str) -> Iterator[Cell]:
    """Cells of the search over learning rates; without training there is nothing to search, and one cell in all."""
    rates = learning_rates(settings, method)
    for seed in range(settings.tuning_seeds if rates != (None,) else 1):
        for rate in rates:
            yield Cell(scheme=scheme, method=method, learning_rate=rate, seed=seed)


def chosen_rate(settings: ArenaSettings, results: dict[Cell, CellResult], scheme: str, method: str) -> float | None:
    """The rate of the lowest mean loss on the tuning text; a rate at which a seed diverged is never chosen.

    Raises:
        KeyError: if a cell of the search is missing.
        ValueError: if every rate diverged.
    """
    best: tuple[float, float | None] | None = None
    for rate in learning_rates(settings, method):
        cells = [c for c in tuning_cells(settings, scheme, method) if c.learning_rate == rate]
        scores = [results[cell].tuning for cell in cells]
        if any(score is None for score in scores):
            continue
        mean = sum(score.loss for score in scores if score is not None) / len(scores)
        if best is None or mean < best[0]:
            best = mean, rate
    if best is None:
        raise ValueError(f"{scheme} {method} diverged at every learning rate of the search")
    return best[1]


def report_cells(settings: ArenaSettings, scheme: str, method: str, rate: float | None) -> Iterator[Cell]:
    """Cells at the chosen rate, one a seed; methods without training do not depend on the seed and have one."""
    for seed in range(1 if METHODS[method].stage == "ptq" else settings.seeds):
        yield Cell(scheme=scheme, method=method, learning_rate=rate, seed=seed)


def ready_cells(settings: ArenaSettings, results: dict[Cell, CellResult]) -> list[Cell]:
    """Cells that are not finished and need nothing that is not: the search first, then the other seeds.

    Args:
        settings: of the arena.
        results: finished cells.
    """
    found: list[Cell] = []
    for scheme in settings.schemes:
        for method in settings.methods:
            if settings.allows(scheme, method) is not None:
                continue
            search = list(tuning_cells(settings, scheme, method))
            if missing := [cell for cell in search if cell not in results]:
                found += missing
                continue
            try:
                rate = chosen_rate(settings, results, scheme, method)
            except ValueError:
                continue  # diverged at every rate: the report says so
            found += [cell for cell in report_cells(settings, scheme, method, rate) if cell not in results]
    return found


def num_cells(settings: ArenaSettings) -> tuple[int, int]:
    """``(trained, untrained)`` cells of a whole arena.

    Example:
        >>> num_cells(ArenaSettings(schemes=("W2", "W1"), methods=("ste", "bitnet", "rtn"), seeds=5))
        (21, 2)
    """
    trained = untrained = 0
    for scheme in settings.schemes:
        for method in settings.methods:
            if settings.allows(scheme, method) is not None:
                continue
            if METHODS[method].stage == "ptq":
                untrained += 1
            else:
                rates = len(settings.learning_rates)
                trained += settings.tuning_seeds * rates + settings.seeds - settings.tuning_seeds
    return trained, untrained
