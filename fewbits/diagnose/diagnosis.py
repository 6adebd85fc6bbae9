"""The whole diagnosis as one value: what was measured, on what, with which versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy.stats import spearmanr
from torch import nn

from fewbits.data import TokenBlocks
from fewbits.diagnose.after import AfterReport, after_training
from fewbits.diagnose.before import Baseline, Say, SchemeReport, before_training
from fewbits.diagnose.layers import Proposal, SensitivityTable, layer_sensitivity, propose_recipe
from fewbits.diagnose.losses import evaluation_mode, token_loss
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.diagnose.sites import find_sites
from fewbits.evaluate import versions
from fewbits.geometry._result import Result
from fewbits.recipe import Recipe
from fewbits.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Result):
    """Everything that was measured; ``to_dict()`` is what the JSON file holds.

    ``rank_agreement`` are Spearman's rank correlations of each forecast with the measured rise over the schemes, in
    ``[-1, 1]``; with one scheme, or equal values, there is none and the entry is None.
    """

    model: str
    data: str
    settings: DiagnosisSettings
    baseline: Baseline
    schemes: list[SchemeReport]
    rank_agreement: dict[str, float | None]
    layers: SensitivityTable
    proposal: Proposal | None
    after: AfterReport | None
    versions: dict[str, str] = field(default_factory=versions)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation in ``[-1, 1]``, or None where one side is constant or shorter than two.

    Example:
        >>> round(rank_correlation([1.0, 2.0, 3.0], [0.1, 0.2, 9.0]), 6)
        1.0
    """
    if len(a) < 2 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


def diagnose(
    model: nn.Module,
    blocks: TokenBlocks,
    schemes: Mapping[str, Scheme] | Sequence[str],
    *,
    settings: DiagnosisSettings | None = None,
    budget: float | None = None,
    qat_model: nn.Module | None = None,
    base: Recipe | None = None,
    ignore: Sequence[str] | None = None,
    model_name: str = "",
    data_name: str = "",
    say: Say = lambda line: None,
) -> Diagnosis:
    """Diagnose a plain model before training, and a trained one beside it if there is one; nothing is changed.

    Args:
        model: the full-precision model.
        blocks: the fixed token set, at least two blocks.
        schemes: names for :meth:`~fewbits.Scheme.parse`, or schemes by such names.
        settings: how thorough.
        budget: bits per quantized weight of the proposed recipe; None proposes none.
        qat_model: a prepared model that was trained from ``model``.
        base: what the proposed recipe says beside its rules.
        ignore: layers to leave alone, as ``prepare`` takes it.
        model_name: for the report.
        data_name: for the report.
        say: takes lines of progress.

    Raises:
        ValueError: from the parts: shapes that a scheme cannot take, too few blocks, a budget that nothing fits.
    """
    settings = settings or DiagnosisSettings()
    named = dict(schemes) if isinstance(schemes, Mapping) else {name: Scheme.parse(name) for name in schemes}
    with evaluation_mode(model):
        loss = token_loss(model, blocks, batch_size=settings.batch_size)
        sites = find_sites(model, list(named.values()), ignore)
        baseline, reports = before_training(loss, sites, named, settings, say=say)
        say(f"{len(sites)} layers by {len(named)} schemes")
        table = layer_sensitivity(loss, sites, named)
        proposal = None
        if budget is not None:
            start = (base or Recipe()).model_copy(update={"ignore": None if ignore is None else list(ignore)})
            proposal = propose_recipe(loss, sites, named, table, budget=budget, base=start)
            say(f"proposed recipe: {proposal.bits_per_weight:.3f} bits, rise {proposal.measured_rise:.4f} nats")
        after = None if qat_model is None else after_training(loss, qat_model, tol=baseline.tol, say=say)
    return Diagnosis(
        model=model_name,
        data=data_name,
        settings=settings,
        baseline=baseline,
        schemes=reports,
        rank_agreement=_agreement(reports, table),
        layers=table,
        proposal=proposal,
        after=after,
    )


def _agreement(reports: Sequence[SchemeReport], table: SensitivityTable) -> dict[str, float | None]:
    rises = [r.rise for r in reports]
    forecasts: dict[str, Any] = {
        "kappa_rand": [r.kappa_rand for r in reports],
        "quadratic_rise": [r.quadratic_rise for r in reports],
        "sum_of_layers": [sum(row[r.scheme] for row in table.rises.values()) for r in reports],
    }
    if all(r.forecast is not None for r in reports):
        forecasts["pitch_energy"] = [r.forecast.energy for r in reports if r.forecast is not None]
    return {name: rank_correlation(values, rises) for name, values in forecasts.items()}
