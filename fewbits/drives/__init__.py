"""Drives: what moves the latent weight, or the weight of the forward pass, besides the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.drives._base import Drive, DriveContext, NoDrive
from fewbits.drives.cage import CAGE
from fewbits.drives.fpq import FPQ
from fewbits.drives.parq import PARQ
from fewbits.drives.winq import WinQ
from fewbits.fake_quant import fake_quantize
from fewbits.naming import did_you_mean
from fewbits.scales import stored_scale
from fewbits.scheme import Scheme
from fewbits.surrogates import Surrogate

DRIVES: dict[str, type[Drive]] = {cls.name: cls for cls in (NoDrive, WinQ, CAGE, PARQ, FPQ)}
"""Every drive by the name that recipes use; a test asserts that it is complete."""


def drive_from_dict(data: dict[str, Any] | str) -> Drive:
    """Inverse of ``drive.to_dict()``; a plain name means the defaults.

    Raises:
        ValueError: for an unknown name or option.

    Example:
        >>> drive_from_dict({"name": "cage", "strength": 1.0}).silence
        0.8
    """
    data = {"name": data} if isinstance(data, str) else dict(data)
    name = data.pop("name", None)
    if name not in DRIVES:
        raise ValueError(f"unknown drive {name!r}; {did_you_mean(name, DRIVES)}known drives: {', '.join(DRIVES)}")
    cls = DRIVES[name]
    options = set(cls.__dataclass_fields__)
    if unknown := sorted(set(data) - options):
        raise ValueError(
            f"drive {name!r} has no option {unknown[0]!r}; options: {', '.join(sorted(options)) or 'none'}"
        )
    return cls(**data)


def driven_weight(
    drive: Drive,
    w: Tensor,
    scheme: Scheme,
    scale: Tensor,
    surrogate: Surrogate,
    state: Mapping[str, Tensor],
    *,
    progress: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The weight of the forward pass in training: noise, then the quantizer, then the drive's own map.

    Noise is drawn in the basis in which the quantizer rounds: :math:`w + R^{-1}\delta`.

    Args:
        drive: what acts.
        w: latent weight ``(out_features, in_features)``.
        scheme: the forward quantizer.
        scale: raw scales ``(R, G)``.
        surrogate: the backward rule.
        state: its tensors.
        progress: share of the optimizer steps that is done, in [0, 1].
        generator: None is torch's own stream.

    Returns:
        Same shape and dtype as ``w``; equal to ``fake_quantize(w, ...)`` for :class:`NoDrive`.
    """
    if drive.perturbs:
        scale = drive.perturb_scale(scale, generator)
        pitch = scheme.grid.step * scheme.scale.view(w.shape).expand(stored_scale(scale.detach(), scheme.scale))
        if scheme.rotation.kind == "none":
            w = drive.perturb(w, pitch, generator)
        else:
            zero = torch.zeros(w.shape, device=w.device)
            w = w + scheme.rotation.invert(drive.perturb(zero, pitch, generator)).to(w.dtype)
    quantized = fake_quantize(w, scheme, scale, surrogate, state)
    stored = stored_scale(scale.detach(), scheme.scale)
    return drive.forward_weight(w, quantized, DriveContext(scheme=scheme, scale=stored, progress=progress))


__all__ = [
    "CAGE",
    "DRIVES",
    "FPQ",
    "PARQ",
    "Drive",
    "DriveContext",
    "NoDrive",
    "WinQ",
    "drive_from_dict",
    "driven_weight",
]
