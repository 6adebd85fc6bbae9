"""What engines hold: one file per target; each says which grids it holds without loss, writes them and reads back."""

from __future__ import annotations

from fewbits.naming import did_you_mean
from fewbits.targets.base import Target
from fewbits.targets.bitnet import BitNet
from fewbits.targets.compressed_tensors import CompressedTensors
from fewbits.targets.dequantized import Dequantized
from fewbits.targets.genai import GenAI
from fewbits.targets.gguf import GGUF
from fewbits.targets.gguf import TYPES as GGUF_TYPES
from fewbits.targets.gptq import GPTQ
from fewbits.targets.hf import HF
from fewbits.targets.mlx import MLX
from fewbits.targets.onnx import ONNX
from fewbits.targets.torchao import TorchAO

_ALL: tuple[Target, ...] = (
    HF(),
    Dequantized(),
    Dequantized("fp16"),
    Dequantized("fp32"),
    CompressedTensors(),
    CompressedTensors(num_bits=4),
    CompressedTensors(num_bits=8),
    GPTQ(),
    GPTQ(num_bits=4),
    MLX(),
    MLX("fp16"),
    ONNX(),
    ONNX(num_bits=4),
    GenAI(),
    BitNet(),
    TorchAO(),
    GGUF(),
    *(GGUF(kind) for kind in GGUF_TYPES),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
"""Every target by the name that recipes and the command line use."""


def get_target(name: str) -> Target:
    """The target of this name.

    Raises:
        ValueError: for an unknown name, listing near ones.

    Example:
        >>> get_target("hf").name
        'hf'
    """
    if name not in TARGETS:
        hint = did_you_mean(name, TARGETS, cutoff=0.5)
        raise ValueError(f"unknown target {name!r}; {hint}known targets: {', '.join(TARGETS)}")
    return TARGETS[name]


def folder_name(name: str) -> str:
    """A target's name as a folder's name.

    Example:
        >>> folder_name("gguf:q2_0")
        'gguf-q2_0'
    """
    return name.replace(":", "-")


__all__ = ["GGUF", "HF", "TARGETS", "Dequantized", "Target", "folder_name", "get_target"]
