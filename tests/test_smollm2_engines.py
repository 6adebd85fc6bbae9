"""SmolLM2-135M at 2 and 1.58 bits writes the same greedy text in every engine, or the difference is explained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_engines_write_the_same_text(tmp_path: Path) -> None:
    """The script exits with an error for a control that differs, or a difference that rounding does not explain."""
    script = Path(__file__).parents[1] / "benchmarks" / "smollm2_engines.py"
    command = [sys.executable, "-W", "ignore", str(script), "--output", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    assert [r["bits"] for r in results] == ["W2", "W1.58"]
    for result in results:
        assert set(result["types"].values()) == {"Q2_0", "TQ2_0"}
    ternary = results[1]["engines"]["fewbits fp32"]["prompts"]
    assert all(len(set(row["text"].split())) > 3 for row in ternary), "text of one word repeated says nothing"
