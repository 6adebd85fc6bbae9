"""Recipes by name: a file, a shipped recipe, ``METHOD@SCHEME`` for any method of the field, or a scheme alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from fewbits.activations import ActivationScheme, split_scheme
from fewbits.arena import METHODS, NotForScheme
from fewbits.arena.methods import recipe_fields, rule_for
from fewbits.arena.methods import split_scheme as split_weights
from fewbits.naming import did_you_mean
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


_SCHEME_LIKE = re.compile(r"^W\d(\.\d+)?[A-Z0-9-]*$", re.IGNORECASE)


def find_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a command means.

    Args:
        name: a YAML file; a shipped recipe (``fewbits recipes``); ``METHOD@SCHEME``, a method of the arena at a scheme,
            such as ``quest@W2G64`` (``fewbits arena --list``); or a scheme, such as ``W1.58``, at which the default
            method is the arena's choice. The scheme may name inputs and cache too, as ``W2A8KV4G64``; they are
            quantized in the plain way, of each token, whatever the method.
        overrides: ``key=value`` pairs, as :meth:`fewbits.recipe.Recipe.parse`.

    Raises:
        ValueError: if there is no such recipe, or the method is not defined at the scheme.

    Example:
        >>> find_recipe("quest@W1", ["train.max_steps=50"]).rules[0].surrogate
        {'name': 'clipped_ste', 'edge': 1.3}
        >>> find_recipe("W2A8G64").init
        'signround'
        >>> find_recipe("W2A8G64").rules[0].build().activation.name
        'A8'
    """
    text = str(name)
    if Path(text).is_file() or text in shipped_recipes():
        return Recipe.load(text, overrides)
    method, at, scheme = text.partition("@")
    if at:
        return method_recipe(method, scheme, overrides)
    if text in METHODS:
        raise ValueError(f"{text!r} is a method; name its scheme too, as in {text}@W2G64")
    if not _SCHEME_LIKE.match(text):
        if not did_you_mean(text, shipped_recipes()) and (near := did_you_mean(text, METHODS, cutoff=0.75)):
            raise ValueError(
                f"recipe {text!r} is neither a file nor a shipped recipe; a method goes with a scheme, as in "
                f"quest@W2G64; {near.strip()}"
            )
        return Recipe.load(text, overrides)  # which says what there is
    bits, _ = split_weights(_weights_and_spellings(text)[0])
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
    if not name or not scheme:
        raise ValueError(f"{f'{name}@{scheme}'!r} lacks a part of METHOD@SCHEME, e.g. quest@W2G64")
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) or f"methods: {', '.join(METHODS)}"
        raise ValueError(f"unknown method {name!r} in {f'{name}@{scheme}'!r}; {hint.strip()}")
    method = METHODS[name]
    if method.stage == "fp_then_ptq":
        raise ValueError(
            f"{name} is a control of the arena, full precision first, and has no recipe; run it there "
            f"(fewbits arena --methods {name} --schemes {scheme}), or train {method.init}@{scheme}"
        )
    weights, *spelled = _weights_and_spellings(scheme)
    try:
        fields = recipe_fields(name, method, weights, learning_rate=learning_rate, num_steps=NUM_STEPS)
    except NotForScheme as error:
        there = ", ".join(f"W{bits}" for bits in ("1", "1.58", "2", "3", "4") if bits not in method.missing)
        raise NotForScheme(f"{error}; {name} goes with {there}, and `fewbits recipes` lists methods at W2G64") from None
    for key, text in zip(("activation", "kv_cache"), spelled, strict=True):
        if (parsed := ActivationScheme.parse(text)) is not None:
            fields["rules"][0][key] = {"num_bits": parsed.num_bits}  # a mapping, so that overrides reach into it
    steps = 0 if method.stage == "ptq" else NUM_STEPS
    fields["train"] = {"max_steps": steps, "batch_size": BATCH_SIZE, **fields["train"]}
    return Recipe.parse(yaml.safe_dump(fields, sort_keys=False), overrides)


def _weights_and_spellings(scheme: str) -> tuple[str, str | None, str | None]:
    """What the scheme says of weights, inputs and cache, after a look at its case."""
    if scheme != scheme.upper():
        raise ValueError(f"scheme {scheme!r} is not in capitals; write {scheme.upper()}")
    return split_scheme(scheme)


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
