r"""Questions to the engine that runs a format: what it makes of the weights, and which logits it computes.

Three levels, by what the engine does to numbers:

* ``weights``: nothing is computed but ``scale * code``. Zero tolerance.
* ``float``: weights as they are, activations in fp32. Sums run in another order, so logits differ in their last bits.
* ``int8``: the engine rounds the input of every quantized layer to 8 bits a block. That is no fault of the file, so it
  is measured against the same rounding in our own model (:func:`round_activations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch
from torch import Tensor, nn

Level = Literal["weights", "float", "int8"]
FLOAT_TOLERANCE = 1e-4
"""Of sums in fp32 that run in another order, over the largest logit; up to 2e-5 is seen."""


@dataclass(frozen=True, kw_only=True)
class EngineCheck:
    """One question to an engine about one file. Asking raises ImportError where the engine is not installed.

    Attributes:
        engine: who is asked, and how.
        level: of the answer.
        weights: for ``weights``: yields name of a layer and its weight as the engine decodes it, fp32 ``(out_features,
            in_features)``.
        logits: for the others: token ids ``(sequences, length)`` to fp32 ``(sequences, length, vocabulary)``.
        tolerance: for ``float``: largest difference of a logit over the largest logit (or over 1 if that is less).
        block: for ``int8``: activations that share a scale; 0 means all of a token.
    """

    engine: str
    level: Level
    weights: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
    logits: Callable[[Tensor], Tensor] | None = None
    tolerance: float = FLOAT_TOLERANCE
    block: int = 0

    def __post_init__(self) -> None:
        if (self.weights is not None) != (self.level == "weights") or (self.logits is None) != (
            self.level == "weights"
        ):
            raise ValueError(f"a check of the level {self.level!r} needs weights or logits, as its level says")


def with_version(package: str) -> str:
    """Name and version of an engine, for reports.

    Example:
        >>> with_version("no-such-engine")
        'no-such-engine'
    """
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def round_activations(x: Tensor, block: int = 0) -> Tensor:
    r"""Activations as int8 codes with one scale for every ``block`` of them, and back.

    .. math:: \hat x = \Delta \operatorname{round}(x / \Delta), \qquad \Delta = \max_\text{block} |x| / 127

    Args:
        x: activations, any shape, floating point; the blocks lie along the last axis, the last one may be short.
        block: activations that share a scale; 0 takes all of the last axis.

    Returns:
        The same shape and dtype; a block of zeros stays zero.

    Raises:
        ValueError: for a negative block.

    Example:
        >>> round_activations(torch.tensor([127.0, 0.6, -254.0, 3.1]), 2).tolist()
        [127.0, 1.0, -254.0, 4.0]
    """
    if block < 0:
        raise ValueError(f"block={block} is negative; use 0 for one scale a token")
    width = x.shape[-1]
    size = block or width
    padded = nn.functional.pad(x.float(), (0, -width % size)).unflatten(-1, (-1, size))
    step = padded.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(step > 0, (padded / step).round() * step, 0.0)
    return rounded.flatten(-2)[..., :width].to(x.dtype)
