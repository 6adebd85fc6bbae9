"""The demo: full precision -> rounding breaks it -> training brings it back -> packed file -> proved equal -> a page.

Two arms from the same start and data, over several seeds: JacQuant and clipped STE. Every arm is an ordinary run folder
below the demo's folder, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import html
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from fewbits.checkpoint import load_model, load_prepared, load_tokenizer
from fewbits.convert import prepare
from fewbits.evaluate import evaluate, versions
from fewbits.export import export
from fewbits.inspection import inspect_model
from fewbits.io import write_text
from fewbits.pipeline import EVAL_FILE, load_blocks, model_source, read_scores, run
from fewbits.plots import bars
from fewbits.recipe import Recipe, shipped_recipes
from fewbits.report import figure, html_table, page, training_figures
from fewbits.verify import verify

ARMS = {"clipped STE": "demo-clipped-ste", "JacQuant": "demo-jacquant"}
PROMPT = "The return value of this function is"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What changes between the embedded model and SmolLM2.

    Args:
        model: ``embedded`` or ``smollm2``.
        seeds: runs per arm; the data order differs between them.
        overrides: recipe overrides of both arms.
    """

    model: str = "embedded"
    seeds: int = 3
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.model not in ("embedded", "smollm2"):
            raise ValueError(f"demo model {self.model!r} is unknown; use 'embedded' or 'smollm2'")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1")

    def recipe(self, arm: str, seed: int) -> Recipe:
        """The recipe of one run."""
        more = [f"seed={seed}"]
        if self.model == "smollm2":
            more += [
                "model=smollm2",
                "train.batch_size=1",
                "train.gradient_accumulation_steps=4",
                "train.max_steps=100",
                "train.learning_rate=0.0002",
                "train.save_steps=10",
                "train.freeze=[model.embed_tokens.weight]",
                "data.max_tokens=102400",
                "data.eval_tokens=4096",
            ]
        return Recipe.parse(shipped_recipes()[ARMS[arm]], [*more, *self.overrides])


class DemoRow(BaseModel):
    """One line of the demo's table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bits_per_weight: float
    megabytes: float
    perplexity: list[float]
    kl_to_teacher: list[float]
    sample: str

    @property
    def mean(self) -> float:
        """Mean perplexity over seeds."""
        return statistics.fmean(self.perplexity)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds, 0 for one."""
        return statistics.stdev(self.perplexity) if len(self.perplexity) > 1 else 0.0


class DemoResult(BaseModel):
    """Everything the demo measured; ``demo.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: list[DemoRow]
    verdict: str
    verified: dict[str, bool]
    seconds: float
    versions: dict[str, str]


def estimate_seconds(settings: DemoSettings) -> float:
    """Seconds that the whole demo will take here, from one measured training step; text and set-up not counted."""
    recipe = settings.recipe("JacQuant", 0)
    model = load_model(model_source(recipe.model))
    ids = torch.randint(0, model.config.vocab_size, (recipe.train.batch_size, recipe.data.block_size))
    rules = [rule.build() for rule in recipe.rules]
    prepare(model, rules, ignore=recipe.ignore)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids)
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        times.append(time.perf_counter() - start)
    micro_steps = recipe.train.max_steps * recipe.train.gradient_accumulation_steps
    return min(times) * micro_steps * len(ARMS) * settings.seeds


def generate_line(model: nn.Module, tokenizer: Any, prompt: str = PROMPT, *, num_tokens: int = 24) -> str:
    """A greedy continuation, on one line."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())


