"""Models and tokenizers from folders or the hub, with the usual accidents refused in plain words.

``load_model`` is ``AutoModelForCausalLM.from_pretrained`` from safetensors only. Transformers would fill a missing
weight with random numbers and only log it; here it is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fewbits.io import read_json_object
from fewbits.weight_files import safetensors_header, weight_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_SOME_LAYERS = 256
"""No more layers than this are built without a look at the weights."""


def local_folder(path: str | Path) -> Path | None:
    """The folder that a user means, or None for the name of a model on the hub.

    Raises:
        ValueError: for a path that does not exist or is a file.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; pass the folder that holds config.json and the weights")
    if isinstance(path, str) and _HUB_ID.fullmatch(path):
        return None
    raise ValueError(f"the folder {path} does not exist")


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model in evaluation mode, from safetensors only.

    Args:
        path: a local folder, or the name of a model on the hub.
        dtype: of the weights; ``"auto"`` takes the one in ``config.json``.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run modelling code that comes with the weights.

    Raises:
        ValueError: for a missing folder, no ``config.json``, no weights or a pickle only, a truncated file, a missing
            shard, shapes that ``config.json`` does not agree with, a missing tensor, or a name the hub does not know.
    """
    folder = local_folder(path)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
        read_json_object(folder / "config.json")
        weight_files(folder)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    model, info = from_pretrained(folder or str(path), dtype=dtype, **options)
    refuse_missing(path, info["missing_keys"])
    return model


def from_pretrained(path: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """``AutoModelForCausalLM.from_pretrained`` with its loading information, and errors in plain words.

    Raises:
        ValueError: for whatever Transformers raises.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if isinstance(path, Path) and "gguf_file" not in options:  # a GGUF file holds its own configuration
        _refuse_absurd(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path), use_safetensors=True, output_loading_info=True, **options
        )
    except ImportError:
        raise
    except Exception as error:  # a damaged config.json makes any part of a model's code fail in its own way
        detail = _shape_mismatch(path) if isinstance(path, Path) and isinstance(error, RuntimeError) else None
        fix = "" if isinstance(path, Path) else "; to use no hub, give a local folder, 'embedded' or 'smollm2'"
        text = detail or " ".join(str(error).split())[:400].rstrip(".")
        raise ValueError(f"cannot load {path}: {text}{fix}") from error
    model, info = loaded
    return model, info


def refuse_missing(path: str | Path, missing: Any) -> None:
    """Transformers only logs missing tensors and goes on with random numbers.

    Raises:
        ValueError: if a tensor is missing.
    """
    if missing:
        names = sorted(missing)
        raise ValueError(f"{path} lacks {len(names)} tensors that the model needs, e.g. {', '.join(names[:3])}")


def _refuse_absurd(folder: Path) -> None:
    """Refuse more layers than the files hold tensors, before Transformers builds them one by one.

    Raises:
        ValueError: giving both numbers.
    """
    config = read_json_object(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    layers = max((n for part in parts for key in _LAYERS if isinstance(n := part.get(key), int)), default=0)
    if layers > _SOME_LAYERS:
        held = sum(len(safetensors_header(path)) for path in weight_files(folder))
        if layers > held:
            raise ValueError(f"{folder / 'config.json'} asks for {layers} layers; the weights hold {held} tensors")


def _shape_mismatch(folder: Path) -> str | None:
    """The first tensor whose stored shape differs from what ``config.json`` says, in words."""
    try:
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(config).state_dict()
    except Exception:  # it has failed before; this only looks for a better message
        return None
    for path in weight_files(folder):
        for name, (_, shape) in safetensors_header(path).items():
            if name in expected and tuple(expected[name].shape) != shape:
                vocab = getattr(config.get_text_config(), "vocab_size", None)
                hint = f" (its vocab_size is {vocab})" if vocab in expected[name].shape else ""
                needed = tuple(expected[name].shape)
                return f"{name} has shape {shape} in {path.name}, but config.json{hint} needs {needed}"
    return None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a local folder holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model, checked against the vocabulary in the folder's ``config.json``.

    Raises:
        ValueError: for a missing folder or tokenizer, or one with more tokens than the model has rows.
    """
    folder = local_folder(path)
    if folder is not None and not has_tokenizer(folder):
        raise ValueError(f"{folder} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    options = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder or path), **options)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ValueError(f"cannot load the tokenizer of {path}: {str(error).strip()[:400]}") from error
    if folder is not None and (folder / "config.json").is_file():
        config = read_json_object(folder / "config.json")
        vocab_size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        if isinstance(vocab_size, int):
            check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that can name tokens which the model does not have.

    Raises:
        ValueError: giving both sizes.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer knows token {largest}, but the model has only {vocab_size} tokens; they do not go together"
        )
