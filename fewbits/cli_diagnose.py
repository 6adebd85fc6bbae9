"""The command ``fewbits diagnose``; :mod:`fewbits.cli` puts it into the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Watch = Callable[[str, int, int], None]
diagnose_app = typer.Typer()
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@diagnose_app.command(
    epilog="Examples: `fewbits diagnose embedded --schemes W4,W3,W2 -o diag` · "
    "`fewbits diagnose embedded --schemes W3,W2,W1.58 --budget 2.5 --run runs/a --control`"
)
def diagnose(
    model: Annotated[str, typer.Argument(help="A full-precision model: 'embedded', 'smollm2', a folder or a hub id.")],
    schemes: Annotated[str, typer.Option(help="Comma-separated, e.g. W4,W2A16G64,W1.58.")] = "W4,W3,W2,W1.58,W1",
    data: Annotated[
        Path | None, typer.Option(help="Text file or folder to measure on (default: the embedded held-out text).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of JSON, figures, page and stages (default: diagnosis, in RUN if given)."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=1.0, help="Propose a mixed recipe of so many bits per weight.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="A finished run that was trained from MODEL.")] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also fine-tune MODEL in full precision like RUN, round it, and compare.")
    ] = False,
    blocks: Annotated[int, typer.Option(min=2, help="Token blocks to measure on.")] = 16,
    block_size: Annotated[int, typer.Option(min=2, help="Tokens per block.")] = 256,
    random: Annotated[int, typer.Option(min=1, help="Random directions per scheme.")] = 5,
    probes: Annotated[int, typer.Option(min=0, help="Trace probes per scheme; 0 leaves P(fail) out.")] = 8,
    monte_carlo: Annotated[int, typer.Option(min=0, help="Random errors that check P(fail).")] = 8,
    spectra: Annotated[
        int, typer.Option(min=0, help="Lanczos runs per curvature spectrum; 0 draws none (WinQ: 200).")
    ] = 1,
    lanczos: Annotated[int, typer.Option(min=2, help="Hessian products per Lanczos run (WinQ: 100).")] = 24,
    normals: Annotated[
        int, typer.Option(min=0, help="Directions that count as walls of the river; 0 leaves the river out.")
    ] = 8,
    curvature_blocks: Annotated[int, typer.Option(min=1, help="Token blocks of spectra and river.")] = 4,
    slice_points: Annotated[int, typer.Option(min=2, help="Rows and columns of the plane after training.")] = 11,
    tol: Annotated[float | None, typer.Option(help="Basin's rise in nats (default: measured from the noise).")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Will rounding to these bits leave the low-loss basin, where, and did training bring the model back?

    Every part is saved in the output folder when it is done; the same command goes on where it was stopped.
    """
    from fewbits.checkpoint import load_model, load_tokenizer
    from fewbits.corpora import embedded_texts
    from fewbits.data import pack_texts, read_texts
    from fewbits.diagnose import DiagnosisSettings, open_run, write_diagnosis
    from fewbits.diagnose import diagnose as measure
    from fewbits.diagnose.pages import TABLE_HEADER, table_rows
    from fewbits.pipeline import RECIPE_FILE, model_source
    from fewbits.recipe import DataSpec, Recipe
    from fewbits.report import write_report

    settings = DiagnosisSettings(
        tol=tol,
        num_random=random,
        num_probes=probes,
        num_monte_carlo=monte_carlo,
        num_spectrum_probes=spectra,
        num_lanczos_steps=lanczos,
        num_normals=normals,
        curvature_blocks=curvature_blocks,
        slice_points=slice_points,
        seed=seed,
    )
    if control and run is None:
        raise ValueError("--control repeats the training of a run in full precision; name the run with --run")
    folder = output or (Path("diagnosis") if run is None else run / "diagnosis")
    source = model_source(model)
    loaded, tokenizer = load_model(source).eval(), load_tokenizer(source)
    texts = embedded_texts("valid") if data is None else read_texts(data)
    with _progress() as watch:
        found = measure(
            loaded,
            pack_texts(texts, tokenizer, block_size).take(blocks),
            [name.strip() for name in schemes.split(",") if name.strip()],
            settings=settings,
            budget=budget,
            trained=None if run is None else open_run(run, loaded, tokenizer, control=control),
            folder=folder,
            watch=watch,
            base=Recipe(model=model, data=DataSpec() if data is None else DataSpec(source="text", path=str(data))),
            model_name=model,
            data_name="embedded, held out" if data is None else str(data),
            say=lambda line: _err.print(escape(line)),
        )
    table = Table(
        title=f"basin: within {found.baseline.tol:.3g} nats of {found.baseline.loss:.4f}", title_justify="left"
    )
    for i, name in enumerate(TABLE_HEADER):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in table_rows(found):
        table.add_row(*map(escape, row))
    out = Console(highlight=False, soft_wrap=True)
    out.print(table)
    for part in (found.after, found.arms):
        if part is not None:
            out.print(escape(part.verdict))
    out.print(f"page: {write_diagnosis(found, folder)}")
    if run is not None and folder == run / "diagnosis" and (run / RECIPE_FILE).exists():
        out.print(f"report: {write_report(run)}")


@contextmanager
def _progress() -> Iterator[Watch]:
    """A progress bar over the stages on the error stream; on something that is not a terminal it stays silent."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:
        task = bar.add_task("diagnose", total=None)
        yield lambda name, done, total: bar.update(task, description=name or "done", completed=done, total=total)
