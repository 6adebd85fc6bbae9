"""The arena's report: Markdown for the documentation and one HTML page, from the same parts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from fewbits.arena.figures import forest, scatter
from fewbits.arena.run import finished_cells, read_settings
from fewbits.arena.settings import WARMUP_SHARE
from fewbits.arena.shared import read_start
from fewbits.arena.statistics import chance_note, sentence
from fewbits.arena.summary import REFERENCES, Row, SchemeSummary, Summary, summarize
from fewbits.arena.table import METHODS
from fewbits.io import write_json, write_text
from fewbits.report import figure, html_table, page

HEADER = (
    "method", "loss", "gap to fp", "gap / paretoq", "KL to fp", "mean rank", "bits", "rate", "s per step", "CPU s",
    "peak MB",
)  # fmt: skip

SHORT = ("method", "loss", "gap to fp", "gap / paretoq", "rate", "CPU s")
"""The columns for a terminal."""


def short_rows(summary: SchemeSummary) -> list[list[str]]:
    """Rows of the columns of :data:`SHORT`."""
    keep = [HEADER.index(name) for name in SHORT]
    return [[row[i] for i in keep] for row in table_rows(summary)]


def table_rows(summary: SchemeSummary) -> list[list[str]]:
    """Cells of a scheme's table, best method first."""
    return [_cells(row) for row in summary.rows]


def _cells(row: Row) -> list[str]:
    rate = "" if row.learning_rate is None else f"{row.learning_rate:g}" + ("*" if row.at_edge else "")
    trained = row.learning_rate is not None  # else there is one cell, and no spread was measured
    spread = f" +- {row.spread:.4f}" if trained and len(row.losses) > 1 else ""
    diverged = f" ({row.num_diverged} diverged)" if row.num_diverged else ""
    return [
        row.name,
        f"{row.mean:.4f}{spread}{diverged}",
        f"{row.gap:+.4f}",
        "" if row.share is None else f"{row.share:.0%}",
        f"{row.kl:.4f}",
        "" if row.rank is None else f"{row.rank:.1f}",
        f"{row.bits_per_weight:.3f}",
        rate,
        "" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}",
        f"{row.cpu_seconds:.0f}",
        "" if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}",
    ]


def conditions(summary: Summary) -> list[str]:
    """What was held equal, in sentences."""
    s, start = summary.settings, summary.start
    rates = ", ".join(f"{rate:g}" for rate in s.learning_rates)
    lines = [
        f"Model {Path(s.model).name}, {s.num_steps} steps of {s.batch_size} x {s.block_size} tokens "
        f"({s.num_steps * s.tokens_per_step:,} in all, of a text of {start.train_tokens:,}), "
        f"AdamW and a cosine after {WARMUP_SHARE:.0%} warm-up unless a row says otherwise; every cell starts from the "
        "same weights, and methods that need no training, also as starts, run once: their own seed is not varied.",
        f"Learning rates {rates} for every method that trains, on {_count(s.tuning_seeds, 'seed')}; the lowest mean "
        "loss on the tuning text is chosen (a * marks the end of the range: a better rate may lie beyond).",
        f"Reported on {start.report.num_tokens:,} tokens of other held-out text, {_count(s.seeds, 'seed')}; a seed is "
        "a data order, the same for all methods. In full precision the loss there is "
        f"{start.report.loss:.4f}.",
        f"Measured on {'; '.join(summary.devices) or 'nothing yet'}, commit {', '.join(summary.commits) or 'none'}, "
        f"{summary.num_cells} cells. Times are comparable only where nothing else ran on the machine.",
    ]
    if s.overrides:
        lines.append(f"Recipe of every cell with {', '.join(s.overrides)}.")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def findings(summary: SchemeSummary) -> list[str]:
    """Sentences on a scheme: every comparison with the references, and what is missing."""
    lines, num_comparisons = [], 0
    for reference in REFERENCES:
        for row in summary.rows:
            if reference in row.versus:
                num_comparisons += 1
                lines.append(sentence(row.name, reference, row.versus[reference]))
    if num_comparisons:
        lines.append(chance_note(num_comparisons))
    if summary.seeds_differ:
        seeds = ", ".join(map(str, summary.seeds_differ))
        lines.insert(0, f"VOID: at seeds {seeds} not all methods saw the same batches; run the arena anew.")
    lines += [f"Left out: {name}: {reason}." for name, reason in summary.left_out.items()]
    return lines


