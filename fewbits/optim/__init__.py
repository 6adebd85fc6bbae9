"""Optimizer-side parts: parameter groups and what acts around ``optimizer.step()``."""

from fewbits.optim.groups import parameter_groups

__all__ = ["parameter_groups"]
