"""Scheme: grid x scale x rotation, one frozen value; the place where all validation of the combination lives."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary, grid_from_dict
from fewbits.rotations import Rotation
from fewbits.scales import GRID_FREE_RULES, ScaleSpec, gaussian_size

_PATTERN = re.compile(r"^W(?P<bits>1\.58|[1-8])(?P<letter>[HK]?)(A(?P<act>\d+))?(G(?P<group>-1|\d+))?$")
_ASSUMED_WIDTH = 1024
"""Weights in a row, where the units of a codebook that is not fitted yet depend on it."""
_SCALE_BITS = {"portable": 16, "fp16": 16, "bf16": 16, "fp32": 32}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    r"""How one weight is quantized: :math:`\hat w = R^{-1}\big(s \cdot \mathrm{level}(\mathrm{code})\big)`.

    Args:
        grid: the level set, in steps.
        scale: granularity, rule, mode and stored dtype of the step size.
        rotation: transform of the input axis around the quantizer.

    Raises:
        ValueError: at construction, for combinations that have no meaning.

    Example:
        >>> Scheme.parse("W2A16G64").bits_per_weight((256, 256))
        2.25
        >>> Scheme.from_json(Scheme.parse("W1.58").to_json()) == Scheme.parse("W1.58")
        True
    """

    grid: AnyGrid
    scale: ScaleSpec = field(default_factory=ScaleSpec)
    rotation: Rotation = field(default_factory=Rotation)

    def __post_init__(self) -> None:
        if not isinstance(self.grid, AnyGrid):
            raise ValueError(f"grid must be a grid of fewbits.grids, got {self.grid!r}")
        if self.scale.rule == "rms" and isinstance(self.grid, Int | Codebook):
            raise ValueError(f"scale rule 'rms' needs a centred grid, not {self.grid.kind!r}; use rule 'gaussian'")
        if self.scale.rule in GRID_FREE_RULES and not isinstance(self.grid, Codebook):
            rule = self.scale.rule
            raise ValueError(
                f"scale rule {rule!r} is the size of a block, the unit of a codebook; the {self.grid.kind} grid has a "
                f"step of its own: use rule {rule.removeprefix('block_')!r}, or a codebook such as W2KG64"
            )
        if self.scale.rule in ("absmax_qmax", "absmean") and self.grid.max_level <= 0:
            raise ValueError(f"scale rule {self.scale.rule!r} needs a positive level; {self.grid} has none")

    @classmethod
    def parse(cls, text: str, **overrides: Any) -> Scheme:
        """Read ``W<bits>[H|K][A16][G<size>]``, the spelling of compressed-tensors and auto-round.

        ``W1`` is binary, ``W1.58`` ternary, ``W2`` to ``W8`` integers; the letter ``H`` asks for the half-shifted grid
        (SEQ, QuEST) and ``K`` for the Lloyd-Max codebook of a Gaussian, in units of its expected block where the scale
        rule is ``block_*``. Without ``G`` (or with ``G-1``) there is one scale per output channel.

        Args:
            text: for example ``W2A16G64``.
            **overrides: fields of :class:`ScaleSpec` (``rule="absmean"``, ``mode=..``, ``dtype=..``,
                ``superblock=..``), or ``grid``, ``rotation``.

        Raises:
            ValueError: for a text that does not match, or an unknown override.

        Example:
            >>> Scheme.parse("W2HG64", dtype="fp16").grid
            HalfShifted(num_bits=2)
        """
        match = _PATTERN.match(text.strip())
        if not match:
            raise ValueError(f"scheme {text!r} is not of the form W<1|1.58|2..8>[H|K][A16][G<size>], e.g. W2A16G64")
        if match["act"] not in (None, "16"):
            raise ValueError(
                f"scheme {text!r} asks for {match['act']}-bit activations; only A16 (none) is of the weights: give the "
                "whole text to Rule or a recipe's rule, which take activations out of it"
            )
        grid = _grid(text, match["bits"], match["letter"])
        group = int(match["group"] or -1)
        fields: dict[str, Any] = {} if group < 0 else {"granularity": "per_group", "group_size": group}
        rotation = overrides.pop("rotation", Rotation())
        given = overrides.pop("grid", None)
        grid = grid if given is None else given
        unknown = sorted(set(overrides) - set(ScaleSpec.__dataclass_fields__))
        if unknown:
            known = [*ScaleSpec.__dataclass_fields__, "grid", "rotation"]
            raise ValueError(f"unknown scheme option {unknown[0]!r}; known options: {', '.join(known)}")
        scale = ScaleSpec(**{**fields, **overrides})
        if given is None and isinstance(grid, Codebook) and scale.rule in GRID_FREE_RULES:
            size = gaussian_size(scale.rule, scale.group_size or _ASSUMED_WIDTH)
            grid = Codebook(tuple((torch.tensor(grid.levels) / size).tolist()))
        return cls(grid=grid, scale=scale, rotation=rotation)

    @property
    def name(self) -> str:
        """Short spelling; :meth:`parse` reads it back up to the scale's rule, mode and dtype."""
        kind = self.grid.kind
        bits = {"binary": "1", "ternary": "1.58"}.get(kind, str(self.grid.num_bits))
        letter = {"half_shifted": "H", "codebook": "K"}.get(kind, "")
        group = f"G{self.scale.group_size}" if self.scale.group_size else ""
        return f"W{bits}{letter}A16{group}"

    def check_shape(self, shape: Sequence[int], *, name: str = "weight") -> None:
        """Whether a weight of this shape can be quantized so.

        Raises:
            ValueError: naming the weight, its shape, the limit and the fix.
        """
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"{name} has shape {tuple(shape)}; a matrix (out_features, in_features) is needed")
        group = self.scale.group_size
        if group is not None and group > shape[1]:
            raise ValueError(
                f"{name}: group_size={group} is larger than its in_features={shape[1]}; "
                "use a smaller group or per_channel"
            )
        if self.rotation.kind != "none":
            self.rotation.block_for(shape[1])

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """True storage cost of one weight, packed codes and scales counted.

        Example:
            >>> round(Scheme.parse("W1.58A16G128").bits_per_weight((256, 256)), 3)
            1.725
        """
        view = self.scale.view(tuple(shape))
        num_scales = view.scale_shape[0] * view.scale_shape[1]
        if self.scale.superblock is None:
            scale_bits = num_scales * _SCALE_BITS[self.scale.dtype]
        else:
            per_row = -(-view.width // self.scale.superblock)
            scale_bits = num_scales * self.scale.multiplier_bits + view.rows * per_row * _SCALE_BITS[self.scale.dtype]
        return self.grid.storage_bits + scale_bits / (view.rows * view.width)

    def with_scale(self, **changes: Any) -> Scheme:
        """A copy with some fields of the scale changed.

        Example:
            >>> Scheme.parse("W2").with_scale(mode="dynamic").scale.mode
            'dynamic'
        """
        return replace(self, scale=replace(self.scale, **changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return {"grid": self.grid.to_dict(), "scale": self.scale.to_dict(), "rotation": self.rotation.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: for unknown or missing keys.
        """
        if not isinstance(data, dict) or "grid" not in data:
            raise ValueError(f"a scheme is a mapping with the keys grid, scale, rotation; got {data!r}")
        if extra := sorted(set(data) - {"grid", "scale", "rotation"}):
            raise ValueError(f"unknown key {extra[0]!r} in a scheme; known keys: grid, scale, rotation")
        try:
            scale, rotation = ScaleSpec(**data.get("scale", {})), Rotation(**data.get("rotation", {}))
        except TypeError as error:
            raise ValueError(f"bad scheme: {error}") from None
        return cls(grid=grid_from_dict(data["grid"]), scale=scale, rotation=rotation)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Scheme:
        """Inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


def _grid(text: str, bits: str, letter: str) -> AnyGrid:
    if bits in ("1", "1.58"):
        if letter == "K" and bits == "1":
            return Codebook.lloyd_max(2)
        if letter:
            raise ValueError(f"scheme {text!r}: the letter {letter} has no meaning at {bits} bits; drop it")
        return Binary() if bits == "1" else Ternary()
    num_bits = int(bits)
    if letter == "H":
        return HalfShifted(num_bits)
    return Codebook.lloyd_max(2**num_bits) if letter == "K" else Int(num_bits)
