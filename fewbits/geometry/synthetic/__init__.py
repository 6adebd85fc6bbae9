"""Landscapes on which every claim can be computed: the valley, the radial wall, the staircase, the factorization.

The worked examples and the simulation of the paper, small enough for exact answers; the claims about them are tests.
Reference: arXiv:2606.09012.
"""

from __future__ import annotations

from fewbits.geometry.synthetic.factorization import (
    FactorizationRun,
    factorization_gradient,
    factorization_loss,
    factorization_run,
)
from fewbits.geometry.synthetic.landscapes import RadialWall, StraightThroughRun, Valley, nearest, straight_through
from fewbits.geometry.synthetic.staircase import has_level_inside, staircase_level, staircase_recovery

__all__ = [
    "FactorizationRun",
    "RadialWall",
    "StraightThroughRun",
    "Valley",
    "factorization_gradient",
    "factorization_loss",
    "factorization_run",
    "has_level_inside",
    "nearest",
    "staircase_level",
    "staircase_recovery",
    "straight_through",
]