def compare(name_a: str, a: Sequence[float], name_b: str, b: Sequence[float]) -> str:
    """One honest sentence on two paired lists of perplexities (same seeds).

    Example:
        >>> compare("A", [10.0, 10.2, 10.2], "B", [10.1, 10.1, 10.1])
        'A and B do not differ beyond their seed spread: paired difference +0.033 +- 0.115 in perplexity over 3 seeds.'
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{name_a} minus {name_b}: {mean:+.3f} in perplexity on one seed, which says nothing about their order."
    spread = statistics.stdev(differences)
    text = f"paired difference {mean:+.3f} +- {spread:.3f} in perplexity over {len(differences)} seeds."
    # 4.30 is the two-sided 95 % quantile of Student's t with 2 degrees of freedom (3 seeds); it falls to 2 for many
    quantile = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}.get(len(differences) - 1, 2.3)
    if abs(mean) <= quantile * spread / len(differences) ** 0.5:
        return f"{name_a} and {name_b} do not differ beyond their seed spread: {text}"
    better = name_a if mean < 0 else name_b
    return f"{better} is better beyond the seed spread (95 %): {name_a} minus {name_b}, {text}"


def demo(
    folder: str | Path,
    settings: DemoSettings | None = None,
    *,
    say: Callable[[str], None] = print,
    quiet: bool = True,
) -> DemoResult:
    """Run (or go on with) the demo.

    Args:
        folder: where runs, ``demo.json`` and ``report.html`` go.
        settings: model, seeds, overrides.
        say: receives progress lines.
        quiet: no progress bars of the runs.

    Raises:
        ValueError: for a folder that holds something else.
    """
    settings = settings or DemoSettings()
    folder = Path(folder)
    start = time.perf_counter()
    folders: dict[str, list[Path]] = {arm: [] for arm in ARMS}
    for seed in range(settings.seeds):
        for arm in ARMS:
            path = folder / f"{ARMS[arm].removeprefix('demo-')}-seed{seed}"
            recipe = settings.recipe(arm, seed)
            if (path / "model").exists():
                if Recipe.load(path / "recipe.yaml") != recipe:
                    raise ValueError(f"{path} holds a run of another recipe; choose another folder for this demo")
                say(f"{arm}, seed {seed}: already there")
            else:
                say(f"{arm}, seed {seed}: {recipe.train.max_steps} steps of {_tokens_per_step(recipe)} tokens")
                scores = run(recipe, path, resume=(path / "recipe.yaml").exists(), quiet=quiet).scores
                say("   perplexity " + ", ".join(f"{k} {v.perplexity:.2f}" for k, v in scores.items()))
            folders[arm].append(path)
    rows = _rows(settings, folders)
    verified = _export_and_verify(folders["JacQuant"][0], say)
    by_name = {row.name: row for row in rows}
    verdict = compare("JacQuant", by_name["JacQuant"].perplexity, "clipped STE", by_name["clipped STE"].perplexity)
    result = DemoResult(
        rows=rows, verdict=verdict, verified=verified, seconds=time.perf_counter() - start, versions=versions()
    )
    write_text(folder / "demo.json", json.dumps(result.model_dump(), indent=1) + "\n")
    write_text(folder / "report.html", _page(result, folders))
    return result


def _tokens_per_step(recipe: Recipe) -> int:
    return recipe.train.batch_size * recipe.train.gradient_accumulation_steps * recipe.data.block_size


def _rows(settings: DemoSettings, folders: dict[str, list[Path]]) -> list[DemoRow]:
    recipe = settings.recipe("JacQuant", 0)
    source = model_source(recipe.model)
    model, tokenizer = load_model(source).eval(), load_tokenizer(source)
    start = read_scores(folders["JacQuant"][0] / EVAL_FILE)
    full_bytes = sum(p.numel() * 2 for p in model.parameters())
    rows = [_row("full precision", 16.0, full_bytes, [start["fp"]], generate_line(model, tokenizer))]
    prepare(model, [rule.build() for rule in recipe.rules], ignore=recipe.ignore)
    size = inspect_model(model, dtype=torch.bfloat16)
    bits, num_bytes = float(size.quantized_bits_per_weight or 16.0), size.total_bytes
    rows.append(_row("RTN, mse scale", bits, num_bytes, [start["rtn"]], generate_line(model, tokenizer)))
    rows.insert(1, _absmax_row(source, recipe, tokenizer, bits, num_bytes))
    for arm, paths in folders.items():
        trained, _ = load_prepared(paths[0] / "model")
        scores = [read_scores(path / EVAL_FILE)["qat"] for path in paths]
        line = generate_line(trained.eval(), tokenizer)
        rows.append(_row(arm, bits, num_bytes, scores, line))
    return rows


def _absmax_row(source: str, recipe: Recipe, tokenizer: Any, bits: float, num_bytes: float) -> DemoRow:
    """Rounding as most tools do it: the largest weight of a group sets the scale."""
    model, teacher = load_model(source), load_model(source)
    rules = [rule.build() for rule in recipe.rules]
    rules = [replace(rule, scheme=rule.scheme.with_scale(rule="absmax")) for rule in rules]
    prepare(model, rules, ignore=recipe.ignore)
    _, valid = load_blocks(recipe.data, tokenizer, teacher, recipe.seed)
    score = evaluate(model, valid, teacher=teacher)
    return _row("RTN, absmax scale", bits, num_bytes, [score], generate_line(model.eval(), tokenizer))


def _row(name: str, bits: float, num_bytes: float, scores: Sequence[Any], sample: str) -> DemoRow:
    return DemoRow(
        name=name,
        bits_per_weight=bits,
        megabytes=num_bytes / 1e6,
        perplexity=[s.perplexity for s in scores],
        kl_to_teacher=[s.kl_to_teacher for s in scores],
        sample=sample,
    )


def _export_and_verify(run_folder: Path, say: Callable[[str], None]) -> dict[str, bool]:
    verified = {}
    for target in ("hf", "dequantized"):
        where = export(run_folder, target, overwrite=True)
        report = verify(run_folder, where)
        verified[target] = report.passed
        say(f"export {target}: {'verified' if report.passed else 'NOT EQUAL, see verify.json'}")
    return verified


TABLE_HEADER = ("model", "bits/weight", "MB", "perplexity", "KL to teacher")


def table_rows(result: DemoResult) -> list[list[str]]:
    """Cells of the demo's table."""
    rows = []
    for row in result.rows:
        spread = f" +- {row.spread:.3f}" if len(row.perplexity) > 1 else ""
        kl = statistics.fmean(row.kl_to_teacher)
        rows.append(
            [row.name, f"{row.bits_per_weight:.2f}", f"{row.megabytes:.2f}", f"{row.mean:.3f}{spread}", f"{kl:.4f}"]
        )
    return rows


