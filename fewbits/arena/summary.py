"""What the finished cells say: one row a method and scheme, compared with the references on the report text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from fewbits.arena.cells import Cell, CellResult, chosen_rate, report_cells, tuning_cells
from fewbits.arena.settings import ArenaSettings
from fewbits.arena.shared import Start
from fewbits.arena.statistics import Comparison, compare_paired, mean_ranks
from fewbits.arena.table import METHODS

REFERENCES = ("paretoq", "ste")
"""What every method is compared with, where it takes part."""


class Row(BaseModel):
    """One method at one scheme.

    Attributes:
        name: of the method.
        learning_rate: chosen on the tuning text; None without training.
        at_edge: whether it is the lowest or highest of the search, so that a better one may lie outside.
        losses: on the report text by seed, nats per token; a method without training has the same at every seed.
        kl: mean over the seeds of the KL to the model in full precision, nats per token.
        num_diverged: seeds whose loss was not finite.
        gap: mean loss minus that in full precision.
        share: ``gap`` over the gap of the first reference; None where there is none.
        rank: mean rank over the seeds among the methods with all seeds; None for others.
        bits_per_weight: scales counted.
        seconds_per_step: median over the cells; None without training.
        cpu_seconds: median over the cells.
        peak_memory: bytes, median over the cells; None if unknown.
        versus: comparison with each reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    learning_rate: float | None
    at_edge: bool
    losses: dict[int, float]
    kl: float
    num_diverged: int
    gap: float
    share: float | None
    rank: float | None
    bits_per_weight: float
    seconds_per_step: float | None
    cpu_seconds: float
    peak_memory: int | None
    versus: dict[str, Comparison]

    @property
    def mean(self) -> float:
        """Mean loss on the report text."""
        return statistics.fmean(self.losses.values())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, 0 for one."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else 0.0


class SchemeSummary(BaseModel):
    """All methods at one scheme, best first.

    Attributes:
        scheme: its text.
        rows: methods with a result, by mean loss.
        left_out: why a method has no row.
        seeds_differ: seeds whose cells did not all see the same batches: empty, or the comparison is void.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str
    rows: list[Row]
    left_out: dict[str, str]
    seeds_differ: list[int]


class Summary(BaseModel):
    """The whole arena; ``summary.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: ArenaSettings
    start: Start
    schemes: list[SchemeSummary]
    num_cells: int
    devices: list[str]
    commits: list[str]


def summarize(settings: ArenaSettings, start: Start, results: Mapping[Cell, CellResult]) -> Summary:
    """Everything that the pages show; cells that are missing leave their method out, with the reason."""
    commits = {result.versions.get("commit", result.versions["fewbits"]) for result in results.values()}
    return Summary(
        settings=settings,
        start=start,
        schemes=[_scheme(settings, start, results, scheme) for scheme in settings.schemes],
        num_cells=len(results),
        devices=sorted({f"{result.device}, {result.threads} threads" for result in results.values()}),
        commits=sorted(commits),
    )


def _scheme(settings: ArenaSettings, start: Start, results: Mapping[Cell, CellResult], scheme: str) -> SchemeSummary:
    chosen: dict[str, list[CellResult]] = {}
    left_out: dict[str, str] = {}
    for method in settings.methods:
        if reason := settings.allows(scheme, method):
            left_out[method] = reason
            continue
        if any(cell not in results for cell in tuning_cells(settings, scheme, method)):
            left_out[method] = "its search over learning rates is not finished"
            continue
        try:
            rate = chosen_rate(settings, dict(results), scheme, method)
        except ValueError as error:
            left_out[method] = str(error)
            continue
        cells = [results[c] for c in report_cells(settings, scheme, method, rate) if c in results]
        if any(cell.report is not None for cell in cells):
            chosen[method] = cells
        else:
            left_out[method] = "no finished cell has a score"
    losses = {name: _losses(settings, name, cells) for name, cells in chosen.items()}
    ranks = mean_ranks({name: by_seed for name, by_seed in losses.items() if len(by_seed) == settings.seeds})
    references = [name for name in REFERENCES if name in losses]
    first = losses.get(REFERENCES[0])
    base = statistics.fmean(first.values()) - start.report.loss if first else 0.0
    rows = [
        _row(settings, start, name, cells, losses, ranks.get(name), references, base) for name, cells in chosen.items()
    ]
    digests: dict[int, set[str]] = {}
    for cells in chosen.values():
        for cell in cells:
            if cell.num_steps:
                digests.setdefault(cell.seed, set()).add(cell.batches_digest)
    return SchemeSummary(
        scheme=scheme,
        rows=sorted(rows, key=lambda row: row.mean),
        left_out=left_out,
        seeds_differ=sorted(seed for seed, found in digests.items() if len(found) > 1),
    )


def _losses(settings: ArenaSettings, name: str, cells: list[CellResult]) -> dict[int, float]:
    found = {cell.seed: cell.report.loss for cell in cells if cell.report is not None}
    if METHODS[name].stage == "ptq":  # no seed plays a part: the same at each
        return dict.fromkeys(range(settings.seeds), found[0])
    return found


def _row(
    settings: ArenaSettings,
    start: Start,
    name: str,
    cells: list[CellResult],
    losses: Mapping[str, Mapping[int, float]],
    rank: float | None,
    references: list[str],
    base: float,
) -> Row:
    done = [cell for cell in cells if cell.report is not None]
    rate = cells[0].learning_rate
    rates = settings.learning_rates
    gap = statistics.fmean(losses[name].values()) - start.report.loss
    steps = [cell.seconds_per_step for cell in done if cell.seconds_per_step is not None]
    peaks = [cell.peak_memory for cell in done if cell.peak_memory is not None]
    kls = [cell.report.kl_to_teacher for cell in done if cell.report is not None]
    versus = {
        other: compare_paired(losses[name], losses[other])
        for other in references
        if other != name and losses[name].keys() & losses[other].keys()
    }
    return Row(
        name=name,
        learning_rate=rate,
        at_edge=rate is not None and len(rates) > 1 and rate in (min(rates), max(rates)),
        losses=dict(losses[name]),
        kl=statistics.fmean(kl for kl in kls if kl is not None),
        num_diverged=len(cells) - len(done),
        gap=gap,
        share=gap / base if base > 0 else None,
        rank=rank,
        bits_per_weight=done[0].bits_per_weight,
        seconds_per_step=statistics.median(steps) if steps else None,
        cpu_seconds=statistics.median(cell.cpu_seconds for cell in done),
        peak_memory=int(statistics.median(peaks)) if peaks else None,
        versus=versus,
    )
