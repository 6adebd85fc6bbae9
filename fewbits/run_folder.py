"""The run folder: which files it holds, the guard before a run, and its scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from fewbits.evaluate import EvalResult, versions
from fewbits.io import begun, check_place, read_json_object, write_text
from fewbits.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
EVAL_FILE = "eval.json"


def check_folder(recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool) -> str | None:
    """Guard the run folder, and change nothing yet; returns the checkpoint to resume from, if any."""
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    check_place(folder)
    if overwrite:
        if folder.exists() and any(folder.iterdir()) and not (folder / RECIPE_FILE).exists():
            raise ValueError(
                f"{folder} is not empty and holds no {RECIPE_FILE}; it is not a run and is not overwritten"
            )
        return None
    if (folder / "model").exists():
        raise ValueError(f"{folder} holds a finished run; choose another folder or pass overwrite (--overwrite)")
    checkpoint = None
    if (folder / RECIPE_FILE).exists():
        if not resume:
            raise ValueError(f"{folder} holds an unfinished run; pass resume (--resume) or overwrite (--overwrite)")
        before = Recipe.load(folder / RECIPE_FILE)
        if before != recipe:
            changed = [k for k, v in recipe.model_dump().items() if before.model_dump()[k] != v]
            raise ValueError(
                f"{folder} was started with another recipe (it differs in {', '.join(changed)}); use that one"
            )
        found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        checkpoint = str(found[-1]) if found else None
    return checkpoint


@contextmanager
def begin_folder(recipe: Recipe, folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Begin the run that :func:`check_folder` allowed; a start that fails leaves nothing of a new run behind."""
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    with begun(folder, RECIPE_FILE):
        write_text(folder / RECIPE_FILE, recipe.to_yaml())
        write_text(folder / "environment.json", json.dumps(versions(), indent=1) + "\n")
        yield


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe of a run.

    Raises:
        ValueError: for a folder that is no run.
    """
    path = Path(folder) / RECIPE_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {RECIPE_FILE}; it is not a run folder, as `fewbits train` or `ptq` makes")
    return Recipe.load(path)


def write_scores(path: Path, scores: dict[str, EvalResult]) -> None:
    """``eval.json``: scores by stage."""
    write_text(path, json.dumps({k: v.model_dump() for k, v in scores.items()}, indent=1) + "\n")


def read_scores(path: Path) -> dict[str, EvalResult]:
    """Inverse of :func:`write_scores`.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; evaluate or finish the run first")
    try:
        return {k: EvalResult.model_validate(v) for k, v in read_json_object(path).items()}
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {error.errors()[0]['msg']}") from None
