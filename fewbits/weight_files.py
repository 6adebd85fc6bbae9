"""Reading model weights strictly: safetensors only, checked before any tensor is read; never a pickle.

The checks exist because the usual accidents (a copy that stopped, a Git LFS pointer, a web page saved under the name of
the weights, a pickle) otherwise show as errors about headers, or as random weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewbits.io import read_json_object

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_HELP = (
    "pickles can run code when they are opened, so fewbits reads only safetensors; convert once where you trust the "
    "file: AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)"
)


def _foreign(head: bytes) -> str | None:
    """What a file that is not safetensors looks like."""
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return f"a PyTorch pickle; {PICKLE_HELP}"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run 'git lfs pull'"
    if head.startswith(b"GGUF"):
        return "a GGUF file; pass the original Hugging Face folder"
    if head.lstrip()[:1] == b"<":
        return "a web page, not the weights; download it again"
    return None


def check_safetensors(path: str | Path) -> None:
    """Refuse a file that is missing, empty, foreign or truncated, before any tensor is read.

    Raises:
        ValueError: saying which of these it is, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is the download or copy complete?")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        length = int.from_bytes(head[:8], "little")
        if size < 10 or head[8:9] != b"{":
            kind = _foreign(head)
            raise ValueError(f"{path} is {kind}" if kind else f"{path} ({size} bytes) is not a safetensors file")
        if length > size - 8:
            raise ValueError(f"{path} is truncated or damaged: its header takes {length} bytes, the file has {size}")
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: its header is not valid") from None
    if not isinstance(expected, int) or expected != size:
        raise ValueError(f"{path} is truncated or damaged: its header promises {expected} bytes, the file has {size}")


def safetensors_header(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to (dtype as safetensors spells it, shape) of every tensor, without reading any.

    Raises:
        ValueError: for a missing, foreign, truncated or damaged file.
    """
    check_safetensors(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of one file.

    Raises:
        ValueError: for a missing, foreign, truncated or damaged file.
    """
    check_safetensors(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, each checked; shards are those that the index lists.

    Raises:
        ValueError: for a missing folder, a folder without weights or with pickles only, and an index that names a
            missing file, a file outside the folder, or a tensor that its file does not hold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder" if folder.exists() else f"the folder {folder} does not exist")
    if (folder / WEIGHTS_NAME).exists():
        check_safetensors(folder / WEIGHTS_NAME)
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ValueError(f"{folder} holds its weights as a pickle only ({pickles[0]}); {PICKLE_HELP}")
        raise ValueError(f"{folder} holds no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME}; is the copy complete?")
    weight_map = read_json_object(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX_NAME} has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0") or len(name) > 200:
            raise ValueError(f"{folder / INDEX_NAME} names the shard {name!r}; only plain file names are allowed")
        files.setdefault(name, set()).add(tensor)
    for name, tensors in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: the shard {name}, listed in {INDEX_NAME}, is missing; is the copy complete?")
        if absent := sorted(tensors - set(safetensors_header(folder / name))):
            raise ValueError(f"{folder / name} lacks the tensor {absent[0]} that {INDEX_NAME} places in it")
    return [folder / name for name in files]


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a model folder, shards merged.

    Raises:
        ValueError: as :func:`weight_files`, and for a tensor that two shards hold.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_safetensors(path).items():
            if name in tensors:
                raise ValueError(f"{path} holds {name} a second time; which shard is right cannot be known")
            tensors[name] = tensor
    return tensors
