"""Paired differences between any two rows of an arena, by scheme: what the log quotes beside the report's own pairs.

    python benchmarks/arena_pairs.py arena-run jacquant:clipped_ste jacquant_update:jacquant_update_constant

Each row is taken at the learning rate that its search chose on the tuning text; differences are of the loss on the
report text, by seed, with Student's 95 % interval. ``scheme, method, reference, difference, interval, verdict``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fewbits.arena import ArenaSettings
from fewbits.arena.cells import chosen_rate, report_cells
from fewbits.arena.pages import markdown_table
from fewbits.arena.run import finished_cells, read_settings
from fewbits.arena.shared import read_start
from fewbits.arena.statistics import compare_paired


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pairs", nargs="+", help="METHOD:REFERENCE")
    arguments = parser.parse_args()
    named = {name: None for pair in arguments.pairs for name in pair.split(":")}
    settings = ArenaSettings(**{**read_settings(arguments.folder).model_dump(), "methods": tuple(named)})
    start = read_start(arguments.folder)
    results = finished_cells(settings, arguments.folder, start)

    def losses(scheme: str, method: str) -> dict[int, float]:
        try:
            rate = chosen_rate(settings, results, scheme, method)
        except (KeyError, ValueError):
            return {}
        cells = [results.get(cell) for cell in report_cells(settings, scheme, method, rate)]
        return {cell.seed: cell.report.loss for cell in cells if cell is not None and cell.report is not None}

    rows = []
    for pair in arguments.pairs:
        method, _, reference = pair.partition(":")
        for scheme in settings.schemes:
            a, b = losses(scheme, method), losses(scheme, reference)
            if not a.keys() & b.keys():
                continue
            c = compare_paired(a, b)
            interval = f"{c.t_low:+.4f} to {c.t_high:+.4f}"
            rows.append([method, reference, scheme, f"{c.mean:+.4f}", interval, str(c.num_seeds), c.verdict])
    if not rows:
        raise SystemExit("no pair has finished cells at a seed in common; see fewbits arena --list for the names")
    header = ("method", "reference", "scheme", "difference", "95 % interval", "seeds", "verdict")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
