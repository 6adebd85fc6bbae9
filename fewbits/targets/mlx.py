r"""Target ``mlx``: an affine folder for MLX and mlx-lm, on Apple machines (and, slowly, on every other one).

Weights are :math:`\hat w = s' q + b` with unsigned codes of 1, 2, 3, 4, 5, 6 or 8 bits, and a scale and a bias for
every 32, 64 or 128 weights of a row. The bias is any number, so every uniform grid fits at its own number of bits:
half-shifted codes of two bits have b = -1.5 s, signs of one bit have s' = 2 s and b = -s.

MLX multiplies and adds in the dtype of scale and bias, rounding twice. In fp32 (``mlx``) both steps are exact for
scales of 16 bits. In fp16 (``mlx:fp16``, faster) they are for portable scales and codes of at most 3 bits; the export
repeats MLX's arithmetic for every weight and refuses a single wrong one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

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
from fewbits.targets.base import model_codes, patch_config, plain_tensors, save_plain, ties
from fewbits.targets.dequantized import reference_fp32, transposed
from fewbits.targets.engine import EngineCheck, with_version
from fewbits.targets.layers import layers_config, require, stored_tensor, write_layers
from fewbits.targets.words import num_words, pack_words, unpack_words
from fewbits.weight_files import read_folder

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class MLX:
    """An affine folder for mlx-lm.

    Args:
        dtype: of scales and biases, ``fp32`` or ``fp16``; all other tensors stay as they are.

    Raises:
        ValueError: for another dtype.

    Example:
        >>> MLX().judge(Scheme.parse("W2HA16G64"), (8, 128)).reason
        '2-bit codes, bias -3/2 scale, groups of 64'
        >>> MLX("fp16").judge(Scheme.parse("W2HA16G64", dtype="fp16"), (8, 128)).verdict
        'cannot'
    """

    dtype: Literal["fp32", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(_DTYPES)}")

    @property
    def name(self) -> str:
        """``mlx`` or ``mlx:fp16``."""
        return "mlx" if self.dtype == "fp32" else f"mlx:{self.dtype}"

    def _find(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[Fit, int] | str:
        """Codes and group size, or why there are none."""
        if reason := refuse_scheme(scheme, shape):
            return reason
        fit = affine_fit(scheme.grid, WIDTHS, ("float",))
        if fit is None:
            return explain_misfit(scheme.grid, WIDTHS, ("float",))
        group = engine_group(scheme, shape, GROUPS)
        if group is None:
            size = scheme.scale.group_size
            unit = f"in_features={shape[1]}" if size is None else f"group_size={size} in rows of {shape[1]}"
            return f"{unit} cannot be cut into groups of 32, 64 or 128, and MLX has no others"
        return fit, group

    def judge(self, scheme: Scheme, shape: tuple[int, int]) -> Judgement:
        """Verdict and reason; :meth:`holds` is its refusal."""
        found = self._find(scheme, shape)
        if isinstance(found, str):
            return Judgement(verdict="cannot", reason=found)
        fit, group = found
        stored = f"{fit.num_bits}-bit codes, bias {_bias(fit)} scale, groups of {group}"
        if all(always_exact(factor, scheme, _DTYPES[self.dtype]) for factor in _factors(fit)):
            return Judgement(verdict="lossless", reason=stored)
        condition = f"every weight is exact when {self.dtype} rounds scale * code and adds the bias"
        return judge_numbers(
            scheme, shape, condition, stored, lambda q: _pack("a weight", q, fit, group, _DTYPES[self.dtype])
        )

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None, or why the format cannot hold the scheme; the numbers themselves are checked by :meth:`write`."""
        found = self.judge(scheme, shape)
        return found.reason if found.verdict == "cannot" else None

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """Codes, scales and biases of linear layers and embeddings; all other tensors as they are.

        Raises:
            ValueError: for a Conv1D, a tie that MLX does not have, a grid that does not fit, or a weight that is not
                exact in MLX's arithmetic.
        """
        if turned := sorted(transposed(model)):
            raise ValueError(f"target {self.name!r} holds no Conv1D, but {turned[0]} is one")
        state, codes, tied = plain_tensors(model), model_codes(model), ties(model)
        places = _places(codes, tied)
        kinds: dict[str, tuple[int, int]] = {}
        for name, q in codes.items():
            found = self._find(q.scheme, (q.shape[0], q.shape[1]))
            if isinstance(found, str):
                raise ValueError(f"{name}: {found}")
            fit, group = found
            kinds[places[name]] = fit.num_bits, group
            parts = _pack(name, q, fit, group, _DTYPES[self.dtype])
            state |= {f"{places[name]}.{key}": value for key, value in parts.items()}
        options = engine_options(model.config.to_dict())
        save_plain(model, state, tokenizer, folder, save_original_format=False)
        patch_config(folder, quantization=_config(kinds), **options)
        write_layers(folder, codes, tied)

    def read_codes(self, folder: Path) -> dict[str, QTensor]:
        """Codes and scales, checked against ``config.json``."""
        tensors, config, layers = read_folder(folder), _read_config(folder), layers_config(folder)
        places = _places(layers.packed(), layers.tied)
        found = {}
        for name, (scheme, shape) in layers.packed().items():
            try:
                found[name] = self._read(places[name], scheme, shape, config, tensors)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found

    def _read(
        self, name: str, scheme: Scheme, shape: tuple[int, int], config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> QTensor:
        found = self._find(scheme, shape)
        if isinstance(found, str):
            raise ValueError(found)
        fit, group = found
        own = config.get(name, config)
        kind = (own.get("bits"), own.get("group_size")) if isinstance(own, dict) else own
        if kind != (fit.num_bits, group):
            raise ValueError(f"config.json says (bits, group_size) = {kind}; {scheme.name} needs {fit.num_bits, group}")
        rows, width, num_groups = *shape, shape[1] // group
        dtype = _DTYPES[self.dtype]
        words = stored_tensor(tensors, f"{name}.weight", torch.uint32, (rows, num_words(width, fit.num_bits)))
        scale, bias = (
            stored_tensor(tensors, f"{name}.{key}", dtype, (rows, num_groups)) for key in ("scales", "biases")
        )
        codes = codes_from_stored(unpack_words(words.view(torch.int32), width, fit.num_bits), scheme, fit)
        q = assemble(codes, gather_scale(scale, fit.multiplier, scheme, shape, group), scheme)
        if not torch.equal(times(spread_scale(q, group), _bias(fit), dtype, name), bias):
            raise ValueError("a bias does not belong to its scale")
        return q

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Norms, biases of layers and whatever was not quantized."""
        layers = layers_config(folder)
        names = set(_places(layers.packed(), layers.tied).values())
        return {
            key: value
            for key, value in read_folder(folder).items()
            if key.rpartition(".")[0] not in names or key.endswith(".bias")
        }

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """The same from the model."""
        return plain_tensors(model)

    def load(self, folder: Path, like: Any) -> None:
        """None: MLX is no PyTorch; see :meth:`engine_logits`."""

    def engine_logits(self, folder: Path, ids: Tensor, *, exact: bool = False) -> Tensor:
        """Logits of mlx-lm itself, fp32 ``(sequences, length, vocabulary)``, on the machine's CPU or Apple GPU.

        Args:
            folder: the export.
            ids: int ``(sequences, length)``.
            exact: compute in fp32 whatever the dtype of the file; every number of the file is one of fp32.

        Raises:
            ImportError: without the packages mlx and mlx-lm.
        """
        core = require("mlx.core", "mlx")
        model, _ = require("mlx_lm.utils", "mlx").load_model(folder)
        if exact:
            model.set_dtype(core.float32)
        logits = model(core.array(ids.cpu().numpy())).astype(core.float32)
        return torch.from_numpy(np.array(logits))

    def engine_weights(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Every weight as MLX dequantizes it in the dtype of the file, fp32, by layer name.

        Raises:
            ImportError: without the package mlx.
        """
        core = require("mlx.core", "mlx")
        tensors, config, layers = read_folder(folder), _read_config(folder), layers_config(folder)
        for name, place in _places(layers.packed(), layers.tied).items():
            kind = config.get(place, config)
            parts = [core.array(tensors[f"{place}.{leaf}"].numpy()) for leaf in ("weight", "scales", "biases")]
            weight = core.dequantize(*parts, group_size=kind["group_size"], bits=kind["bits"], mode="affine")
            yield name, torch.from_numpy(np.array(weight.astype(core.float32)))

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """MLX's own dequantization, and mlx-lm computing in fp32."""
        return (
            EngineCheck(
                engine=with_version("mlx"), level="weights", weights=functools.partial(self.engine_weights, folder)
            ),
            EngineCheck(
                engine=f"{with_version('mlx-lm')} in fp32",
                level="float",
                logits=functools.partial(self.engine_logits, folder, exact=True),
            ),
        )

    def reference(self, model: Any) -> nn.Module:
        """The trained model itself, or (of a model in bf16) the model of its dequantized weights in fp32."""
        return reference_fp32(model)


def _bias(fit: Fit) -> Fraction:
    """Bias over scale: the least level."""
    return -fit.zero * fit.multiplier


def _factors(fit: Fit) -> set[Fraction]:
    """What MLX computes, over the scale: stored scale, bias, products and sums."""
    products = {fit.multiplier * q for q in fit.codes}
    return {fit.multiplier, _bias(fit), *products, *(p + _bias(fit) for p in products)}


def engine_options(config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm reads under other names than Transformers 5 writes, and would else replace by its defaults.

    Rotary bases and scalings stand at the top of the file, and the layers without a window are every so manieth one.

    Raises:
        ValueError: for windows without such a pattern.

    Example:
        >>> engine_options({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
        {'rope_theta': 500000.0}
    """
    rope = config.get("rope_parameters") or {}
    whole, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    options = {"rope_theta": whole["rope_theta"]} if "rope_theta" in whole else {}
    if whole.get("rope_type", "default") != "default":
        options["rope_scaling"] = whole
    if "rope_theta" in local:
        options["rope_local_base_freq"] = local["rope_theta"]
    kinds = config.get("layer_types") or []
    if "sliding_attention" in kinds:
        pattern = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
        if not pattern or [(i + 1) % pattern == 0 for i in range(len(kinds))] != [k == "full_attention" for k in kinds]:
            raise ValueError("mlx-lm attends without a window in every n-th layer; this model has no such pattern")
        options["sliding_window_pattern"] = pattern
    return options


@torch.no_grad()
def _pack(name: str, q: QTensor, fit: Fit, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    spread, stored = spread_scale(q, group), stored_codes(q, fit)
    scale, bias = (times(spread, factor, dtype, name) for factor in (fit.multiplier, _bias(fit)))
    weight = stored.view(*spread.shape, group).to(dtype) * scale[..., None] + bias[..., None]
    if wrong := int((weight.view(q.shape).float() != q.dequantize()).sum()):
        plain = str(dtype).removeprefix("torch.")
        fix = "use the target mlx, whose scales are fp32" if dtype == torch.float16 else "train with portable scales"
        raise ValueError(
            f"{name}: scale * code + bias is not exact in {plain} for {wrong} of {stored.numel()} weights; {fix}"
        )
    words = pack_words(stored, fit.num_bits).view(torch.uint32)
    return {"weight": words, "scales": scale.contiguous(), "biases": bias.contiguous()}


def _places(layers: Any, tied: dict[str, str]) -> dict[str, str]:
    """The name that MLX gives a layer: of a tied pair, the embedding.

    Raises:
        ValueError: for any other tie.
    """
    partner = {owner: name for name, owner in tied.items()}
    for name, owner in tied.items():
        if "lm_head" not in (name, owner):
            raise ValueError(f"{name} uses the codes of {owner}; MLX ties only the head and the embedding")
    return {name: partner.get(name, name) if name == "lm_head" else name for name in layers}


def _config(kinds: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """The most common bits and group for all layers, the others by name."""
    common, _ = Counter(kinds.values()).most_common(1)[0]

    def entry(bits: int, group: int) -> dict[str, Any]:
        return {"bits": bits, "group_size": group, "mode": "affine"}

    return entry(*common) | {name: entry(*kind) for name, kind in kinds.items() if kind != common}


def _read_config(folder: Path) -> dict[str, Any]:
    data = read_json_object(folder / "config.json").get("quantization")
    if not isinstance(data, dict) or data.get("mode", "affine") != "affine":
        raise ValueError(f"{folder / 'config.json'} describes no affine quantization of MLX")
    return data
