"""Run a converted model from packed memory on the CPU."""

from __future__ import annotations

from fewbits.runtime.convert import describe, runtime_bytes, runtime_layers, to_runtime
from fewbits.runtime.decoder import Decoder
from fewbits.runtime.generate import generate_stream
from fewbits.runtime.linear import RuntimeEmbedding, RuntimeLayer, RuntimeLinear
from fewbits.runtime.packed import PackedWeight, choose_kernel, rounding_bound

__all__ = [
    "Decoder",
    "PackedWeight",
    "RuntimeEmbedding",
    "RuntimeLayer",
    "RuntimeLinear",
    "choose_kernel",
    "describe",
    "generate_stream",
    "rounding_bound",
    "runtime_bytes",
    "runtime_layers",
    "to_runtime",
]
