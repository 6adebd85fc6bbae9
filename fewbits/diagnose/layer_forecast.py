r"""``kappa_rand`` of every layer: could one have known which layers suffer, without rounding any of them?

A random direction inside one layer knows nothing of the scheme, so one width :math:`R_l` per layer serves all schemes:
:math:`\kappa_{rand}(l, s) = \|e_{l,s}\| / R_l`. Reference: arXiv:2606.09012 (its slices, layer by layer).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fewbits.diagnose.layers import SensitivityTable
from fewbits.diagnose.losses import TokenLoss
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.diagnose.sites import Site
from fewbits.diagnose.stages import Stages
from fewbits.geometry import difference, norm, random_vector, width
from fewbits.geometry._result import Result
from fewbits.scheme import Scheme

Rank = Callable[[Sequence[float], Sequence[float]], float | None]


@dataclass(frozen=True, kw_only=True)
class LayerForecast(Result):
    """``random_widths[layer]`` and ``error_norms[layer][scheme]`` in units of ``w``, ``kappa_rand`` their ratio.

    ``rank_agreement`` holds Spearman's correlation of ``kappa_rand`` with the measured rises over the layers of each
    scheme, ``rank_agreement_norms`` the same for the bare error norms: what the width adds is the difference.
    """

    random_widths: dict[str, float]
    error_norms: dict[str, dict[str, float]]
    kappa_rand: dict[str, dict[str, float]]
    rank_agreement: dict[str, float | None]
    rank_agreement_norms: dict[str, float | None]


def layer_width(loss: TokenLoss, site: Site, settings: DiagnosisSettings, *, tol: float, guess: float) -> float:
    """Median width of the basin along random directions inside one layer, units of ``w``; weights are restored.

    Args:
        loss: of the plain model.
        site: the layer.
        settings: numbers of directions and bisections, and the seed.
        tol: band of the basin, nats.
        guess: where the search starts, units of ``w``.
    """
    generator = torch.Generator().manual_seed(settings.seed + 4)
    widths = []
    for _ in range(settings.num_layer_random):
        direction = random_vector([site.weight], generator)
        found = width(
            loss, [site.weight], direction, tol=tol, start=guess, max_distance=1024 * guess,
            num_bisections=settings.num_bisections,
        )  # fmt: skip
        widths.append(found.first)
    return statistics.median(widths)


def forecast_layers(
    loss: TokenLoss,
    sites: Sequence[Site],
    schemes: Mapping[str, Scheme],
    table: SensitivityTable,
    settings: DiagnosisSettings,
    stages: Stages,
    *,
    tol: float,
    rank: Rank,
) -> LayerForecast:
    """``kappa_rand`` of every layer and scheme, and how well it ranks the layers.

    Args:
        loss: of the plain model.
        sites: layers; restored bit for bit.
        schemes: by name.
        table: measured rises, to compare with.
        settings: ``num_layer_random`` at least 1.
        stages: every layer is a stage.
        tol: band of the basin, nats.
        rank: rank correlation of two lists.

    Raises:
        ValueError: without random directions.
    """
    if settings.num_layer_random < 1:
        raise ValueError(f"num_layer_random={settings.num_layer_random} must be at least 1 for a forecast per layer")
    widths, norms = {}, {}
    numbers = [settings.num_layer_random, settings.num_bisections, settings.seed, tol]
    for index, site in enumerate(sites):
        size = {name: norm(difference([site.rounded(s)], [site.weight])) for name, s in schemes.items()}
        guess = max(max(size.values()), 1e-6 * norm([site.weight]), 1e-12)

        def one(site: Site = site, guess: float = guess) -> float:
            return layer_width(loss, site, settings, tol=tol, guess=guess)

        widths[site.name] = stages.run(f"width-{index:03d}", float, one, layer=site.name, numbers=numbers, guess=guess)
        norms[site.name] = size
    kappas = {layer: {name: e / widths[layer] for name, e in row.items()} for layer, row in norms.items()}
    rises = {name: [table.rises[layer][name] for layer in kappas] for name in schemes}
    usable = {name: all(map(math.isfinite, values)) for name, values in rises.items()}

    def agreement(values: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
        return {n: rank([row[n] for row in values.values()], rises[n]) if usable[n] else None for n in schemes}

    return LayerForecast(
        random_widths=widths,
        error_norms=norms,
        kappa_rand=kappas,
        rank_agreement=agreement(kappas),
        rank_agreement_norms=agreement(norms),
    )
