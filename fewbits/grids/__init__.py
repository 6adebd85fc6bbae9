r"""Level sets: what a code decodes to, in steps (units of the scale).

A grid knows its levels, how to ``encode`` a weight in steps ``v = w / scale`` to the nearest level (ties half to even,
as ``torch.round``) and how to ``decode`` codes. It knows neither scales nor gradients.

Relations to the names of the field, with step ``s``:

* SEQ with range ``alpha`` (ParetoQ, arXiv:2502.02631) at b bits is ``half_shifted`` with ``s = alpha / 2**(b - 1)``;
  SEQ ternary is ``ternary`` with ``s = 2 alpha / 3``.
* QuEST (arXiv:2502.05003) with outermost level ``S`` is ``half_shifted`` with ``s = 2 S / (2**b - 1)``.
* LSQ, StableQAT, GPTQ and ``num_bits=b`` of compressed-tensors are ``int``.
* BitNet b1.58 is ``ternary``, sign binary is ``binary``, 1-Bit Wonder is ``codebook``.
"""

from __future__ import annotations

from typing import Any

from fewbits.grids._base import MAX_BITS, Grid
from fewbits.grids.codebook import Codebook
from fewbits.grids.uniform import Binary, HalfShifted, Int, Ternary

AnyGrid = Binary | Ternary | Int | HalfShifted | Codebook
"""Every grid there is: a union for annotations and ``isinstance``."""
GRIDS: dict[str, type] = {cls.kind: cls for cls in (Binary, Ternary, Int, HalfShifted, Codebook)}
"""Every grid by its ``kind``; a test asserts that it is complete."""


def grid_from_dict(data: dict[str, Any]) -> AnyGrid:
    """Inverse of ``grid.to_dict()``.

    Raises:
        ValueError: for an unknown kind or unknown keys.

    Example:
        >>> grid_from_dict({"kind": "int", "num_bits": 3})
        Int(num_bits=3)
    """
    data = dict(data)
    kind = data.pop("kind", None)
    if kind not in GRIDS:
        raise ValueError(f"unknown grid {kind!r}; known grids: {', '.join(GRIDS)}")
    if "codebook" in data:
        data["codebook"] = tuple(data["codebook"])
    try:
        return GRIDS[kind](**data)
    except TypeError as error:
        raise ValueError(f"grid {kind!r} does not take {sorted(data)}: {error}") from None


__all__ = [
    "GRIDS",
    "MAX_BITS",
    "AnyGrid",
    "Binary",
    "Codebook",
    "Grid",
    "HalfShifted",
    "Int",
    "Ternary",
    "grid_from_dict",
]
