"""``metrics.jsonl``: one JSON object a line, in step order, without wall-clock times, so that runs can be compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fewbits.io import parse_json, read_text

_TIMES = ("runtime", "samples_per_second", "steps_per_second", "total_flos", "epoch")


class MetricsFile:
    """Append-only; after a resume, lines of later steps are dropped first, so that nothing is there twice."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def resume_at(self, step: int) -> None:
        """Drop what an interrupted run wrote after the checkpoint that training goes on from; make the file if new."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                continue  # a line that was cut off when the run was killed
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; wall-clock values are left out."""
        kept = {k: v for k, v in values.items() if not any(k.endswith(t) for t in _TIMES)}
        if not kept:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **kept}) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines.

    Raises:
        ValueError: if the file is missing or a line is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; is this the folder of a run?")
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        row = parse_json(line, f"{path}, line {number},")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, holds a JSON {type(row).__name__}; an object is needed")
        rows.append(row)
    return rows
