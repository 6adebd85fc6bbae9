"""Methods side by side: one start, one data order, one budget, equal searches, seeds, controls, and what they support.

    settings = ArenaSettings(schemes=("W2G64",), methods=("paretoq", "jacquant"), budget="tokens=2M", seeds=5)
    run_arena(settings, "arena-run", jobs=2)

The same call goes on where an earlier one stopped.
"""

from __future__ import annotations

from fewbits.arena.cells import Cell, CellResult
from fewbits.arena.methods import Method, NotForScheme
from fewbits.arena.run import run_arena
from fewbits.arena.settings import ArenaSettings
from fewbits.arena.table import METHODS

__all__ = [
    "METHODS",
    "ArenaSettings",
    "Cell",
    "CellResult",
    "Method",
    "NotForScheme",
    "run_arena",
]
