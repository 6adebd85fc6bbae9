"""The verdicts in words: what a number means for somebody who has not read the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

FREE = "rounding is free"
LEAVES = "leaves the basin"
BROKEN = "breaks the model"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What rounding does: one of ``FREE``, ``LEAVES``, ``BROKEN``, with the rise of the loss in nats per token."""

    short: str
    rise: float

    def long(self, kappa_rand: float) -> str:
        """One sentence on what to do, and one on whether the forecast saw it coming."""
        factor = math.exp(min(self.rise, 50.0))
        advice = {
            FREE: "Rounding alone keeps the loss; training at these bits has little to win.",
            LEAVES: f"Rounding multiplies the perplexity by {factor:.3g}; training at these bits has something to win.",
            BROKEN: "The rounded model predicts worse than uniform guessing; only training can make these bits usable.",
        }[self.short]
        seen = (kappa_rand > 1) == (self.short != FREE)
        forecast = f"The error spans {kappa_rand:.2g} random basin widths, which "
        return f"{advice} {forecast}{'foretold this' if seen else 'did not foretell this'}."


def judge(*, rise: float, tol: float, loss: float, vocab_size: int) -> Verdict:
    """Sort a rounded model: within ``tol`` of the original, outside, or worse than uniform guessing.

    Args:
        rise: loss of the rounded model minus that of the original, nats per token; NaN counts as broken.
        tol: band of the basin, nats.
        loss: of the rounded model, nats per token.
        vocab_size: uniform guessing costs its logarithm.

    Example:
        >>> judge(rise=0.01, tol=0.02, loss=3.0, vocab_size=2048).short
        'rounding is free'
        >>> judge(rise=6.0, tol=0.02, loss=9.0, vocab_size=2048).short
        'breaks the model'
    """
    if rise <= tol:
        return Verdict(short=FREE, rise=rise)
    return Verdict(short=LEAVES if loss < math.log(vocab_size) else BROKEN, rise=rise)
