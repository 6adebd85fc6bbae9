"""Rules: which layers get which quantizer and surrogate, and the layers of a model that they choose."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.activations.scheme import ActivationScheme, check_basis
from fewbits.activations.text import read_spellings, split_scheme
from fewbits.drives import Drive, drive_from_dict
from fewbits.nn import QATLayer, QuantizedLayer
from fewbits.parametrizations import Parametrization, read_parametrization
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, Surrogate, surrogate_from_dict

DEFAULT_IGNORE = ("lm_head",)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which layers get which quantizer and surrogate.

    Args:
        pattern: shell-style pattern on module names (``*``, ``model.layers.*.mlp.*``), or a regular expression that
            must match the whole name after the prefix ``re:``. The first rule that matches a layer wins.
        scheme: a :class:`Scheme`, or text for :meth:`Scheme.parse`, in which ``A8`` and ``KV4`` stand for the last two.
        surrogate: a surrogate, its name, or its dict; the identity STE by default.
        drive: what moves the weight besides the gradient: a drive, its name, or its dict; None for nothing.
        embeddings: whether the pattern also matches embeddings (a bare ``*`` should seldom mean them).
        activation: how the inputs of the linear layers are quantized: an
            :class:`~fewbits.activations.ActivationScheme`, text such as ``A8``, or a mapping; None for not at all.
        kv_cache: likewise how keys and values are, in attention modules with a layer that the rule chooses.
        differentiate_scale: for dynamic scales: the gradient passes through the scale too (a rank-one term per group),
            see :func:`fewbits.fake_quant.scale_as_function`; off, dynamic scales are constants of the backward pass.
        parametrization: what the latent weight is made of, or its name or dict; None for one full trained matrix.

    Raises:
        ValueError: for a bad regular expression or part, or parts that do not go together.

    Example:
        >>> Rule(pattern="*.mlp.*", scheme="W2A16G64").scheme.name
        'W2A16G64'
    """

    scheme: Scheme
    pattern: str = "*"
    surrogate: Surrogate = field(default_factory=STE)
    drive: Drive | None = None
    embeddings: bool = False
    activation: ActivationScheme | None = None
    kv_cache: ActivationScheme | None = None
    differentiate_scale: bool = False
    parametrization: Parametrization | None = None

    def __post_init__(self) -> None:
        weights, *spelled = split_scheme(self.scheme) if isinstance(self.scheme, str) else (None, None, None)
        for name, text in zip(("activation", "kv_cache"), spelled, strict=True):
            object.__setattr__(self, name, read_spellings(name, text, getattr(self, name)))
        if weights is not None:
            object.__setattr__(self, "scheme", Scheme.parse(weights))
        elif isinstance(self.scheme, dict):
            object.__setattr__(self, "scheme", Scheme.from_dict(self.scheme))
        if isinstance(self.surrogate, str | dict):
            object.__setattr__(self, "surrogate", surrogate_from_dict(self.surrogate))
        if isinstance(self.drive, str | dict):
            object.__setattr__(self, "drive", drive_from_dict(self.drive))
        if not isinstance(self.scheme, Scheme) or not isinstance(self.surrogate, Surrogate):
            raise ValueError(
                f"rule {self.pattern!r} needs a Scheme and a Surrogate, got {self.scheme!r}, {self.surrogate!r}"
            )
        if not isinstance(self.drive, Drive | None):
            raise ValueError(f"rule {self.pattern!r} needs a Drive or None, got {self.drive!r}")
        scale = self.scheme.scale
        if self.differentiate_scale and (scale.mode != "dynamic" or scale.rule == "mse"):
            raise ValueError(
                f"differentiate_scale with mode={scale.mode!r}, rule={scale.rule!r}: only dynamic scales are functions "
                "of the weights, and mse has no derivative; use mode='dynamic' with absmax, absmean, rms or gaussian"
            )
        made_of = read_parametrization(self.parametrization, self.scheme, self.surrogate, self.drive)
        object.__setattr__(self, "parametrization", made_of)
        self._check_basis()
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None

    def _check_basis(self) -> None:
        """Operands that stay rotated: both of a product, and of hard quantizers only."""
        rotation = self.scheme.rotation
        check_basis(rotation, self.activation, name=f"rule {self.pattern!r}")
        if self.kv_cache is not None and self.kv_cache.rotation.basis == "rotated":
            raise ValueError("keys and values are rotated back after rounding; use rotation basis 'original' for them")
        drive = self.drive
        if rotation.basis == "original" or drive is None:
            return
        if drive.perturbs or type(drive).forward_weight is not Drive.forward_weight:
            raise ValueError(f"drive {drive.name!r} changes the forward pass; it needs rotation basis 'original'")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``Rule(**data)`` is the inverse."""
        return {
            "pattern": self.pattern,
            "scheme": self.scheme.to_dict(),
            "surrogate": self.surrogate.to_dict(),
            "drive": None if self.drive is None else self.drive.to_dict(),
            "embeddings": self.embeddings,
            "activation": None if self.activation is None else self.activation.to_dict(),
            "kv_cache": None if self.kv_cache is None else self.kv_cache.to_dict(),
            **({"differentiate_scale": True} if self.differentiate_scale else {}),
            **({} if self.parametrization is None else {"parametrization": self.parametrization.to_dict()}),
        }


def matches(pattern: str, name: str) -> bool:
    """Whether a module name matches a shell-style pattern, or a regular expression after ``re:``."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def is_quantizable(module: nn.Module) -> bool:
    """Linear layers, GPT-2's Conv1D and embeddings; subclasses with a forward pass of their own are left alone."""
    return type(module) in (nn.Linear, Conv1D) or _is_embedding(module)


