"""Parametrizations: what the latent weight is made of, where it is not one full trained matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.parametrizations.low_rank import LowRank

PARAMETRIZATIONS: dict[str, type[LowRank]] = {cls.name: cls for cls in (LowRank,)}
"""Every parametrization by the name that recipes use; a test asserts that it is complete."""


def parametrization_from_dict(data: Mapping[str, Any] | str) -> LowRank:
    """Inverse of ``parametrization.to_dict()``; a plain name means the defaults.

    Raises:
        ValueError: for an unknown name or option.

    Example:
        >>> parametrization_from_dict({"name": "low_rank", "rank": 8}).storage
        'int8'
    """
    options = {"name": data} if isinstance(data, str) else dict(data)
    name = options.pop("name", None)
    if name not in PARAMETRIZATIONS:
        raise ValueError(f"unknown parametrization {name!r}; known parametrizations: {', '.join(PARAMETRIZATIONS)}")
    cls = PARAMETRIZATIONS[name]
    known = set(cls.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        raise ValueError(f"parametrization {name!r} has no option {unknown[0]!r}; options: {', '.join(sorted(known))}")
    return cls(**options)


__all__ = ["PARAMETRIZATIONS", "LowRank", "parametrization_from_dict"]
