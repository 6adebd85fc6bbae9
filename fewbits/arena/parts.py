"""Parts that rows of the arena in several files share."""

from __future__ import annotations

from typing import Any

from fewbits.arena.methods import Method


def jacquant(summary: str, note: str = "", more: dict[str, Any] | None = None, **options: Any) -> Method:
    """A row of JacQuant with its options; ``more`` are other fields of the row."""
    surrogate = {"name": "jacquant", **options}
    return Method(summary=summary, papers=("2605.25469",), note=note, surrogate=surrogate, **(more or {}))


MUON: dict[str, Any] = {"train": {"optim": "muon"}}

MUON_NOTE = "steps scaled to the size of AdamW's, which moves scales and the rest, all at the common rate"
