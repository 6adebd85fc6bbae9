"""Losses of a quantized student: cross-entropy, distillation from a teacher, features, agreement of noisy views."""

from fewbits.objectives.features import feature_distance, standardize
from fewbits.objectives.losses import Objective, cross_entropy, kl_divergence

__all__ = ["Objective", "cross_entropy", "feature_distance", "kl_divergence", "standardize"]
