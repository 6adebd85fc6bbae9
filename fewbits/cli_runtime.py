"""Commands that run a model from packed memory; :mod:`fewbits.cli` puts them into the command line."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

runtime_app = typer.Typer()


class ActivationKind(StrEnum):
    """How activations enter the kernels."""

    fp32 = "fp32"
    int8 = "int8"


def _load(model: str, activations: ActivationKind) -> tuple[Any, Any]:
    from fewbits.convert import convert, qat_layers, quantized_layers
    from fewbits.pipeline import load_any
    from fewbits.runtime import to_runtime

    loaded, tokenizer = load_any(model)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; save one into its folder")
    if any(True for _ in qat_layers(loaded)):
        convert(loaded)
    if any(True for _ in quantized_layers(loaded)):
        to_runtime(loaded, activations=activations.value)
    return loaded, tokenizer


def _stream(model: Any, tokenizer: Any, prompt: str, *, echo: str = "", **options: Any) -> str:
    from fewbits.runtime.generate import generate_stream

    pieces: list[str] = []
    for piece in generate_stream(model, tokenizer, prompt, **options):
        sys.stdout.write(piece if pieces else echo + piece)
        sys.stdout.flush()
        pieces.append(piece)
    sys.stdout.write("\n" if pieces else f"{echo}\n")
    return "".join(pieces)


@runtime_app.command(epilog='Example: `fewbits generate runs/a --prompt "The list object" --max-new-tokens 40`')
def generate(
    model: Annotated[str, typer.Argument(help="A run, an exported folder, a checkpoint, or 'embedded'.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    activations: Annotated[ActivationKind, typer.Option(help="int8 is faster.")] = ActivationKind.fp32,
) -> None:
    """Continue a prompt from packed memory, token by token (full-precision checkpoints run as they are)."""
    loaded, tokenizer = _load(model, activations)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    _stream(loaded, tokenizer, prompt, echo=prompt, **options)


@runtime_app.command(epilog="Example: `fewbits chat runs/smollm2 --temperature 0.7`")
def chat(
    model: Annotated[str, typer.Argument(help="A run or an exported folder of a chat model.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    activations: Annotated[ActivationKind, typer.Option(help="int8 is faster.")] = ActivationKind.fp32,
) -> None:
    """Talk to a model through its chat template; an empty line or end of input stops."""
    loaded, tokenizer = _load(model, activations)
    if tokenizer.chat_template is None:
        raise ValueError(f"{model} has no chat template; use: fewbits generate {model} --prompt ..")
    turns: list[dict[str, str]] = []
    for line in iter(lambda: _ask("> "), ""):
        turns.append({"role": "user", "content": line})
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        reply = _stream(
            loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + len(turns)
        )
        turns.append({"role": "assistant", "content": reply})


def _ask(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""
