"""The arena's statistics against closed forms and enumeration."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from fewbits.arena.statistics import (
    bootstrap_interval,
    chance_note,
    compare_paired,
    mean_ranks,
    sentence,
    student_interval,
)


def test_bootstrap_of_two_values_is_their_range() -> None:
    """The means are a, (a + b)/2, b with probabilities 1/4, 1/2, 1/4: at 95 % the interval is [a, b]."""
    assert bootstrap_interval([-1.0, 5.0]) == (-1.0, 5.0)
    assert bootstrap_interval([-1.0, 5.0], level=0.4) == (2.0, 2.0)


def test_bootstrap_matches_the_enumeration_of_all_resamples() -> None:
    values = [0.0, 1.0, 3.0, 4.5, 11.0]
    means = sorted(statistics.fmean(sample) for sample in itertools.product(values, repeat=5))
    exact = np.quantile(means, [0.025, 0.975])
    found = bootstrap_interval(values, num_resamples=200_000)
    np.testing.assert_allclose(found, exact, atol=0.11)  # the means lie .1 apart there


def test_bootstrap_is_fixed_shifts_and_scales_with_the_data() -> None:
    values = [0.3, -0.2, 0.9, 0.4]
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high)
    np.testing.assert_allclose(bootstrap_interval([2 * v + 1 for v in values]), (2 * low + 1, 2 * high + 1), rtol=1e-12)
    assert bootstrap_interval([0.7] * 4) == pytest.approx((0.7, 0.7), abs=1e-15)
    assert bootstrap_interval([0.7]) == (0.7, 0.7)


@pytest.mark.parametrize(("values", "level", "message"), [([], 0.95, "no values"), ([1.0], 1.0, "outside")])
def test_bootstrap_refuses(values: list[float], level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, level=level)


def test_student_with_one_and_two_degrees_of_freedom() -> None:
    """For two values the quantile is tan(.475 pi) = 12.706; for three it is 4.3027."""
    low, high = student_interval([0.0, 2.0])
    assert (high - low) / 2 == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)
    low, high = student_interval([1.0, 2.0, 3.0])
    assert (high - low) / 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert student_interval([5.0]) == (-math.inf, math.inf)


def test_the_verdict_needs_both_intervals() -> None:
    clear = compare_paired({0: 1.0, 1: 1.1, 2: 1.05}, {0: 2.0, 1: 2.1, 2: 2.04})
    assert clear.verdict == "better"
    assert compare_paired({0: 2.0, 1: 2.1, 2: 2.04}, {0: 1.0, 1: 1.1, 2: 1.05}).verdict == "worse"
    # all three differences are negative, so the bootstrap excludes 0; Student's interval of so few does not
    unsure = compare_paired({0: -0.1, 1: -1.0, 2: -0.3}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert unsure.high < 0 < unsure.t_high
    assert unsure.verdict == "undecided"


def test_pairing_uses_common_seeds_only_and_removes_what_they_share() -> None:
    found = compare_paired({0: 10.0, 1: 20.0, 7: 0.0}, {0: 11.0, 1: 21.0, 3: 5.0})
    assert (found.num_seeds, found.mean, found.low, found.high) == (2, -1.0, -1.0, -1.0)
    assert found.verdict == "better"
    with pytest.raises(ValueError, match="no seed in common"):
        compare_paired({0: 1.0}, {1: 1.0})


def test_equal_runs_and_single_seeds_say_so() -> None:
    same = compare_paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same.verdict == "equal"
    assert sentence("a", "b", same) == "a and b are the same here, to the last bit of the loss."
    one = compare_paired({0: 1.0}, {0: 2.0})
    assert one.verdict == "one seed"
    assert "says nothing of order" in sentence("a", "b", one)
    assert sentence("a", "b", compare_paired({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.5})).startswith("a and b do not differ")


def test_ranks_with_ties_and_missing_seeds() -> None:
    ranks = mean_ranks({"a": {0: 1.0, 1: 1.0}, "b": {0: 1.0, 1: 2.0}, "c": {0: 3.0, 1: 3.0, 2: 0.0}})
    assert ranks == {"a": 1.25, "b": 1.75, "c": 3.0}
    assert sum(ranks.values()) == 6
    assert mean_ranks({}) == {}
    assert all(math.isnan(rank) for rank in mean_ranks({"a": {0: 1.0}, "b": {1: 1.0}}).values())


def test_the_chance_note_counts() -> None:
    assert "about 2.0 of the 40 comparisons" in chance_note(40)


def test_coverage_of_the_verdict_under_no_difference() -> None:
    """At 5 seeds and no true difference, at most about 5 % of comparisons say better or worse."""
    generator = np.random.default_rng(0)
    verdicts = []
    for _ in range(300):
        a, b = generator.normal(size=(2, 5)).tolist()
        verdicts.append(compare_paired(dict(enumerate(a)), dict(enumerate(b))).verdict)
    assert sum(verdict != "undecided" for verdict in verdicts) <= 24  # 15 expected, 2.4 standard deviations more
