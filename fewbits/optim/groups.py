"""Parameter groups: latent weights, scales and the rest, each with its own learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewbits.activations.module import input_quantizers
from fewbits.convert import owned_layers


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    scale_learning_rate: float,
    rest_learning_rate: float,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer; frozen parameters and empty groups are left out.

    Args:
        model: a prepared model.
        learning_rate: of the latent weights, or of their low-rank factors.
        scale_learning_rate: of the learned scales, and of what a surrogate trains (never decayed).
        rest_learning_rate: of everything else: norms, biases, embeddings in full precision; 0 leaves it fixed.
        weight_decay: of the latent weights, and of matrices among the rest.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and ``name`` (``latent``, ``scale``, ``rest`` or
        ``rest_no_decay``; of quantized inputs ``activation``, at the scales' rate, with the decay of their scheme).

    Raises:
        ValueError: if the model has no prepared layer, or nothing is left to train.
    """
    layers = [layer for _, layer in owned_layers(model)]
    if not layers:
        raise ValueError("the model has no prepared layer; call prepare first")
    latent = {id(w) for layer in layers for w in layer.trained_weights()}
    scales = {id(layer.weight_scale) for layer in layers if isinstance(layer.weight_scale, nn.Parameter)}
    scales |= {id(layer.state()[key]) for layer in layers for key in layer.surrogate.trained}
    groups: dict[str, dict[str, Any]] = {
        "latent": {"params": [], "lr": learning_rate, "weight_decay": weight_decay},
        "scale": {"params": [], "lr": scale_learning_rate, "weight_decay": 0.0},
        "rest": {"params": [], "lr": rest_learning_rate, "weight_decay": weight_decay},
        "rest_no_decay": {"params": [], "lr": rest_learning_rate, "weight_decay": 0.0},
    }
    decays: dict[int, float] = {}
    for _, quantizer in input_quantizers(model):
        decays |= {id(p): quantizer.scheme.decay for p in quantizer.parameters()}
    for decay in sorted(set(decays.values())):
        name = "activation" if decay == 0 else f"activation_decay_{decay:g}"
        groups[name] = {"params": [], "lr": scale_learning_rate, "weight_decay": decay}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if id(p) in latent:
            name = "latent"
        elif id(p) in scales:
            name = "scale"
        elif id(p) in decays:
            name = "activation" if decays[id(p)] == 0 else f"activation_decay_{decays[id(p)]:g}"
        else:
            name = "rest" if p.ndim > 1 else "rest_no_decay"
        groups[name]["params"].append(p)
    kept = [{**group, "name": name} for name, group in groups.items() if group["params"] and group["lr"] > 0]
    if not kept:
        raise ValueError("nothing is left to train: every parameter is frozen or has learning rate 0")
    return kept
