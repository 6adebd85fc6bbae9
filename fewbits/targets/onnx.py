r"""Target ``onnx``: one ONNX graph whose quantized layers are ``MatMulNBits`` of onnxruntime (OpenVINO reads it too).

Weights are :math:`\hat w = s' (q - z)` with unsigned codes of 2, 4 or 8 bits and one fp32 scale for every 16 to 256
weights of a row. Without a zero point z is the middle code; with one it is any number, here only at 2 bits, where the
half-shifted grid has z = 1.5 (8-bit codes refuse such a zero, and at 4 bits it has no fast kernel). Odd grids that do
not fit so take more bits. A group that is ragged, or no power of two, is cut into smaller blocks.

The graph takes ``input_ids`` (batch, length) and returns ``logits`` in fp32, without a cache: for scoring and checking;
to generate, use ``genai``. ``accuracy_level`` 4 lets onnxruntime round activations to 8 bits, which its fast kernels
want; at 0 it computes in fp32, exactly but slower than a dense layer at 2 bits. With z = 1.5 the fast kernel needs the
session option ``mlas.use_lut_gemm`` = ``1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.qtensor import QTensor
from fewbits.scheme import Scheme
from fewbits.targets.affine import Fit, Judgement
from fewbits.targets.base import plain_tensors
from fewbits.targets.dequantized import reference_fp32
from fewbits.targets.engine import EngineCheck, with_version
from fewbits.targets.layers import linear_codes, read_layers, require, write_layers
from fewbits.targets.nbits import LEAVES, OP, WIDTHS, Packing, find_nbits, judge_nbits, unpack_nbits
from fewbits.targets.onnx_graph import CONSTANT, FILE, nbits_checks, read_onnx, trace, with_accuracy

_ONE_FILE = 2**30
"""Bytes of tensors up to which everything lies in one file; protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class ONNX:
    """An ONNX graph with ``MatMulNBits``.

    Args:
        num_bits: of every stored code, 2, 4 or 8; None takes for each layer the fewest that hold its grid.
        accuracy_level: of the layers, 0 (fp32 activations) or 4 (int8 activations, the fast kernels).

    Raises:
        ValueError: for other values.

    Example:
        >>> ONNX().judge(Scheme.parse("W2HA16G64"), (8, 128)).reason
        '2-bit codes, zero point 3/2, blocks of 64'
        >>> ONNX(num_bits=4).judge(Scheme.parse("W2HA16G64"), (8, 128)).reason
        '4-bit codes, zero point 8, blocks of 64'
    """

    num_bits: int | None = None
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.num_bits is not None and self.num_bits not in WIDTHS:
            raise ValueError(f"num_bits={self.num_bits} is unknown to MatMulNBits; use one of 2, 4, 8")
        if self.accuracy_level not in (0, 4):
            raise ValueError(f"accuracy_level={self.accuracy_level} is unknown; use 0 (fp32) or 4 (int8 activations)")

    @property
    def name(self) -> str:
        """``onnx`` or, with a number of bits, ``onnx:4``."""
        return "onnx" if self.num_bits is None else f"onnx:{self.num_bits}"

    def _find(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[Fit, int] | str:
        """Codes and block size, or why there are none."""
        return find_nbits(scheme, shape, self.num_bits)

    def judge(self, scheme: Scheme, shape: tuple[int, int]) -> Judgement:
        """Verdict and reason; :meth:`holds` is its refusal. Scales are fp32, so nothing depends on the numbers."""
        return judge_nbits(self._find(scheme, shape))

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None, or why the format cannot hold the scheme."""
        found = self._find(scheme, shape)
        return found if isinstance(found, str) else None

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """``model.onnx`` (and ``model.onnx.data`` if it is large), configuration and tokenizer.

        Raises:
            ValueError: for a quantized embedding or Conv1D, or a grid that does not fit.
            ImportError: without onnx and onnxscript.
        """
        require("onnx", "onnx")
        require("onnxscript", "onnx")
        codes = linear_codes(model, self.name)
        layers: dict[str, Packing] = {}
        for name, q in codes.items():
            found = self._find(q.scheme, (q.shape[0], q.shape[1]))
            if isinstance(found, str):
                raise ValueError(f"{name}: {found}")
            layers[name] = (q, *found)
        program = trace(self.reference(model), layers, self.accuracy_level, set(plain_tensors(model)))
        values = program.model.graph.initializers.values()
        size = sum(value.const_value.nbytes for value in values if value.const_value is not None)
        program.save(folder / FILE, external_data=size > _ONE_FILE)
        model.config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_layers(folder, codes)

    def read_codes(self, folder: Path) -> dict[str, QTensor]:
        """Codes and scales, checked against the nodes that use them."""
        model, tensors = read_onnx(folder)
        nodes = {node.input[1].rpartition(".")[0]: node for node in model.graph.node if node.op_type == OP}
        layers = read_layers(folder)
        if extra := sorted(set(nodes) - set(layers)):
            raise ValueError(f"{folder / FILE} has the quantized layer {extra[0]}, which is not described")
        found: dict[str, QTensor] = {}
        for name, (scheme, shape) in layers.items():
            try:
                if name not in nodes:
                    raise ValueError(f"{FILE} has no {OP} for it")
                found |= unpack_nbits(name, nodes[name], tensors, [(name, scheme, shape)])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Norms, embeddings, biases and whatever was not quantized, in fp32."""
        _, tensors = read_onnx(folder)
        packed = {f"{name}.{leaf}" for name in read_layers(folder) for leaf in LEAVES}
        return {k: v for k, v in tensors.items() if k not in packed and not k.startswith(CONSTANT)}

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """The same from the model."""
        return {k: v.detach().float() for k, v in plain_tensors(model).items()}

    def load(self, folder: Path, like: Any) -> None:
        """None: the graph runs in onnxruntime; see :meth:`engine_logits`."""

    def engine_logits(self, folder: Path, ids: Tensor, *, accuracy_level: int = 0, use_lut: bool = False) -> Tensor:
        """Logits of onnxruntime on the CPU, fp32 ``(sequences, length, vocabulary)``.

        Args:
            folder: the export.
            ids: int ``(sequences, length)``.
            accuracy_level: put in place of the file's: 0 computes in fp32, 4 rounds activations to 8 bits.
            use_lut: the session option ``mlas.use_lut_gemm``.

        Raises:
            ImportError: without onnxruntime.
        """
        runtime = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("mlas.use_lut_gemm", str(int(use_lut)))
        with with_accuracy(folder, accuracy_level) as path:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            return torch.from_numpy(session.run(["logits"], {"input_ids": ids.long().cpu().numpy()})[0])

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """onnxruntime with fp32 activations, and with int8 ones where the file asks for them."""
        return nbits_checks(folder, with_version("onnxruntime"), self.engine_logits)

    def reference(self, model: Any) -> nn.Module:
        """The trained model itself, or (of a model in bf16) the model of its dequantized weights in fp32."""
        return reference_fp32(model)
