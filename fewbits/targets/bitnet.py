r"""Target ``bitnet``: Transformers' packed ternary format, one scale for a whole matrix (BitNet b1.58).

Weights are :math:`\hat w = s\,t` with t in {-1, 0, 1}, four rows of t + 1 in a byte: bits 2k and 2k + 1 of row r hold
row r + k rows / 4. Of the two layers that Transformers has, ``autobitlinear`` multiplies by the scale, which is exact,
while ``bitlinear`` divides by its reciprocal, which is not; the first is written.

Codes and scale are exact, but BitNet's layer (arXiv:2402.17764) also rounds its input to 8 bits a token. What was
trained here has no such rounding, so the logits of this engine are close, not equal.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.io import read_json_object
from fewbits.pretrained import from_pretrained, refuse_missing
from fewbits.qtensor import QTensor
from fewbits.scheme import Scheme
from fewbits.targets.affine import Fit, Judgement, assemble, codes_from_stored, refuse_scheme, stored_codes, times
from fewbits.targets.base import patch_config, plain_tensors, save_plain
from fewbits.targets.dequantized import reference_fp32
from fewbits.targets.engine import EngineCheck, with_version
from fewbits.targets.gguf_plan import integer_levels
from fewbits.targets.layers import linear_codes, other_tensors, read_layers, stored_tensor, write_layers
from fewbits.weight_files import read_folder

_ROWS = 4
"""Rows in a byte."""


@dataclass(frozen=True)
class BitNet:
    """A folder of packed ternary layers.

    Example:
        >>> BitNet().holds(Scheme.parse("W1.58", granularity="per_tensor"), (8, 64)) is None
        True
        >>> BitNet().holds(Scheme.parse("W1.58A16G64"), (8, 64))
        "BitNet has one scale for a whole matrix; train with granularity='per_tensor'"
    """

    name: str = "bitnet"

    def _find(self, scheme: Scheme, shape: tuple[int, int]) -> Fit | str:
        """How the levels are stored, or why they cannot be."""
        if reason := refuse_scheme(scheme, shape):
            return reason
        found = integer_levels(scheme.grid.levels)
        assert found is not None
        integers, divisor = found
        slope = math.gcd(*integers)
        if not {i // slope for i in integers} <= {-1, 0, 1}:
            levels = scheme.grid.levels
            return f"the {len(levels)} levels {levels[0]:g}..{levels[-1]:g} are not ternary; train with W1.58"
        if scheme.scale.granularity != "per_tensor":
            return "BitNet has one scale for a whole matrix; train with granularity='per_tensor'"
        if shape[0] % _ROWS:
            return f"out_features={shape[0]} is not a multiple of {_ROWS}, the rows in a byte"
        codes = tuple(i // slope + 1 for i in integers)
        return Fit(num_bits=2, multiplier=Fraction(slope, divisor), zero=Fraction(1), zeros="int", codes=codes)

    def judge(self, scheme: Scheme, shape: tuple[int, int]) -> Judgement:
        """Verdict and reason; :meth:`holds` is its refusal."""
        found = self._find(scheme, shape)
        if isinstance(found, str):
            return Judgement(verdict="cannot", reason=found)
        if scheme.scale.dtype == "portable":
            return Judgement(
                verdict="lossless", reason="ternary codes and one scale; activations are rounded to 8 bits"
            )
        return Judgement(verdict="lossless if", reason="the dtype of the model holds every scale")

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None, or why the format cannot hold the scheme."""
        found = self._find(scheme, shape)
        return found if isinstance(found, str) else None

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """Packed codes and scales in the dtype of the model; all other tensors as they are.

        Raises:
            ValueError: for a quantized embedding or Conv1D, a grid that does not fit, or a scale that is not exact in
                the dtype of the model.
        """
        state, codes = plain_tensors(model), linear_codes(model, self.name)
        for name, q in codes.items():
            fit = self._find(q.scheme, (q.shape[0], q.shape[1]))
            if isinstance(fit, str):
                raise ValueError(f"{name}: {fit}")
            state[f"{name}.weight"] = pack_rows(stored_codes(q, fit))
            state[f"{name}.weight_scale"] = times(q.scale.view(1), fit.multiplier, model.dtype, name)
        save_plain(model, state, tokenizer, folder, save_original_format=False)
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        config = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": sorted(linear - set(codes)),
        }
        patch_config(folder, quantization_config=config)
        write_layers(folder, codes)

    def read_codes(self, folder: Path) -> dict[str, QTensor]:
        """Codes and scales, checked against ``config.json``."""
        config = read_json_object(folder / "config.json").get("quantization_config")
        kind = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
        if not isinstance(config, dict) or {key: config.get(key) for key in kind} != kind:
            raise ValueError(f"{folder / 'config.json'} describes no packed weights of BitNet (autobitlinear, offline)")
        tensors = read_folder(folder)
        found = {}
        for name, (scheme, shape) in read_layers(folder).items():
            try:
                if name in (config.get("modules_to_not_convert") or ()):
                    raise ValueError("config.json says that it is not packed")
                found[name] = self._read(name, scheme, shape, tensors)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found

    def _read(self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: dict[str, Tensor]) -> QTensor:
        fit = self._find(scheme, shape)
        if isinstance(fit, str):
            raise ValueError(fit)
        packed = stored_tensor(tensors, f"{name}.weight", torch.uint8, (shape[0] // _ROWS, shape[1]))
        scale = stored_tensor(tensors, f"{name}.weight_scale", None, (1,))
        exact = (scale.double() * fit.multiplier.denominator / fit.multiplier.numerator).float().view(1, 1)
        return assemble(codes_from_stored(unpack_rows(packed), scheme, fit), exact, scheme)

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Norms, embeddings, biases and whatever was not quantized."""
        return other_tensors(folder, read_layers(folder))

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """The same from the model."""
        return plain_tensors(model)

    def load(self, folder: Path, like: Any) -> None:
        """None: the engine's layer rounds activations, so its logits are others; see :meth:`engine_logits`."""

    def engine_logits(self, folder: Path, ids: Tensor, *, exact: bool = False) -> Tensor:
        """Logits of Transformers' own BitNet layers, fp32 ``(sequences, length, vocabulary)``; nothing is compiled.

        Args:
            folder: the export.
            ids: int ``(sequences, length)``.
            exact: in fp32 and without the layers' rounding of activations, as a control of everything else.
        """
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), _rounding_left_out(exact):
            model, info = from_pretrained(folder, dtype=torch.float32 if exact else "auto")
            refuse_missing(folder, info["missing_keys"])
            logits: Tensor = model(input_ids=ids.cpu(), use_cache=False).logits
            return logits.float()

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """Transformers' layers without their rounding of activations, and with it."""
        engine = with_version("transformers")
        ask = functools.partial(self.engine_logits, folder)
        return (
            EngineCheck(engine=f"{engine}, fp32 activations", level="float", logits=functools.partial(ask, exact=True)),
            EngineCheck(engine=f"{engine}, int8 activations", level="int8", logits=ask),
        )

    def reference(self, model: Any) -> nn.Module:
        """The trained model itself, or (of a model in bf16) the model of its dequantized weights in fp32."""
        return reference_fp32(model)


@contextmanager
def _rounding_left_out(wanted: bool) -> Iterator[None]:
    """Transformers' BitNet layers with their inputs as they are."""
    if not wanted:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its functions are compiled ones, and torch warns about its own compiler
        module: Any = importlib.import_module("transformers.integrations.bitnet")
    original = module.ActQuant
    module.ActQuant = _AsItIs
    try:
        yield
    finally:
        module.ActQuant = original


class _AsItIs:
    @staticmethod
    def apply(x: Tensor) -> Tensor:
        """The input."""
        return x


def pack_rows(stored: Tensor) -> Tensor:
    """Codes 0, 1, 2 ``(rows, width)`` as uint8 ``(rows / 4, width)``.

    Example:
        >>> pack_rows(torch.tensor([[0], [1], [2], [1]], dtype=torch.uint8)).tolist()
        [[100]]
    """
    parts = stored.view(_ROWS, -1, stored.shape[1])
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def unpack_rows(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_rows`."""
    return torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])
