"""The methods that the arena compares; each is a combination of parts, written as data.

Unless a row says otherwise it has the scheme's plain grid, learned scales that start at the smallest squared error,
all layers and parameters trained, and the arena's objective: rows then differ in one part only.
"""

from __future__ import annotations

from fewbits.arena.methods import Method
from fewbits.arena.rows_gradients import GRADIENTS
from fewbits.arena.rows_starts import STARTS
from fewbits.arena.rows_training import TRAINING

METHODS: dict[str, Method] = {**GRADIENTS, **TRAINING, **STARTS}
"""Every method by the name that ``--methods`` takes, in the order of the report."""
