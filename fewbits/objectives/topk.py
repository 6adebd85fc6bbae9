"""Distillation from the k most likely tokens of a teacher and the mass of the rest: what is kept on disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.objectives.losses import mean_over_labels


@dataclass(frozen=True, kw_only=True)
class TopKLogits:
    """A teacher's distribution over k tokens and "any other".

    Attributes:
        ids: ``(..., k)`` int64, the most likely tokens; each once.
        log_probs: ``(..., k)``, their log-probabilities at the temperature of the distillation, nats.
        tail: ``(...)``, log of the mass of all other tokens; minus infinity if there is none.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor

    def shifted(self) -> TopKLogits:
        """Without the last position, whose next token is not in the block; ``(batch, length, k)`` needed."""
        return TopKLogits(ids=self.ids[:, :-1], log_probs=self.log_probs[:, :-1], tail=self.tail[:, :-1])


def top_k_logits(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopKLogits:
    """The k largest of full logits ``(..., vocab)``, as log-probabilities, and the log-sum-exp of the rest.

    Raises:
        ValueError: for a k outside 1..vocab, or a temperature that is not positive.

    Example:
        >>> kept = top_k_logits(torch.tensor([0.5, 0.3, 0.2]).log(), 2)
        >>> kept.ids.tolist(), round(kept.tail.exp().item(), 4)
        ([0, 1], 0.2)
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k={k} is outside 1..{logits.shape[-1]}, the size of the vocabulary")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    log_p = torch.log_softmax(logits.detach().float() / temperature, dim=-1)
    values, ids = log_p.topk(k, dim=-1)
    return TopKLogits(ids=ids, log_probs=values, tail=_rest(log_p, ids))


def _rest(z: Tensor, ids: Tensor) -> Tensor:
    """Log-sum-exp over the entries that ``ids`` does not name."""
    return z.scatter(-1, ids, float("-inf")).logsumexp(-1)


def top_k_divergence(logits: Tensor, teacher: TopKLogits, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Forward KL over k + 1 outcomes, the kept tokens K and "any other" R, times :math:`\tau^2`.

    .. math:: \tau^2 \Bigl( \sum_{i \in K} p_i \log \frac{p_i}{q_i} + p_R \log \frac{p_R}{q_R} \Bigr)
              \le \tau^2\, \mathrm{KL}(p \,\|\, q), \qquad p_R = \sum_{i \notin K} p_i

    The bound is the log-sum inequality on R. With :math:`a_i = p_i / p_R` and :math:`b_i = q_i / q_R`, which sum to 1,

    .. math:: \sum_{i \in R} p_i \log \frac{p_i}{q_i}
              = p_R \log \frac{p_R}{q_R} + p_R \sum_{i \in R} a_i \log \frac{a_i}{b_i}

    and the last sum is a divergence, hence :math:`\ge 0`. So the loss is short of the full one by exactly
    :math:`\tau^2 p_R\,\mathrm{KL}(a \| b)`, and equal at k = vocab, or where the student orders the rest as the teacher
    does. The mean over labels that are not -100.

    Args:
        logits: student ``(..., vocab)``.
        teacher: of the same positions, kept at the same temperature; normalized again, since it was rounded for disk.
        labels: ``(...)``; only their -100 entries matter.
        temperature: :math:`\tau` > 0.

    Raises:
        ValueError: if positions differ, or a kept id is not in the student's vocabulary.

    Example:
        >>> p, q = torch.tensor([[.5, .3, .2]]).log(), torch.zeros(1, 3)
        >>> [round(top_k_divergence(q, top_k_logits(p, k), torch.tensor([0])).item(), 4) for k in (1, 2, 3)]
        [0.0589, 0.069, 0.069]
    """
    if teacher.ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"kept logits of {tuple(teacher.ids.shape[:-1])} positions, student {tuple(logits.shape[:-1])}"
        )
    if int(teacher.ids.max()) >= logits.shape[-1]:
        raise ValueError(f"a kept token {int(teacher.ids.max())} is not in the vocabulary of {logits.shape[-1]}")
    log_p = torch.log_softmax(torch.cat([teacher.log_probs, teacher.tail[..., None]], dim=-1).float(), dim=-1).detach()
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0.0)  # an outcome of mass 0 adds 0, not 0 times infinity
    z = logits.float() / temperature
    whole = z.logsumexp(-1, keepdim=True)
    log_q = z.gather(-1, teacher.ids) - whole
    value = (p[..., :-1] * (log_p[..., :-1] - log_q)).sum(-1)
    if teacher.ids.shape[-1] < logits.shape[-1]:
        value = value + p[..., -1] * (log_p[..., -1] - (_rest(z, teacher.ids) - whole.squeeze(-1)))
    return mean_over_labels(value, labels) * temperature**2
