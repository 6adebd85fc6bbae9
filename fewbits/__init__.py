"""fewbits: train language models that live in 1 to 4 bits, and ship files that engines load without loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fewbits import surrogates
from fewbits.convert import Rule, convert, prepare
from fewbits.export import export
from fewbits.fake_quant import fake_quantize
from fewbits.qtensor import QTensor, quantize
from fewbits.scheme import Scheme
from fewbits.verify import verify

if TYPE_CHECKING:
    from fewbits.training import QATCallback, QATTrainer

__version__ = "0.1.0"

__all__ = [
    "QATCallback",
    "QATTrainer",
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

_TRAINING = ("QATCallback", "QATTrainer")


def __getattr__(name: str) -> Any:
    """The trainer on first use: transformers' Trainer takes a second to import, and inference never needs it."""
    if name in _TRAINING:
        from fewbits import training

        return getattr(training, name)
    raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
