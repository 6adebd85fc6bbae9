"""Optimizer-side parts: parameter groups and what acts around ``optimizer.step()``."""

from fewbits.optim.build import Combined, build_optimizer
from fewbits.optim.groups import parameter_groups
from fewbits.optim.variance_reduced import VarianceReduced, VarianceReduction

__all__ = ["Combined", "VarianceReduced", "VarianceReduction", "build_optimizer", "parameter_groups"]
