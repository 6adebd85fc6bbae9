"""Target ``hf``: packed codes and scales in a Hugging Face folder, for Transformers with fewbits imported.

Weights are safetensors: ``NAME.weight_packed`` (uint8, rows of dense codes), ``NAME.weight_scale`` (in the scheme's
stored dtype; ``NAME.weight_super_scale`` and ``NAME.weight_multipliers`` where scales are double quantized),
``NAME.weight_codebook`` for codebooks, and everything else under the model's own names. ``config.json`` describes them
(:class:`~fewbits.quantizer.FewbitsConfig`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.activations.module import INPUT, input_quantizers, kv_schemes
from fewbits.activations.scheme import ActivationScheme
from fewbits.io import read_json_object
from fewbits.nn import QuantizedLinear
from fewbits.qtensor import QTensor
from fewbits.quantizer import METHOD, FewbitsConfig, Packed
from fewbits.scheme import Scheme
from fewbits.targets.base import load_whole, model_codes, patch_config, plain_tensors, save_plain, ties
from fewbits.targets.engine import EngineCheck
from fewbits.weight_files import read_folder

_README = """# Packed by fewbits

The weights of this model are low-bit codes. Transformers reads them once fewbits is imported:

```python
import fewbits  # registers the format; without it Transformers would start from random weights
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


@dataclass(frozen=True)
class HF:
    """Packed codes for Transformers; holds every scheme.

    Example:
        >>> HF().holds(Scheme.parse("W2A16G64"), (8, 64)) is None
        True
    """

    name: str = "hf"

    def holds_input(self, scheme: ActivationScheme) -> str | None:
        """None: every scheme of inputs is kept as it is."""
        return None

    def holds_kv(self, scheme: ActivationScheme) -> str | None:
        """None: every scheme of keys and values is kept as it is."""
        return None

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None unless the scheme does not fit the shape at all."""
        try:
            scheme.check_shape(shape)
        except ValueError as error:
            return str(error)
        return None

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """Codes and scales of every trained layer, all other tensors as they are."""
        state = self.expected_tensors(model)
        packed: Packed = {}
        for name, q in model_codes(model).items():
            packed[name] = (q.scheme, (q.shape[0], q.shape[1]))
            layer = QuantizedLinear(*packed[name], torch.float32, device=q.codes.device)
            layer.load_qtensor_(q)
            state |= {f"{name}.{key}": value for key, value in layer.named_buffers()}
        save_plain(model, state, tokenizer, folder, save_original_format=False)
        inputs = {name: quantizer.deployed().scheme for name, quantizer in input_quantizers(model)}
        config = FewbitsConfig.from_packed(packed, ties(model), inputs, kv_schemes(model))
        patch_config(folder, quantization_config=config.to_dict())
        (folder / "README.md").write_text(_README, encoding="utf-8")

    def read_codes(self, folder: Path) -> dict[str, QTensor]:
        """Codes and scales as stored, checked against ``config.json``."""
        tensors = read_folder(folder)
        return {name: _read_layer(name, *entry, tensors) for name, entry in _config(folder).packed().items()}

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Everything that is no code, scale or codebook of a packed layer."""
        packed = set(_config(folder).packed())
        return {
            key: value
            for key, value in read_folder(folder).items()
            if key.rpartition(".")[0] not in packed or key.endswith(".bias")
        }

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """Norms, biases and whatever was not quantized; static activation scales as constants."""
        state = plain_tensors(model)
        for name, quantizer in input_quantizers(model):
            state |= {f"{name}.{INPUT}.{key}": value for key, value in quantizer.deployed().named_buffers()}
        return state

    def load(self, folder: Path, like: Any) -> nn.Module:
        """``AutoModelForCausalLM.from_pretrained``."""
        return load_whole(folder, like)

    def reference(self, model: Any) -> nn.Module:
        """The trained model itself."""
        return model

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """None: Transformers is the engine; :meth:`load` asks it."""
        return ()


def _config(folder: Path) -> FewbitsConfig:
    data = read_json_object(folder / "config.json").get("quantization_config")
    if not isinstance(data, dict) or data.get("quant_method") != METHOD:
        raise ValueError(f"{folder / 'config.json'} has no quantization_config of fewbits")
    return FewbitsConfig(**data)


def _read_layer(name: str, scheme: Scheme, shape: tuple[int, int], tensors: dict[str, Tensor]) -> QTensor:
    layer = QuantizedLinear(scheme, shape, torch.float32, device="meta")
    for key, like in list(layer.named_buffers()):
        value = tensors.get(f"{name}.{key}")
        if value is None:
            raise ValueError(f"the tensor {name}.{key} is missing")
        if value.shape != like.shape or value.dtype != like.dtype:
            found, needed = f"{value.dtype} {tuple(value.shape)}", f"{like.dtype} {tuple(like.shape)}"
            raise ValueError(f"the tensor {name}.{key} is {found}; {needed} is needed")
        layer._buffers[key] = value
    try:
        return layer.qtensor()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
