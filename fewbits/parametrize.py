"""Parametrizations on the layers of a model: owners first, then the layers that are tied to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fewbits.nn import QATLayer
from fewbits.parametrizations import LowRank, Parametrization, Tanh
from fewbits.qtensor import initial_scale


def parametrize_(layers: Iterable[tuple[str, QATLayer]], chosen: Mapping[str, Parametrization | None]) -> None:
    """Give prepared layers the parametrizations of their rules, in place; tied layers follow the owner.

    ``low_rank`` freezes and compresses the weight; ``tanh`` keeps it and finds the scales of the mapped weight.

    Args:
        layers: named layers of a model, tied ones included.
        chosen: by name of the layer, its parametrization; None, or no entry, leaves the full weight.

    Raises:
        ValueError: for a rank above the smaller side of a weight.
    """
    layers = list(layers)
    for name, layer in layers:
        how = chosen.get(name)
        if isinstance(how, Tanh) and layer.owner is layer:
            layer.transform = how
            if layer.weight_scale is not None:
                with torch.no_grad():
                    layer.weight_scale.copy_(initial_scale(layer.latent(), layer.scheme))
        elif isinstance(how, LowRank) and layer.owner is layer:
            layer.parametrize_(how, name)
    for _, layer in layers:
        if layer.owner is not layer and layer.owner.parametrization is not None:
            layer.weight = layer.owner.weight
