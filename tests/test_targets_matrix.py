"""The map of grids and targets says what the checkers say, and the checkers' promises are kept by exports."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from targets_common import exported, trained

from fewbits import Rule, Scheme, prepare
from fewbits.export import export
from fewbits.grids import GRIDS as KINDS
from fewbits.targets import TARGETS, get_target
from fewbits.targets.matrix import GRIDS, GROUPS, SHAPE, judge, matrix_markdown, target_matrix
from fewbits.testing.tiny import tiny_llama

MATRIX = target_matrix()
EXPECTED = {
    ("hf", "W2K"): "lossless",
    ("dequantized:fp32", "W2K"): "lossless",
    ("dequantized", "W2"): "lossless",
    ("dequantized", "W3"): "lossless if every scale * level is a bf16 number",
    ("compressed-tensors", "W2H"): "lossless",
    ("gptq", "W4H"): "lossless",
    ("mlx", "W2H"): "lossless",
    ("onnx", "W2H"): "lossless",
    ("genai", "W3"): "lossless",
    ("bitnet", "W1.58"): "lossless if per tensor",
    ("gguf", "W2H"): "lossless",
    ("gguf:tq2_0", "W2"): "lossless if per tensor, per channel, G256",
    ("gguf:q2_k", "W2H"): "lossless if per tensor, per channel, G256, G64 in superblocks of 256",
}


@pytest.mark.parametrize(("place", "text"), EXPECTED.items(), ids=["/".join(key) for key in EXPECTED])
def test_cells_sum_up_all_groups(place: tuple[str, str], text: str) -> None:
    assert MATRIX[place[0]][place[1]].text == text


@pytest.mark.parametrize(
    ("target", "grid", "reason"),
    [
        ("bitnet", "W2", "the 4 levels -2..1 are not ternary"),
        ("gptq", "W2K", "not multiples of 1/1024"),
        ("onnx:4", "W4H", "do not fit 4-bit codes with no zero point"),
        ("mlx:fp16", "W4", "use the target mlx, whose scales are fp32"),
        ("gguf:q2_0", "W2H", "4 levels -1.5..1.5 do not fit"),
        ("compressed-tensors:4", "W8", "256 levels -128..127 do not fit 4-bit codes"),
    ],
)
def test_reasons_are_the_checkers(target: str, grid: str, reason: str) -> None:
    cell = MATRIX[target][grid]
    assert cell.verdict == "cannot"
    assert reason in cell.condition


def test_every_target_and_grid_is_there_and_agrees_with_holds() -> None:
    assert list(MATRIX) == list(TARGETS)
    assert {scheme.grid.kind for scheme in GRIDS.values()} == set(KINDS)
    for name, row in MATRIX.items():
        assert list(row) == list(GRIDS)
        for grid, cell in row.items():
            for group, found in cell.judgements.items():
                scheme = GRIDS[grid].with_scale(**GROUPS[group])
                assert (get_target(name).holds(scheme, SHAPE) is None) == (found.verdict != "cannot"), (name, scheme)


def test_scales_that_are_not_portable_hold_in_fewer_targets() -> None:
    portable, fp16 = MATRIX, target_matrix(scale_dtype="fp16")
    assert portable["mlx:fp16"]["W2H"].verdict == "lossless"
    assert fp16["mlx:fp16"]["W2H"].verdict == "cannot"
    order = ("cannot", "lossless if", "lossless")
    for name, row in fp16.items():
        for grid, cell in row.items():
            assert order.index(cell.verdict) <= order.index(portable[name][grid].verdict)


@pytest.mark.parametrize("reasons", [False, True])
def test_the_table_is_markdown(reasons: bool) -> None:
    lines = matrix_markdown(MATRIX, reasons=reasons).splitlines()
    assert lines[0] == f"| target | {' | '.join(GRIDS)} |"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == len(TARGETS) + 2
    assert len({line.count("|") for line in table}) == 1
    numbers = [int(line.partition(".")[0]) for line in lines[len(table) + 1 :]]
    assert numbers == list(range(1, len(numbers) + 1))
    shown = [cell.strip() for line in table[2:] for cell in line.split("|")[2:-1]]
    assert {int(cell.split("(")[1].rstrip(")")) for cell in shown if "(" in cell} == set(numbers)
    words = {cell.partition(" ")[0] for cell in shown}
    assert words == {"yes", "if", "no"}
    assert all(("(" in cell) == (cell[:2] == "if" or (reasons and cell[:2] == "no")) for cell in shown)
    assert matrix_markdown({}) == "| target |  |\n|---|\n"


def test_the_page_is_current() -> None:
    root = Path(__file__).parents[1]
    scope = runpy.run_path(str(root / "scripts" / "targets_page.py"))
    wanted = scope["page"]()
    assert (root / "docs" / "targets.md").read_text(encoding="utf-8") == wanted, "run scripts/targets_page.py"
    assert matrix_markdown(MATRIX) in wanted


LIGHT = [t for t in TARGETS if t.startswith(("hf", "compressed", "gptq", "mlx", "bitnet"))]


@pytest.mark.parametrize("name", LIGHT)
def test_promises_are_kept(tmp_path: Path, name: str) -> None:
    """Whatever the map calls lossless is exported exactly, and whatever it refuses is refused by export."""
    target = get_target(name)
    for number, text in enumerate(GRIDS):
        scheme: Any = GRIDS[text].with_scale(
            granularity="per_tensor" if name == "bitnet" else "per_channel", rule="mse"
        )
        verdict = judge(target, scheme, (64, 64)).verdict
        if verdict == "cannot":
            with pytest.raises(ValueError, match="cannot hold"):
                export(prepare(tiny_llama(), Rule(scheme=scheme)), target, tmp_path / str(number))
        else:
            assert verdict == "lossless"
            exported(trained(scheme), target, tmp_path / str(number))


def test_a_judgement_of_one_scheme() -> None:
    found = judge(get_target("gguf"), Scheme.parse("W1.58A16G256"))
    assert (found.verdict, found.reason.partition(":")[0]) == ("lossless", "TQ2_0")
    assert judge(get_target("dequantized"), Scheme.parse("W3")).verdict == "lossless if"
