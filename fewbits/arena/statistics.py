"""Paired comparisons over few seeds: intervals, ranks, and sentences that say no more than the data support."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import rankdata
from scipy.stats import t as student

NUM_RESAMPLES = 20_000
LEVEL = 0.95
Verdict = Literal["better", "worse", "undecided", "equal", "one seed"]


class Comparison(BaseModel):
    """Paired differences of a loss, method minus reference, over the seeds that both have.

    Attributes:
        mean: of the differences, nats per token; negative is better than the reference.
        low: lower end of the bootstrap interval.
        high: its upper end.
        t_low: lower end of Student's interval.
        t_high: its upper end.
        num_seeds: pairs.
        verdict: ``better`` or ``worse`` where *both* intervals exclude 0, ``equal`` where all differences are exactly
            0 (the two are the same run), ``one seed``, else ``undecided``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    low: float
    high: float
    t_low: float
    t_high: float
    num_seeds: int
    verdict: Verdict


def bootstrap_interval(
    values: Sequence[float], *, level: float = LEVEL, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; the generator is fixed, so that the same data give the same interval.

    Few values make it too narrow, since it never leaves their range: :func:`compare_paired` asks Student's interval
    too.

    Args:
        values: at least one.
        level: in (0, 1).
        num_resamples: samples with replacement.
        seed: of the generator.

    Raises:
        ValueError: for no values, or a level outside (0, 1).

    Example:
        >>> bootstrap_interval([1.0, 3.0])
        (1.0, 3.0)
    """
    if not values:
        raise ValueError("no values to resample")
    if not 0 < level < 1:
        raise ValueError(f"level={level} is outside (0, 1)")
    data = np.asarray(values, dtype=np.float64)
    index = np.random.default_rng(seed).integers(0, len(data), size=(num_resamples, len(data)))
    tail = (1 - level) / 2
    low, high = np.quantile(data[index].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def student_interval(values: Sequence[float], *, level: float = LEVEL) -> tuple[float, float]:
    r"""Student's interval of the mean, :math:`\bar x \pm t_{n-1}\, s / \sqrt n`; unbounded for one value.

    Example:
        >>> [round(x, 3) for x in student_interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]
    """
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return -math.inf, math.inf
    half = float(student.ppf((1 + level) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def compare_paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Comparison:
    """Compare losses by seed.

    Raises:
        ValueError: if they have no seed in common.

    Example:
        >>> compare_paired({0: 2.0, 1: 2.1, 2: 2.0}, {0: 3.0, 1: 3.1, 2: 3.05}).verdict
        'better'
    """
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        raise ValueError("the two have no seed in common; nothing is paired")
    differences = [values[seed] - reference[seed] for seed in seeds]
    low, high = bootstrap_interval(differences)
    t_low, t_high = student_interval(differences)
    verdict: Verdict = "undecided"
    if not any(differences):
        verdict = "equal"
    elif len(seeds) == 1:
        verdict = "one seed"
    elif max(high, t_high) < 0:
        verdict = "better"
    elif min(low, t_low) > 0:
        verdict = "worse"
    return Comparison(
        mean=statistics.fmean(differences),
        low=low,
        high=high,
        t_low=t_low,
        t_high=t_high,
        num_seeds=len(seeds),
        verdict=verdict,
    )


def mean_ranks(losses: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Mean over the common seeds of each method's rank, 1 the lowest loss; ties share their mean rank.

    Example:
        >>> mean_ranks({"a": {0: 1.0, 1: 2.0}, "b": {0: 2.0, 1: 1.0}, "c": {0: 3.0, 1: 3.0}})
        {'a': 1.5, 'b': 1.5, 'c': 3.0}
    """
    if not losses:
        return {}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in losses.values())))
    if not seeds:
        return dict.fromkeys(losses, math.nan)
    table = np.array([[by_seed[seed] for seed in seeds] for by_seed in losses.values()])
    ranks = rankdata(table, axis=0).mean(axis=1)
    return dict(zip(losses, ranks.tolist(), strict=True))


def sentence(name: str, reference: str, comparison: Comparison) -> str:
    """What the data support, in one sentence.

    Example:
        >>> sentence("a", "b", compare_paired({0: 2.0, 1: 2.2}, {0: 2.1, 1: 2.1}))
        'a and b do not differ beyond the seeds: +0.0000 nats per token [-0.1000, +0.1000], 2 seeds.'
    """
    c = comparison
    numbers = f"{c.mean:+.4f} nats per token [{c.low:+.4f}, {c.high:+.4f}], {c.num_seeds} seeds."
    match c.verdict:
        case "better" | "worse":
            return f"{name} is {c.verdict} than {reference} beyond the seeds: {numbers}"
        case "equal":
            return f"{name} and {reference} are the same here, to the last bit of the loss."
        case "one seed":
            return f"{name} minus {reference} is {c.mean:+.4f} nats per token on one seed, which says nothing of order."
        case _:
            return f"{name} and {reference} do not differ beyond the seeds: {numbers}"


def chance_note(num_comparisons: int) -> str:
    """How many differences would appear if there were none."""
    expected = (1 - LEVEL) * num_comparisons
    return (
        f"Intervals are at {LEVEL:.0%} each, not corrected for their number: if no method differed, about "
        f"{expected:.1f} of the {num_comparisons} comparisons would still look as if."
    )
