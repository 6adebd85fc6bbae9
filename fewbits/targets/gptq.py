r"""Target ``gptq``: a GPTQ folder of version 1, which vLLM, GPTQModel and the onnxruntime-genai builder import.

Weights are :math:`\hat w = s' (q - z)` with unsigned codes of 2, 3, 4 or 8 bits, packed along the input axis, fp16
scales and :math:`z = 2^{b-1}`. Version 1 stores z - 1; readers that take a file of version 2 for one of version 1 are
off by one step everywhere, so only version 1 is written. Half-shifted grids take one bit more (odd codes, half the
scale).

Codes and scales are exact. Kernels that dequantize in fp16 get the exact weights too where scales are portable and
codes have at most 4 bits; onnxruntime computes in fp32 and needs neither.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbits.evaluate import versions
from fewbits.io import read_json_object
from fewbits.qtensor import QTensor
from fewbits.scheme import Scheme
from fewbits.targets.affine import (
    Fit,
    Judgement,
    affine_fit,
    always_exact,
    assemble,
    codes_from_stored,
    engine_group,
    explain_misfit,
    gather_scale,
    judge_numbers,
    refuse_scheme,
    spread_scale,
    stored_codes,
    times,
)
from fewbits.targets.base import patch_config, plain_tensors, save_plain
from fewbits.targets.engine import EngineCheck
from fewbits.targets.layers import linear_codes, other_tensors, read_layers, stored_tensor, write_layers
from fewbits.targets.words import pack_words, unpack_words
from fewbits.weight_files import read_folder

WIDTHS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class GPTQ:
    """A GPTQ folder of version 1.

    Args:
        num_bits: of every stored code, 2, 3, 4 or 8; None takes for each layer the fewest that hold its grid. Engines
            have the fastest kernels for 4 bits.

    Raises:
        ValueError: for another number of bits.

    Example:
        >>> GPTQ().judge(Scheme.parse("W2HA16G64"), (64, 128)).reason
        '3-bit codes with 1/2 scale, groups of 64'
    """

    num_bits: int | None = None

    def __post_init__(self) -> None:
        if self.num_bits is not None and self.num_bits not in WIDTHS:
            raise ValueError(f"num_bits={self.num_bits} is unknown to GPTQ; use one of {', '.join(map(str, WIDTHS))}")

    @property
    def name(self) -> str:
        """``gptq`` or, with a number of bits, ``gptq:4``."""
        return "gptq" if self.num_bits is None else f"gptq:{self.num_bits}"

    @property
    def _widths(self) -> tuple[int, ...]:
        return WIDTHS if self.num_bits is None else (self.num_bits,)

    def _find(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[Fit, int] | str:
        """Codes and group size, or why there are none."""
        if reason := refuse_scheme(scheme, shape):
            return reason
        fit = affine_fit(scheme.grid, self._widths)
        if fit is None:
            return explain_misfit(scheme.grid, self._widths, ("middle",))
        for what, size in (("out_features", shape[0]), ("in_features", shape[1])):
            if size * fit.num_bits % 32:
                return f"{what}={size} of {fit.num_bits}-bit codes do not fill whole 32-bit words; use a multiple of 32"
        group = engine_group(scheme, shape)
        if group != shape[1]:
            group = engine_group(scheme, shape, GROUPS)
        if group is None:
            return (
                f"no group of {', '.join(map(str, GROUPS))} divides group_size={scheme.scale.group_size}; use 32 or 64"
            )
        return fit, group

    def judge(self, scheme: Scheme, shape: tuple[int, int]) -> Judgement:
        """Verdict and reason; :meth:`holds` is its refusal."""
        found = self._find(scheme, shape)
        if isinstance(found, str):
            return Judgement(verdict="cannot", reason=found)
        fit, group = found
        scale = "the scale" if fit.multiplier == 1 else f"{fit.multiplier} scale"
        where = "a scale a row" if group == shape[1] else f"groups of {group}"
        stored = f"{fit.num_bits}-bit codes with {scale}, {where}"
        if always_exact(fit.multiplier, scheme, torch.float16):
            return Judgement(verdict="lossless", reason=stored)
        condition = f"every {scale.removeprefix('the ')} is an fp16 number"

        def pack(q: QTensor) -> Tensor:
            return times(spread_scale(q, group), fit.multiplier, torch.float16, "a weight")

        return judge_numbers(scheme, shape, condition, stored, pack)

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None, or why the format cannot hold the scheme; the numbers themselves are checked by :meth:`write`."""
        found = self.judge(scheme, shape)
        return found.reason if found.verdict == "cannot" else None

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """Codes, zeros and scales; all other tensors as they are.

        Raises:
            ValueError: for a quantized embedding or Conv1D, a grid that does not fit, or a scale beyond fp16.
        """
        codes = linear_codes(model, self.name)
        layers: dict[str, GPTQLayer] = {}
        for name, q in codes.items():
            found = self._find(q.scheme, (q.shape[0], q.shape[1]))
            if isinstance(found, str):
                raise ValueError(f"{name}: {found}")
            fit, group = found
            scale = times(spread_scale(q, group), fit.multiplier, torch.float16, name)
            layers[name] = GPTQLayer(stored_codes(q, fit), scale, fit.num_bits, group)
        write_gptq(model, plain_tensors(model), layers, tokenizer, folder)
        write_layers(folder, codes)

    def read_codes(self, folder: Path) -> dict[str, QTensor]:
        """Codes and scales, checked against ``config.json``."""
        tensors, config = read_folder(folder), _read_config(folder)
        found = {}
        for name, (scheme, shape) in read_layers(folder).items():
            try:
                found[name] = _read(name, scheme, shape, _kind(config, name), tensors)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Norms, embeddings, biases and whatever was not quantized."""
        return other_tensors(folder, read_layers(folder))

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """The same from the model."""
        return plain_tensors(model)

    def load(self, folder: Path, like: Any) -> None:
        """None: Transformers reads GPTQ through GPTQModel only, which replaces the installed torch."""

    def reference(self, model: Any) -> nn.Module:
        """The trained model itself."""
        return model

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """None: GPTQModel, which Transformers reads GPTQ through, replaces the installed torch."""
        return ()


class GPTQLayer(NamedTuple):
    """Unsigned codes ``(out_features, in_features)``, fp16 scales ``(out_features, groups)``, bits and group size."""

    stored: Tensor
    scale: Tensor
    num_bits: int
    group: int

    @property
    def kind(self) -> tuple[int, int]:
        """Bits and group size as ``config.json`` says them: -1 for one scale a row."""
        return self.num_bits, -1 if self.group == self.stored.shape[1] else self.group

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file; zeros are stored less one."""
        scale = self.scale.t().contiguous()
        zeros = torch.full(scale.shape, 2 ** (self.num_bits - 1) - 1, dtype=torch.int16)
        return {
            "qweight": pack_words(self.stored, self.num_bits).t().contiguous(),
            "qzeros": pack_words(zeros, self.num_bits),
            "scales": scale,
            "g_idx": (torch.arange(self.stored.shape[1]) // self.group).int(),
        }


def write_gptq(
    model: Any, plain: dict[str, Tensor], layers: dict[str, GPTQLayer], tokenizer: Any | None, folder: Path
) -> None:
    """A folder of version 1 with these layers and these other tensors."""
    state = dict(plain)
    for name, layer in layers.items():
        state |= {f"{name}.{key}": value for key, value in layer.tensors().items()}
    save_plain(model, state, tokenizer, folder, save_original_format=False)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rest = sorted(linear - set(layers) - {"lm_head"})
    patch_config(folder, quantization_config=_config({name: layer.kind for name, layer in layers.items()}, rest))


def _pattern(name: str) -> str:
    """A regular expression for the module and its tensors, and no module whose name only begins so."""
    return rf"^{re.escape(name)}(\.|$)"


def _config(kinds: dict[str, tuple[int, int]], plain: list[str]) -> dict[str, Any]:
    """The most common bits and group for all layers, the others by name, as GPTQModel, vLLM and ORT-GenAI read it."""
    (bits, group), _ = Counter(kinds.values()).most_common(1)[0]
    dynamic: dict[str, dict[str, int]] = {
        f"+:{_pattern(name)}": {"bits": b, "group_size": g} for name, (b, g) in kinds.items() if (b, g) != (bits, group)
    }
    dynamic |= {f"-:{_pattern(name)}": {} for name in plain}
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "lm_head": "lm_head" in kinds,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"fewbits:{versions()['fewbits']}"]},
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _read_config(folder: Path) -> dict[str, Any]:
    data = read_json_object(folder / "config.json").get("quantization_config")
    if not isinstance(data, dict) or data.get("quant_method") != "gptq":
        raise ValueError(f"{folder / 'config.json'} describes no GPTQ weights")
    if data.get("checkpoint_format") != "gptq":
        found = data.get("checkpoint_format")
        raise ValueError(f"{folder} is GPTQ of the format {found!r}; only version 1 ('gptq') is read")
    return data


