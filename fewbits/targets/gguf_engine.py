"""A GGUF export before llama.cpp itself: its C dequantizer, its graph in fp32, and the file as it is served.

llama.cpp rounds activations to int8 before it meets a quantized matrix, so the graph, the metadata and the order of the
rows are checked by a control: the same file with every tensor decoded to F32 by llama.cpp's own functions.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbits.targets.engine import FLOAT_TOLERANCE, EngineCheck, with_version
from fewbits.targets.ggml import ggml_dequantize
from fewbits.targets.gguf_contents import FILE, described_layers, open_export
from fewbits.targets.gguf_file import write_gguf
from fewbits.targets.gguf_layer import float_tensor
from fewbits.targets.gguf_model import Heads, row_order
from fewbits.targets.gguf_reader import GGUFFile, read_gguf
from fewbits.targets.gguf_types import F32
from fewbits.targets.llamacpp import LlamaCpp

_WHOLE = 256
"""Activations that share a scale before k-quants and ternary types; 32 before all others."""
_TABLE_TOLERANCE = 5e-3
"""For Gemma: llama.cpp looks GELU up in a table of fp16 numbers, and a gate near the edge of two entries takes the
other one. Differences up to 8e-4 are seen; a wrong file differs by more than 1e-2."""


def llamacpp_checks(folder: Path, *, quantized: bool) -> tuple[EngineCheck, ...]:
    """The three levels of a file, or the middle one alone for a file without codes."""
    engine = with_version("xllamacpp")
    file, found = open_export(folder)
    gelu = found.name.startswith("gemma")
    control = EngineCheck(
        engine=f"{engine}, F32 copy of the file" if quantized else engine,
        level="float",
        logits=functools.partial(control_logits if quantized else engine_logits, folder),
        tolerance=_TABLE_TOLERANCE if gelu else FLOAT_TOLERANCE,
    )
    if not quantized:
        return (control,)
    types = {file.tensors[tensor].gguf_type for tensor, _ in described_layers(file).values()}
    return (
        EngineCheck(
            engine=f"{engine}, its dequantizer", level="weights", weights=functools.partial(engine_weights, folder)
        ),
        control,
        EngineCheck(
            engine=engine,
            level="int8",
            logits=functools.partial(engine_logits, folder),
            block=_WHOLE if any(kind.endswith("_K") or kind.startswith("TQ") for kind in types) else 32,
        ),
    )


def engine_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every quantized layer as llama.cpp's C code decodes it, fp32, rows in the order of the model.

    Raises:
        ImportError: without the package xllamacpp.
    """
    file, found = open_export(folder)
    heads = Heads.read(found, file.metadata)
    for name, (tensor, _) in described_layers(file).items():
        values = _decoded(file, tensor)
        order = row_order(found, tensor, heads)
        yield name, torch.from_numpy(values if order is None else values[np.argsort(order)])


def engine_logits(folder: Path, ids: Tensor, *, file: str = FILE) -> Tensor:
    """Logits of llama.cpp on the CPU, fp32 ``(sequences, length, vocabulary)``, each sequence from an empty cache.

    Raises:
        ImportError: without the package xllamacpp.
        ValueError: for a file that fewbits or llama.cpp refuses.
    """
    with LlamaCpp(folder / file, num_threads=torch.get_num_threads(), context_length=ids.shape[1]) as engine:
        return torch.stack([torch.from_numpy(engine.logits(row)) for row in ids.cpu()])


def control_logits(folder: Path, ids: Tensor) -> Tensor:
    """The same of a copy whose tensors are all F32, which takes 4 bytes a weight in the temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        write_control(folder / FILE, Path(temporary) / FILE)
        return engine_logits(Path(temporary), ids)


def write_control(source: Path, path: Path) -> None:
    """A GGUF file with the metadata of another one and its tensors as llama.cpp decodes them.

    Raises:
        ImportError: without the package xllamacpp.
    """
    file = read_gguf(source)
    tensors = [
        float_tensor(name, info.shape, "F32", functools.partial(_decoded, file, name))
        for name, info in file.tensors.items()
    ]
    write_gguf(path, file.metadata, tensors)


def _decoded(file: GGUFFile, name: str) -> F32:
    info = file.tensors[name]
    raw = file.read(name)
    if info.gguf_type == "F32":
        return raw.view("<f4").reshape(info.shape)
    return ggml_dequantize(info.gguf_type, raw, prod(info.shape)).reshape(info.shape)
