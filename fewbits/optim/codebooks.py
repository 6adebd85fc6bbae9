"""Codebooks that follow the weights: fit one per layer, after a warm-up and now and then."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewbits.convert import owned_layers, qat_layers
from fewbits.grids import Codebook
from fewbits.kmeans import block_scale, fit_codebook
from fewbits.scales import GRID_FREE_RULES


@dataclass(frozen=True, kw_only=True)
class CodebookFit:
    """When codebooks are fitted to the latent weights by k-means.

    Args:
        step: optimizer steps in full precision before the first fit; 0 fits to the checkpoint, before the first step.
        refit_interval: steps between later fits; None fits once and freezes, as in the paper's main runs.
        fisher: weigh every weight by Adam's second moment; needs ``step >= 1`` and an optimizer that keeps one.
        seed: of the seedings.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> CodebookFit(step=1000, fisher=True).refit_interval is None
        True

    Reference: 1-Bit Wonder, arXiv:2602.15563.
    """

    step: int = 0
    refit_interval: int | None = None
    fisher: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step={self.step} must be at least 0")
        if self.refit_interval is not None and self.refit_interval < 1:
            raise ValueError(f"refit_interval={self.refit_interval} must be at least 1; None fits once")
        if self.fisher and self.step == 0:
            raise ValueError("fisher=True before the first step: there is no second moment yet; use step >= 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")

    def is_due(self, step: int) -> bool:
        """Whether a fit follows optimizer step ``step``.

        Example:
            >>> [s for s in range(12) if CodebookFit(step=4, refit_interval=3).is_due(s)]
            [4, 7, 10]
        """
        past = step - self.step
        return past == 0 or (past > 0 and self.refit_interval is not None and past % self.refit_interval == 0)


def refit_codebooks_(model: nn.Module, *, weights: Mapping[str, Tensor] | None = None, seed: int = 0) -> list[str]:
    """Fit the codebook of every layer that has one to its current latent weight, and restart its scales.

    1-Bit Wonder trains without quantization first (``layer.fake_quant_enabled = False``), fits once and freezes: call
    this once. Levels are not trained in between; learned scales are, and start anew at the size of each block. Dynamic
    scales of the rules ``block_*``, the published form, are the sizes of the blocks at every step by themselves.

    Args:
        model: a prepared model.
        weights: per layer name, importance of each weight, >= 0 and of the latent weight's shape, such as Adam's second
            moment (Fisher information); layers without an entry count every weight the same.
        seed: of the seedings; every layer has a stream of its own.

    Returns:
        Names of the layers that were fitted.

    Raises:
        ValueError: if no layer has a codebook, if a scale is dynamic by another rule (it would follow the levels and
            leave the units in which they were fitted), if weights are given for an unknown or a rotated layer, and as
            :func:`fewbits.kmeans.fit_codebook`; nothing is changed then.

    Example:
        >>> from fewbits.convert import Rule, prepare
        >>> model = prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2KG64"))
        >>> refit_codebooks_(model)
        ['0']

    Reference: arXiv:2602.15563.
    """
    layers = {name: layer for name, layer in owned_layers(model) if isinstance(layer.scheme.grid, Codebook)}
    if not layers:
        raise ValueError("no layer of the model has a codebook; use a scheme such as W2KG64")
    if unknown := sorted(set(weights or ()) - set(layers)):
        raise ValueError(f"weights for {unknown[0]!r}, which is no layer with a codebook")
    fitted = {}
    for name, layer in layers.items():
        scheme, h = layer.scheme, None if weights is None else weights.get(name)
        if layer.parametrization is not None:
            raise ValueError(f"{name} has a frozen base in steps of its present codebook; refit before parametrizing")
        if layer.weight_scale is None and scheme.scale.rule not in GRID_FREE_RULES:
            raise ValueError(
                f"{name} has dynamic scales of the rule {scheme.scale.rule!r}, which depend on the levels; a fitted "
                f"codebook needs one of {', '.join(GRID_FREE_RULES)}, or mode='learned' or 'frozen'"
            )
        if h is not None and scheme.rotation.kind != "none":
            raise ValueError(f"{name} is rotated, so weights per latent entry have no meaning for it")
        if h is not None and layer.transform is not None:
            raise ValueError(f"{name} quantizes a function of its trained weight; fit its codebook without weights")
        w = scheme.rotation.apply(layer.latent().detach().float())
        own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
        grid = fit_codebook(w, len(scheme.grid.levels), scheme.scale, weights=h, seed=own_seed)
        fitted[name] = replace(scheme, grid=grid), block_scale(w, scheme.scale)
    with torch.no_grad():
        for name, (scheme, scale) in fitted.items():
            if layers[name].weight_scale is not None:
                layers[name].raw_scale().copy_(scale)
            for _, layer in qat_layers(model):
                if layer.owner is layers[name]:
                    layer.scheme = scheme
    return list(fitted)
