"""A run folder, or several side by side, as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbits import plots
from fewbits.evaluate import EvalResult
from fewbits.io import read_json_object, write_text
from fewbits.pipeline import EVAL_FILE, RECIPE_FILE, read_scores
from fewbits.run_folder import read_recipe
from fewbits.training.metrics import read_metrics
from fewbits.training.windows import WINDOWS_FILE
from fewbits.verify import ROW_HEADER, VerifyReport

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,.text td,.text th{text-align:left}svg{max-width:100%;height:auto}
pre{background:#f5f5f5;padding:1rem;overflow:auto}
blockquote{border-left:4px solid #1b6ca8;margin:1rem 0;padding:.2rem 1rem;background:#f3f8fc}
figcaption{color:#555;font-size:.9rem}
"""

DIAGNOSIS_FRAGMENT = "diagnosis/section.html"
"""Where ``fewbits diagnose --run`` leaves its part of a run's report."""


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """An HTML table; all cells are escaped. Columns after the first are numbers, or ``text``."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="text"' if text else ""
    return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figure(svg: str, caption: str) -> str:
    """A figure with its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def page(title: str, sections: Mapping[str, str]) -> str:
    """A whole page: sections by heading."""
    body = "".join(f"<h2>{html.escape(name)}</h2>{content}" for name, content in sections.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def score_rows(scores: Mapping[str, EvalResult]) -> list[list[str]]:
    """Rows of the score table."""
    rows = []
    for name, score in scores.items():
        kl = "" if score.kl_to_teacher is None else f"{score.kl_to_teacher:.4f}"
        agree = "" if score.top1_agreement is None else f"{score.top1_agreement:.1%}"
        rows.append([name, f"{score.perplexity:.3f}", f"{score.bits_per_byte:.4f}", kl, agree])
    return rows


_WINDOW_MEANS = ("mean_window", "layer_window_mean")
_WINDOW_SHARES = ("never_flipped", "outer_share", "jump_share", "return_share")
_WINDOW_HEADER = (
    "layer",
    "flips per weight and step",
    "window of a weight, steps",
    "of the layer",
    "never flipped",
    "flips at an outer code",
    "by more than one code",
    "back to the code before",
)
SCORE_HEADER = ("model", "perplexity", "bits per byte", "KL to teacher", "top-1 agreement")


def metric_series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """``(step, value)`` of one metric."""
    return [(row["step"], row[key]) for row in rows if key in row]


def training_figures(runs: Mapping[str, Path]) -> dict[str, str]:
    """Loss curves, gain over time and histograms of one or more run folders; keys are headings."""
    metrics = {name: read_metrics(folder / "metrics.jsonl") for name, folder in runs.items()}
    sections = {}
    losses = {name: points for name, rows in metrics.items() if (points := metric_series(rows, "loss"))}
    if losses:  # a run of fewer steps than it logs has none
        sections["Training loss"] = figure(
            plots.curves(losses, x_label="optimizer step", y_label="loss (nats per token)", log_y=True),
            "The objective of the recipe, mean over the steps between two logs.",
        )
    for key, heading, caption in (
        ("qat/gain_mean", "Learned gain B over time", "Mean over layers of the gain in use; 1 is the identity STE."),
        ("qat/flip_rate", "Code flips", "Share of codes that changed since the last look, mean over layers."),
        ("qat/saturated_share", "Saturation", "Share of weights outside the outermost levels, mean over layers."),
        ("qat/scale_drift", "Drift of the scales", "Mean abs(log2(scale / starting scale))."),
    ):
        series = {name: points for name, rows in metrics.items() if (points := metric_series(rows, key))}
        if series:
            label = heading.split(" over")[0].lower()
            sections[heading] = figure(plots.curves(series, x_label="optimizer step", y_label=label), caption)
    for name, rows in metrics.items():
        sections |= calibration_section(name, rows)
    name, folder = next(iter(runs.items()))
    if (folder / "histogram.json").exists():
        data = json.loads((folder / "histogram.json").read_text(encoding="utf-8"))
        for scheme, before in data["before"].items():
            after = data.get("after", {}).get(scheme)
            sections[f"Weights over the grid, {scheme}"] = figure(
                plots.weight_histograms(before, after), f"All layers of {name} with this scheme."
            )
    return sections


def calibration_section(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Whether the gain predicts how the deployed weights move; nothing if the run did not record it."""
    slope = metric_series(rows, "qat/slope_mean")
    if not slope:
        return {}
    gain = metric_series(rows, "qat/gain_mean") or [(step, 1.0) for step, _ in slope]
    errors = {
        "with the gain b": metric_series(rows, "qat/cal"),
        "with b = 1": metric_series(rows, "qat/cal_identity"),
        "with the best b": metric_series(rows, "qat/cal_best"),
    }
    content = figure(
        plots.curves({"slope <dQ, dW> / |dW|^2": slope, "gain b": gain}, x_label="optimizer step", y_label="slope"),
        "Moves of deployed over moves of latent weights since the last look, means over groups and layers.",
    )
    content += figure(
        plots.curves(errors, x_label="optimizer step", y_label="cal", log_y=True),
        "Squared relative error of dQ = b dW. What the best b leaves, no gain can predict.",
    )
    return {f"Calibration of the gain, {name}": content}


def windows_section(folder: Path) -> dict[str, str]:
    """How long codes stay, how often they flip, and where; nothing if the run did not watch them.

    Raises:
        ValueError: if the file is damaged.
    """
    if not (folder / WINDOWS_FILE).exists():
        return {}
    data = read_json_object(folder / WINDOWS_FILE)
    try:
        layers, first, last, interval = (data[key] for key in ("layers", "first_step", "last_step", "interval"))
        rows, counts = [], [0] * 32
        for name, layer in layers.items():
            means = ["none" if layer[key] is None else f"{layer[key]:.4g}" for key in _WINDOW_MEANS]
            shares = [f"{layer[key]:.1%}" for key in _WINDOW_SHARES]
            rows.append([name, f"{layer['flip_rate']:.2e}", *means, *shares])
            counts = [a + b for a, b in zip(counts, [*layer["window_counts"], *[0] * 32], strict=False)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / WINDOWS_FILE} is damaged: {error!r}") from None
    content = html_table(_WINDOW_HEADER, rows)
    closed = {f"{2**k}-{2 ** (k + 1) - 1}": [float(n)] for k, n in enumerate(counts) if n}
    if closed:
        content += figure(
            plots.bars(closed, y_label="windows of single weights", log_y=True),
            f"Completed windows by their length in steps. Codes were looked at every {interval} steps, from step "
            f"{first} to {last}.",
        )
    return {"Code windows": content}


def write_report(folder: str | Path) -> Path:
    """``report.html`` of a run folder.

    Raises:
        ValueError: if the folder is not a run, or its files are damaged.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    scores = read_scores(folder / EVAL_FILE)
    sections = {"Scores": html_table(SCORE_HEADER, score_rows(scores))}
    sections["Perplexity"] = figure(
        plots.bars({k: [v.perplexity] for k, v in scores.items()}, y_label="perplexity", log_y=True),
        f"On {next(iter(scores.values())).num_tokens} held-out tokens.",
    )
    if recipe.train.max_steps > 0:
        sections |= training_figures({"run": folder}) | windows_section(folder)
    verdicts = [VerifyReport(**read_json_object(path)) for path in sorted(folder.glob("export/*/verify.json"))]
    if verdicts:
        sections["Exports"] = html_table(ROW_HEADER, [verdict.row for verdict in verdicts])
    for path in sorted(folder.glob("export/*/verify.json")):
        verdict = json.loads(path.read_text(encoding="utf-8"))
        sections[f"Export {path.parent.name}"] = f"<pre>{html.escape(json.dumps(verdict, indent=1)[:4000])}</pre>"
    if (geometry := folder / DIAGNOSIS_FRAGMENT).exists():
        sections["Geometry"] = geometry.read_text(encoding="utf-8")
    sections["Recipe"] = f"<pre>{html.escape((folder / RECIPE_FILE).read_text(encoding='utf-8'))}</pre>"
    versions = next(iter(scores.values())).versions
    sections["Versions"] = html_table(("part", "version"), [[k, v] for k, v in versions.items()])
    path = folder / "report.html"
    write_text(path, page(f"fewbits run: {folder.name}", sections))
    return path
