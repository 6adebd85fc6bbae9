"""Losses of a quantized student: cross-entropy, distillation from a teacher (whole or its top k), features."""

from fewbits.objectives.features import feature_distance, standardize
from fewbits.objectives.losses import cross_entropy, kl_divergence
from fewbits.objectives.mixture import Objective
from fewbits.objectives.topk import TopKLogits, top_k_divergence, top_k_logits

__all__ = [
    "Objective",
    "TopKLogits",
    "cross_entropy",
    "feature_distance",
    "kl_divergence",
    "standardize",
    "top_k_divergence",
    "top_k_logits",
]
