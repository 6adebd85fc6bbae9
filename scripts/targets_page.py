"""Write docs/targets.md: the map of grids and targets, asked of the code that checks every export.

Run it after a change of a target or of the map: ``.venv/bin/python scripts/targets_page.py``.
"""

from __future__ import annotations

from pathlib import Path

from fewbits.targets.matrix import GROUPS, SHAPE, matrix_markdown, target_matrix

PAGE = Path(__file__).resolve().parent.parent / "docs" / "targets.md"
_HEAD = f"""# Which engine format holds which grid

Made by `scripts/targets_page.py` from the code that checks every export; `fewbits targets` prints the same table, and
`fewbits targets gguf:q2_k` the conditions and refusals of one target in words. Asked of a weight of
{SHAPE[0]} x {SHAPE[1]} with portable scales, in every granularity: {", ".join(GROUPS)}.

* **yes**: lossless in every granularity.
* **if** (number): lossless where the numbered condition below holds; which granularities, or which numbers.
* **no**: cannot be held without loss, so the export is refused. Nothing is ever quantized again.

Every cell that is not **no** is tested: trained for some steps, exported, read back and compared with zero tolerance
(`tests/test_targets_cells.py`), and GGUF and MLX cells also by the engine's own dequantizer.
"""


def page() -> str:
    """The page, as Markdown."""
    return f"{_HEAD}\n{matrix_markdown(target_matrix())}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
