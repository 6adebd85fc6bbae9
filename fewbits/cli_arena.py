"""The arena's command; :mod:`fewbits.cli` puts it into the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

arena_app = typer.Typer()


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"learning rates {text!r} are not numbers separated by commas, e.g. 2e-4,6e-4") from None


def _table(header: tuple[str, ...], rows: list[list[str]], title: str, *, numbers: bool = True) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if numbers and i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


@arena_app.command(
    epilog="Examples: `fewbits arena --methods paretoq,jacquant,gptq --budget tokens=200K --seeds 3` · "
    "`fewbits arena -o arena-run --pages-only` · `fewbits arena --list`"
)
def arena(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the arena.")] = Path("arena-run"),
    model: Annotated[str, typer.Option(help="'embedded', 'smollm2', a folder or a hub id.")] = "embedded",
    schemes: Annotated[str, typer.Option(help="Separated by commas.")] = "W2G64,W1.58,W1",
    methods: Annotated[str, typer.Option(help="'all', or names separated by commas; see --list.")] = "all",
    budget: Annotated[str, typer.Option(help="Of every cell: tokens=2M or steps=300.")] = "tokens=2M",
    seeds: Annotated[int, typer.Option(min=1, help="Data orders per method.")] = 5,
    learning_rates: Annotated[str, typer.Option(help="The search, the same for all methods.")] = "2e-4,6e-4,1.8e-3",
    tuning_seeds: Annotated[int, typer.Option(min=1, help="Seeds of the search.")] = 1,
    text: Annotated[Path | None, typer.Option(help="File or folder of text; the embedded text if not given.")] = None,
    eval_tokens: Annotated[int, typer.Option(min=2, help="In each of the two held-out texts.")] = 16_384,
    block_size: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks in a step.")] = 4,
    jobs: Annotated[int, typer.Option(min=0, help="Cells at a time, each in its own process; 0: in this one.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a cell.")] = 1,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value pairs for the recipe of every cell.")] = None,
    pages_only: Annotated[bool, typer.Option(help="Only write the pages of what is finished.")] = False,
    list_methods: Annotated[bool, typer.Option("--list", help="Only list the methods.")] = False,
) -> None:
    """Compare methods under one budget; the same command goes on where it was stopped."""
    from fewbits.arena import METHODS, ArenaSettings, run_arena
    from fewbits.arena.cells import num_cells
    from fewbits.arena.methods import choose_methods
    from fewbits.arena.pages import METHOD_HEADER, SHORT, findings, method_rows, short_rows, write_pages

    out = Console(highlight=False, soft_wrap=True)
    if list_methods:
        out.print(_table(METHOD_HEADER, method_rows(list(METHODS)), "Methods", numbers=False))
        return
    if not pages_only:
        settings = ArenaSettings(
            model=model,
            schemes=tuple(part.strip() for part in schemes.split(",")),
            methods=choose_methods(methods, METHODS),
            budget=budget,
            seeds=seeds,
            learning_rates=_rates(learning_rates),
            tuning_seeds=tuning_seeds,
            text=None if text is None else str(text),
            eval_tokens=eval_tokens,
            block_size=block_size,
            batch_size=batch_size,
            threads=threads,
            overrides=tuple(overrides or ()),
        )
        trained, untrained = num_cells(settings)
        out.print(f"{trained} trained cells of {settings.num_steps} steps, {untrained} without training")
        run_arena(settings, output, jobs=jobs, console=out)
    summary = write_pages(output)
    for scheme in summary.schemes:
        out.print(_table(SHORT, short_rows(scheme), scheme.scheme))
        for line in findings(scheme):
            out.print(escape(line))
    out.print(escape(f"pages: {output / 'README.md'} · {output / 'report.html'}"))
