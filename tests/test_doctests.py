"""Every example in every docstring of fewbits runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fewbits

MODULES = ["fewbits", *(info.name for info in pkgutil.walk_packages([str(Path(fewbits.__file__).parent)], "fewbits."))]
NEEDS_EXTRA: dict[str, str] = {}
"""Modules that need an extra to be imported, and what it brings: none, extras are imported where they are used."""
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def import_or_name_the_missing(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        return None, error.name


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module, missing = import_or_name_the_missing(name)
    if module is None:
        assert missing == NEEDS_EXTRA.get(name), f"{name} needs {missing}, which it must import where it is used"
        return
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    report: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs={**vars(module), "torch": torch}):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_the_core_has_many_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    core = ("grids", "scales", "rotations", "scheme", "qtensor", "surrogates", "fake_quant", "packing", "convert")
    modules = [
        importlib.import_module(name) for name in MODULES if name.startswith(tuple(f"fewbits.{c}" for c in core))
    ]
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) > 40
