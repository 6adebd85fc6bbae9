"""The graph of the target ``onnx``: traced by ``torch.onnx.export`` with one ``MatMulNBits`` for each quantized layer.

Tensors have the model's own names; ``NAME.codes``, ``NAME.scales`` and ``NAME.zeros`` are those of the layer NAME, and
what the exporter adds is named ``constant/..``. Optimizing is left to the engine, which does it when it loads the file:
the exporter's optimizer would merge tensors that are equal, so that names were lost.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.convert import replace_module_
from fewbits.qtensor import QTensor
from fewbits.targets.affine import Fit
from fewbits.targets.engine import EngineCheck
from fewbits.targets.layers import require
from fewbits.targets.nbits import DOMAIN, LEAVES, OP, Packing, node_attributes, pack_nbits

FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
CONSTANT = "constant/"


class MatMulNBits(nn.Module):
    """Stands for a quantized layer while the graph is traced."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, name: str, q: QTensor, fit: Fit, block: int, accuracy_level: int, bias: Tensor | None) -> None:
        super().__init__()
        parts = pack_nbits(name, q, fit, block)
        for leaf in LEAVES:
            self.register_buffer(leaf, parts.get(leaf))
        self.bias = bias
        self.attributes: dict[str, Any] = node_attributes(q.shape[0], q.shape[1], fit, block) | {
            "accuracy_level": accuracy_level
        }

    def forward(self, x: Tensor) -> Tensor:
        """One node, and the addition of the bias."""
        inputs = [x, self.codes, self.scales] + ([] if self.zeros is None else [self.zeros])
        shape = (*x.shape[:-1], self.attributes["N"])
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP}", inputs, self.attributes, dtype=x.dtype, shape=shape, version=1
        )
        return y if self.bias is None else y + self.bias


class _LogitsOnly(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of a whole sequence."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def _shared_copy(model: nn.Module) -> Any:
    """A copy whose modules are new and whose tensors are the same."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors}).eval()


def trace(reference: Any, layers: Mapping[str, Packing], accuracy_level: int, plain: set[str]) -> Any:
    """The ``torch.onnx.ONNXProgram`` of a model in fp32, batch and length free.

    Args:
        reference: the model, which is left as it is.
        layers: what stands for each quantized layer.
        accuracy_level: of every ``MatMulNBits``.
        plain: names of the tensors that were not quantized.
    """
    model = _shared_copy(reference)
    for name, (q, fit, block) in layers.items():
        bias = getattr(model.get_submodule(name), "bias", None)
        replace_module_(model, name, MatMulNBits(name, q, fit, block, accuracy_level, bias))
    program = _export(model)
    declared = type(reference)._tied_weights_keys
    _rename(program.model.graph, plain, set(layers), declared if isinstance(declared, dict) else {})
    return program


def _export(model: nn.Module) -> Any:
    example = torch.zeros(2, 8, dtype=torch.long)
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # says that torchvision is missing
    level = logger.level
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about itself
        logger.setLevel(logging.ERROR)
        try:
            return torch.onnx.export(
                _LogitsOnly(model).eval(),
                (example,),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch", 1: "length"},),
            )
        finally:
            logger.setLevel(level)


def _rename(graph: Any, plain: set[str], packed: set[str], tied: dict[str, str]) -> None:
    """Name tensors as the model does, and everything else a constant; drop the exporter's notes (with file paths)."""
    for old, value in list(graph.initializers.items()):
        name = old.removeprefix("model.")
        name = tied[name] if name not in plain and tied.get(name) in plain else name
        if name not in plain and name.rpartition(".")[0] not in packed:
            name = CONSTANT + old
        del graph.initializers[old]
        value.name = name
        graph.initializers[name] = value
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()


def read_onnx(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The ``ModelProto`` of an export and its tensors.

    Raises:
        ValueError: for a missing, damaged or foreign file.
        ImportError: without onnx.
    """
    onnx = require("onnx", "onnx")
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is the copy complete?")
    try:
        model = onnx.load(str(path))
        tensors = {t.name: _tensor(onnx.numpy_helper.to_array(t)) for t in model.graph.initializer}
    except Exception as error:  # protobuf, onnx and numpy raise many kinds for a damaged file
        raise ValueError(f"{path} is truncated, damaged or no ONNX file: {str(error)[:300]}") from error
    if not model.graph.node:
        raise ValueError(f"{path} is truncated, damaged or no ONNX file: it has no node")
    return model, tensors


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


@contextmanager
def with_accuracy(folder: Path, level: int) -> Iterator[Path]:
    """The file with another accuracy level, beside a link to its data."""
    onnx = require("onnx", "onnx")
    model = onnx.load(str(folder / FILE), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == OP else ():
            if attribute.name == "accuracy_level":
                attribute.i = level
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / FILE
        path.write_bytes(model.SerializeToString())
        if (folder / DATA_FILE).is_file():
            try:
                os.link(folder / DATA_FILE, path.with_name(DATA_FILE))
            except OSError:
                shutil.copyfile(folder / DATA_FILE, path.with_name(DATA_FILE))
        yield path


def nbits_checks(folder: Path, engine: str, logits: Callable[..., Tensor]) -> tuple[EngineCheck, ...]:
    """The checks of a graph: at accuracy level 0, and at 4 where the file says so.

    Args:
        folder: the export.
        engine: its name.
        logits: of a folder, token ids and the keyword ``accuracy_level``.

    Raises:
        ImportError: without onnx.
    """
    onnx = require("onnx", "onnx")
    nodes = [node for node in onnx.load(str(folder / FILE), load_external_data=False).graph.node if node.op_type == OP]
    said = [{a.name: a.i for a in node.attribute} for node in nodes]
    ask = functools.partial(logits, folder)
    exact = EngineCheck(
        engine=f"{engine}, fp32 activations", level="float", logits=functools.partial(ask, accuracy_level=0)
    )
    if all(attributes.get("accuracy_level", 0) != 4 for attributes in said):
        return (exact,)
    rounded = EngineCheck(
        engine=f"{engine}, int8 activations",
        level="int8",
        logits=functools.partial(ask, accuracy_level=4),
        block=max(attributes["block_size"] for attributes in said),
    )
    return exact, rounded
