"""The arena on a tiny model: what is finished stays, everything that should be equal is, and the pages say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from arena_common import tiny_arena, write_checkpoint
from typer.testing import CliRunner

from fewbits.arena import METHODS, ArenaSettings, Cell, CellResult, NotForScheme, run_arena
from fewbits.arena.cells import CELLS_FOLDER, chosen_rate, num_cells, read_cell, ready_cells
from fewbits.arena.execute import run_cell
from fewbits.arena.methods import rule_for
from fewbits.arena.pages import markdown_table, write_pages
from fewbits.arena.rows_gradients import GRADIENTS
from fewbits.arena.rows_starts import STARTS
from fewbits.arena.rows_training import TRAINING
from fewbits.arena.settings import parse_budget
from fewbits.arena.shared import load_texts, read_start, split_held_out
from fewbits.arena.summary import summarize
from fewbits.cli import app
from fewbits.data import TokenBlocks
from fewbits.scheme import Scheme


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def arena(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ArenaSettings, Path]:
    """A finished arena of three methods, two seeds, two rates and four steps."""
    folder = tmp_path_factory.mktemp("arena") / "run"
    settings = tiny_arena(checkpoint)
    torch.set_num_threads(1)
    run_arena(settings, folder)
    return settings, folder


def never(settings: ArenaSettings, cell: Cell, folder: Path) -> CellResult:
    raise AssertionError(f"{cell.name} was finished and ran again")


def cells_of(arena: tuple[ArenaSettings, Path]) -> dict[Cell, CellResult]:
    return run_arena(*arena, measure=never)


def test_every_cell_is_a_file_and_none_runs_twice(arena: tuple[ArenaSettings, Path]) -> None:
    settings, folder = arena
    results = cells_of(arena)
    assert num_cells(settings) == (6, 1)  # two methods x (two rates + one more seed), and rounding
    files = {path.relative_to(folder / CELLS_FOLDER).as_posix() for path in folder.glob(f"{CELLS_FOLDER}/**/*.json")}
    assert files == {cell.path for cell in results}
    assert len(files) == 7
    assert ready_cells(settings, results) == []


def test_all_methods_see_the_same_batches_in_the_same_order_and_as_many(arena: tuple[ArenaSettings, Path]) -> None:
    trained = [result for result in cells_of(arena).values() if result.num_steps]
    by_seed = {seed: {r.batches_digest for r in trained if r.seed == seed} for seed in (0, 1)}
    assert [len(found) for found in by_seed.values()] == [1, 1]
    assert by_seed[0] != by_seed[1]
    assert {(r.num_steps, r.num_tokens) for r in trained} == {(4, 4 * 2 * 32)}
    assert {r.bits_per_weight for r in cells_of(arena).values()} == {2.5}
    assert all(r.seconds_per_step is not None and r.seconds_per_step > 0 for r in trained)


@pytest.mark.parametrize("damage", ["half", "other", "leftover"])
def test_a_half_written_cell_is_not_taken_and_gives_the_same_again(
    arena: tuple[ArenaSettings, Path], damage: str
) -> None:
    settings, folder = arena
    cell = Cell(scheme="W2G32", method="paretoq", learning_rate=1e-3, seed=0)
    path = folder / CELLS_FOLDER / cell.path
    before = read_cell(folder, cell)
    assert before is not None
    whole = path.read_text()
    left = path.with_name(f".{path.name}.partial-0")
    if damage == "half":
        path.write_text(whole[: len(whole) // 2])
    elif damage == "other":  # another cell's result under this name
        path.write_text(whole.replace('"paretoq"', '"ste"'))
    else:
        path.unlink()
        left.write_text(whole)
    assert read_cell(folder, cell) is None
    ran: list[Cell] = []

    def counted(settings: ArenaSettings, cell: Cell, folder: Path) -> CellResult:
        ran.append(cell)
        return run_cell(settings, cell, folder)

    after = run_arena(settings, folder, measure=counted)[cell]
    assert ran == [cell]
    assert not left.exists()
    measured = {"seconds_per_step", "cpu_seconds", "peak_memory", "versions", "tuning", "report"}
    assert after.model_dump(exclude=measured) == before.model_dump(exclude=measured)
    assert after.report is not None
    assert before.report is not None
    assert after.report.loss == before.report.loss  # bit for bit


def test_an_arena_may_grow_but_not_change(arena: tuple[ArenaSettings, Path], checkpoint: Path) -> None:
    settings, folder = arena
    ran: list[Cell] = []

    def counted(settings: ArenaSettings, cell: Cell, folder: Path) -> CellResult:
        ran.append(cell)
        return run_cell(settings, cell, folder)

    more = run_arena(tiny_arena(checkpoint, seeds=3, methods=("clipped_ste", "rtn")), folder, measure=counted)
    assert [cell.seed for cell in ran] == [2]
    assert len(more) == 5
    run_arena(settings, folder, measure=never)
    with pytest.raises(ValueError, match=r"other settings .they differ in budget, batch_size"):
        run_arena(tiny_arena(checkpoint, budget="steps=5", batch_size=1), folder)
    with pytest.raises(ValueError, match=r"holds no arena\.json"):
        run_arena(settings, checkpoint)


def test_a_cell_of_another_recipe_is_refused(arena: tuple[ArenaSettings, Path]) -> None:
    settings, folder = arena
    path = folder / CELLS_FOLDER / "W2G32/rtn/seed0.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="measured with another recipe"):
        run_arena(settings, folder, measure=never)
    path.write_text(text)


def test_failed_cells_are_tried_again_and_do_not_stop_the_others(checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_arena(checkpoint, methods=("ste", "rtn"), seeds=1, learning_rates=(1e-3,))

    def unlucky(settings: ArenaSettings, cell: Cell, folder: Path) -> CellResult:
        if cell.method == "ste":
            raise MemoryError("no room")
        return run_cell(settings, cell, folder)

    with pytest.raises(RuntimeError, match=r"1 cells failed; the first: W2G32 ste at 0\.001, seed 0: MemoryError: no"):
        run_arena(settings, tmp_path / "run", measure=unlucky)
    assert len(run_arena(settings, tmp_path / "run")) == 2


def test_a_diverged_rate_is_finished_and_never_chosen(arena: tuple[ArenaSettings, Path]) -> None:
    settings, _ = arena
    results = cells_of(arena)
    best = chosen_rate(settings, results, "W2G32", "paretoq")
    bad = Cell(scheme="W2G32", method="paretoq", learning_rate=best, seed=0)
    gone = {"status": "diverged", "tuning": None, "report": None}
    worse = {**results, bad: results[bad].model_copy(update=gone)}
    assert chosen_rate(settings, worse, "W2G32", "paretoq") != best
    for rate in settings.learning_rates:
        cell = Cell(scheme="W2G32", method="paretoq", learning_rate=rate, seed=0)
        worse[cell] = results[cell].model_copy(update=gone)
    with pytest.raises(ValueError, match="diverged at every learning rate"):
        chosen_rate(settings, worse, "W2G32", "paretoq")
    assert not [cell for cell in ready_cells(settings, worse) if cell.method == "paretoq"]


def test_workers_give_the_same_numbers(arena: tuple[ArenaSettings, Path], checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_arena(checkpoint, methods=("paretoq",), seeds=1, learning_rates=(1e-3,))
    (result,) = run_arena(settings, tmp_path / "run", jobs=1).values()
    here = cells_of(arena)[result.cell]
    assert result.report is not None
    assert here.report is not None
    assert result.report.loss == here.report.loss
    assert result.batches_digest == here.batches_digest


def test_no_name_stands_in_two_tables() -> None:
    """A second row of a name would silently take the place of the first."""
    assert len(METHODS) == len(GRADIENTS) + len(TRAINING) + len(STARTS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["W2G64", "W1.58", "W1", "W4G64"])
def test_every_method_is_a_valid_recipe_or_says_why_not(method: str, scheme: str) -> None:
    settings = ArenaSettings(schemes=(scheme,))
    if (reason := settings.allows(scheme, method)) is not None:
        assert len(reason) > 20
        with pytest.raises(NotForScheme):
            settings.recipe(scheme, method, 1e-3, 0)
        return
    recipe = settings.recipe(scheme, method, 1e-3, 0)
    rule = recipe.rules[0].build()
    assert rule.scheme.bits_per_weight((256, 256)) == Scheme.parse(scheme).bits_per_weight((256, 256))
    assert recipe.train.max_steps == (0 if METHODS[method].stage == "ptq" else 1953)


def test_few_methods_are_missing_at_a_scheme() -> None:
    settings = ArenaSettings()
    missing = {scheme: {name for name in METHODS if settings.allows(scheme, name)} for scheme in settings.schemes}
    assert missing == {
        "W2G64": {"bitnet"},
        "W1.58": {"dorefa", "kmeans", "kmeans_literal", "kmeans_ptq", "seq_mse", "jacquant_seq"},
        "W1": {"seq_mse", "jacquant_seq"},
    }


def test_exceptions_by_bits_and_the_refresh_of_short_runs() -> None:
    quest = METHODS["quest"]
    assert rule_for("quest", quest, "W1", num_steps=10)["surrogate"]["edge"] == 1.3
    two = rule_for("quest", quest, "W2G64", num_steps=10)["scheme"]
    assert (two["grid"]["kind"], two["rotation"]["kind"], two["scale"]["mode"]) == (
        "half_shifted",
        "hadamard",
        "dynamic",
    )
    for num_steps, interval in ((4, 1), (200, 10), (2000, 100), (9000, 100)):
        rule = rule_for("jacquant", METHODS["jacquant"], "W2G64", num_steps=num_steps)
        assert rule["surrogate"]["interval"] == interval


@pytest.mark.parametrize("method", ["kmeans", "gptq", "fp_finetune_then_gptq", "jacquant_shuffled_gain", "quest"])
def test_methods_with_steps_of_their_own_run(checkpoint: Path, tmp_path: Path, method: str) -> None:
    settings = tiny_arena(checkpoint, methods=(method,), seeds=1, learning_rates=(1e-3,), budget="steps=2")
    (result,) = run_arena(settings, tmp_path / "run").values()
    assert result.status == "ok"
    assert result.report is not None
    assert result.report.kl_to_teacher is not None
    assert result.report.kl_to_teacher > 0


def test_budgets_and_settings_are_checked() -> None:
    assert parse_budget("tokens=1K", 100) == 10
    for text, message in (("2M", "not of the form"), ("tokens=10", "less than one step"), ("steps=0", "less than one")):
        with pytest.raises(ValueError, match=message):
            parse_budget(text, 100)
    for fields, message in (
        ({"schemes": ("W2HG64",)}, "methods choose the grid letter"),
        ({"methods": ("stee",)}, "unknown arena method 'stee'"),
        ({"seeds": 1, "tuning_seeds": 2}, "more than seeds"),
        ({"learning_rates": (1e-3, 1e-3)}, "a rate is given twice"),
        ({"overrides": ("train.max_steps=7",)}, "the arena itself decides"),
        ({"overrides": ("train={max_steps: 7}",)}, "the arena itself decides"),
    ):
        with pytest.raises(ValueError, match=message):
            ArenaSettings(**fields)  # type: ignore[arg-type]


def test_tuning_and_report_are_different_text(arena: tuple[ArenaSettings, Path]) -> None:
    _, folder = arena
    texts = load_texts(folder, read_start(folder))
    assert len(texts["tuning"]) == len(texts["report"]) == 2
    blocks = TokenBlocks(torch.arange(14).view(7, 2).numpy(), 1.0)
    first, second = split_held_out(blocks, 100)
    assert (first.tokens.max(), second.tokens.min()) == (5, 8)
    with pytest.raises(ValueError, match="2 held-out blocks are too few"):
        split_held_out(TokenBlocks(blocks.tokens[:2], 1.0), 1)
    file = folder / "text.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-4] + b"\1\1\1\1")
    with pytest.raises(ValueError, match="another text"):
        load_texts(folder, read_start(folder))
    file.write_bytes(data[:100])
    with pytest.raises(ValueError, match="missing or damaged"):
        load_texts(folder, read_start(folder))
    file.write_bytes(data)


def test_pages_have_a_table_figures_and_a_sentence_for_every_comparison(
    arena: tuple[ArenaSettings, Path], tmp_path: Path
) -> None:
    settings, folder = arena
    summary = write_pages(folder)
    (scheme,) = summary.schemes
    assert [row.name for row in scheme.rows] == [r.name for r in sorted(scheme.rows, key=lambda row: row.mean)]
    assert {row.name for row in scheme.rows} == set(settings.methods)
    assert scheme.seeds_differ == []
    by_name = {row.name: row for row in scheme.rows}
    assert by_name["rtn"].losses[0] == by_name["rtn"].losses[1]
    assert sum(row.rank or 0 for row in scheme.rows) == 6  # ranks 1, 2, 3 shared out
    text, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    assert settings.command() in text
    for name in settings.methods:
        assert f"| {name} | " in text
        assert f"<td>{name}</td>" in page
    for line in ("clipped_ste and paretoq", "rtn and paretoq"):
        assert line in text.replace(" is worse than ", " and ").replace(" is better than ", " and ")
    assert page.count("<svg") == 2
    for name in ("W2G32-cost.svg", "W2G32-versus-paretoq.svg"):
        assert f"]({name})" in text
        assert (folder / name).read_text().startswith("<svg")
    assert json.loads((folder / "summary.json").read_text())["num_cells"] == 7


def test_the_share_of_paretoqs_gap(arena: tuple[ArenaSettings, Path]) -> None:
    settings, folder = arena
    start = read_start(folder)

    def shares(full: float) -> dict[str, float | None]:
        moved = start.model_copy(update={"report": start.report.model_copy(update={"loss": full})})
        (scheme,) = summarize(settings, moved, cells_of(arena)).schemes
        assert all(row.gap == pytest.approx(row.mean - full) for row in scheme.rows)
        return {row.name: row.share for row in scheme.rows}

    found = shares(5.0)
    assert found["paretoq"] == 1.0
    losses = {r.cell: r.report.loss for r in cells_of(arena).values() if r.report is not None}
    rtn = losses[Cell(scheme="W2G32", method="rtn", learning_rate=None, seed=0)] - 5.0
    paretoq = [loss - 5.0 for cell, loss in losses.items() if cell.method == "paretoq" and cell.learning_rate == 1e-3]
    assert found["rtn"] == pytest.approx(2 * rtn / sum(paretoq), rel=1e-12)
    assert set(shares(99.0).values()) == {None}  # there is no gap to have a share of


def test_pages_of_an_unfinished_arena_say_what_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_arena(checkpoint, methods=("ste", "bitnet", "rtn"), seeds=1, learning_rates=(1e-3,))

    def interrupted(settings: ArenaSettings, cell: Cell, folder: Path) -> CellResult:
        if cell.method == "rtn":
            return run_cell(settings, cell, folder)
        raise ValueError("not today")

    with pytest.raises(RuntimeError, match="not today"):
        run_arena(settings, tmp_path / "run", measure=interrupted)
    (scheme,) = write_pages(tmp_path / "run").schemes
    assert [row.name for row in scheme.rows] == ["rtn"]
    assert scheme.left_out["ste"] == "its search over learning rates is not finished"
    assert "BitNet has a sign and a ternary grid only" in scheme.left_out["bitnet"]


def test_the_command_runs_resumes_and_lists(checkpoint: Path, tmp_path: Path) -> None:
    command = ["arena", "-o", str(tmp_path / "run"), "--model", str(checkpoint / "model"), "--methods", "rtn"]
    command += ["--text", str(checkpoint / "text.txt"), "--schemes", "W2G32", "--budget", "steps=2", "--jobs", "0"]
    command += ["--block-size", "32", "--eval-tokens", "64", "--seeds", "1"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "0 trained cells of 2 steps, 1 without training" in first.output
    assert "W2G32 rtn, seed 0: loss" in first.output
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0
    assert "W2G32 rtn, seed 0: loss" not in again.output
    pages = CliRunner().invoke(app, ["arena", "-o", str(tmp_path / "run"), "--pages-only"])
    assert pages.exit_code == 0
    assert "report.html" in pages.output
    listed = CliRunner().invoke(app, ["arena", "--list"])
    assert all(name in listed.output for name in METHODS)


def test_bars_in_a_markdown_cell_do_not_break_the_table() -> None:
    assert markdown_table(["a"], [["|x|"]]).splitlines()[-1] == "| \\|x\\| |"
