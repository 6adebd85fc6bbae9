"""The whole diagnosis as one value: what was measured, on what, with which versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from torch import nn

from fewbits.data import TokenBlocks
from fewbits.diagnose.after import AfterReport, after_training
from fewbits.diagnose.arms import ArmsReport
from fewbits.diagnose.before import Baseline, Say, SchemeReport, before_training
from fewbits.diagnose.callback import read_recovery
from fewbits.diagnose.control import train_control
from fewbits.diagnose.layer_forecast import LayerForecast, forecast_layers
from fewbits.diagnose.layers import Proposal, SensitivityTable, propose_recipe
from fewbits.diagnose.losses import evaluation_mode, token_loss
from fewbits.diagnose.measure import (
    Trained,
    count_stages,
    layer_table,
    measure_arms,
    river_and_walls,
    teacher_of,
    terrain_and_pitch,
)
from fewbits.diagnose.pitch import PitchSweep
from fewbits.diagnose.river import RiverReport
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.diagnose.sites import find_sites
from fewbits.diagnose.stages import Stages, Watch, model_digest, tensor_digest
from fewbits.diagnose.terrain import TerrainReport
from fewbits.evaluate import versions
from fewbits.geometry import RecoveryReport
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
    layer_forecast: LayerForecast | None
    proposal: Proposal | None
    terrain: TerrainReport
    pitch: PitchSweep | None
    river: RiverReport | None
    after: AfterReport | None
    arms: ArmsReport | None
    recovery: RecoveryReport | None
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
    trained: Trained | nn.Module | None = None,
    base: Recipe | None = None,
    ignore: Sequence[str] | None = None,
    model_name: str = "",
    data_name: str = "",
    folder: str | Path | None = None,
    say: Say = lambda line: None,
    watch: Watch = lambda name, done, total: None,
) -> Diagnosis:
    """Diagnose a plain model before training, and a trained one beside it if there is one; nothing is changed.

    Args:
        model: the full-precision model.
        blocks: the fixed token set, at least two blocks.
        schemes: names for :meth:`~fewbits.Scheme.parse`, or schemes by such names.
        settings: how thorough.
        budget: bits per quantized weight of the proposed recipe; None proposes none.
        trained: a prepared model that was trained from ``model``, or all that is known of its run.
        base: what the proposed recipe says beside its rules.
        ignore: layers to leave alone, as ``prepare`` takes it.
        model_name: for the report.
        data_name: for the report.
        folder: keeps every stage as a JSON file in ``stages/``; the same call finds them again, and a killed one loses
            the stage that it was at. None keeps nothing.
        say: takes lines of progress.
        watch: takes the stage that begins, the number done and the number in all, for a progress bar.

    Raises:
        ValueError: from the parts: shapes that a scheme cannot take, too few blocks, a budget that nothing fits, a
            control arm without a folder to train it in.
    """
    settings = settings or DiagnosisSettings()
    named = dict(schemes) if isinstance(schemes, Mapping) else {name: Scheme.parse(name) for name in schemes}
    run = Trained(model=trained) if isinstance(trained, nn.Module) else trained
    folder = None if folder is None else Path(folder)
    if run is not None and run.recipe is not None and (folder is None or run.text is None):
        raise ValueError("the control arm needs a folder to be trained in, and the training text of the run")
    with evaluation_mode(model):
        loss = token_loss(model, blocks, batch_size=settings.batch_size)
        sites = find_sites(model, list(named.values()), ignore)
        common = {
            "model": model_digest(model),
            "tokens": tensor_digest({"tokens": loss.tokens}),
            "layers": [site.name for site in sites],
            "batch_size": settings.batch_size,
            "versions": versions(),
        }
        stages = Stages(None if folder is None else folder / "stages", common, watch=watch)
        stages.total = count_stages(settings, len(named), len(sites), budget=budget is not None, run=run)
        baseline, reports = before_training(loss, sites, named, settings, say=say, stages=stages)
        say(f"{len(sites)} layers by {len(named)} schemes")
        table = layer_table(loss, sites, named, baseline, stages)
        forecast = None
        if settings.num_layer_random:
            forecast = forecast_layers(
                loss, sites, named, table, settings, stages, tol=baseline.tol, rank=rank_correlation
            )
        proposal = None
        if budget is not None:
            start = (base or Recipe()).model_copy(update={"ignore": None if ignore is None else list(ignore)})
            proposal = stages.run(
                "proposal",
                Proposal,
                lambda: propose_recipe(loss, sites, named, table, budget=budget, base=start),
                budget=budget,
                base=start.to_yaml(),
                table=table.to_dict(),
            )
            say(f"proposed recipe: {proposal.bits_per_weight:.3f} bits, rise {proposal.measured_rise:.4f} nats")
        say("curvature and spectra")
        terrain, pitch = terrain_and_pitch(loss, sites, named, baseline, run, settings, stages)
        after = arms = control = None
        if run is not None:
            digest = model_digest(run.model)
            path = {} if run.trajectory is None else {"latent": run.trajectory.latent, "to": run.trajectory.deployed}
            after = stages.run(
                "after",
                AfterReport,
                lambda: after_training(
                    loss, run.model, tol=baseline.tol, num_points=settings.slice_points, trajectory=run.trajectory
                ),
                run=digest,
                path=tensor_digest(path),
                tol=baseline.tol,
                num_points=settings.slice_points,
            )
            say(after.verdict)
            if run.recipe is not None and run.text is not None and folder is not None:
                say(f"control arm: {run.recipe.train.max_steps} steps in full precision")
                stages.step("control")
                control = train_control(model, run.recipe, run.text, folder / "control", teacher=teacher_of(run.recipe))
                arms = measure_arms(loss, run, control, baseline, settings, stages)
                say(arms.verdict)
        river = None
        if settings.num_normals:
            say("river and walls")
            river = river_and_walls(loss, sites, named, baseline, reports, run, control, settings, stages)
        stages.finish()
    return Diagnosis(
        model=model_name,
        data=data_name,
        settings=settings,
        baseline=baseline,
        schemes=reports,
        rank_agreement=_agreement(reports, table),
        layers=table,
        layer_forecast=forecast,
        proposal=proposal,
        terrain=terrain,
        pitch=pitch,
        river=river,
        after=after,
        arms=arms,
        recovery=None if run is None or run.folder is None else read_recovery(run.folder, tol=baseline.tol),
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
