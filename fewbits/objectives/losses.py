"""Cross-entropy on labels and KL to a frozen teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def mean_over_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``values`` where ``labels`` (same shape) are not -100; 0 if there is none."""
    kept = labels != IGNORE_INDEX
    return (values * kept).sum() / kept.sum().clamp_min(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Mean of :math:`-\log p(\mathrm{label})` in nats over labels that are not -100.

    Args:
        logits: ``(..., vocab)``, already aligned with ``labels``; computed in fp32.
        labels: ``(...)`` token ids, -100 where no loss is wanted (prompt tokens, padding).

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item().__round__(4)
        1.3863
    """
    flat = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return mean_over_labels(flat.view(labels.shape), labels)


def kl_divergence(logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Forward KL to the teacher, :math:`\tau^2\,\mathrm{KL}(p_T\,\|\,p_S)` with :math:`p = \mathrm{softmax}(z/\tau)`.

    The mean over labels that are not -100, in nats (times :math:`\tau^2`, so that gradients keep their size: the
    gradient for the student's logits is :math:`\tau(p_S - p_T)` per token). The teacher's logits are detached.

    Args:
        logits: student ``(..., vocab)``.
        teacher_logits: same shape.
        labels: ``(...)``; only their -100 entries matter.
        temperature: :math:`\tau` > 0.

    Example:
        >>> p, q = torch.tensor([[.9, .1]]).log(), torch.tensor([[.5, .5]]).log()
        >>> kl_divergence(q, p, torch.tensor([0])).item().__round__(5)
        0.36806

    Reference: Hinton et al., arXiv:1503.02531.
    """
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    return mean_over_labels((teacher.exp() * (teacher - student)).sum(-1), labels) * temperature**2