def _page(result: DemoResult, folders: dict[str, list[Path]]) -> str:
    rows = {row.name: row for row in result.rows}
    fp, rtn, best = rows["full precision"].mean, rows["RTN, mse scale"].mean, rows["JacQuant"].mean
    recovered = (rtn - best) / (rtn - fp) if rtn > fp else float("nan")
    story = (
        f"<p>Rounding the linear layers to 2 bits takes perplexity from {fp:.2f} to "
        f"{rows['RTN, absmax scale'].mean:.2f} with the usual scales, and to {rtn:.2f} with the best scales. Training "
        f"through the rounding brings it back to {best:.2f}: {recovered:.0%} of the gap that the best scales leave.</p>"
        f"<blockquote>{html.escape(result.verdict)}</blockquote>"
    )
    sections = {
        "What happened": story + html_table(TABLE_HEADER, table_rows(result)),
        "Perplexity": figure(
            bars({row.name: row.perplexity for row in result.rows}, y_label="perplexity", log_y=True),
            "Held-out text; bars are means over seeds, dots the seeds.",
        ),
        "The same prompt, continued": html_table(
            ("model", "text"), [[row.name, row.sample] for row in result.rows], text=True
        ),
        "Proof": "<p>"
        + "; ".join(
            f"export <b>{html.escape(k)}</b>: {'read back and equal' if v else 'NOT equal'}"
            for k, v in result.verified.items()
        )
        + "</p>",
    }
    runs = {f"{arm}#{i}": path for arm, paths in reversed(folders.items()) for i, path in enumerate(paths)}
    sections |= training_figures(runs)
    sections["Versions"] = html_table(("part", "version"), [[k, v] for k, v in result.versions.items()])
    return page("fewbits demo: a language model at 2 bits", sections)
