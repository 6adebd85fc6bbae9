"""The integer program against the enumeration of every recipe."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.geometry import Option, allocate_bits

Table = dict[str, dict[str, Option]]


def brute_force(table: Table, budget: int, ties: list[list[str]]) -> float:
    """Least loss over all recipes that fit, ``inf`` if none does."""
    layers = list(table)
    best = math.inf
    for names in itertools.product(*(table[layer] for layer in layers)):
        chosen = dict(zip(layers, names, strict=True))
        if any(len({chosen[layer] for layer in group}) > 1 for group in ties):
            continue
        options = [table[layer][name] for layer, name in chosen.items()]
        if sum(o.size for o in options) <= budget:
            best = min(best, math.fsum(o.loss for o in options))
    return best


def random_table(rng: random.Random, num_layers: int, scale: int) -> Table:
    names = ["W1", "W2", "W3", "W4"]
    return {
        f"layer{i}": {
            name: Option(loss=rng.uniform(-0.05, 1.0) / (k + 1) ** 2, size=scale * rng.randint(k + 1, 3 * (k + 1)))
            for k, name in enumerate(names[: rng.randint(1, 4)])
        }
        for i in range(num_layers)
    }


@pytest.mark.parametrize("seed", range(25))
def test_the_optimum_is_that_of_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    # Sizes as large as those of real layers: the solver must not lose whole bits to its tolerances.
    table = random_table(rng, rng.randint(1, 6), scale=rng.choice([1, 7, 1_000_003, 16_777_216 * 3 + 1]))
    smallest = sum(min(o.size for o in row.values()) for row in table.values())
    largest = sum(max(o.size for o in row.values()) for row in table.values())
    for budget in {smallest, rng.randint(smallest, largest), rng.randint(smallest, largest), largest + 5}:
        found = allocate_bits(table, budget=budget)
        assert found.loss == pytest.approx(brute_force(table, budget, []), abs=1e-12)
        assert found.size == sum(table[layer][name].size for layer, name in found.choices.items()) <= budget
        assert found.slack == budget - found.size
        assert list(found.choices) == list(table)


@pytest.mark.parametrize("seed", range(10))
def test_tied_layers_take_one_option_and_the_optimum_is_still_exact(seed: int) -> None:
    rng = random.Random(100 + seed)
    table = random_table(rng, 5, scale=5)
    for row in table.values():
        row["W2"] = Option(loss=rng.random(), size=rng.randint(1, 60))
    ties = [["layer1", "layer3"], ["layer0", "layer4"]]
    budget = rng.randint(150, 300)
    found = allocate_bits(table, budget=budget, ties=ties)
    assert found.choices["layer1"] == found.choices["layer3"]
    assert found.choices["layer0"] == found.choices["layer4"]
    assert found.loss == pytest.approx(brute_force(table, budget, ties), abs=1e-12)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=3), min_size=1, max_size=4
    ),
    budget=st.integers(0, 40),
)
def test_integer_losses_with_many_equal_optima(rows: list[list[tuple[int, int]]], budget: int) -> None:
    table = {
        f"l{i}": {f"o{k}": Option(loss=float(loss), size=size) for k, (loss, size) in enumerate(row)}
        for i, row in enumerate(rows)
    }
    wanted = brute_force(table, budget, [])
    if wanted == math.inf:
        with pytest.raises(ValueError, match="smallest possible size"):
            allocate_bits(table, budget=budget)
    else:
        assert allocate_bits(table, budget=budget).loss == wanted
        assert allocate_bits(table, budget=budget) == allocate_bits(table, budget=budget)


def test_one_bit_too_few_changes_the_recipe() -> None:
    size = 3_141_592_653
    table = {
        name: {"W2": Option(loss=loss, size=2 * size), "W4": Option(loss=0.0, size=4 * size + 1)}
        for name, loss in (("a", 0.3), ("b", 0.2), ("c", 0.1))
    }
    both = allocate_bits(table, budget=10 * size + 2)
    assert both.choices == {"a": "W4", "b": "W4", "c": "W2"}
    assert both.slack == 0
    less = allocate_bits(table, budget=10 * size + 1)
    assert less.choices == {"a": "W4", "b": "W2", "c": "W2"}


def test_a_single_bit_counts_where_sizes_have_no_common_divisor() -> None:
    # A solver that works to a relative 1e-6 would take both and be one bit over.
    table = {
        "a": {"lo": Option(loss=0.5, size=0), "hi": Option(loss=0.0, size=1_000_000_007)},
        "b": {"lo": Option(loss=0.4, size=0), "hi": Option(loss=0.0, size=1_000_000_009)},
        "c": {"lo": Option(loss=0.3, size=0), "hi": Option(loss=0.0, size=999_999_937)},
    }
    assert allocate_bits(table, budget=2_000_000_016).choices == {"a": "hi", "b": "hi", "c": "lo"}
    assert allocate_bits(table, budget=2_000_000_015).choices == {"a": "hi", "b": "lo", "c": "hi"}
    assert allocate_bits(table, budget=1_999_999_943).choices == {"a": "hi", "b": "lo", "c": "lo"}


def test_sizes_beyond_the_digits_of_the_solver() -> None:
    # Found by comparing with brute force: given the sizes as they are, HiGHS 1.x calls this one infeasible, or answers
    # 5.087 without presolve.
    rows = {
        "a": [(1.815, 22583577740), (1.569, 160187121254), (0.976, 224904226912)],
        "b": [(1.583, 40764695650), (1.689, 144114411818), (0.877, 251699387854)],
        "c": [(2.856, 60124492280), (1.313, 119458804585), (0.994, 262860924042)],
        "d": [(2.396, 65991207179), (1.556, 146369637910), (0.729, 228107532019)],
        "e": [(2.105, 73642191685), (1.437, 181502008732), (0.804, 244662741080)],
    }
    table = {
        layer: {f"W{k + 1}": Option(loss=loss, size=size) for k, (loss, size) in enumerate(row)}
        for layer, row in rows.items()
    }
    budget = 1147517706248
    found = allocate_bits(table, budget=budget)
    assert found.loss == pytest.approx(brute_force(table, budget, []), abs=1e-12)
    assert found.choices == {"a": "W3", "b": "W3", "c": "W2", "d": "W3", "e": "W3"}


def test_a_greedy_choice_would_lose() -> None:
    # By gain per bit "a" comes first (.6 / 6), but it blocks "b" and "c", which together gain more.
    table = {
        "a": {"lo": Option(loss=0.6, size=0), "hi": Option(loss=0.0, size=6)},
        "b": {"lo": Option(loss=0.45, size=0), "hi": Option(loss=0.0, size=5)},
        "c": {"lo": Option(loss=0.45, size=0), "hi": Option(loss=0.0, size=5)},
    }
    assert allocate_bits(table, budget=10).choices == {"a": "lo", "b": "hi", "c": "hi"}


def knapsack(table: Table, budget: int) -> float:
    """Exact optimum by dynamic programming over every size, for tables too large to enumerate."""
    best = [0.0] * (budget + 1)
    for row in table.values():
        best = [
            min((best[room - o.size] + o.loss for o in row.values() if o.size <= room), default=math.inf)
            for room in range(budget + 1)
        ]
    return best[budget]


@pytest.mark.parametrize("seed", range(4))
def test_a_model_of_eighty_layers_is_solved_to_the_last_digit(seed: int) -> None:
    rng = random.Random(seed)
    table = random_table(rng, 80, scale=1)
    smallest = sum(min(o.size for o in row.values()) for row in table.values())
    for extra in (10, 60, 120):
        found = allocate_bits(table, budget=smallest + extra)
        assert found.loss == pytest.approx(knapsack(table, smallest + extra), abs=1e-10)


def test_more_budget_never_hurts_and_a_large_model_is_solved() -> None:
    rng = random.Random(0)
    table = random_table(rng, 200, scale=65_536)
    smallest = sum(min(o.size for o in row.values()) for row in table.values())
    losses = [allocate_bits(table, budget=smallest + extra * 65_536).loss for extra in (0, 50, 200, 5000)]
    assert losses == sorted(losses, reverse=True)
    free = math.fsum(min(o.loss for o in row.values()) for row in table.values())
    assert losses[-1] == pytest.approx(free, abs=1e-12)


def test_the_result_is_plain_json() -> None:
    found = allocate_bits({"a": {"W2": Option(loss=0.5, size=8)}}, budget=9)
    assert json.loads(json.dumps(found.to_dict())) == {
        "choices": {"a": "W2"},
        "loss": 0.5,
        "size": 8,
        "budget": 9,
        "slack": 1,
    }


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"table": {}}, "empty"),
        ({"table": {"a": {}}}, "'a' has no options"),
        ({"ties": [["a", "z"]]}, "lacks: z"),
        ({"ties": [["a", "b"], ["a"]]}, "twice"),
        ({"ties": [["a", "b"]]}, "in common"),
        ({"budget": 6}, "smallest possible size, 7 bits"),
    ],
)
def test_wrong_tables_are_refused(kwargs: dict, message: str) -> None:
    table = {"a": {"W2": Option(loss=0.5, size=3)}, "b": {"W3": Option(loss=0.5, size=4)}}
    with pytest.raises(ValueError, match=message):
        allocate_bits(**{"table": table, "budget": 100, **kwargs})


@pytest.mark.parametrize(("loss", "size", "message"), [(math.nan, 1, "finite"), (0.1, -1, "bits"), (0.1, 1.5, "bits")])
def test_wrong_options_are_refused(loss: float, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Option(loss=loss, size=size)
