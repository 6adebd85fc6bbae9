"""docs/serving.md: every block that it marks as run is run, on a run folder made of the embedded model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fewbits import Rule, prepare
from fewbits.checkpoint import save_prepared
from fewbits.cli import app
from fewbits.corpora import embedded_model_path
from fewbits.io import read_json
from fewbits.pretrained import load_model, load_tokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^<!-- run by a( slow)? test -->\n```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ImportWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    model, source = load_model(embedded_model_path()), embedded_model_path()
    save_prepared(prepare(model, Rule(scheme="W2A16G64")), load_tokenizer(source), folder / "runs" / "a" / "model")
    return folder


@pytest.fixture(scope="module")
def served(place: Path) -> Path:
    """The folder after the page's own commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (commands,) = [text for _, language, text in BLOCKS if language == ""]
        for line in commands.splitlines():
            result = CliRunner().invoke(app, line.removeprefix("fewbits ").split())
            assert result.exit_code == 0, result.output
    return place


def run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    exec(compile(text, "docs/serving.md", "exec"), {})
    return capsys.readouterr().out


def block(name: str) -> str:
    (found,) = [text for _, _, text in BLOCKS if name in text.splitlines()[0] or name in text.splitlines()[1]]
    return found


def test_commands_verify_every_export(served: Path) -> None:
    targets = read_json(served / "runs" / "a" / "verify.json")["targets"]
    assert set(targets) == {"gguf", "compressed-tensors", "mlx"}
    assert all(report["passed"] for report in targets.values())
    assert {v["level"] for v in targets["gguf"]["engines"]} == {"weights", "float", "int8"}


@pytest.mark.parametrize("name", ["xllamacpp", "transformers", "mlx_lm"])
def test_python_blocks_print_text(
    name: str, served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run(block(name), served, monkeypatch, capsys)
    assert len(printed.strip()) > 4


@pytest.mark.slow
def test_the_genai_block_prints_text(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    result = CliRunner().invoke(app, ["export", "runs/a", "--target", "genai"])
    assert result.exit_code == 0, result.output
    printed = run(block("onnxruntime_genai"), place, monkeypatch, capsys)
    assert printed.startswith("Return the")


def test_every_block_is_run_or_says_that_it_is_not() -> None:
    assert len(BLOCKS) == PAGE.count("```") // 2 == 5
    assert [bool(slow) for slow, _, _ in BLOCKS] == [False] * 4 + [True]
