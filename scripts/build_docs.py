"""API pages from the docstrings into site/; fails where a public name has none.

Run by ``make docs``. The pages are static; formulas are drawn by the reader's browser.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pdoc
import pdoc.render

import fewbits

ROOT = Path(__file__).resolve().parent.parent


def public_modules() -> list[str]:
    """Every module without an underscore in its path."""
    names = ["fewbits"]
    for info in pkgutil.walk_packages(fewbits.__path__, "fewbits."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            names.append(info.name)
    return names


def undocumented(name: str) -> list[str]:
    """Public functions, classes and methods of one module without a docstring of their own."""
    module = importlib.import_module(name)
    missing = [] if module.__doc__ else [name]
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            if not inspect.getdoc(value):
                missing.append(f"{name}.{key}")
            if inspect.isclass(value):
                missing += [
                    f"{name}.{key}.{k}"
                    for k, v in vars(value).items()
                    if inspect.isfunction(v) and not k.startswith("_") and not inspect.getdoc(v)
                ]
    return missing


def main() -> int:
    """Check, then write."""
    names = public_modules()
    missing = [item for name in names for item in undocumented(name)]
    if missing:
        print("without a docstring: " + ", ".join(missing), file=sys.stderr)
        return 1
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(*names, output_directory=ROOT / "site")
    print(f"{len(names)} modules documented in site/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
