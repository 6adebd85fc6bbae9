r"""Quantized inputs as ``compressed-tensors`` means them: which schemes are its ``input_activations``, bit for bit.

Its library computes, in the dtype of the model, with b bits and :math:`q_\pm = 2^{b-1} - 1, -2^{b-1}`,

.. math:: \hat x = s\,\big(\operatorname{round}\operatorname{clamp}(x/s + z,\, q_-,\, q_+) - z\big), \qquad
          s = \max|x| \,/\, \tfrac12 (2^b - 1) \ \text{where it is dynamic and symmetric}.

That is ours for ``rule='half_range'`` or a static scale, where z = 0, in float32. A zero point is added *before* the
rounding, so ties (and sums that float32 rounds) fall on other levels than ours; in bfloat16 the quotient itself is
rounded to 8 significant bits. Both are refused. Tokens whose largest input is below 1.3e-28 aside: there our scale
stops at :data:`~fewbits.activations.quantize.SMALLEST_SCALE`.

Engines may mean something else by the same words: vLLM's kernel of dynamic int8 inputs divides by 127.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.activations.module import InputQuantizer, input_quantizers
from fewbits.activations.quantize import SMALLEST_SCALE
from fewbits.activations.scheme import ActivationScheme

SCALE = "input_scale"
"""Name of a static scale beside ``weight_packed``."""


def refuse_input(scheme: ActivationScheme) -> str | None:
    """Why ``input_activations`` cannot say what this scheme computes; None if they can.

    Example:
        >>> refuse_input(ActivationScheme(num_bits=8, rule="half_range")) is None
        True
        >>> refuse_input(ActivationScheme(num_bits=8))
        "its dynamic scale is max|x| / 127.5, not 'absmax'; use rule='half_range'"
    """
    half = (2**scheme.num_bits - 1) / 2
    before = "its zero point is added before the rounding, so ties fall on other levels"
    rules = [
        (scheme.rotation.kind != "none", f"it has no rotation ({scheme.rotation.kind}) of inputs; use rotation='none'"),
        (scheme.grid != "int", f"its levels are integers, not grid={scheme.grid!r}; use grid='int'"),
        (scheme.thresholds != "uniform", "its thresholds lie midway between levels; use thresholds='uniform'"),
        (not scheme.signed, f"levels 0..{2**scheme.num_bits - 1} need a zero point, and {before}; use signed=True"),
        (
            not scheme.symmetric and scheme.mode == "static",
            "its zero point is an integer, and LSQ+'s offset is a number in units of x; use symmetric=True",
        ),
        (not scheme.symmetric, f"{before}; use symmetric=True"),
        (
            scheme.mode == "dynamic" and scheme.rule != "half_range",
            f"its dynamic scale is max|x| / {half:g}, not {scheme.rule!r}; use rule='half_range'",
        ),
    ]
    return next((text for wrong, text in rules if wrong), None)


def refuse_keys_and_values() -> str:
    """Why ``kv_cache_scheme`` says none of our schemes, which are dynamic, per head and token, and kept nowhere.

    Example:
        >>> refuse_keys_and_values().partition(":")[0]
        'its kv_cache_scheme is not this quantizer'
    """
    return (
        "its kv_cache_scheme is not this quantizer: a dynamic scale there stands for all tokens of a head added at "
        "once, and a static one is calibrated; use target 'hf', or train without KV"
    )


def input_args(scheme: ActivationScheme) -> dict[str, Any]:
    """``input_activations`` of a scheme that :func:`refuse_input` lets pass.

    Example:
        >>> args = input_args(ActivationScheme(num_bits=8, rule="half_range"))
        >>> args["strategy"], args["dynamic"]
        ('token', True)
    """
    return {
        "num_bits": scheme.num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": scheme.granularity,
        "group_size": None,
        "dynamic": scheme.mode == "dynamic",
    }


def input_scales(model: nn.Module) -> dict[str, Tensor]:
    """``NAME.input_scale``, fp32 of shape (1,), for every layer with a static scale, as it is computed with."""
    found = {}
    for name, quantizer in input_quantizers(model):
        scale = quantizer.deployed().static_scale()
        if scale is not None:
            found[f"{name}.{SCALE}"] = scale.detach().reshape(1).clone()
    return found


def checked_inputs(model: Any) -> dict[str, ActivationScheme]:
    """Schemes of all quantized inputs, as constants, by layer.

    Raises:
        ValueError: for one that the format does not mean, a static scale out of range, or a model not in float32.
    """
    found = {}
    for name, quantizer in input_quantizers(model):
        _check(name, quantizer, model.dtype)
        found[name] = quantizer.scheme.deployed()
    return found


def _check(name: str, quantizer: InputQuantizer, dtype: torch.dtype) -> None:
    if reason := refuse_input(quantizer.scheme):
        raise ValueError(f"the input of {name} ({quantizer.scheme.summary}): {reason}")
    if dtype != torch.float32:
        plain = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"the model is {plain}, where loaders divide the input of {name} by its scale in {plain} and so round "
            "to other levels than it was trained with; export the model in float32 (model.float())"
        )
    scale = quantizer.deployed().static_scale()
    if scale is not None and not SMALLEST_SCALE <= float(scale) < float("inf"):
        raise ValueError(f"the input scale {float(scale):.3g} of {name} must be finite and >= {SMALLEST_SCALE}")
