"""What users may rely on: it is listed, it is there, and it is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fewbits
from fewbits.drives import DRIVES, Drive
from fewbits.grids import GRIDS
from fewbits.grids._base import LevelSet
from fewbits.surrogates import SURROGATES, Surrogate

PACKAGE = Path(fewbits.__file__).parent
PROMISED = {  # the names that the documentation, the command line and outside checks use
    "QATTrainer",
    "QTensor",
    "Rule",
    "Scheme",
    "convert",
    "export",
    "fake_quantize",
    "prepare",
    "quantize",
    "surrogates",
    "verify",
}


def packages() -> list[ModuleType]:
    """fewbits and its subpackages, by import, since a function may carry the name of its module."""
    found = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "fewbits.") if info.ispkg]
    return [importlib.import_module(name) for name in ["fewbits", *found]]


LISTED = [(package, name) for package in packages() for name in getattr(package, "__all__", ())]


def documented_constants(package: ModuleType) -> set[str]:
    """Names of a package that are assigned at the top of one of its files and followed by a docstring."""
    found: set[str] = set()
    assert package.__file__ is not None
    for path in Path(package.__file__).parent.glob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, after in pairwise(body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize(("package", "name"), LISTED, ids=lambda x: getattr(x, "__name__", x))
def test_every_listed_name_is_there_and_documented(package: ModuleType, name: str) -> None:
    thing: Any = getattr(package, name)
    if inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isroutine(thing):
        assert (thing.__doc__ or "").strip(), f"{package.__name__}.{name} has no docstring"
        # a dataclass without a docstring gets its signature for one
        assert not (thing.__doc__ or "").startswith(f"{name}("), f"{package.__name__}.{name} has no docstring"
    else:
        assert name in documented_constants(package), f"{package.__name__}.{name} has no docstring below it"


@pytest.mark.parametrize("package", packages(), ids=lambda p: p.__name__)
def test_lists_are_sorted_and_without_repeats(package: ModuleType) -> None:
    names = list(getattr(package, "__all__", ()))
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("_") and name != "__version__"]


def test_the_promised_names_are_listed() -> None:
    assert set(fewbits.__all__) >= PROMISED
    for name in ("STE", "ClippedSTE", "StableQAT", "JacQuant"):
        assert name in fewbits.surrogates.__all__


def leaves(cls: type) -> set[type]:
    """Final subclasses inside fewbits."""
    below = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("fewbits.")]
    return {cls} if not below else set().union(*(leaves(sub) for sub in below))


@pytest.mark.parametrize(
    ("registry", "base", "key"),
    [(GRIDS, LevelSet, "kind"), (SURROGATES, Surrogate, "name"), (DRIVES, Drive, "name")],
    ids=["grids", "surrogates", "drives"],
)
def test_registries_are_complete(registry: dict[str, type], base: type, key: str) -> None:
    packages()  # so that every subclass is known
    assert set(registry.values()) == leaves(base)
    assert all(getattr(cls, key) == name for name, cls in registry.items())


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_public_definition_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    missing = [name for name, node in public_definitions(tree.body) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not missing, f"without a docstring: {', '.join(missing)}"
