"""Drives around an optimizer step: progress of the run, and pulls of the latent weights."""

from __future__ import annotations

import torch
from torch import nn

from fewbits.convert import owned_layers
from fewbits.fake_quant import fake_quantize
from fewbits.nn import QATLayer


def set_progress_(model: nn.Module, progress: float) -> None:
    """Tell every driven layer which share of the run is done; call it before the first step and after a resume.

    Args:
        model: a prepared model.
        progress: in [0, 1].

    Raises:
        ValueError: for a progress outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} is outside [0, 1]; it is steps done over steps of the run")
    for _, layer in owned_layers(model):
        layer.progress = progress


@torch.no_grad()
def apply_drives_(model: nn.Module, *, step: int, total_steps: int, lr: float) -> list[str]:
    """Move latent weights as their drives say; call it after the optimizer's and the scheduler's step.

    Each quantized tensor is moved once, tied layers included. Frozen weights, and layers whose fake quantization is
    off, stay where they are. A layer without a drive, or whose drive rests at this step, costs nothing.

    Args:
        model: a prepared model.
        step: optimizer steps done, the last one included.
        total_steps: of the run.
        lr: learning rate of the latent weights after the scheduler's step.

    Returns:
        Names of the layers that moved.

    Raises:
        ValueError: for a step outside the run, or a pull beyond the grid.

    Example:
        >>> from fewbits.convert import Rule, prepare
        >>> rule = Rule(scheme="W2", drive={"name": "winq", "toward_grid": 1.0, "interval": 5, "noise": 0.0})
        >>> model = prepare(nn.Sequential(nn.Linear(64, 8)), rule)
        >>> [apply_drives_(model, step=step, total_steps=20, lr=0.0) for step in (4, 5)]
        [[], ['0']]
        >>> torch.equal(model[0].weight, model[0].quantized_weight())
        True
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step={step} is outside 1..{total_steps}; count the step that was just made")
    set_progress_(model, step / total_steps)
    moved = []
    for name, layer in owned_layers(model):
        drive = layer.drive
        if drive is None or not layer.fake_quant_enabled or not layer.weight.requires_grad:
            continue
        if drive.pull(step=step, total_steps=total_steps, lr=lr) == 0:
            continue
        w = layer.latent()
        quantized = fake_quantize(w, layer.scheme, layer.raw_scale(), layer.surrogate, layer.state())
        if drive.after_step_(w, quantized, step=step, total_steps=total_steps, lr=lr):
            moved.append(name)
    return moved


@torch.no_grad()
def add_pulls_to_gradients_(model: nn.Module, *, step: int, total_steps: int) -> list[str]:
    r"""Add :math:`\lambda_t (w - Q(w))` to gradients where drives ask for it; call it before the optimizer's step.

    Args:
        model: a prepared model whose gradients are complete, clipped ones included.
        step: the optimizer step that is about to be made.
        total_steps: of the run.

    Returns:
        Names of the layers whose gradient changed; a layer that the loss did not reach has the pull for its gradient.

    Raises:
        ValueError: for a step outside the run, or if no layer has a gradient (as without a backward pass).

    Example:
        >>> from fewbits.convert import Rule, prepare
        >>> rule = Rule(scheme="W2", drive={"name": "cage", "coupled": True, "silence": 0.5})
        >>> model = prepare(nn.Sequential(nn.Linear(64, 8)), rule)
        >>> model[0].weight.grad = torch.zeros(8, 64)
        >>> [add_pulls_to_gradients_(model, step=step, total_steps=20) for step in (10, 20)]
        [[], ['0']]
        >>> torch.allclose(model[0].weight.grad, 10 * (model[0].weight - model[0].quantized_weight()))
        True
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step={step} is outside 1..{total_steps}; count the step that is about to be made")
    pulled: dict[str, tuple[QATLayer, float]] = {}
    for name, layer in owned_layers(model):
        drive = layer.drive
        if drive is None or not layer.fake_quant_enabled or not layer.weight.requires_grad:
            continue
        if (strength := drive.gradient_pull(step=step, total_steps=total_steps)) > 0:
            pulled[name] = layer, strength
    if pulled and all(layer.weight.grad is None for layer, _ in pulled.values()):
        raise ValueError(
            f"the drive of {next(iter(pulled))} adds to gradients, but there are none (zeroth order has no backward "
            "pass); use coupled=False"
        )
    for layer, strength in pulled.values():
        w = layer.latent()
        error = w - fake_quantize(w, layer.scheme, layer.raw_scale(), layer.surrogate, layer.state())
        error = error.t() if layer.transposed else error
        grad = layer.weight.grad
        layer.weight.grad = strength * error if grad is None else grad.add_(error.to(grad.dtype), alpha=strength)
    return list(pulled)
