"""The README's examples are executed, its commands exist, and its table is the one that was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewbits.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 14
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "my-2-bit-model" / "model.safetensors").exists()


def test_every_command_of_the_readme_exists() -> None:
    runner = CliRunner()
    names = set(re.findall(r"^fewbits ([a-z-]+)", "\n".join(blocks("")), flags=re.MULTILINE))
    assert {"train", "eval", "export", "verify", "inspect", "report", "demo", "recipes"} <= names
    for name in names:
        result = runner.invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert "xample" in result.output, f"{name} --help shows no example"


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (root / target).exists(), target


def test_the_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_table_was_measured() -> None:
    table = README.split("<!-- demo-table -->")[1].split("<!-- /demo-table -->")[0]
    for name in ("full precision", "RTN, absmax scale", "RTN, mse scale", "clipped STE", "JacQuant"):
        assert f"| {name} |" in table
    assert re.search(r"commit `[0-9a-f]{7,}", table)
    assert "make demo" in table
