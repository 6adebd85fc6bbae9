"""What a diagnosis leaves on disk: ``diagnosis.json``, figures, one HTML page, and the proposed recipe."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from pathlib import Path

from fewbits.diagnose.diagnosis import Diagnosis
from fewbits.diagnose.figures import VERDICT_COLORS, figures_of
from fewbits.diagnose.pages_terrain import ARM_HEADER, arm_rows, number, recovery_text, terrain_section
from fewbits.diagnose.words import BROKEN, FREE, LEAVES
from fewbits.io import atomic_file, write_json, write_text
from fewbits.plots import to_svg
from fewbits.report import figure, html_table, page

JSON_FILE = "diagnosis.json"
PAGE_FILE = "diagnosis.html"
SECTION_FILE = "section.html"
RECIPE_NAME = "proposed-recipe.yaml"

TABLE_HEADER = ("scheme", "bits", "loss", "ppl x", "kappa_rand", "P(fail)", "verdict")


def table_rows(found: Diagnosis) -> list[list[str]]:
    """Cells of the main table, one row per scheme."""
    return [
        [
            r.scheme,
            f"{r.bits_per_weight:.2f}",
            f"{r.loss:.4f}",
            number(math.exp(min(r.rise, 700.0))),
            number(r.kappa_rand),
            "-" if r.forecast is None else f"{r.forecast.failure_probability:.2f}",
            r.verdict,
        ]
        for r in found.schemes
    ]


DETAIL_HEADER = (
    "scheme", "error norm", "kappa", "clipped", "width along the error", "promised by curvature", "flat ratio", "rise",
    "quadratic rise", "pitch", "critical pitch", "Monte Carlo",
)  # fmt: skip


def detail_rows(found: Diagnosis) -> list[list[str]]:
    """Cells of the table for readers of the paper; lengths in units of ``w``, rises in nats."""
    rows = []
    for r in found.schemes:
        f = r.forecast
        share = None if f is None else f.monte_carlo
        rows.append(
            [
                r.scheme,
                number(r.error_norm),
                number(r.kappa),
                f"{r.clipped_share:.1%}",
                number(r.width.plus.t),
                number(r.quadratic_width),
                number(r.flat_ratio),
                f"{r.rise:.4f}",
                f"{r.quadratic_rise:.4f}",
                number(None if f is None else f.pitch),
                number(None if f is None else f.critical_pitch),
                "-" if share is None else f"{share:.2f}",
            ]
        )
    return rows


def first_screen(found: Diagnosis) -> str:
    """The answer in sentences, as HTML, for a reader who has not read the paper."""
    by_verdict = {v: [r.scheme for r in found.schemes if r.verdict == v] for v in (FREE, LEAVES, BROKEN)}
    phrases = {
        FREE: "can be rounded to without training: the loss stays where it was",
        LEAVES: "lose quality when rounded to; training at these bits has something to win",
        BROKEN: "destroy the model when rounded to; it must be trained at these bits",
    }
    items = [
        f'<li><b style="color:{VERDICT_COLORS[v]}">{html.escape(", ".join(names))}</b>: {phrases[v]}.</li>'
        for v, names in by_verdict.items()
        if names
    ]
    base = found.baseline
    parts = [
        f"<p>{html.escape(found.model or 'The model')} scores {base.loss:.4f} nats per token on {base.num_tokens} "
        f"tokens. Rounding its {base.num_weights:,} layer weights to few bits moves it in weight space. Near the "
        f"original lies a <i>basin</i> where the loss rises by less than {base.tol:.3g} nats. The question is whether "
        "the rounded model still lies in it.</p>",
        f"<ul>{''.join(items)}</ul>",
    ]
    if found.proposal is not None:
        p = found.proposal
        text = f"A mix of bits costs {p.bits_per_weight:.2f} bits per weight and {p.measured_rise:.3f} nats"
        if p.uniform is not None:
            text += f"; {p.uniform} everywhere costs {p.uniform_bits_per_weight:.2f} bits and {p.uniform_rise:.3f} nats"
        parts.append(f"<p>{html.escape(text)}, both before training. It is written to {RECIPE_NAME}.</p>")
    if found.after is not None:
        parts.append(f"<blockquote>{html.escape(found.after.verdict)}</blockquote>")
    if found.arms is not None:
        parts.append(f"<blockquote>{html.escape(found.arms.verdict)}</blockquote>")
    return "".join(parts)


_COLUMNS = """<p><b>ppl x</b>: factor on the perplexity. <b>kappa_rand</b>: rounding error in units of the basin's width
along random directions; above about 1 it should leave. It does not look at the answer, so it is a forecast.
<b>P(fail)</b>: forecast from curvature and the size of the grid's cells alone.</p>"""
_DETAILS = """<p><b>kappa</b>: rounding error in units of the width along it; above 1 just restates that it left.
<b>flat ratio</b>: that width over the one that the curvature promises; far above 1 is a flat floor with a wall, about 1
a plain bowl. <b>Monte Carlo</b>: share of random errors of the size of the cells that did leave.</p>"""


