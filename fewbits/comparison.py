"""Exact comparison of tensors and of the logits of two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fewbits.targets.engine import Level

Logits = Callable[[Tensor], Tensor]
"""Token ids ``(sequences, length)`` to logits ``(sequences, length, vocabulary)``."""

_TOKENS_AT_ONCE = 256


class Difference(BaseModel):
    """One thing that is not as it should be.

    Attributes:
        where: a layer, tensor, file or stage.
        what: in words.
        num_different: entries that differ, or None where counting has no meaning.
        num_total: entries compared.
        level: of the comparison: ``weights`` has no tolerance, ``float`` and ``int8`` are an engine's arithmetic.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    where: str
    what: str
    num_different: int | None = None
    num_total: int | None = None
    level: Level = "weights"


class LogitsComparison(BaseModel):
    """Two models on the same tokens.

    Attributes:
        max_abs_diff: largest difference of two logits.
        kl: mean KL divergence of the export from the reference, nats per token.
        top1_agreement: share of positions with the same most likely token, in [0, 1].
        bitwise_equal: whether all logits are the same, bit for bit (0.0 and -0.0 count as the same).
        finite: whether all logits of both are finite.
        num_tokens: positions compared.
        max_abs_logit: largest logit of the reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_abs_diff: float
    kl: float
    top1_agreement: float
    bitwise_equal: bool
    finite: bool
    num_tokens: int
    max_abs_logit: float = 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def fixed_tokens(config: Any, *, num_sequences: int = 4, length: int = 64, seed: int = 0) -> Tensor:
    """The same random tokens for a vocabulary every time, int64 ``(num_sequences, length)``."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or length
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, text.vocab_size, (num_sequences, min(length, longest)), generator=generator)


def count_different(a: Tensor, b: Tensor) -> int:
    """Entries whose bits differ (0.0 and -0.0 differ, a NaN equals itself); same shape and dtype needed."""
    a, b = (x.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8) for x in (a, b))
    return int((a != b).any(-1).sum())


def tensor_difference(where: str, what: str, found: Tensor | None, expected: Tensor | None) -> Difference | None:
    """How two tensors differ, or None; a tensor may be absent on either side."""
    if found is None or expected is None:
        if found is expected:
            return None
        return Difference(where=where, what=f"{what}: {'missing in' if found is None else 'only in'} the file")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        is_, should = (f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in (found, expected))
        return Difference(where=where, what=f"{what}: {is_} in the file, {should} in the model")
    count = count_different(found, expected)
    if not count:
        return None
    return Difference(where=where, what=f"{what} differ", num_different=count, num_total=found.numel())


def compare_logits(expected: Logits, found: Logits, ids: Tensor) -> LogitsComparison:
    r"""Compare two models on the same tokens.

    .. math:: \mathrm{kl} = \frac1N \sum_i \sum_t p_i(t)\,(\log p_i(t) - \log q_i(t)), \quad p = \text{expected}

    Args:
        expected: logits of the reference.
        found: logits of the export.
        ids: int ``(sequences, length)``.
    """
    num_different = num_same_top = 0
    worst = largest = kl = 0.0
    finite = True
    with torch.no_grad():
        for rows in ids.split(max(1, _TOKENS_AT_ONCE // ids.shape[1])):
            both = expected(rows), found(rows)
            if both[0].shape != both[1].shape:
                raise ValueError(
                    f"logits have shape {tuple(both[1].shape)} in the export, {tuple(both[0].shape)} in the model"
                )
            for pair in zip(*both, strict=True):
                # exact in float64; and -0.0 becomes 0.0, since a zero weight has a sign
                a, b = (x.double() + 0.0 for x in pair)
                finite &= bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())
                num_different += count_different(a, b)
                worst, largest = max(worst, float((a - b).abs().max())), max(largest, float(a.abs().max()))
                log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                num_same_top += int((a.argmax(-1) == b.argmax(-1)).sum())
    return LogitsComparison(
        max_abs_diff=worst,
        kl=kl / ids.numel(),
        top1_agreement=num_same_top / ids.numel(),
        bitwise_equal=num_different == 0,
        finite=finite,
        num_tokens=ids.numel(),
        max_abs_logit=largest,
    )
