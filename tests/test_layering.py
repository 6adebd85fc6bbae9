"""The shape of the package: imports point one way, without cycles, files stay small, heavy imports stay lazy."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fewbits"
MAX_LINES = 400

# A file imports only from entries above its own, or from its own package.
ORDER = [
    "naming", "numerics", "grids", "scales", "rotations", "scheme", "qtensor", "kmeans",
    "surrogates", "fake_quant", "drives", "activations",
    "packing", "parametrizations", "nn", "parametrize", "rules", "convert",
    "optim", "objectives",
    "io", "weight_files", "pretrained", "quantizer", "checkpoint", "adapters",
    "corpora", "data", "traces", "teacher_logits", "smollm2", "recipe",
    "evaluate", "geometry", "ptq", "training",
    "targets", "runtime",
    "manifest", "comparison", "engines", "verify", "export",
    "inspection", "run_folder", "loading", "pipeline", "reinforce",
    "plots", "report", "diagnose", "arena", "cookbook", "demo",
    "cli_arena", "cli_runtime", "cli_diagnose", "cli_teach", "cli", "testing",
]  # fmt: skip
"""Names of modules and packages right below ``fewbits``, lowest first."""
ROOT_NAMES = {"__version__"}
"""What a file may take from ``fewbits`` itself, which stands above everything."""

FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def resolve(base: str, name: str) -> str:
    """``from base import name`` means the submodule if there is one, else something of ``base``."""
    return f"{base}.{name}" if f"{base}.{name}" in MODULES else base


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of fewbits that a file imports, wherever the statement stands, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fewbits":
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write imports in full, from fewbits..."
            if node.module is not None and node.module.split(".")[0] == "fewbits":
                for alias in node.names:
                    if node.module == "fewbits" and alias.name in ROOT_NAMES:
                        continue
                    yield resolve(node.module, alias.name), node.lineno


def layer_of(module: str) -> str:
    """The entry of ORDER that a module belongs to; empty for ``fewbits`` itself."""
    return module.split(".")[1] if "." in module else ""


@every_file
def test_every_module_has_its_place(path: Path) -> None:
    layer = layer_of(module_name(path))
    assert layer in {"", "__main__", *ORDER}, (
        f"fewbits.{layer} has no place in ORDER of {Path(__file__).name}: add it below everything that it imports"
    )


@every_file
def test_imports_point_one_way(path: Path) -> None:
    module = module_name(path)
    own = layer_of(module)
    if own not in ORDER:  # fewbits itself imports all; a module without a place fails the test above
        return
    for imported, line in imports(path):
        target = layer_of(imported)
        where = f"{path.relative_to(ROOT)}:{line}"
        assert target, f"{where} imports fewbits itself, which stands above everything; import the module meant"
        if target != own:
            assert target in ORDER, f"{where} imports {imported}, which has no place in ORDER"
            assert ORDER.index(target) < ORDER.index(own), (
                f"{where}: {module} may not import {imported}; {target} does not stand above {own} in ORDER"
            )


def test_no_cycles() -> None:
    graph = {name: {target for target, _ in imports(path)} - {name} for name, path in MODULES.items()}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name in state:
            return
        state[name] = 1
        for target in sorted(graph.get(name, ())):
            visit(target, (*trail, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


def test_the_order_names_each_module_once() -> None:
    assert len(ORDER) == len(set(ORDER))


@every_file
def test_files_stay_small(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {num_lines} lines; split it by concept"


def required_imports() -> set[str]:
    """Import names of the packages that are always installed with fewbits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {entry.split(">")[0].split("=")[0].split("<")[0].strip() for entry in project["dependencies"]}
    return {{"pyyaml": "yaml"}.get(name, name.replace("-", "_")) for name in names}


@every_file
def test_extras_are_imported_where_they_are_used(path: Path) -> None:
    """At the top of a file stand only the standard library, required packages and fewbits."""
    allowed = required_imports() | set(sys.stdlib_module_names) | {"fewbits"}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] in allowed, (
                f"{path.relative_to(ROOT)}:{node.lineno} imports {name} at the top; it is an extra, import it in the "
                "function that needs it and name the install line if it is missing"
            )
