"""Recipes by name: every method of the arena, defaults by bit-width, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbits.arena import METHODS, ArenaSettings, NotForScheme
from fewbits.arena.methods import rule_for
from fewbits.cookbook import DEFAULT_METHODS, LEARNING_RATE, NUM_STEPS, find_recipe, method_recipe, named_recipes
from fewbits.pipeline import run
from fewbits.recipe import Recipe
from fewbits.rules import Rule


@pytest.mark.parametrize("scheme", ["W2G64", "W1.58", "W1"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_arenas_recipe(name: str, scheme: str) -> None:
    method = METHODS[name]
    try:
        rule = rule_for(name, method, scheme, num_steps=NUM_STEPS)
    except NotForScheme as error:
        with pytest.raises(ValueError, match=str(error)[:20]):
            method_recipe(name, scheme)
        return
    if method.stage == "fp_then_ptq":
        with pytest.raises(ValueError, match="no recipe"):
            find_recipe(f"{name}@{scheme}")
        return
    recipe = find_recipe(f"{name}@{scheme}")
    settings = ArenaSettings(schemes=(scheme,), methods=(name,), budget=f"steps={NUM_STEPS}")
    arena = settings.recipe(scheme, name, None if method.stage == "ptq" else LEARNING_RATE, 0)
    assert recipe.rules[0].build() == arena.rules[0].build()
    assert recipe.rules[0].model_dump()["scheme"] == rule["scheme"]
    assert (recipe.init, recipe.objective) == (arena.init, arena.objective)
    for key in ("optim", "rest_optim", "optim_options", "ema_decay", "activation_noise", "max_steps"):
        assert getattr(recipe.train, key) == getattr(arena.train, key), key
    if arena.train.max_steps:
        assert recipe.train.learning_rate == arena.train.learning_rate
    assert recipe.codebooks == arena.codebooks


def test_a_scheme_alone_takes_the_default_method() -> None:
    for bits, (method, rate) in DEFAULT_METHODS.items():
        recipe = find_recipe(f"W{bits}")
        assert recipe == method_recipe(method, f"W{bits}", learning_rate=rate)
        assert recipe.train.learning_rate == rate * METHODS[method].at(bits).rate_factor
        assert recipe.rules[0].build().scheme.rotation.kind == "none"  # so that engines hold it
    assert find_recipe("W4G64").rules[0].build().scheme.name == "W4A16G64"


def test_files_and_shipped_recipes_come_first(tmp_path: Path) -> None:
    assert find_recipe("demo-jacquant", ["seed=3"]) == Recipe.load("demo-jacquant", ["seed=3"])
    file = tmp_path / "quest@W2"
    file.write_text("seed: 7")
    assert find_recipe(file).seed == 7


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(ValueError, match="did you mean quest"):
        find_recipe("qeust@W2G64")
    with pytest.raises(ValueError, match="did you mean demo-jacquant"):
        find_recipe("demo-jaquant")
    with pytest.raises(ValueError, match="W9"):
        find_recipe("quest@W9")
    with pytest.raises(ValueError, match="sign and a ternary"):
        find_recipe("bitnet@W2G64")


def test_a_scheme_may_name_inputs_and_cache() -> None:
    recipe = find_recipe("W2A8KV4G64")
    rule, plain = recipe.rules[0].build(), find_recipe("W2G64")
    assert rule.activation is not None
    assert rule.kv_cache is not None
    assert (rule.activation.name, rule.kv_cache.num_bits) == ("A8", 4)
    bare = recipe.rules[0].model_copy(update={"activation": None, "kv_cache": None})
    assert recipe.model_copy(update={"rules": [bare]}) == plain
    assert find_recipe("W2A16G64") == plain
    trusted = find_recipe("quest@W4A4", ["rules.0.activation.preset=quest"]).rules[0].build()
    assert trusted == Rule(
        scheme=trusted.scheme, surrogate=trusted.surrogate, activation={"preset": "quest", "num_bits": 4}
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quest@", "lacks a part of METHOD@SCHEME, e.g. quest@W2G64"),
        ("@W2", "lacks a part of METHOD@SCHEME, e.g. quest@W2G64"),
        ("quest", "is a method; name its scheme too, as in quest@W2G64"),
        ("qest", "a method goes with a scheme, as in quest@W2G64; did you mean quest"),
        ("bitnet@W2", "sign and a ternary grid only; bitnet goes with W1, W1.58,"),
        ("kmeans@W1.58", "goes with W1, W2, W3, W4"),
        ("fp_finetune_then_ptq@W2", "fewbits arena --methods fp_finetune_then_ptq --schemes W2.*, or train rtn@W2"),
        ("W4HG64", "methods choose the grid letter; write W4G64"),
        ("quest@W2KG64", "methods choose the grid letter; write W2G64"),
        ("w2g64", "not in capitals; write W2G64"),
        ("quest@w2a8", "not in capitals; write W2A8"),
        ("W2A9G64", "num_bits=9 must be a whole number from 1 to 8"),
        ("W1.5", "not of the form W<1.1.58.2..8>"),
        ("W2.yaml", "neither a file nor a shipped recipe"),
    ],
)
def test_every_refusal_names_the_fix(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_recipe(name)


def test_the_list_holds_what_can_be_run() -> None:
    names = named_recipes()
    assert "kmeans@W2G64" in names
    assert "bitnet@W2G64" not in names
    assert all(find_recipe(name) for name in names)


def test_a_method_by_name_runs(tmp_path: Path) -> None:
    small = ["train.max_steps=1", "train.batch_size=1", "data.block_size=32", "data.eval_tokens=64"]
    result = run(find_recipe("kmeans@W2G64", [*small, "data.max_tokens=512"]), tmp_path / "run", quiet=True)
    assert set(result.scores) == {"fp", "rtn", "qat"}
