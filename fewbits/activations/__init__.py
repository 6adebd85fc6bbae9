"""Quantized activations: schemes of layer inputs and of keys and values, their fake quantization and calibration."""

from __future__ import annotations

from fewbits.activations.calibrate import calibrate_activations_
from fewbits.activations.module import InputQuantizer, input_quantizers, input_scheme, kv_schemes, quantize_input
from fewbits.activations.quantize import dynamic_scale, fake_quantize_activation
from fewbits.activations.scheme import PRESETS, ActivationScheme
from fewbits.activations.text import full_name, read_spellings, split_scheme
from fewbits.activations.thresholds import learned_thresholds

__all__ = [
    "PRESETS",
    "ActivationScheme",
    "InputQuantizer",
    "calibrate_activations_",
    "dynamic_scale",
    "fake_quantize_activation",
    "full_name",
    "input_quantizers",
    "input_scheme",
    "kv_schemes",
    "learned_thresholds",
    "quantize_input",
    "read_spellings",
    "split_scheme",
]
