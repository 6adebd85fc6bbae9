"""Optimizer-side parts: parameter groups and what acts around ``optimizer.step()``."""

from fewbits.optim.groups import parameter_groups
from fewbits.optim.variance_reduced import VarianceReduced, VarianceReduction

__all__ = ["VarianceReduced", "VarianceReduction", "parameter_groups"]
