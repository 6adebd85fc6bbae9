"""Parametrizations: what the latent weight is made of, where it is not one full trained matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.drives import Drive
from fewbits.naming import did_you_mean
from fewbits.parametrizations.low_rank import LowRank
from fewbits.parametrizations.tanh import Tanh
from fewbits.scheme import Scheme
from fewbits.surrogates import Surrogate

Parametrization = LowRank | Tanh
"""What a rule's ``parametrization`` may be."""

PARAMETRIZATIONS: dict[str, type[Parametrization]] = {LowRank.name: LowRank, Tanh.name: Tanh}
"""Every parametrization by the name that recipes use; a test asserts that it is complete."""


def parametrization_from_dict(data: Mapping[str, Any] | str) -> Parametrization:
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
        near = did_you_mean(name, PARAMETRIZATIONS)
        raise ValueError(
            f"unknown parametrization {name!r}; {near}known parametrizations: {', '.join(PARAMETRIZATIONS)}"
        )
    cls = PARAMETRIZATIONS[name]
    known = set(cls.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        raise ValueError(f"parametrization {name!r} has no option {unknown[0]!r}; options: {', '.join(sorted(known))}")
    return cls(**options)


def read_parametrization(
    value: Any, scheme: Scheme, surrogate: Surrogate, drive: Drive | None
) -> Parametrization | None:
    """A rule's parametrization from whatever spells it, checked against the rule's other parts.

    Raises:
        ValueError: for a bad spelling, or parts that do not go together.
    """
    found = parametrization_from_dict(value) if isinstance(value, str | dict) else value
    if not isinstance(found, Parametrization | None):
        raise ValueError(f"a rule's parametrization is a LowRank, a Tanh or None, got {found!r}")
    if found is not None:
        found.check(scheme, surrogate, drive)
    return found


__all__ = [
    "PARAMETRIZATIONS",
    "LowRank",
    "Parametrization",
    "Tanh",
    "parametrization_from_dict",
    "read_parametrization",
]
