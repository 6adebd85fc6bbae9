"""The command ``fewbits diagnose``; :mod:`fewbits.cli` puts it into the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

diagnose_app = typer.Typer()
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@diagnose_app.command(
    epilog="Examples: `fewbits diagnose embedded --schemes W4,W3,W2 -o diag` · "
    "`fewbits diagnose embedded --schemes W3,W2,W1.58 --budget 2.5 --run runs/a -o diag`"
)
def diagnose(
    model: Annotated[str, typer.Argument(help="A full-precision model: 'embedded', 'smollm2', a folder or a hub id.")],
    schemes: Annotated[str, typer.Option(help="Comma-separated, e.g. W4,W2A16G64,W1.58.")] = "W4,W3,W2,W1.58,W1",
    data: Annotated[
        Path | None, typer.Option(help="Text file or folder to measure on (default: the embedded held-out text).")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of JSON, figures and page.")] = Path(
        "diagnosis"
    ),
    budget: Annotated[float | None, typer.Option(help="Propose a mixed recipe of so many bits per weight.")] = None,
    run: Annotated[Path | None, typer.Option(help="A finished run that was trained from MODEL.")] = None,
    blocks: Annotated[int, typer.Option(min=2, help="Token blocks to measure on.")] = 16,
    block_size: Annotated[int, typer.Option(min=2, help="Tokens per block.")] = 256,
    random: Annotated[int, typer.Option(min=1, help="Random directions per scheme.")] = 5,
    probes: Annotated[int, typer.Option(min=0, help="Trace probes per scheme; 0 leaves P(fail) out.")] = 8,
    monte_carlo: Annotated[int, typer.Option(min=0, help="Random errors that check P(fail).")] = 8,
    tol: Annotated[float | None, typer.Option(help="Basin's rise in nats (default: measured from the noise).")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Will rounding to these bits leave the low-loss basin, where, and did training bring the model back?"""
    from fewbits.checkpoint import find_prepared, load_model, load_prepared, load_tokenizer
    from fewbits.corpora import embedded_texts
    from fewbits.data import pack_texts, read_texts
    from fewbits.diagnose import DiagnosisSettings, write_diagnosis
    from fewbits.diagnose import diagnose as measure
    from fewbits.diagnose.pages import TABLE_HEADER, table_rows
    from fewbits.pipeline import model_source
    from fewbits.recipe import DataSpec, Recipe

    settings = DiagnosisSettings(tol=tol, num_random=random, num_probes=probes, num_monte_carlo=monte_carlo, seed=seed)
    source = model_source(model)
    loaded, tokenizer = load_model(source).eval(), load_tokenizer(source)
    texts = embedded_texts("valid") if data is None else read_texts(data)
    found = measure(
        loaded,
        pack_texts(texts, tokenizer, block_size).take(blocks),
        [name.strip() for name in schemes.split(",") if name.strip()],
        settings=settings,
        budget=budget,
        qat_model=None if run is None else load_prepared(find_prepared(run))[0],
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
    if found.after is not None:
        out.print(escape(found.after.verdict))
    out.print(f"page: {write_diagnosis(found, output)}")
