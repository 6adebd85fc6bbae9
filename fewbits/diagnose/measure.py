"""The second half of a diagnosis, part by part: layers, terrain, arms and river, each in stages that are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewbits.checkpoint import find_prepared, load_model, load_prepared
from fewbits.data import TokenBlocks
from fewbits.diagnose.after import Triple, triple
from fewbits.diagnose.arms import CONTROL, PTQ, QAT, Arm, ArmsReport, compare_arms, measure_arm, plain_point
from fewbits.diagnose.before import Baseline, SchemeReport
from fewbits.diagnose.control import control_recipe, rounded_start
from fewbits.diagnose.layers import SensitivityTable, layer_sensitivity
from fewbits.diagnose.losses import TokenLoss
from fewbits.diagnose.pitch import PitchSweep, sweep_pitch
from fewbits.diagnose.river import RiverReport, measure_river
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.diagnose.sites import Site
from fewbits.diagnose.stages import Stages, model_digest
from fewbits.diagnose.terrain import PLAIN, TerrainReport, count_terrain, curvature_loss, measure_terrain
from fewbits.diagnose.trajectory import TRAJECTORY_FOLDER, Trajectory, read_trajectory
from fewbits.diagnose.words import FREE
from fewbits.geometry import difference, norm
from fewbits.geometry.directions import Vector
from fewbits.pipeline import load_blocks, model_source
from fewbits.recipe import Recipe
from fewbits.run_folder import read_recipe
from fewbits.scheme import Scheme

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A finished QAT run beside the model that it started from.

    Args:
        model: the prepared model.
        trajectory: its path, if it was recorded.
        folder: its run folder, for the curve of losses if that was recorded.
        recipe: of the run; with ``text``, its training blocks, the control arm is trained and measured.
        text: see ``recipe``.

    Raises:
        ValueError: for a recipe without text or the reverse.
    """

    model: nn.Module
    trajectory: Trajectory | None = None
    folder: Path | None = None
    recipe: Recipe | None = None
    text: TokenBlocks | None = None

    def __post_init__(self) -> None:
        if (self.recipe is None) != (self.text is None):
            raise ValueError("recipe and text of a run go together: the control arm needs both, a run without it none")


def open_run(folder: str | Path, model: nn.Module, tokenizer: Any, *, control: bool = False) -> Trained:
    """A finished run with what was recorded while it trained.

    Args:
        folder: the run folder (or a saved QAT model, which has neither path nor control).
        model: the plain model that the run started from, for text that is sampled from it.
        tokenizer: its tokenizer.
        control: also read recipe and training text, so that the control arm is measured.

    Raises:
        ValueError: for a folder without a prepared model, or a control without a recipe.
    """
    folder = Path(folder)
    recipe = text = None
    if control:
        recipe = read_recipe(folder)
        text, _ = load_blocks(recipe.data, tokenizer, model, recipe.seed)
    return Trained(
        model=load_prepared(find_prepared(folder))[0],
        trajectory=read_trajectory(folder / TRAJECTORY_FOLDER),
        folder=folder,
        recipe=recipe,
        text=text,
    )


def count_stages(
    settings: DiagnosisSettings, num_schemes: int, num_layers: int, *, budget: bool, run: Trained | None
) -> int:
    """Stages of a diagnosis, for the progress bar."""
    control = run is not None and run.recipe is not None
    count = 1 + num_schemes + num_layers * (1 + (settings.num_layer_random > 0))
    count += count_terrain(1 + num_schemes + (run is not None), settings)
    count += settings.num_probes > 0 and settings.num_monte_carlo > 0
    return count + budget + (run is not None) + 4 * control + (settings.num_normals > 0)


def layer_table(
    loss: TokenLoss, sites: Sequence[Site], named: Mapping[str, Scheme], baseline: Baseline, stages: Stages
) -> SensitivityTable:
    """The rises layer by layer; every layer is a stage."""
    known: dict[tuple[str, str], float] = {}
    schemes = {name: scheme.to_dict() for name, scheme in named.items()}
    for index, site in enumerate(sites):

        def one(site: Site = site) -> dict[str, float]:
            return layer_sensitivity(loss, [site], named, base_loss=baseline.loss).rises[site.name]

        row = stages.run(f"layer-{index:03d}", dict[str, float], one, layer=site.name, schemes=schemes)
        known |= {(site.name, name): rise for name, rise in row.items()}
    return layer_sensitivity(loss, sites, named, known=known, base_loss=baseline.loss)


