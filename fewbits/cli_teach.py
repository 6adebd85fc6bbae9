"""The command ``fewbits teach``; :mod:`fewbits.cli` puts it into the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

teach_app = typer.Typer()
_out = Console(highlight=False, soft_wrap=True)


@teach_app.command(
    epilog="Example: `fewbits teach embedded --data book.txt -o logits --top-k 64`, then `teacher: logits` in a recipe"
)
def teach(
    model: Annotated[str, typer.Argument(help="The teacher: 'embedded', 'smollm2', a local folder or a hub id.")],
    data: Annotated[
        Path | None, typer.Option(help="Text file, folder, or traces (.jsonl); default: the embedded text.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder of the logits.")] = Path("logits"),
    top_k: Annotated[int, typer.Option(min=1, help="Kept tokens per position.")] = 64,
    block_size: Annotated[int, typer.Option(min=2, help="As in the recipe's data.")] = 256,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="As in the recipe's data.")] = None,
    temperature: Annotated[float, typer.Option(help="As in the recipe's objective.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Run a teacher once over a text and keep its most likely tokens, to distil from without it."""
    from fewbits.pipeline import teach as write

    manifest = write(
        model,
        data,
        output,
        top_k=top_k,
        block_size=block_size,
        max_tokens=max_tokens,
        temperature=temperature,
        dtype=dtype,
        batch_size=batch_size,
    )
    size = sum(path.stat().st_size for path in output.iterdir()) / 2**20
    _out.print(f"{manifest.num_blocks} blocks of {manifest.block_size} tokens, {size:.1f} MiB in {output}")
