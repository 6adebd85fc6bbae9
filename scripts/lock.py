"""Write requirements.lock (what fewbits runs on) and requirements-dev.lock (the rest that tests and engines need).

Takes the versions installed in the running environment; run it in the environment that passed the tests:
``.venv/bin/python scripts/lock.py``.
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Made by scripts/lock.py; edit pyproject.toml, install, test, and run it again.\n"


def normal(name: str) -> str:
    """PEP 503 spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[str]) -> dict[str, str]:
    """Name to version of everything that the requirements need here."""
    found: dict[str, str] = {}
    todo = [Requirement(r) for r in requirements]
    while todo:
        need = todo.pop()
        if need.marker is not None and not any(need.marker.evaluate({"extra": e}) for e in {"", *need.extras}):
            continue
        key = normal(need.name)
        dist = metadata.distribution(need.name)
        fresh = key not in found
        found[key] = dist.version.partition("+")[0]
        if not fresh and not need.extras:
            continue
        for text in dist.requires or []:
            child = Requirement(text)
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in {"", *need.extras}):
                child.marker = None
                todo.append(child)
    return found


def main() -> None:
    """Write both files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    base = closure([*project["dependencies"], "setuptools"])
    skip = {"lm-eval", "torchao"}  # no test needs them; one is large, the other logs missing GPU libraries everywhere
    dev = closure([r for name, group in extras.items() if name not in skip for r in group])
    for path, pins in (
        ("requirements.lock", base),
        ("requirements-dev.lock", {k: v for k, v in dev.items() if k not in base}),
    ):
        (ROOT / path).write_text(HEAD + "".join(f"{k}=={v}\n" for k, v in sorted(pins.items())))


if __name__ == "__main__":
    main()