def terrain_and_pitch(
    loss: TokenLoss,
    sites: Sequence[Site],
    named: Mapping[str, Scheme],
    baseline: Baseline,
    run: Trained | None,
    settings: DiagnosisSettings,
    stages: Stages,
) -> tuple[TerrainReport, PitchSweep | None]:
    """Spectra of the plain model, of its roundings and of the trained one, and the sweep of pitches."""
    params: Vector = [site.weight for site in sites]
    points: dict[str, Vector | None] = {PLAIN: None}
    points |= {name: [site.rounded(scheme) for site in sites] for name, scheme in named.items()}
    if run is not None:
        found = triple(loss.model, run.model)
        points[QAT] = on_sites(found, found.deployed, sites)
    terrain = measure_terrain(loss, params, points, settings, stages)
    if terrain.trace is None or not settings.num_monte_carlo:
        return terrain, None
    trace = terrain.trace
    sweep = stages.run(
        "pitch",
        PitchSweep | None,
        lambda: (
            sweep_pitch(
                loss, params, trace, baseline.gradient_norm, settings, base_loss=baseline.loss, tol=baseline.tol
            )
            if trace.trace > 0
            else None
        ),
        trace=trace.to_dict(),
        tol=baseline.tol,
        draws=[settings.num_monte_carlo, settings.seed],
    )
    return terrain, sweep


def on_sites(points: Triple, point: Vector, sites: Sequence[Site]) -> Vector:
    """A point over all parameters, restricted to the weights of the sites in their order."""
    place = {id(p): index for index, p in enumerate(points.params)}
    return [point[place[id(site.weight)]] for site in sites]


def teacher_of(recipe: Recipe) -> nn.Module | None:
    """The teacher that the recipe names; None where it is the model itself."""
    if recipe.teacher is None:
        return None
    return load_model(model_source(recipe.teacher), trust_remote_code=recipe.trust_remote_code).eval()


def measure_arms(
    loss: TokenLoss,
    run: Trained,
    control: nn.Module,
    baseline: Baseline,
    settings: DiagnosisSettings,
    stages: Stages,
) -> ArmsReport:
    """The three arms, each a stage."""
    recipe, text = run.recipe, run.text
    assert recipe is not None
    assert text is not None
    points = triple(loss.model, run.model)
    digests = [model_digest(run.model), model_digest(control)]
    numbers = [settings.num_random, settings.num_bisections, settings.seed, baseline.tol]

    def ends(name: str) -> tuple[Vector, Vector]:
        if name == QAT:
            return points.latent, points.deployed
        plain = loss.model if name == PTQ else control
        start = triple(plain, rounded_start(plain, recipe, text))
        return plain_point(plain, points.params), [q.to(p) for q, p in zip(start.deployed, points.params, strict=True)]

    def one(name: str) -> Arm:
        latent, deployed = ends(name)
        return measure_arm(loss, points, latent, deployed, settings, tol=baseline.tol)

    keys = {"ptq": PTQ, "control": CONTROL, "qat": QAT}
    arms: dict[str, Arm] = {
        name: stages.run(f"arm-{key}", Arm, functools.partial(one, name), digests=digests, numbers=numbers)
        for key, name in keys.items()
    }
    objective = control_recipe(recipe).objective
    return compare_arms(
        arms,
        objective=f"cross-entropy x {objective.cross_entropy:g} + KL to the teacher x {objective.kl:g}",
        num_steps=recipe.train.max_steps,
        learning_rate=recipe.train.learning_rate,
        loss_fp=baseline.loss,
        tol=baseline.tol,
    )


def river_and_walls(
    loss: TokenLoss,
    sites: Sequence[Site],
    named: Mapping[str, Scheme],
    baseline: Baseline,
    reports: Sequence[SchemeReport],
    run: Trained | None,
    control: nn.Module | None,
    settings: DiagnosisSettings,
    stages: Stages,
) -> RiverReport:
    """River and normal split at the scale of the finest scheme that leaves the basin (else the coarsest)."""
    params: Vector = [site.weight for site in sites]
    ordered = sorted(reports, key=lambda r: r.error_norm)
    smoothed_at = next((r.scheme for r in ordered if r.verdict != FREE), ordered[-1].scheme)
    displacements: dict[str, Vector] = {}
    digests = []
    if run is not None:
        found = triple(loss.model, run.model)
        displacements[QAT] = difference(on_sites(found, found.latent, sites), params)
        digests.append(model_digest(run.model))
        if control is not None:
            end = plain_point(control, found.params)
            displacements["full-precision fine-tuning"] = difference(on_sites(found, end, sites), params)
            digests.append(model_digest(control))
    displacements = {name: d for name, d in displacements.items() if norm(d) > 0}

    def one() -> RiverReport:
        errors = {name: difference([s.rounded(scheme) for s in sites], params) for name, scheme in named.items()}
        part = curvature_loss(loss, settings)
        return measure_river(part, params, smoothed_at, errors, displacements, settings, tol=baseline.tol)

    return stages.run(
        "river",
        RiverReport,
        one,
        smoothed_at=smoothed_at,
        schemes={name: scheme.to_dict() for name, scheme in named.items()},
        digests=digests,
        tol=baseline.tol,
        numbers=[settings.curvature_blocks, settings.num_lanczos_steps, settings.num_normals, settings.num_deltas,
                 settings.num_bisections, settings.seed],
    )  # fmt: skip