_LAYERS = """<p>A direction drawn at random inside a layer knows nothing of the grid. If the dots climb from left to
right, the sensitive layers could have been named without rounding any of them.</p>"""


def section(found: Diagnosis, drawn: Mapping[str, tuple[str, str]] | None = None) -> dict[str, str]:
    """Headings and HTML of a report; the first one is the answer.

    Args:
        found: a diagnosis.
        drawn: its figures as SVG with their captions, where they are drawn already.
    """
    if drawn is None:
        drawn = {name: (to_svg(drawing), caption) for name, (drawing, caption) in figures_of(found).items()}
    pictures = {name: figure(svg, caption) for name, (svg, caption) in drawn.items()}
    agreement = [[k, number(v)] for k, v in found.rank_agreement.items()]
    sections = {
        "Will rounding break this model?": first_screen(found) + pictures["schemes"],
        "The schemes": html_table(TABLE_HEADER, table_rows(found)) + _COLUMNS + pictures["profiles"],
        "The layers": pictures["layers"],
    }
    if found.layer_forecast is not None:
        sections["The layers"] += pictures["layer-forecast"] + _LAYERS
    if found.after is not None:
        a = found.after
        rows = [
            ["original", f"{a.loss_fp:.4f}"],
            ["rounded (PTQ)", f"{a.loss_ptq:.4f}"],
            ["trained, latent", f"{a.loss_latent:.4f}"],
            ["trained, deployed", f"{a.loss_deployed:.4f}"],
        ]
        slopes = [
            [
                name,
                *(number(x) for x in (r.at_rounded.slope, r.at_latent.slope, r.quadratic_slope, r.wall_ratio)),
            ]
            for name, r in (("PTQ about the original", a.inward_ptq), ("deployed about latent", a.inward_qat))
        ]
        sections["Did training bring it back?"] = (
            f"<p>{html.escape(a.verdict)}</p>"
            + html_table(("model", "loss"), rows)
            + pictures["plane"]
            + pictures["lines"]
            + recovery_text(found)
            + html_table(("inward slope (nats per unit of w)", "rounded", "unrounded", "quadratic", "ratio"), slopes)
        )
    if found.arms is not None:
        sections["Was it the training, or the training through the rounding?"] = (
            f"<p>{html.escape(found.arms.verdict)} The control minimized {html.escape(found.arms.objective)}.</p>"
            + pictures["arms"]
            + html_table(ARM_HEADER, arm_rows(found.arms))
        )
    if terrain := terrain_section(found, pictures):
        sections["The terrain"] = terrain
    sections["For readers of the paper"] = (
        html_table(DETAIL_HEADER, detail_rows(found))
        + _DETAILS
        + pictures.get("pitch", "")
        + html_table(("forecast", "rank correlation with the measured rise"), agreement)
    )
    sections["Versions"] = html_table(("part", "version"), [[k, v] for k, v in found.versions.items()])
    return sections


def write_diagnosis(found: Diagnosis, folder: str | Path) -> Path:
    """Write JSON, figures as PNG and SVG, the page, and the proposed recipe if there is one.

    Args:
        found: a diagnosis.
        folder: made if it is not there; files of an earlier diagnosis in it are replaced.

    Returns:
        The path of the HTML page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON_FILE, found.to_dict())
    drawn = {}
    for name, (drawing, caption) in figures_of(found).items():
        drawn[name] = to_svg(drawing), caption
        write_text(folder / f"{name}.svg", drawn[name][0])
        with atomic_file(folder / f"{name}.png") as partial:
            drawing.savefig(partial, format="png", dpi=150)
    if found.proposal is not None:
        write_text(folder / RECIPE_NAME, found.proposal.recipe.to_yaml())
    path = folder / PAGE_FILE
    parts = section(found, drawn)
    write_text(path, page(f"fewbits diagnose: {found.model or 'model'}", parts))
    # One level down, as a part of a run's report.
    fragment = "".join(f"<h3>{html.escape(name)}</h3>{content}" for name, content in parts.items())
    write_text(folder / SECTION_FILE, fragment)
    return path
