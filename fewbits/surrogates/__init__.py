"""Surrogates: what stands for the derivative of the quantizer in the backward pass."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fewbits.naming import did_you_mean
from fewbits.surrogates._base import ElementwiseSurrogate, Surrogate
from fewbits.surrogates.dsq import DSQ
from fewbits.surrogates.ewgs import EWGS, HessianSchedule
from fewbits.surrogates.jacquant import JacQuant
from fewbits.surrogates.rotation_trick import RotationTrick
from fewbits.surrogates.stableqat import StableQAT
from fewbits.surrogates.ste import STE, ClippedSTE

SURROGATES: dict[str, type[Surrogate]] = {
    cls.name: cls for cls in (STE, ClippedSTE, StableQAT, DSQ, EWGS, RotationTrick, JacQuant)
}
"""Every surrogate by the name that recipes use; a test asserts that it is complete."""


def surrogate_from_dict(data: dict[str, Any] | str) -> Surrogate:
    """Inverse of ``surrogate.to_dict()``; a plain name means the defaults; JacQuant also takes ``preset``.

    Raises:
        ValueError: for an unknown name or option.

    Example:
        >>> surrogate_from_dict({"name": "jacquant", "preset": "probe_rel", "group_size": 32}).group_size
        32
    """
    data = {"name": data} if isinstance(data, str) else dict(data)
    name = data.pop("name", None)
    if name not in SURROGATES:
        near = did_you_mean(name, SURROGATES)
        raise ValueError(f"unknown surrogate {name!r}; {near}known surrogates: {', '.join(SURROGATES)}")
    cls = SURROGATES[name]
    options = {field.name for field in fields(cls)} | ({"preset"} if cls is JacQuant else set())
    if unknown := sorted(set(data) - options):
        raise ValueError(
            f"surrogate {name!r} has no option {unknown[0]!r}; options: {', '.join(sorted(options)) or 'none'}"
        )
    if cls is JacQuant and "preset" in data:
        return JacQuant.preset(data.pop("preset"), **data)
    return cls(**data)


__all__ = [
    "DSQ",
    "EWGS",
    "STE",
    "SURROGATES",
    "ClippedSTE",
    "ElementwiseSurrogate",
    "HessianSchedule",
    "JacQuant",
    "RotationTrick",
    "StableQAT",
    "Surrogate",
    "surrogate_from_dict",
]
