"""Parametrizations on the layers of a model: owners first, then the layers that are tied to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fewbits.nn import QATLayer
from fewbits.parametrizations import LowRank


def parametrize_(layers: Iterable[tuple[str, QATLayer]], chosen: Mapping[str, LowRank | None]) -> None:
    """Freeze and compress the weights of prepared layers as their rules say, in place; tied layers follow the owner.

    Args:
        layers: named layers of a model, tied ones included.
        chosen: by name of the layer, its parametrization; None, or no entry, leaves the full weight.

    Raises:
        ValueError: for a rank above the smaller side of a weight.
    """
    layers = list(layers)
    for name, layer in layers:
        how = chosen.get(name)
        if how is not None and layer.owner is layer:
            layer.parametrize_(how, name)
    for _, layer in layers:
        if layer.owner is not layer and layer.owner.parametrization is not None:
            layer.weight = layer.owner.weight
