"""Target ``dequantized``: a plain Hugging Face folder that every program reads, without fewbits anywhere.

Each quantized weight is ``qtensor.dequantize(dtype)``: computed in fp32 in the canonical order, then cast once. In
bfloat16 the cast is exact where scale times level has at most 8 significant bits (portable scales with the levels -2,
-1, 0, 1), and a rounding elsewhere; ``dequantized:fp32`` is always exact.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from fewbits.nn import QATLayer
from fewbits.scheme import Scheme
from fewbits.targets.base import (
    ROTATED_INPUTS,
    Layer,
    drop_ties,
    load_whole,
    model_codes,
    owners,
    patch_config,
    plain_tensors,
    save_plain,
    ties,
    trained_layers,
)
from fewbits.targets.engine import EngineCheck
from fewbits.weight_files import read_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Dequantized:
    """Plain floating-point weights.

    Args:
        dtype: of every floating-point tensor in the file.

    Example:
        >>> Dequantized().name, Dequantized(dtype="fp32").name
        ('dequantized', 'dequantized:fp32')
    """

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")

    @property
    def name(self) -> str:
        """``dequantized`` is bfloat16."""
        return "dequantized" if self.dtype == "bf16" else f"dequantized:{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the file."""
        return DTYPES[self.dtype]

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None unless inputs are rotated at run time, or the scheme does not fit the shape; the values are there."""
        if scheme.rotation.basis == "rotated":
            return ROTATED_INPUTS
        try:
            scheme.check_shape(shape)
        except ValueError as error:
            return str(error)
        return None

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """Dequantized weights, all other tensors cast.

        Raises:
            ValueError: for a value that is finite in the model and not in the file (beyond fp16).
        """
        state = self._state(model, {name: q.dequantize(self.torch_dtype) for name, q in model_codes(model).items()})
        for name, value in state.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} has entries that are not finite in {self.dtype}; use dequantized:fp32")
        save_plain(model, state, tokenizer, folder)
        patch_config(folder, dtype=str(self.torch_dtype).removeprefix("torch."))

    def read_codes(self, folder: Path) -> None:
        """There are no codes."""

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """All tensors."""
        return read_folder(folder)

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """``qtensor.dequantize(dtype)`` of every quantized weight; the rest cast."""
        weights = {name: q.dequantize(self.torch_dtype) for name, q in model_codes(model).items()}
        return revert_weight_conversion(model, self._state(model, weights))

    def load(self, folder: Path, like: Any) -> nn.Module:
        """``AutoModelForCausalLM.from_pretrained``."""
        return load_whole(folder, like)

    def reference(self, model: Any) -> nn.Module:
        """A plain model built by ``from_pretrained`` from the weights that training computes with, cast once.

        These come from training's own fake quantization, not by way of the codes, and no file lies between.
        """
        config = copy.deepcopy(model.config)
        config.__dict__.pop("quantization_config", None)
        weights = {name: _trained_weight(layer, self.torch_dtype) for name, layer in owners(model).items()}
        return type(model).from_pretrained(
            None,
            config=config,
            state_dict=self._state(model, weights),
            dtype=self.torch_dtype,
            attn_implementation=getattr(model.config, "_attn_implementation", None),
        )

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """None: Transformers is the engine; :meth:`load` asks it."""
        return ()

    def _state(self, model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain model's state: ``weights`` of the owners ``(out_features, in_features)``, everything else cast."""
        turned = transposed(model)
        weights = {name: w.t().contiguous() if name in turned else w for name, w in weights.items()}
        weights |= {name: weights[owner] for name, owner in ties(model).items()}
        state = plain_tensors(model) | {f"{name}.weight": value for name, value in weights.items()}
        state = drop_ties(model, state)
        return {k: v.to(self.torch_dtype) if v.is_floating_point() else v for k, v in state.items()}


@torch.no_grad()
def _trained_weight(layer: Layer, dtype: torch.dtype) -> Tensor:
    if isinstance(layer, QATLayer):
        return layer.forward_weight(dtype)
    return layer.qtensor().dequantize(dtype)


def reference_fp32(model: Any) -> nn.Module:
    """The trained model itself, or (of a model in bf16 or fp16) the model of its dequantized weights in fp32."""
    if all(p.dtype == torch.float32 for p in model.parameters()) and model.dtype == torch.float32:
        return model
    return Dequantized("fp32").reference(model)


def transposed(model: Any) -> set[str]:
    """Names of trained layers whose weight a plain model stores as ``(in_features, out_features)``: GPT-2's Conv1D."""
    layers = trained_layers(model)
    if all(isinstance(layer, QATLayer) for layer in layers.values()):
        return {name for name, layer in layers.items() if isinstance(layer, QATLayer) and layer.transposed}
    with torch.device("meta"):  # a packed layer does not say what it replaced; the architecture does
        skeleton = type(model)(copy.deepcopy(model.config))
    return {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D) and name in layers}
