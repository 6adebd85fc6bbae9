"""What a recipe names, loaded: models, token blocks, and whatever a run or an export has left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from fewbits.checkpoint import is_prepared_folder, load_model, load_prepared, load_tokenizer
from fewbits.corpora import embedded_model_path, embedded_texts
from fewbits.data import TokenBlocks, pack_dataset, pack_texts, read_texts, sample_teacher
from fewbits.naming import did_you_mean
from fewbits.recipe import DataSpec
from fewbits.run_folder import RECIPE_FILE
from fewbits.smollm2 import smollm2_path
from fewbits.traces import pack_traces, read_traces

NAMES = ("embedded", "smollm2")
"""Models that come from packages."""


def model_source(name: str) -> str:
    """The folder or hub id behind a recipe's ``model``: ``embedded`` and ``smollm2`` come from packages.

    Raises:
        ValueError: for a misspelled ``embedded`` or ``smollm2``, which the hub does not know either.
    """
    if name == "embedded":
        return str(embedded_model_path())
    if name == "smollm2":
        return str(smollm2_path())
    if not Path(name).exists() and (near := did_you_mean(name, NAMES, cutoff=0.8)):
        raise ValueError(f"model {name!r} is neither a folder nor a name that comes with a package; {near.strip()}")
    return name


def load_blocks(data: DataSpec, tokenizer: Any, teacher: nn.Module, seed: int) -> tuple[TokenBlocks, TokenBlocks]:
    """``(train, valid)`` token blocks as the recipe says.

    Raises:
        ValueError: for missing, empty or too short text.
        ImportError: with the install line, if ``datasets`` is missing.
    """
    size = data.block_size
    if data.source == "embedded":
        train = pack_texts(embedded_texts("train"), tokenizer, size, max_tokens=data.max_tokens)
    elif data.source == "text":
        assert data.path is not None
        train = pack_texts(read_texts(data.path), tokenizer, size, max_tokens=data.max_tokens)
    elif data.source == "traces":
        assert data.path is not None
        train = pack_traces(read_traces(data.path), tokenizer, size)
    elif data.source == "self":
        assert data.max_tokens is not None
        train = sample_teacher(teacher, tokenizer, num_tokens=data.max_tokens, block_size=size, seed=seed)
    else:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError("data.source='dataset' needs datasets: pip install 'fewbits[datasets]'") from error
        rows = load_dataset(data.path, data.name, split=data.split)
        train = pack_dataset(rows, tokenizer, size, column=data.column, max_tokens=data.max_tokens)
    eval_blocks = max(1, data.eval_tokens // size)
    if data.eval_path is not None:
        return train, pack_texts(read_texts(data.eval_path), tokenizer, size).take(eval_blocks)
    if data.source == "embedded":
        return train, pack_texts(embedded_texts("valid"), tokenizer, size).take(eval_blocks)
    train, valid = train.split(data.holdout)
    return train, valid.take(eval_blocks)


def load_any(source: str | Path) -> tuple[nn.Module, Any]:
    """Model (in eval mode) and tokenizer of a run, a saved QAT model, an export, a checkpoint or a known name."""
    folder = Path(source)
    if (folder / RECIPE_FILE).exists():
        if not (folder / "model").exists():
            raise ValueError(f"{folder} is an unfinished run; finish it with --resume")
        folder = folder / "model"
    if is_prepared_folder(folder):
        model, tokenizer = load_prepared(folder)
        return model.eval(), tokenizer
    path = model_source(str(folder) if folder.exists() else str(source))
    return load_model(path).eval(), load_tokenizer(path)


def quiet_libraries() -> None:
    """Progress bars and warnings of the libraries below off; the command line prints its own."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as hf_logging

    hub_logging.set_verbosity_error()

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
