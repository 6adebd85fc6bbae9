r"""Target ``compressed-tensors``: a ``pack-quantized`` folder, as Transformers and vLLM read it.

Weights are signed integers of 1 to 8 bits, :math:`\hat w = s' (q - z)`, packed densely into int32 words along a row;
scales ``s'`` stand for a row or for a group of it, zero points are integers. Grids whose levels are no such integers
take more bits: half-shifted levels are odd multiples of half the scale, binary ones are -1 and 1 of two bits.

The loader casts scales to the dtype of the model and computes there. In a float32 model that is exact; in a bfloat16 or
float16 model it is with portable scales, and otherwise the export checks every weight and refuses a single wrong one.

Quantized inputs of layers are written where the format means what was trained (``compressed_activations.py``).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompressedTensorsConfig

from fewbits.activations.scheme import ActivationScheme
from fewbits.io import read_json_object
from fewbits.pretrained import from_pretrained, refuse_missing
from fewbits.qtensor import QTensor
from fewbits.scheme import Scheme
from fewbits.targets.affine import (
    Fit,
    Judgement,
    Zero,
    affine_fit,
    assemble,
    codes_from_stored,
    engine_group,
    explain_misfit,
    gather_scale,
    judge_dtype,
    refuse_scheme,
    scale_dtype,
    spread_scale,
    stored_codes,
    times,
)
from fewbits.targets.base import load_whole, patch_config, plain_tensors, save_plain
from fewbits.targets.compressed_activations import (
    SCALE,
    checked_inputs,
    input_args,
    input_scales,
    refuse_input,
    refuse_keys_and_values,
)
from fewbits.targets.engine import EngineCheck
from fewbits.targets.layers import (
    layers_config,
    linear_codes,
    other_tensors,
    read_layers,
    require,
    stored_tensor,
    write_layers,
)
from fewbits.targets.words import num_words, pack_words, unpack_words
from fewbits.weight_files import read_folder

FORMAT = "pack-quantized"


@dataclass(frozen=True)
class CompressedTensors:
    """A ``pack-quantized`` folder.

    Args:
        num_bits: of every stored code; None takes the fewest that hold the grid. More engines run 4 and 8 than others.

    Example:
        >>> CompressedTensors().judge(Scheme.parse("W2HA16G64"), (8, 128)).reason
        '3-bit codes with 1/2 scale, groups of 64'
        >>> CompressedTensors(num_bits=2).holds(Scheme.parse("W2HA16G64"), (8, 64))
        'the 4 levels -1.5..1.5 do not fit 2-bit codes with an integer zero point'
    """

    num_bits: int | None = None

    def __post_init__(self) -> None:
        if self.num_bits is not None and not 1 <= self.num_bits <= 8:
            raise ValueError(f"num_bits={self.num_bits} is outside 1..8")

    @property
    def name(self) -> str:
        """``compressed-tensors`` or, with a number of bits, ``compressed-tensors:4``."""
        return "compressed-tensors" if self.num_bits is None else f"compressed-tensors:{self.num_bits}"

    @property
    def _widths(self) -> range:
        return range(1, 9) if self.num_bits is None else range(self.num_bits, self.num_bits + 1)

    def _find(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[Fit, int] | str:
        """How it is stored, without a zero point wherever the codes allow it, or why it cannot be."""
        if reason := refuse_scheme(scheme, shape):
            return reason
        fit = affine_fit(scheme.grid, self._widths) or affine_fit(scheme.grid, self._widths, ("int",))
        group = engine_group(scheme, shape)
        if fit is None or group is None:
            return explain_misfit(scheme.grid, self._widths, ("int",))
        return fit, group

    def judge(self, scheme: Scheme, shape: tuple[int, int]) -> Judgement:
        """Verdict and reason; :meth:`holds` is its refusal."""
        found = self._find(scheme, shape)
        if isinstance(found, str):
            return Judgement(verdict="cannot", reason=found)
        fit, group = found
        where = "a scale a row" if group == shape[1] else f"groups of {group}"
        scale = "the scale" if fit.multiplier == 1 else f"{fit.multiplier} scale"
        zero = "" if fit.zeros == "middle" else f", zero point {fit.zero}"
        stored = f"{fit.num_bits}-bit codes with {scale}, {where}{zero}"
        return judge_dtype(scheme, fit.multiplier, stored)

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None, or why the format cannot hold the scheme; scales and the model's dtype are checked by :meth:`write`."""
        found = self.judge(scheme, shape)
        return found.reason if found.verdict == "cannot" else None

    def holds_input(self, scheme: ActivationScheme) -> str | None:
        """None, or why ``input_activations`` would not be what was trained."""
        return refuse_input(scheme)

    def holds_kv(self, scheme: ActivationScheme) -> str | None:
        """Why ``kv_cache_scheme`` would not be what was trained."""
        return refuse_keys_and_values()

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """Packed codes, scales and zero points; all other tensors as they are.

        Raises:
            ValueError: for a quantized embedding or Conv1D, a grid that does not fit, scales that the model's dtype
                rounds so that a weight changes, or quantized inputs that loaders would round in another way.
        """
        inputs = checked_inputs(model)
        state = self.expected_tensors(model)
        codes = linear_codes(model, self.name)
        groups: dict[tuple[int, bool, int | None, ActivationScheme | None], list[str]] = {}
        for name, q in codes.items():
            found = self._find(q.scheme, (q.shape[0], q.shape[1]))
            if isinstance(found, str):
                raise ValueError(f"{name}: {found}")
            fit, group = found
            state |= {f"{name}.{key}": value for key, value in _pack(name, q, fit, group, model.dtype).items()}
            key = fit.num_bits, fit.zeros == "middle", None if group == q.shape[1] else group, inputs.get(name)
            groups.setdefault(key, []).append(name)
        if not all(symmetric for _, symmetric, *_ in groups):
            if len(groups) > 1:
                raise ValueError("Transformers reads zero points only where all layers have one scheme; drop num_bits")
            if inputs:
                raise ValueError("Transformers reads zero points only without quantized inputs; drop num_bits")
        save_plain(model, state, tokenizer, folder, save_original_format=False)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        rest = sorted(set(linear) - set(codes))
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": _group_config(*key, targets=["Linear"] if len(groups) == 1 else names)
                for i, (key, names) in enumerate(groups.items())
            },
            "ignore": rest,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        patch_config(folder, quantization_config=config)
        write_layers(folder, codes, inputs=inputs)

    def read_codes(self, folder: Path) -> dict[str, QTensor]:
        """Codes and scales, checked against ``config.json``."""
        tensors = read_folder(folder)
        quantization, layers = _config(folder), layers_config(folder)
        inputs, found = layers.by_module("activations"), {}
        for name, (scheme, shape) in layers.packed().items():
            try:
                group = _group_of(quantization, name)
                _check_input(group, inputs.get(name))
                found[name] = _read(name, scheme, shape, group["weights"], tensors)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Norms, embeddings, biases and whatever was not quantized; static scales of inputs."""
        packed = read_layers(folder)
        scales = {k: v for k, v in read_folder(folder).items() if k.endswith(f".{SCALE}")}
        return other_tensors(folder, packed) | scales

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """The same from the model."""
        return plain_tensors(model) | input_scales(model)

    def load(self, folder: Path, like: Any) -> nn.Module:
        """``AutoModelForCausalLM.from_pretrained``, which needs the package compressed-tensors.

        Zero points are read with ``CompressedTensorsConfig(dequantize=True)`` only (Transformers 5.24 with
        compressed-tensors 0.20): without it, the loader expects them unpacked, which no writer does.

        Raises:
            ImportError: without the package.
        """
        require("compressed_tensors", "compressed")
        if all(group["weights"]["symmetric"] for group in _config(folder)["config_groups"].values()):
            return load_whole(folder, like)
        attention = getattr(like.config, "_attn_implementation", None)
        dense = CompressedTensorsConfig(dequantize=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model, info = from_pretrained(
                folder, dtype="auto", attn_implementation=attention, quantization_config=dense
            )
        refuse_missing(folder, info["missing_keys"])
        return model

    def reference(self, model: Any) -> nn.Module:
        """The trained model itself."""
        return model

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """None: Transformers is the engine; :meth:`load` asks it."""
        return ()


@torch.no_grad()
def _pack(name: str, q: QTensor, fit: Fit, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    spread, stored = spread_scale(q, group), stored_codes(q, fit)
    scale = times(spread, fit.multiplier, scale_dtype(q.scheme, fit.multiplier), name)
    level = (stored.to(dtype) - float(fit.zero)).view(*spread.shape, group)
    wrong = (level * scale.to(dtype)[..., None]).view(q.shape) != q.dequantize(dtype)
    if bool(wrong.any()):
        plain = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: the model is {plain} and so loaders round its scales, which changes {int(wrong.sum())} of "
            f"{wrong.numel()} weights; train with portable scales, or export the model in float32"
        )
    parts = {
        "weight_packed": pack_words(stored, fit.num_bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(q.shape),
    }
    if fit.zeros != "middle":
        zeros = torch.full((scale.shape[1], scale.shape[0]), int(fit.zero), dtype=torch.int16)
        parts["weight_zero_point"] = pack_words(zeros, fit.num_bits).t().contiguous()
    return parts


def _group_config(
    num_bits: int, symmetric: bool, group: int | None, inputs: ActivationScheme | None, *, targets: list[str]
) -> dict[str, Any]:
    weights = {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    activations = None if inputs is None else input_args(inputs)
    parts = {"weights": weights, "input_activations": activations, "output_activations": None}
    return {"targets": targets, **parts, "format": FORMAT}


def _config(folder: Path) -> dict[str, Any]:
    data = read_json_object(folder / "config.json").get("quantization_config")
    if not isinstance(data, dict) or data.get("quant_method") != "compressed-tensors" or data.get("format") != FORMAT:
        raise ValueError(f"{folder / 'config.json'} describes no {FORMAT} weights of compressed-tensors")
    return data


def _group_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(group.get("targets"), list):
            everything = group["targets"] == ["Linear"] and name not in (config.get("ignore") or ())
            if (everything or name in group["targets"]) and isinstance(group.get("weights"), dict):
                return group
    raise ValueError("config.json does not say how it is quantized")


def _check_input(group: dict[str, Any], scheme: ActivationScheme | None) -> None:
    found, needed = group.get("input_activations"), None if scheme is None else input_args(scheme)
    if found != needed:
        raise ValueError(f"config.json says input_activations={found}; {needed} was trained")


def _read(
    name: str, scheme: Scheme, shape: tuple[int, int], config: dict[str, Any], tensors: dict[str, Tensor]
) -> QTensor:
    bits, symmetric = config.get("num_bits"), config.get("symmetric")
    rule: Zero = "middle" if symmetric is True else "int"
    fit = affine_fit(scheme.grid, (bits,), (rule,)) if isinstance(bits, int) and 1 <= bits <= 8 else None
    if fit is None:
        raise ValueError(f"config.json says num_bits={bits}, symmetric={symmetric}, which do not hold {scheme.name}")
    group = engine_group(scheme, shape)
    assert group is not None
    if config.get("group_size") not in (group, *((None, -1) if group == shape[1] else ())):
        raise ValueError(f"config.json says group_size={config.get('group_size')}; {scheme.name} needs {group}")
    rows, width, num_groups = *shape, shape[1] // group
    if stored_tensor(tensors, f"{name}.weight_shape", torch.int64, (2,)).tolist() != list(shape):
        raise ValueError(f"weight_shape is not {shape}")
    words = stored_tensor(tensors, f"{name}.weight_packed", torch.int32, (rows, num_words(width, fit.num_bits)))
    scale = stored_tensor(tensors, f"{name}.weight_scale", None, (rows, num_groups))
    if fit.zeros != "middle":
        size = (num_words(rows, fit.num_bits), num_groups)
        zeros = stored_tensor(tensors, f"{name}.weight_zero_point", torch.int32, size)
        if bool((unpack_words(zeros.t(), rows, fit.num_bits) != int(fit.zero)).any()):
            raise ValueError(f"a zero point is not {fit.zero}")
    codes = codes_from_stored(unpack_words(words, width, fit.num_bits), scheme, fit)
    return assemble(codes, gather_scale(scale, fit.multiplier, scheme, shape, group), scheme)