def _is_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale"))


def closest_names(pattern: str, names: Iterable[str]) -> str:
    """The three names most like the pattern, for error messages."""
    names = list(names)
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return ", ".join(near) or "(the model has no linear layer or embedding)"


def select_layers(
    model: nn.Module, rules: Sequence[Rule], ignore: Sequence[str] | None = None
) -> dict[str, tuple[Rule, nn.Module]]:
    """The layers that the rules choose, in model order.

    Raises:
        ValueError: for a rule that chooses nothing, an ``ignore`` pattern that matches nothing, or an already prepared
            model; near names are listed.
    """
    if any(isinstance(m, QATLayer | QuantizedLayer) for m in model.modules()):
        raise ValueError("the model is already prepared or converted; start from the original checkpoint")
    names = {name: m for name, m in model.named_modules() if is_quantizable(m)}
    for pattern in ignore or ():
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"ignore pattern {pattern!r} matches no layer; near names: {closest_names(pattern, names)}"
            )
    skip = DEFAULT_IGNORE if ignore is None else tuple(ignore)
    chosen: dict[str, tuple[Rule, nn.Module]] = {}
    used: set[int] = set()
    for name, module in names.items():
        if any(matches(pattern, name) for pattern in skip):
            continue
        for i, rule in enumerate(rules):
            if matches(rule.pattern, name) and (rule.embeddings or not _is_embedding(module)):
                chosen[name] = (rule, module)
                used.add(i)
                break
    for i, rule in enumerate(rules):
        if i in used:
            continue
        hit = [name for name in names if matches(rule.pattern, name)]
        reason = (
            f"it matches only {', '.join(hit[:3])}, which are ignored, taken by an earlier rule, or embeddings "
            "(set embeddings=True)"
            if hit
            else f"near names: {closest_names(rule.pattern, names)}"
        )
        raise ValueError(f"rule {rule.pattern!r} chooses no layer; {reason}")
    return chosen


def add_tied_partners_(
    model: nn.Module, chosen: dict[str, tuple[Rule, nn.Module]], ignore: Sequence[str] | None
) -> None:
    """Add the layers that share a weight with a chosen one; in place.

    Raises:
        ValueError: if the user ignores such a layer.
    """
    by_weight = {id(module.weight): rule for rule, module in chosen.values()}
    for name, module in model.named_modules():
        if name in chosen or not is_quantizable(module) or id(module.weight) not in by_weight:
            continue
        if any(matches(pattern, name) for pattern in ignore or ()):
            partner = next(n for n, (_, m) in chosen.items() if m.weight is module.weight)
            raise ValueError(
                f"{name} is ignored but its weight is tied to {partner}, which a rule quantizes; drop {name} from "
                "ignore, or untie the two before prepare"
            )
        chosen[name] = (by_weight[id(module.weight)], module)
