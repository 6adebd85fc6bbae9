"""Quality of a model on a fixed token set: perplexity, bits per byte, KL to a teacher, top-1 agreement."""

from __future__ import annotations

import functools
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fewbits.data import TokenBlocks


class EvalResult(BaseModel):
    """What was measured, on how many tokens, with which versions.

    Attributes:
        loss: mean cross-entropy, nats per token.
        perplexity: ``exp(loss)``.
        bits_per_byte: ``loss / ln 2 / bytes_per_token``; comparable between tokenizers.
        kl_to_teacher: mean forward KL, nats per token, or None without a teacher.
        top1_agreement: share of positions where student and teacher prefer the same token, or None.
        num_tokens: scored tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: float
    perplexity: float
    bits_per_byte: float
    kl_to_teacher: float | None = None
    top1_agreement: float | None = None
    num_tokens: int
    versions: dict[str, str]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, torch, transformers and fewbits, and the commit where fewbits runs from a clone."""
    import transformers

    from fewbits import __version__

    found = {
        "fewbits": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            found["commit"] = "unknown"
    return found


@torch.no_grad()
def evaluate(
    model: nn.Module, blocks: TokenBlocks, *, teacher: nn.Module | None = None, batch_size: int = 8
) -> EvalResult:
    """Score a causal LM on token blocks; deterministic, in eval mode (the mode of every part is restored).

    Args:
        model: maps ``input_ids`` to an output with ``logits``.
        blocks: the fixed token set; each block's first token is context only.
        teacher: for KL and top-1 agreement.
        batch_size: blocks per forward pass.

    Raises:
        ValueError: if a loss is not finite, or the vocabularies differ.
    """
    whole = [m for m in (model, teacher) if m is not None]
    modes = [(part, part.training) for m in whole for part in m.modules()]
    for m in whole:
        m.eval()
    device = next(iter([*model.parameters(), *model.buffers()])).device
    totals = torch.zeros(3, dtype=torch.float64)
    count = 0
    for first in range(0, len(blocks), batch_size):
        items = [blocks[i] for i in range(first, min(first + batch_size, len(blocks)))]
        ids = torch.stack([item["input_ids"] for item in items])
        kept = torch.stack([item["labels"] for item in items])[:, 1:] != -100
        totals += _score(model, teacher, ids.to(device), kept.to(device)).cpu()
        count += int(kept.sum())
    for part, training in modes:
        part.training = training
    loss, kl, agree = (totals / count).tolist()
    if not math.isfinite(loss):
        raise ValueError(f"the loss on {count} tokens is {loss}; the model's weights or activations are not finite")
    return EvalResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=loss / math.log(2) / blocks.bytes_per_token,
        kl_to_teacher=kl if teacher is not None else None,
        top1_agreement=agree if teacher is not None else None,
        num_tokens=count,
        versions=versions(),
    )


def _score(model: nn.Module, teacher: nn.Module | None, ids: Tensor, kept: Tensor) -> Tensor:
    """Sums of cross-entropy, KL and agreement over the targets ``kept`` of the batch."""
    log_p = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None])[kept].sum(dtype=torch.float64)
    if teacher is None:
        return torch.stack([nll, nll * 0, nll * 0])
    log_t = teacher(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    if log_t.shape != log_p.shape:
        raise ValueError(f"teacher and student logits differ in shape: {tuple(log_t.shape)} and {tuple(log_p.shape)}")
    divergence = log_t.exp() * (log_t - log_p)
    kl = (divergence if bool(kept.all()) else divergence[kept]).sum(dtype=torch.float64)
    agree = (log_t.argmax(-1) == log_p.argmax(-1))[kept].sum(dtype=torch.float64)
    return torch.stack([nll, kl, agree])


def evaluate_lm_eval(model: nn.Module, tokenizer: Any, tasks: list[str], *, limit: int | None = None) -> dict[str, Any]:
    """Scores of lm-evaluation-harness tasks for a model in memory.

    Raises:
        ImportError: with the install line, if lm-eval is missing.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("lm-eval is needed for tasks: pip install 'fewbits[lm-eval]'") from error
    results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks, limit=limit)
    assert results is not None
    return dict(results["results"])