def _kind(config: dict[str, Any], name: str) -> tuple[Any, Any]:
    dynamic = config.get("dynamic") or {}
    own = dynamic.get(f"+:{_pattern(name)}", {}) if isinstance(dynamic, dict) else {}
    merged = config | (own if isinstance(own, dict) else {})
    return merged.get("bits"), merged.get("group_size")


def _read(
    name: str, scheme: Scheme, shape: tuple[int, int], kind: tuple[Any, Any], tensors: dict[str, Tensor]
) -> QTensor:
    bits, size = kind
    found = GPTQ(bits)._find(scheme, shape) if bits in WIDTHS else f"config.json says bits={bits!r}"
    if isinstance(found, str):
        raise ValueError(found)
    fit, group = found
    if size != (-1 if group == shape[1] else group):
        raise ValueError(f"config.json says group_size={size!r}; {scheme.name} needs {group}")
    rows, width, num_groups = *shape, shape[1] // group
    parts = {
        "qweight": (torch.int32, (width * fit.num_bits // 32, rows)),
        "qzeros": (torch.int32, (num_groups, rows * fit.num_bits // 32)),
        "scales": (torch.float16, (num_groups, rows)),
        "g_idx": (torch.int32, (width,)),
    }
    read = {key: stored_tensor(tensors, f"{name}.{key}", *form) for key, form in parts.items()}
    if not torch.equal(read["g_idx"], (torch.arange(width) // group).int()):
        raise ValueError("g_idx is not the plain order of groups")
    if bool((unpack_words(read["qzeros"], rows, fit.num_bits) != int(fit.zero) - 1).any()):
        raise ValueError(f"a zero point is not {fit.zero}, stored as {fit.zero - 1}")
    codes = codes_from_stored(unpack_words(read["qweight"].t(), width, fit.num_bits), scheme, fit)
    return assemble(codes, gather_scale(read["scales"].t(), fit.multiplier, scheme, shape, group), scheme)
