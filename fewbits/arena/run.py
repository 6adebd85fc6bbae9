"""The arena: every cell that is not finished, in parallel, and the report. The same call goes on where it stopped."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewbits.arena.cells import CELLS_FOLDER, Cell, CellResult, finished_cell, num_cells, ready_cells, write_cell
from fewbits.arena.execute import run_cell
from fewbits.arena.settings import ArenaSettings
from fewbits.arena.shared import Start, prepare_shared
from fewbits.io import begun, read_json_object, write_json
from fewbits.pipeline import quiet_libraries

SETTINGS_FILE = "arena.json"
MAY_GROW = ("schemes", "methods", "seeds")
"""What may change when an arena goes on: more of the same. All else would make cells that cannot be compared."""
_NO_ESTIMATE_BEFORE = 1e9


def open_folder(settings: ArenaSettings, folder: Path) -> None:
    """Guard the folder: a new one, or one of an arena of the same settings but for :data:`MAY_GROW`.

    Raises:
        ValueError: for a folder that holds something else.
    """
    path = folder / SETTINGS_FILE
    if path.exists():
        before = read_settings(folder)
        changed = [key for key in ArenaSettings.model_fields if getattr(before, key) != getattr(settings, key)]
        if fixed := [key for key in changed if key not in MAY_GROW]:
            raise ValueError(
                f"{folder} holds an arena of other settings (they differ in {', '.join(fixed)}); use another folder"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {SETTINGS_FILE}; it is not an arena, choose another")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{CELLS_FOLDER}/*/*/.*.partial-*"):  # of a run that was killed while it wrote
        left.unlink(missing_ok=True)
    write_json(path, settings.model_dump())


def read_settings(folder: Path) -> ArenaSettings:
    """The settings that an arena's folder keeps.

    Raises:
        ValueError: if they are missing or damaged.
    """
    data = read_json_object(folder / SETTINGS_FILE)
    try:
        return ArenaSettings.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{folder / SETTINGS_FILE} is damaged: {error.errors()[0]['msg']}") from None


def finished_cells(
    settings: ArenaSettings, folder: Path, start: Start, known: Mapping[Cell, CellResult] | None = None
) -> dict[Cell, CellResult]:
    """Every finished cell that the settings ask for, ``known`` ones included.

    A cell is looked for when it is its turn only, since the search decides which rate the other seeds take.
    """
    results = dict(known or {})
    while True:
        found = {c: r for c in ready_cells(settings, results) if (r := finished_cell(folder, settings, c, start))}
        if not found:
            return results
        results |= found


def run_arena(
    settings: ArenaSettings,
    folder: str | Path,
    *,
    jobs: int = 0,
    console: Console | None = None,
    measure: Callable[[ArenaSettings, Cell, Path], CellResult] = run_cell,
) -> dict[Cell, CellResult]:
    """Run all cells that are not finished; killed at any moment it loses those under way, one a job.

    Args:
        settings: what to compare.
        folder: where ``arena.json``, text, start and ``cells/`` are.
        jobs: cells at a time, each in a fresh process; 0 runs them one after the other in this process.
        console: for progress and time left; None is silent.
        measure: what runs a cell (in this process only, or importable by the workers).

    Returns:
        Every finished cell.

    Raises:
        ValueError: for a folder of other settings.
        RuntimeError: after all others have run, if cells failed or a worker was killed.
    """
    if jobs < 0:
        raise ValueError(f"jobs={jobs} must be at least 0; 0 uses this process")
    folder = Path(folder)
    with begun(folder, SETTINGS_FILE):
        open_folder(settings, folder)
        start = prepare_shared(settings, folder)
    results = finished_cells(settings, folder, start)
    failed: dict[Cell, str] = {}
    with _progress(settings, results, console) as done:
        for cell, outcome in _outcomes(settings, folder, results, failed, jobs, measure):
            if isinstance(outcome, CellResult):
                write_cell(folder, outcome)
                results |= finished_cells(settings, folder, start, {**results, cell: outcome})
            else:
                failed[cell] = f"{type(outcome).__name__}: {outcome}"
            done(cell, outcome)
    if failed:
        first, reason = next(iter(failed.items()))
        raise RuntimeError(
            f"{len(failed)} cells failed; the first: {first.name}: {reason}. The same command tries them again"
        )
    return results


Outcome = CellResult | Exception


def _outcomes(
    settings: ArenaSettings,
    folder: Path,
    results: dict[Cell, CellResult],
    failed: dict[Cell, str],
    jobs: int,
    measure: Callable[[ArenaSettings, Cell, Path], CellResult],
) -> Iterator[tuple[Cell, Outcome]]:
    """Cells as they finish; the caller puts them into ``results`` or ``failed``, which decides what is ready next."""
    if jobs == 0:
        while ready := [cell for cell in ready_cells(settings, results) if cell not in failed]:
            yield ready[0], _guarded(measure, settings, ready[0], folder)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fewbits.arena.execute"])
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=quiet_libraries, max_tasks_per_child=1) as pool:
        running: dict[Future[CellResult], Cell] = {}
        try:
            while True:
                busy = {*running.values(), *failed}
                for cell in ready_cells(settings, results):
                    if cell not in busy and len(running) < jobs:
                        running[pool.submit(measure, settings, cell, folder)] = cell
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), _outcome(future)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _guarded(measure: Callable[..., CellResult], *arguments: Any) -> Outcome:
    try:
        return measure(*arguments)
    except Exception as error:
        return error


def _outcome(future: Future[CellResult]) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker was killed (out of memory?); finished cells are kept, the same command goes on, with fewer --jobs"
        ) from error
    except Exception as error:
        return error


@contextmanager
def _progress(
    settings: ArenaSettings, results: dict[Cell, CellResult], console: Console | None
) -> Iterator[Callable[[Cell, Outcome], None]]:
    """Cells done of all, time passed, time left; time left counts trained cells, whose pace is that of this call."""
    trained, _ = num_cells(settings)
    num_done = sum(cell.learning_rate is not None for cell in results)
    if console is None:
        yield lambda cell, outcome: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=_NO_ESTIMATE_BEFORE,
    ) as progress:
        task = progress.add_task("trained cells", total=max(1, trained), completed=num_done)

        def done(cell: Cell, outcome: Outcome) -> None:
            if isinstance(outcome, CellResult):
                loss = "diverged" if outcome.report is None else f"loss {outcome.report.loss:.4f}"
                progress.console.print(f"{escape(cell.name)}: {loss}, {outcome.cpu_seconds:.0f} s of processor time")
            else:
                progress.console.print(f"[red]{escape(cell.name)} failed:[/] {escape(str(outcome))}")
            progress.update(task, advance=cell.learning_rate is not None)

        yield done
