"""ActivationScheme: how the input of a layer, or keys and values, are quantized; one frozen value and its presets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from fewbits.naming import did_you_mean
from fewbits.rotations import Rotation

Mode = Literal["dynamic", "static"]
Granularity = Literal["token", "tensor"]
Rule = Literal["absmax", "half_range", "rms", "mse"]
Levels = Literal["int", "centred"]
Gradient = Literal["ste", "clip", "trust"]
Parameter = Literal["scale", "log_scale", "clip"]
ScaleGradient = Literal["lsq", "clip"]
Thresholds = Literal["uniform", "learned"]

_CHOICES: dict[str, Any] = {
    "mode": Mode, "granularity": Granularity, "rule": Rule, "grid": Levels, "gradient": Gradient,
    "parameter": Parameter, "scale_gradient": ScaleGradient, "thresholds": Thresholds,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ActivationScheme:
    r"""How activations are quantized: :math:`\hat x = R^{-1}\big(s\,\ell((R x - \beta)/s) + \beta\big)`.

    The levels :math:`\ell` are ``-2**(b-1) .. 2**(b-1) - 1`` (``int``, signed), ``0 .. 2**b - 1`` (unsigned) or the odd
    multiples of half a step (``centred``, QuEST's).

    Args:
        num_bits: 1 to 8; one bit needs the centred grid or ``signed=False``.
        mode: ``dynamic`` finds the scale of what is to be quantized at every use, as a constant of the backward pass;
            ``static`` has one stored number.
        granularity: ``token`` (every row of the last axis; of keys and values: every head and token) or ``tensor``.
        rule: of the dynamic scale, or of the start of a static one: ``absmax`` (largest magnitude over the largest
            level), ``half_range`` (dynamic; largest magnitude over :math:`(2^b-1)/2`, as compressed-tensors has it),
            ``rms`` (RMS times the MSE-optimal step of a Gaussian; QuEST's table on the centred grid) or, for
            static scales, ``mse`` (line search on calibration data).
        grid: ``int`` or ``centred``.
        signed: False for inputs that are never negative.
        symmetric: False adds an offset: dynamic, an integer zero point from minimum and maximum; static, a stored
            :math:`\beta` in units of x (LSQ+, arXiv:2004.09576).
        gradient: what the gradient of x passes: ``ste`` everything; ``clip`` what lies between the outermost levels;
            ``trust`` what is at most half a step beyond them (QuEST, arXiv:2502.05003; at one bit up to 1.3 s, without
            a rotation 1.25 s).
        rotation: transform of the last axis around the quantizer; with ``basis="rotated"`` the result stays rotated,
            which needs the same rotation of the weight.
        learned: whether static numbers are trained.
        parameter: what is trained: ``scale``, ``log_scale`` (always positive) or ``clip``, the largest level times the
            scale (PACT's alpha).
        scale_gradient: ``lsq`` (level minus v inside, level outside, times :math:`1/\sqrt{n\,q_p}` with n features) or
            ``clip`` (nothing inside, level outside, no factor: PACT, arXiv:1805.06085).
        thresholds: ``learned`` trains the lengths of the input intervals (N2UQ, arXiv:2111.14826).
        start_clip: largest level times scale at the start, instead of calibration (PACT 10, DoReFa 1).
        decay: weight decay of the trained numbers (PACT's L2).

    Raises:
        ValueError: at construction, for values and combinations that have no meaning.

    Example:
        >>> ActivationScheme.parse("A8").levels
        (-128.0, 127.0)
        >>> ActivationScheme.parse({"num_bits": 4, "preset": "quest"}).levels
        (-7.5, 7.5)
        >>> ActivationScheme.parse("A16") is None
        True
    """

    num_bits: int
    mode: Mode = "dynamic"
    granularity: Granularity = "token"
    rule: Rule = "absmax"
    grid: Levels = "int"
    signed: bool = True
    symmetric: bool = True
    gradient: Gradient = "ste"
    rotation: Rotation = field(default_factory=Rotation)
    learned: bool = True
    parameter: Parameter = "scale"
    scale_gradient: ScaleGradient = "lsq"
    thresholds: Thresholds = "uniform"
    start_clip: float | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"activation {name}={value!r} is unknown; use one of {', '.join(get_args(choices))}")
        if isinstance(self.num_bits, bool) or not isinstance(self.num_bits, int) or not 1 <= self.num_bits <= 8:
            raise ValueError(f"activation num_bits={self.num_bits!r} must be a whole number from 1 to 8 (16 is none)")
        rotation: Any = self.rotation
        if isinstance(rotation, str | Mapping):
            fields_: dict[str, Any] = {"kind": rotation} if isinstance(rotation, str) else dict(rotation)
            object.__setattr__(self, "rotation", Rotation(**fields_))
        for problem in self._problems():
            raise ValueError(f"activation scheme A{self.num_bits}: {problem}")

    def _problems(self) -> list[str]:
        static = self.mode == "static"
        offset, plain_int = not self.symmetric, self.grid == "int"
        rules = [
            (plain_int and self.signed and self.num_bits == 1, "one signed bit needs grid='centred'"),
            (not plain_int and not self.signed, "grid='centred' is symmetric about 0; use signed=True"),
            (not plain_int and offset, "grid='centred' has no offset; use symmetric=True or grid='int'"),
            (static and self.granularity != "tensor", "static numbers are per tensor; use granularity='tensor'"),
            (not static and self.rule == "mse", "rule='mse' needs calibration data; use mode='static'"),
            (static and self.rule == "half_range", "rule='half_range' is of dynamic scales; use rule='absmax'"),
            (self.rule == "half_range" and not self.signed, "rule='half_range' is of levels about 0; use signed=True"),
            (self.rule == "rms" and not self.signed, "rule='rms' is of a Gaussian about 0; use signed=True"),
            (self.rule != "absmax" and offset, f"rule={self.rule!r} finds no offset; use rule='absmax'"),
            (not static and self.parameter != "scale", f"parameter={self.parameter!r} needs mode='static'"),
            (not static and self.scale_gradient != "lsq", "scale_gradient='clip' needs mode='static'"),
            (not static and self.thresholds != "uniform", "thresholds='learned' needs mode='static'"),
            (not static and self.start_clip is not None, "start_clip needs mode='static'"),
            (self.decay != 0 and not (static and self.learned), "decay needs mode='static' and learned=True"),
            (self.thresholds == "learned" and offset, "thresholds='learned' go without an offset"),
            (self.thresholds == "learned" and not plain_int, "thresholds='learned' need grid='int'"),
            (self.start_clip is not None and offset, "start_clip gives no offset; use symmetric=True"),
            (not (math.isfinite(self.decay) and self.decay >= 0), f"decay={self.decay} must be finite and >= 0"),
        ]
        if self.start_clip is not None and not (math.isfinite(self.start_clip) and self.start_clip > 0):
            rules.append((True, f"start_clip={self.start_clip} must be finite and > 0"))
        return [text for wrong, text in rules if wrong]

    @property
    def levels(self) -> tuple[float, float]:
        """The outermost levels, in steps (of a dynamic offset: before the zero point is subtracted)."""
        if not self.signed or (not self.symmetric and self.mode == "dynamic"):
            return 0.0, float(2**self.num_bits - 1)
        half = 2.0 ** (self.num_bits - 1)
        return (0.5 - half, half - 0.5) if self.grid == "centred" else (-half, half - 1)

    @property
    def margin(self) -> float:
        """How far beyond the outermost levels the gradient passes, in steps."""
        if self.gradient == "ste":
            return math.inf
        if self.gradient == "clip":
            return 0.0
        if self.num_bits == 1 and self.grid == "centred":  # QuEST's clip of 1 bit; the outer level is s, half a step
            return 0.125 if self.rotation.kind == "none" else 0.15
        return 0.5

    @property
    def name(self) -> str:
        """Short spelling, ``A8``."""
        return f"A{self.num_bits}"

    @property
    def summary(self) -> str:
        """What the short spelling leaves out, for people.

        Example:
            >>> ActivationScheme.parse({"num_bits": 8, "preset": "sasq"}).summary
            'A8 static per tensor, learned log_scale'
        """
        parts = [f"{self.name} {self.mode} per {self.granularity}"]
        parts += [self.rule] if self.mode == "dynamic" else [f"learned {self.parameter}" if self.learned else "fixed"]
        parts += ["centred"] if self.grid == "centred" else []
        parts += [] if self.symmetric else ["offset"]
        parts += ["learned thresholds"] if self.thresholds == "learned" else []
        parts += [self.rotation.kind] if self.rotation.kind != "none" else []
        parts += ["left rotated"] if self.rotation.basis == "rotated" else []
        return ", ".join(parts)

    def check_width(self, width: int, *, name: str = "input") -> None:
        """Whether inputs of this many features can be rotated as the scheme says.

        Raises:
            ValueError: naming the input, for an odd width with a rotation.
        """
        if self.rotation.kind != "none":
            try:
                self.rotation.block_for(width)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def deployed(self) -> ActivationScheme:
        """The same forward pass with every number a stored constant."""
        if self.mode == "dynamic":
            return self
        return replace(self, learned=False, parameter="scale", decay=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every field."""
        return {**asdict(self), "rotation": self.rotation.to_dict()}

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | ActivationScheme | None) -> ActivationScheme | None:
        """Read ``A8``, ``KV4``, or a mapping of fields, which may name a ``preset`` to start from.

        Args:
            value: ``A16`` and None mean no quantization.

        Raises:
            ValueError: for another text, an unknown field or preset, or values out of range.
        """
        if value is None or isinstance(value, ActivationScheme):
            return value
        if isinstance(value, str):
            match = re.fullmatch(r"(?:A|KV)(\d+)", value.strip())
            if not match:
                raise ValueError(f"activation scheme {value!r} is not of the form A<1..8 or 16> or KV<1..8 or 16>")
            value = {"num_bits": int(match[1])}
        if not isinstance(value, Mapping):
            raise ValueError(f"an activation scheme is a text such as A8 or a mapping, got {value!r}")
        data = dict(value)
        preset = data.pop("preset", None)
        if preset is not None:
            if preset not in PRESETS:
                near = did_you_mean(preset, PRESETS)
                raise ValueError(f"activation preset {preset!r} is unknown; {near}presets: {', '.join(PRESETS)}")
            data = {**PRESETS[preset], **data}
        if unknown := sorted(set(data) - {f.name for f in fields(cls)}):
            known = ", ".join(["preset", *(f.name for f in fields(cls))])
            raise ValueError(f"activation scheme has the unknown key {unknown[0]!r}; known keys: {known}")
        if "num_bits" not in data:
            raise ValueError("an activation scheme needs num_bits")
        return None if data["num_bits"] == 16 else cls(**data)


def check_basis(weight: Rotation, scheme: ActivationScheme | None, *, name: str = "the rule") -> None:
    """Both operands of a product are in one basis, or neither stays rotated.

    Args:
        weight: rotation of the weight.
        scheme: of the input; None (full precision) is rotated as the weight needs it.
        name: for the message.

    Raises:
        ValueError: if one operand would stay rotated and the other is not rotated in the same way.

    Example:
        >>> check_basis(Rotation(), ActivationScheme(num_bits=8))
    """
    if scheme is None or "rotated" not in (weight.basis, scheme.rotation.basis) or weight == scheme.rotation:
        return
    raise ValueError(
        f"{name}: the weight's rotation is {weight.to_dict()} and the input's {scheme.rotation.to_dict()}; with "
        "basis='rotated' both must be the same, options: {rotation: {kind: hadamard, basis: rotated}} and activation: "
        "{.., rotation: {kind: hadamard, basis: rotated}}"
    )


_STATIC = {"mode": "static", "granularity": "tensor", "gradient": "clip"}
PRESETS: dict[str, dict[str, Any]] = {
    "bitnet": {},
    "compressed_tensors": {"rule": "half_range"},
    "quest": {"rule": "rms", "grid": "centred", "gradient": "trust", "rotation": {"kind": "hadamard"}},
    "lsq": {**_STATIC, "rule": "mse"},
    "lsq_plus": {**_STATIC, "symmetric": False},
    "sasq": {**_STATIC, "parameter": "log_scale"},
    "pact": {**_STATIC, "parameter": "clip", "scale_gradient": "clip", "decay": 1e-4},
    "dorefa": {**_STATIC, "signed": False, "learned": False, "start_clip": 1.0},
    "n2uq": {**_STATIC, "thresholds": "learned", "rule": "mse"},
}
"""Fields by the name of the paper (or format) that chose them; ``num_bits`` is yours. See docs/activations.md."""
