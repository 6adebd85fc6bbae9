"""Recipes: round trip, overrides, and errors that say the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbits.recipe import Recipe, shipped_recipes
from fewbits.surrogates import JacQuant


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid_and_round_trip(name: str) -> None:
    recipe = Recipe.load(name)
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert shipped_recipes()[name].startswith("# ")


def test_overrides_reach_nested_keys_and_lists() -> None:
    recipe = Recipe.parse(
        "rules: [{scheme: W2}, {pattern: 'x', scheme: W4}]",
        ["train.learning_rate=1e-3", "rules.1.scheme=W1.58A16G128", "data.max_tokens=5000", "seed=7", "ignore=[a, b]"],
    )
    assert recipe.train.learning_rate == 1e-3
    assert recipe.rules[1].build().scheme.name == "W1.58A16G128"
    assert (recipe.data.max_tokens, recipe.seed, recipe.ignore) == (5000, 7, ["a", "b"])


def test_rule_options_and_surrogates() -> None:
    text = (
        "rules: [{scheme: W1, options: {rule: absmean, mode: dynamic}, surrogate: {name: jacquant, preset: probe_rel}}]"
    )
    rule = Recipe.parse(text).rules[0].build()
    assert (rule.scheme.scale.rule, rule.scheme.scale.mode) == ("absmean", "dynamic")
    assert rule.surrogate == JacQuant.preset("probe_rel")
    rotated = Recipe.parse("rules: [{scheme: W2HG64, options: {rotation: hadamard}}]").rules[0].build()
    assert rotated.scheme.rotation.kind == "hadamard"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {max_step: 3}", [], r"train.max_step: unknown key; did you mean max_steps"),
        ("- a", [], "a recipe is a mapping"),
        ("a: [", [], "not YAML"),
        ("rules: [{scheme: W9}]", [], "W9"),
        ("rules: [{scheme: W2, surrogate: foo}]", [], "unknown surrogate 'foo'; known surrogates: ste"),
        ("rules: [{scheme: W2, surrogate: {name: jacquant, betta: 1}}]", [], "no option 'betta'"),
        ("rules: [{scheme: W2A9}]", [], "whole number from 1 to 8"),
        ("rules: []", [], "rules"),
        ("data: {source: text}", [], "need a path"),
        ("data: {source: self}", [], "needs data.max_tokens"),
        ("objective: {kl: 0}", [], "not both 0"),
        ("train: {max_steps: -1}", [], r"train.max_steps: .* \(got -1\)"),
        ("rules: [{scheme: W2G16}]", [], "group_size=16 is outside 32..256"),
        ("", ["novalue"], "not of the form key=value"),
        ("", ["seed.x=1"], "seed"),
        ("", ["max_steps=3"], "unknown key; did you mean train.max_steps"),
        ("", ["scheme=W3"], "unknown key; did you mean rules.0.scheme"),
        ("", ["train.variance_reduction.from=saga"], "did you mean form"),
        ("", ["init=gptqq"], "'gptqq' is unknown; did you mean gptq"),
        ("", ["train.optim=adamw"], "did you mean adamw_torch"),
        ("", ["rules.0.surrogate=jaquant"], "rules.0: unknown surrogate 'jaquant'; did you mean jacquant"),
        ("", ["rules.0.drive=winqq"], "did you mean winq"),
        ("", ["rules.0.parametrization=lowrank"], "did you mean low_rank"),
        ("", ["rules.0.activation={preset: qest, num_bits: 4}"], "did you mean quest"),
        ("rules: [W2]", ["rules.0.scheme=W3"], "rules.0 is the value 'W2', not a mapping; give all of rules.0"),
        ("train: {freeze: [a]}", ["train.freeze.0.x=1"], "train.freeze.0 is the value 'a', not a mapping"),
        ("", ["rules.scheme=W3"], "not an index below 1; a list starts at 0, as in rules.0.scheme"),
        ("", ["train.freeze=[a"], "the value is not YAML"),
        ("", ["a..b=3"], "not of the form key=value"),
        ("", ["codebooks.step=3"], "no rule has one; use a scheme such as W2KG64"),
        ("rules: [{scheme: W2}]", ["rules.3.scheme=W1"], "not an index below 1"),
    ],
)
def test_bad_recipes(text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse(text, overrides)


def test_unknown_recipe_lists_near_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean demo-jacquant"):
        Recipe.load("demo-jackquant")
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\n")
    assert Recipe.load(file, ["seed=4"]).seed == 4
