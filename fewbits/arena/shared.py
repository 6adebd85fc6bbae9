"""What all cells share: the packed text, made once, and the score of the model in full precision."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fewbits.arena.settings import ArenaSettings
from fewbits.checkpoint import load_model, load_tokenizer, model_digest
from fewbits.data import TokenBlocks
from fewbits.evaluate import EvalResult, evaluate
from fewbits.io import atomic_file, read_json_object, write_json
from fewbits.pipeline import load_blocks, model_source

TEXT_FILE = "text.safetensors"
START_FILE = "start.json"
PARTS = ("train", "tuning", "report")


class Start(BaseModel):
    """Where every cell starts.

    Attributes:
        text_digest: of the three texts.
        model_digest: of the weights in full precision.
        train_tokens: tokens of the training text.
        tuning: score in full precision on the text that chooses learning rates.
        report: the same on the text that is reported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_digest: str
    model_digest: str
    train_tokens: int
    tuning: EvalResult
    report: EvalResult


def split_held_out(valid: TokenBlocks, num_blocks: int) -> tuple[TokenBlocks, TokenBlocks]:
    """Two texts, the first and the last part of the held-out blocks; what lies between belongs to neither.

    Args:
        valid: held-out blocks in the order of the text.
        num_blocks: blocks of either part; fewer if there are too few, but one block at least always lies between, so
            that no document is cut by the border.

    Raises:
        ValueError: for less than three blocks.
    """
    size = min(num_blocks, (len(valid) - 1) // 2)
    if size < 1:
        raise ValueError(f"{len(valid)} held-out blocks are too few for tuning and report; use more text")
    return (
        TokenBlocks(valid.tokens[:size], valid.bytes_per_token),
        TokenBlocks(valid.tokens[-size:], valid.bytes_per_token),
    )


def prepare_shared(settings: ArenaSettings, folder: Path) -> Start:
    """Text and start of an arena's folder: read if they are there, else made.

    Raises:
        ValueError: if what is there is damaged, or the model has changed since.
    """
    source = model_source(settings.model)
    if (folder / START_FILE).exists():
        start = read_start(folder)
        load_texts(folder, start)
        if model_digest(load_model(source)) != start.model_digest:
            raise ValueError(f"the weights of {settings.model!r} have changed since {folder} was begun; use another")
        return start
    model, tokenizer = load_model(source), load_tokenizer(source)
    recipe = settings.recipe(settings.schemes[0], "rtn", None, 0)
    train, valid = load_blocks(recipe.data, tokenizer, model, 0)
    tuning, report = split_held_out(valid, max(1, settings.eval_tokens // settings.block_size))
    texts = dict(zip(PARTS, (train, tuning, report), strict=True))
    with atomic_file(folder / TEXT_FILE) as partial:
        metadata = {name: repr(blocks.bytes_per_token) for name, blocks in texts.items()}
        save_file({name: blocks.tokens for name, blocks in texts.items()}, partial, metadata=metadata)
    start = Start(
        text_digest=text_digest(texts),
        model_digest=model_digest(model),
        train_tokens=train.num_tokens,
        tuning=evaluate(model, tuning),
        report=evaluate(model, report),
    )
    write_json(folder / START_FILE, start.model_dump())
    return start


def text_digest(texts: dict[str, TokenBlocks]) -> str:
    """SHA-256 over the tokens of the three texts."""
    total = hashlib.sha256()
    for name in PARTS:
        blocks = texts[name]
        total.update(f"{name} {blocks.tokens.shape} {blocks.bytes_per_token!r}".encode())
        total.update(blocks.tokens.astype(np.int32).tobytes())
    return total.hexdigest()


def read_start(folder: Path) -> Start:
    """The start that an arena's folder keeps.

    Raises:
        ValueError: if it is missing or damaged.
    """
    data = read_json_object(folder / START_FILE)
    try:
        return Start.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{folder / START_FILE} is damaged: {error.errors()[0]['msg']}") from None


def load_texts(folder: Path, start: Start) -> dict[str, TokenBlocks]:
    """The three texts by name.

    Raises:
        ValueError: if the file is missing, damaged or another.
    """
    path = folder / TEXT_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            texts = {name: TokenBlocks(file.get_tensor(name), float(metadata[name])) for name in PARTS}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from None
    if text_digest(texts) != start.text_digest:
        raise ValueError(f"{path} holds another text than {START_FILE} says; the folder is damaged")
    return texts
