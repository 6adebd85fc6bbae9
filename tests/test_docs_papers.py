"""docs/papers.md: every line is a command of ours, and every paper of the arena's rows has one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fewbits.arena import METHODS
from fewbits.cookbook import find_recipe
from fewbits.pipeline import ptq_recipe
from fewbits.recipe import shipped_recipes

PAGE = (Path(__file__).parents[1] / "docs" / "papers.md").read_text(encoding="utf-8")
LINES = re.findall(r"`(fewbits (?:train|ptq) [^`]+)` \|", PAGE)


@pytest.mark.parametrize("line", LINES)
def test_every_line_is_a_valid_recipe(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0] == "train":
        find_recipe(words[1], words[2:])
    else:
        assert words[2] == "--method"
        assert words[4] == "--scheme"
        ptq_recipe(words[1], words[3], words[5])


def test_every_paper_of_the_arena_has_a_line() -> None:
    assert len(LINES) > 35
    missing = {paper for method in METHODS.values() for paper in method.papers} - set(
        re.findall(r"\d{4}\.\d{5}|\d{4}\.\d{4}", PAGE)
    )
    assert not missing


def test_every_shipped_recipe_of_a_paper_has_a_line() -> None:
    of_papers = {name for name, text in shipped_recipes().items() if "arXiv:" in text.splitlines()[0]}
    assert of_papers <= {line.split()[2] for line in LINES}
