"""Recipes by name: a file, a shipped recipe, ``METHOD@SCHEME`` for any method of the field, or a scheme alone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

from fewbits.arena import METHODS, NotForScheme
from fewbits.arena.methods import recipe_fields, rule_for, split_scheme
from fewbits.recipe import Recipe, shipped_recipes

NUM_STEPS = 200
LEARNING_RATE = 5e-4
BATCH_SIZE = 4
"""Of a recipe by name, unless overridden: the demo's budget, some minutes for the embedded model on a processor."""
DEFAULT_METHODS: dict[str, tuple[str, float]] = {
    "1": ("seq_from_signround", 6e-4),
    "1.58": ("seq_from_signround", 2e-4),
    "2": ("seq_from_signround", 2e-4),
}
"""The arena's choice by bit-width, among rows that engines hold, and its learning rate; evidence: docs/arena.md."""
OTHER_BITS = ("clipped_ste", LEARNING_RATE)
"""At bit-widths that the arena has not compared."""


def find_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a command means.

    Args:
        name: a YAML file; a shipped recipe (``fewbits recipes``); ``METHOD@SCHEME``, a method of the arena at a scheme,
            such as ``quest@W2G64`` (``fewbits arena --list``); or a scheme, such as ``W1.58``, at which the default
            method is the arena's choice.
        overrides: ``key=value`` pairs, as :meth:`fewbits.recipe.Recipe.parse`.

    Raises:
        ValueError: if there is no such recipe, or the method is not defined at the scheme.

    Example:
        >>> find_recipe("quest@W1", ["train.max_steps=50"]).rules[0].surrogate
        {'name': 'clipped_ste', 'edge': 1.3}
        >>> find_recipe("W2G64").init
        'signround'
    """
    text = str(name)
    if Path(text).is_file() or text in shipped_recipes():
        return Recipe.load(text, overrides)
    method, at, scheme = text.partition("@")
    if at:
        return method_recipe(method, scheme, overrides)
    try:
        bits, _ = split_scheme(text)
    except ValueError:
        return Recipe.load(text, overrides)  # which says what there is
    method, rate = DEFAULT_METHODS.get(bits, OTHER_BITS)
    return method_recipe(method, text, overrides, learning_rate=rate)


def method_recipe(
    name: str, scheme: str, overrides: Sequence[str] = (), *, learning_rate: float = LEARNING_RATE
) -> Recipe:
    """One method of the arena at one scheme, on the embedded model unless overridden.

    Args:
        name: of the method.
        scheme: such as ``W2G64``.
        overrides: as :meth:`fewbits.recipe.Recipe.parse`.
        learning_rate: the arena's common rate; the method's ``rate_factor`` multiplies it.

    Raises:
        ValueError: for an unknown method, one that is not defined at the scheme, or one that no recipe can say.

    Example:
        >>> method_recipe("kmeans", "W2G64").codebooks is not None
        True
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; methods: {', '.join(METHODS)}"
        raise ValueError(f"unknown method {name!r} in {f'{name}@{scheme}'!r}{hint}")
    method = METHODS[name]
    if method.stage == "fp_then_ptq":
        raise ValueError(f"{name} is a control of the arena, full precision first; it has no recipe")
    fields = recipe_fields(name, method, scheme, learning_rate=learning_rate, num_steps=NUM_STEPS)
    steps = 0 if method.stage == "ptq" else NUM_STEPS
    fields["train"] = {"max_steps": steps, "batch_size": BATCH_SIZE, **fields["train"]}
    return Recipe.parse(yaml.safe_dump(fields, sort_keys=False), overrides)


def named_recipes(scheme: str = "W2G64") -> dict[str, str]:
    """``METHOD@SCHEME`` and what it is, for every method that is defined there.

    Example:
        >>> named_recipes("W1.58")["bitnet@W1.58"]
        'Scales that are the mean size at every step, identity STE.'
    """
    found = {}
    for name, method in METHODS.items():
        try:
            rule_for(name, method, scheme, num_steps=NUM_STEPS)
        except NotForScheme:
            continue
        if method.stage != "fp_then_ptq":
            found[f"{name}@{scheme}"] = method.summary
    return found
