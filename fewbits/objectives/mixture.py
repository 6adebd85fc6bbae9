"""The weights by which losses are mixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.objectives.losses import cross_entropy, kl_divergence
from fewbits.objectives.topk import TopKLogits, top_k_divergence


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""``cross_entropy * CE + kl * KL + features * CSD + consistency * CR``, the teacher at ``temperature``.

    The call gives the first two terms. The others need hidden states or another forward pass: the trainer adds them,
    see :func:`fewbits.objectives.feature_distance` and :class:`fewbits.training.consistency.Consistency`.

    Args:
        cross_entropy: weight of the labels' loss, >= 0.
        kl: weight of the distillation loss, >= 0; needs a teacher.
        temperature: of the distillation, > 0.
        features: weight of the distance of standardized hidden states, >= 0; needs a teacher.
        feature_layers: which hidden states (0 is the embedding); None for the output of every block.
        consistency: weight of the disagreement of two noisy views, >= 0; in training only.
        consistency_decay: of the slow copy that is agreed with, in [0, 1).
        consistency_dropout: share of the tokens that a view lacks, in [0, 1).

    Raises:
        ValueError: for negative weights, no weight on labels or teacher, or other values out of range.
    """

    cross_entropy: float = 0.0
    kl: float = 1.0
    temperature: float = 1.0
    features: float = 0.0
    feature_layers: Sequence[int] | None = None
    consistency: float = 0.0
    consistency_decay: float = 0.999
    consistency_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.cross_entropy < 0 or self.kl < 0 or self.cross_entropy + self.kl == 0:
            raise ValueError(
                f"objective weights cross_entropy={self.cross_entropy}, kl={self.kl} must be >= 0 and not both 0"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        for name in ("features", "consistency"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"objective weight {name}={getattr(self, name)} must be a finite number >= 0")
        for name in ("consistency_decay", "consistency_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1)")
        if self.feature_layers is not None and not self.feature_layers:
            raise ValueError("feature_layers is empty; name hidden states, or leave it out for all blocks")

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is asked: for logits or for hidden states."""
        return self.kl > 0 or self.features > 0

    def __call__(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | TopKLogits | None) -> Tensor:
        """The loss of next-token prediction; logits at position t are scored on the label at t + 1."""
        logits, labels = logits[:, :-1], labels[:, 1:]
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.cross_entropy:
            loss = loss + self.cross_entropy * cross_entropy(logits, labels)
        if self.kl:
            if teacher_logits is None:
                raise ValueError("the objective distils (kl > 0) but there is no teacher; pass one or set kl=0")
            if isinstance(teacher_logits, TopKLogits):
                kept = teacher_logits.shifted()
                return loss + self.kl * top_k_divergence(logits, kept, labels, temperature=self.temperature)
            if teacher_logits[:, :-1].shape != logits.shape:
                raise ValueError(
                    f"teacher logits {tuple(teacher_logits[:, :-1].shape)} and student logits {tuple(logits.shape)} "
                    "differ; teacher and student need the same vocabulary"
                )
            loss = loss + self.kl * kl_divergence(logits, teacher_logits[:, :-1], labels, temperature=self.temperature)
        return loss

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
