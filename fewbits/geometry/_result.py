"""What every measurement of this package returns: a frozen record that turns into plain JSON numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, cast

from torch import Tensor

HIDDEN: dict[str, bool] = {"json": False}
"""Field metadata of weight-sized tensors, which a JSON file should not hold."""


class Result:
    """Base of the frozen result records; adds :meth:`to_dict` and nothing else."""

    _derived: ClassVar[tuple[str, ...]] = ()
    """Names of properties that :meth:`to_dict` writes beside the fields."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; a number that is not finite becomes ``None``, as JSON has no infinity.

        Weight-sized tensors (planes, eigenvectors, Krylov bases) are left out.
        """
        names = [f.name for f in dataclasses.fields(cast(Any, self)) if f.metadata.get("json", True)]
        return {name: plain(getattr(self, name)) for name in (*names, *self._derived)}


def plain(value: Any) -> Any:
    """Turn a value into what ``json.dumps(..., allow_nan=False)`` takes.

    Example:
        >>> plain((1.5, float("inf"), {"a": None}))
        [1.5, None, {'a': None}]
    """
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