def _comparisons(summary: SchemeSummary) -> dict[str, str]:
    """Forest plots by reference."""
    found = {}
    for reference in REFERENCES:
        of = {row.name: row.versus[reference] for row in summary.rows if reference in row.versus}
        if of:
            found[reference] = forest(of, reference)
    return found


def method_rows(names: Sequence[str]) -> list[list[str]]:
    """The table of the methods themselves."""
    rows = []
    for name in names:
        method = METHODS[name]
        papers = ", ".join(f"arXiv:{number}" for number in method.papers)
        rows.append([name, method.summary, method.note, papers])
    return rows


METHOD_HEADER = ("method", "what", "differs from its paper", "paper")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; vertical bars in cells are escaped.

    Example:
        >>> print(markdown_table(["a", "b"], [["x|y", "1"]]))
        | a | b |
        |---|---|
        | x\\|y | 1 |
    """
    lines = [" | ".join(header), "|".join("---" for _ in header)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"|{line}|" if i == 1 else f"| {line} |" for i, line in enumerate(lines))


def to_markdown(summary: Summary) -> tuple[str, dict[str, str]]:
    """The page, and its figures by file name."""
    parts = ["# Arena", f"    {summary.settings.command()}", *conditions(summary)]
    figures: dict[str, str] = {}
    for scheme in summary.schemes:
        parts += [f"## {scheme.scheme}", markdown_table(HEADER, table_rows(scheme))]
        images = {f"{scheme.scheme}-cost.svg": scatter(scheme.rows)} if scheme.rows else {}
        images |= {f"{scheme.scheme}-versus-{name}.svg": svg for name, svg in _comparisons(scheme).items()}
        parts += [f"![{name.removesuffix('.svg')}]({name})" for name in images]
        figures |= images
        parts.append("\n".join(f"- {line}" for line in findings(scheme)))
    parts += ["## Methods", markdown_table(METHOD_HEADER, method_rows(summary.settings.methods))]
    return "\n\n".join(parts) + "\n", figures


def to_html(summary: Summary) -> str:
    """The same as one page that needs nothing else."""
    intro = "".join(f"<p>{html.escape(line)}</p>" for line in conditions(summary))
    sections = {"Conditions": f"<pre>{html.escape(summary.settings.command())}</pre>{intro}"}
    for scheme in summary.schemes:
        content = html_table(HEADER, table_rows(scheme))
        if scheme.rows:
            content += figure(scatter(scheme.rows), "Quality against cost; bars are the spread over the seeds.")
        for name, svg in _comparisons(scheme).items():
            content += figure(svg, f"Paired differences from {name}: bootstrap (thick) and Student's interval (thin).")
        content += "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in findings(scheme)) + "</ul>"
        sections[scheme.scheme] = content
    sections["Methods"] = html_table(METHOD_HEADER, method_rows(summary.settings.methods))
    return page("fewbits arena", sections)


def write_pages(folder: str | Path) -> Summary:
    """``README.md`` with its figures, ``report.html`` and ``summary.json`` in the arena's folder, of what is finished.

    Raises:
        ValueError: for a folder that is no arena, or damaged.
    """
    folder = Path(folder)
    settings, start = read_settings(folder), read_start(folder)
    summary = summarize(settings, start, finished_cells(settings, folder, start))
    text, figures = to_markdown(summary)
    for name, svg in figures.items():
        write_text(folder / name, svg)
    write_text(folder / "README.md", text)
    write_text(folder / "report.html", to_html(summary))
    write_json(folder / "summary.json", summary.model_dump())
    return summary
