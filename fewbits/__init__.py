"""fewbits: train language models that live in 1 to 4 bits, and ship files that engines load without loss."""

from __future__ import annotations

from fewbits import surrogates
from fewbits.convert import Rule, convert, prepare
from fewbits.export import export
from fewbits.fake_quant import fake_quantize
from fewbits.qtensor import QTensor, quantize
from fewbits.scheme import Scheme
from fewbits.verify import verify

__version__ = "0.1.0"

__all__ = [
    "QTensor",
    "Rule",
    "Scheme",
    "convert",
    "export",
    "fake_quantize",
    "prepare",
    "quantize",
    "surrogates",
    "verify",
]
