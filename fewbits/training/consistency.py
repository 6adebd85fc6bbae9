"""Consistency regularization: the student, seeing one noisy view, agrees with a slow copy of itself, seeing another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from fewbits.objectives import kl_divergence
from fewbits.training.averaging import WeightEMA

CONSISTENCY_FILE = "fewbits_consistency.safetensors"


@contextmanager
def token_dropout(model: nn.Module, probability: float) -> Iterator[None]:
    """Inside, the embedding of each token is zero with this probability (torch's own random stream).

    Args:
        model: with ``get_input_embeddings``.
        probability: in [0, 1); 0 draws nothing.
    """
    if probability == 0:
        yield
        return

    def drop(layer: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
        kept = torch.rand(rows.shape[:-1], device=rows.device) >= probability
        return rows * kept.unsqueeze(-1)

    handle = extract_model_from_parallel(model).get_input_embeddings().register_forward_hook(drop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class Consistency:
    r"""Keeps the slow copy :math:`\bar\theta` of the student and gives the loss of disagreement

    .. math:: \mathrm{KL}\bigl(\mathrm{sg}\,f_{\bar\theta}(a_1(x)) \,\big\|\, f_\theta(a_2(x))\bigr), \qquad
              \bar\theta \leftarrow m\,\bar\theta + (1 - m)\,\theta

    of two independent views :math:`a_1, a_2` of a batch. Both models run quantized: the mean is of latent weights and
    scales. What is reconstructed: views are token dropout (the paper's are image augmentations), the main loss sees the
    clean text, the copy runs in eval mode, the weight of the term is constant, and m = .999 (the paper's is unknown).

    Cost: one forward pass of the copy and one forward and backward pass of the student more; memory: the mean, fp32.

    Args:
        decay: m in [0, 1).
        dropout: probability that a token is dropped from a view, in [0, 1).

    Raises:
        ValueError: for values out of range.

    Reference: arXiv:2402.13497.
    """

    def __init__(self, *, decay: float = 0.999, dropout: float = 0.1) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is outside [0, 1)")
        self.ema = WeightEMA(decay)
        self.dropout = dropout

    def loss(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Disagreement of the two views, nats per token with a label.

        Args:
            model: the student, in training mode.
            inputs: what the model takes, without labels.
            labels: ``(batch, length)``; -100 where no loss is wanted.
        """
        plain = extract_model_from_parallel(model)
        with torch.no_grad(), self.ema.swapped(plain), _eval_mode(plain), token_dropout(plain, self.dropout):
            copy_logits = plain(**inputs).logits[:, :-1]
        with token_dropout(plain, self.dropout):
            logits = model(**inputs).logits[:, :-1]
        return kl_divergence(logits, copy_logits, labels[:, 1:])
