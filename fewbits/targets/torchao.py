"""Target ``torchao``: tensors of PyTorch's own quantization library, which Transformers and ExecuTorch take.

Every weight is an ``IntxUnpackedToInt8Tensor``: codes of 1 to 8 bits in one int8 each, a scale and a zero for every
group of a row. Codes are centred where they can be (half-shifted ones take one bit more), as its kernels want it; a
file takes a byte a weight all the same. torchao dequantizes in fp32 and casts afterwards, as fewbits does; but
Transformers casts the scales to the dtype of the model when it loads them, so that in bfloat16 only portable scales are
sure.

The file is plain safetensors whose metadata says which tensors make one weight; neither writing nor reading back needs
torchao, only loading does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbits.io import read_json_object
from fewbits.qtensor import QTensor
from fewbits.scheme import Scheme
from fewbits.targets.affine import (
    Fit,
    Judgement,
    affine_fit,
    assemble,
    codes_from_stored,
    engine_group,
    explain_misfit,
    gather_scale,
    judge_dtype,
    refuse_scheme,
    spread_scale,
    stored_codes,
    times,
)
from fewbits.targets.base import load_whole, patch_config, plain_tensors, save_plain
from fewbits.targets.engine import EngineCheck
from fewbits.targets.layers import linear_codes, read_layers, require, stored_tensor, write_layers
from fewbits.weight_files import WEIGHTS_NAME, read_safetensors

_WIDTHS = range(1, 9)
_CLASS = "IntxUnpackedToInt8Tensor"
_PARTS = ("qdata", "scale", "zero_point")


@dataclass(frozen=True)
class TorchAO:
    """A folder of torchao tensors.

    Example:
        >>> TorchAO().judge(Scheme.parse("W2HA16G64"), (8, 128)).reason
        '3-bit codes in int8, zero 0, groups of 64'
    """

    name: str = "torchao"

    def _find(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[Fit, int] | str:
        """Codes and group size, or why there are none."""
        if reason := refuse_scheme(scheme, shape):
            return reason
        fit = affine_fit(scheme.grid, _WIDTHS) or affine_fit(scheme.grid, _WIDTHS, ("float",))
        group = engine_group(scheme, shape)
        if fit is None or group is None:
            return explain_misfit(scheme.grid, _WIDTHS, ("float",))
        return fit, group

    def judge(self, scheme: Scheme, shape: tuple[int, int]) -> Judgement:
        """Verdict and reason; :meth:`holds` is its refusal."""
        found = self._find(scheme, shape)
        if isinstance(found, str):
            return Judgement(verdict="cannot", reason=found)
        fit, group = found
        where = "a scale a row" if group == shape[1] else f"groups of {group}"
        stored = f"{fit.num_bits}-bit codes in int8, zero {_zero(fit):g}, {where}"
        return judge_dtype(scheme, fit.multiplier, stored)

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None, or why the format cannot hold the scheme; scales and the model's dtype are checked by :meth:`write`."""
        found = self._find(scheme, shape)
        return found if isinstance(found, str) else None

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """Codes, scales and zeros; all other tensors as they are.

        Raises:
            ValueError: for a quantized embedding or Conv1D, a grid that does not fit, or scales that the model's dtype
                rounds so that a weight changes.
        """
        plain, codes = plain_tensors(model), linear_codes(model, self.name)
        metadata = {key: json.dumps({"_type": "Tensor"}) for key in plain}
        state, common = dict(plain), (0, 0)
        for name, q in codes.items():
            found = self._find(q.scheme, (q.shape[0], q.shape[1]))
            if isinstance(found, str):
                raise ValueError(f"{name}: {found}")
            fit, group = found
            state |= {f"{name}._weight_{key}": value for key, value in _pack(name, q, fit, group, model.dtype).items()}
            metadata[f"{name}.weight"] = json.dumps(_describe(fit, group, model.dtype))
            common = max(common, (fit.num_bits, group))
        save_plain(model, state, tokenizer, folder, save_original_format=False, max_shard_size="1000GB")
        metadata |= {"format": "pt", "tensor_names": json.dumps(list(metadata))}
        save_file(read_safetensors(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, metadata=metadata)
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        patch_config(folder, quantization_config=_config(*common, sorted(linear - set(codes))))
        write_layers(folder, codes)

    def read_codes(self, folder: Path) -> dict[str, QTensor]:
        """Codes and scales, checked against the metadata of the file."""
        config = read_json_object(folder / "config.json").get("quantization_config")
        if not isinstance(config, dict) or config.get("quant_method") != "torchao":
            raise ValueError(f"{folder / 'config.json'} describes no weights of torchao")
        tensors = read_safetensors(folder / WEIGHTS_NAME)
        with safe_open(str(folder / WEIGHTS_NAME), framework="pt") as file:
            metadata = file.metadata() or {}
        found = {}
        for name, (scheme, shape) in read_layers(folder).items():
            try:
                found[name] = self._read(name, scheme, shape, metadata.get(f"{name}.weight"), tensors)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found

    def _read(
        self, name: str, scheme: Scheme, shape: tuple[int, int], said: str | None, tensors: dict[str, Tensor]
    ) -> QTensor:
        found = self._find(scheme, shape)
        if isinstance(found, str):
            raise ValueError(found)
        fit, group = found
        try:
            description = json.loads(said or "null")
        except json.JSONDecodeError:
            description = None
        data = description.get("_data") if isinstance(description, dict) else None
        dtype = data.get("dtype") if isinstance(data, dict) else None
        if description != _describe(fit, group, None) | {"_data": _data(fit, group, dtype)}:
            raise ValueError(f"the metadata says {str(said)[:300]}, which is not {scheme.name}")
        size = (shape[0], shape[1] // group)
        keys = [f"{name}._weight_{part}" for part in _PARTS]
        qdata = stored_tensor(tensors, keys[0], torch.int8, shape)
        scale = stored_tensor(tensors, keys[1], torch.float32, size)
        zero = stored_tensor(tensors, keys[2], _zero_dtype(fit), size)
        if bool((zero != _zero(fit)).any()):
            raise ValueError(f"a zero point is not {_zero(fit):g}")
        stored = qdata.to(torch.int16) + 2 ** (fit.num_bits - 1)
        if bool((stored < 0).any()) or bool((stored >= 2**fit.num_bits).any()):
            raise ValueError(f"a code does not fit {fit.num_bits} bits")
        codes = codes_from_stored(stored, scheme, fit)
        return assemble(codes, gather_scale(scale, fit.multiplier, scheme, shape, group), scheme)

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Norms, embeddings, biases and whatever was not quantized."""
        packed = {f"{name}._weight_{part}" for name in read_layers(folder) for part in _PARTS}
        return {k: v for k, v in read_safetensors(folder / WEIGHTS_NAME).items() if k not in packed}

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """The same from the model."""
        return plain_tensors(model)

    def load(self, folder: Path, like: Any) -> nn.Module:
        """``AutoModelForCausalLM.from_pretrained``, which needs the package torchao.

        Raises:
            ImportError: without it.
        """
        require("torchao", "torchao")
        return load_whole(folder, like)

    def reference(self, model: Any) -> nn.Module:
        """The trained model itself."""
        return model

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """None: Transformers is the engine; :meth:`load` asks it."""
        return ()


def _zero(fit: Fit) -> float:
    """The signed code that decodes to 0."""
    return float(fit.zero) - 2 ** (fit.num_bits - 1)


def _zero_dtype(fit: Fit) -> torch.dtype:
    return torch.int8 if fit.zeros == "middle" else torch.float32


@torch.no_grad()
def _pack(name: str, q: QTensor, fit: Fit, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    scale = times(spread_scale(q, group), fit.multiplier, torch.float32, name).contiguous()
    qdata = (stored_codes(q, fit).to(torch.int16) - 2 ** (fit.num_bits - 1)).to(torch.int8)
    steps = (qdata.float() - _zero(fit)).view(*scale.shape, group)
    weight = (steps * scale.to(dtype).float()[..., None]).view(q.shape).to(dtype)
    if wrong := int((weight != q.dequantize(dtype)).sum()):
        plain = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: the model is {plain} and so loaders round its scales, which changes {wrong} of {weight.numel()} "
            "weights; train with portable scales, or export the model in float32"
        )
    return {"qdata": qdata, "scale": scale, "zero_point": torch.full_like(scale, _zero(fit)).to(_zero_dtype(fit))}


def _data(fit: Fit, group: int, dtype: Any) -> dict[str, Any]:
    kind = {"_type": "torch.dtype", "_data": f"int{fit.num_bits}"}
    return {"target_dtype": kind, "block_size": [1, group], "dtype": dtype, "activation_quantization": None}


def _describe(fit: Fit, group: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """What torchao 0.18 writes of such a tensor."""
    own = {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}
    return {"_type": _CLASS, "_data": _data(fit, group, own), "_tensor_data_names": list(_PARTS)}


def _config(num_bits: int, group: int, plain: list[str]) -> dict[str, Any]:
    """What Transformers wants to see; the tensors themselves say what they are."""
    settings = {
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{num_bits}"},
        "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": group}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "scale_dtype": None,
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
    }
    kind = {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": settings}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": kind},
        "modules_to_not_convert": plain,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
