r"""What a method is in the arena: changes to a recipe, as data, and nothing else.

A method says how the *grid* differs from the scheme's own (a letter), how scales start and move, the rotation, the
surrogate, the drive and the objective, with exceptions by bit-width. :func:`rule_for` turns it into a rule for a
scheme, or says why the method does not exist there. Every method of the field trains at the scheme's granularity, so
that all of them cost the same bits per weight.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fewbits.naming import did_you_mean
from fewbits.ptq import METHODS as PTQ_METHODS
from fewbits.rotations import Rotation
from fewbits.scheme import Scheme

_SCHEME = re.compile(r"^W(?P<bits>1\.58|[1-8])(?P<rest>(A16)?(G(-1|\d+))?)$")
REFRESHES = 20
"""JacQuant refreshes its gain every 100 steps, or so many times in a run that is shorter."""
MEASUREMENTS = 5
"""EWGS measures the curvature every 100 steps, or so many times in a run that is shorter: it costs several steps."""
Value = str | dict[str, Any] | None
Stage = Literal["train", "ptq", "fp_then_ptq"]


class NotForScheme(ValueError):
    """The method is not defined at this bit-width; the message says why."""


class Method(BaseModel):
    """One row of the table.

    Attributes:
        summary: what it is, in one line.
        papers: arXiv ids.
        note: what differs from the paper, or was reconstructed; empty if nothing does.
        letter: grid letter of the scheme's text: ``H`` half-shifted, ``K`` codebook, or none.
        options: changes of the scale and the rotation, as in a recipe.
        surrogate: as in a recipe.
        drive: as in a recipe.
        parametrization: as in a recipe.
        objective: as in a recipe; None is the arena's own, which all others share.
        train: changes of the recipe's ``train``, such as the optimizer.
        rate_factor: the latent weights' learning rate is this times the cell's, which is of a grid common to all
            methods, for an optimizer whose steps have another size. Where ``rest_optim`` moves scales and the rest,
            these keep the cell's rate.
        init: post-training method of the start; for ``ptq`` and ``fp_then_ptq`` the method itself.
        codebooks: as in a recipe.
        stage: ``train``; ``ptq``: no training; ``fp_then_ptq``: trained in full precision, then ``init``.
        by_bits: fields that differ at a bit-width, such as ``{"1": {"surrogate": ..}}``.
        missing: bit-widths at which the method is not defined, and why.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    summary: str
    papers: tuple[str, ...] = ()
    note: str = ""
    letter: Literal["", "H", "K"] = ""
    options: dict[str, Any] = Field(default_factory=dict)
    surrogate: str | dict[str, Any] = "ste"
    drive: Value = None
    parametrization: Value = None
    objective: dict[str, float] | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    rate_factor: float = Field(default=1.0, gt=0)
    init: str = "rtn"
    codebooks: dict[str, Any] | None = None
    stage: Stage = "train"
    by_bits: dict[str, dict[str, Any]] = Field(default_factory=dict)
    missing: dict[str, str] = Field(default_factory=dict)

    def at(self, bits: str) -> Method:
        """The method at a bit-width, its exceptions applied (``options`` are merged, other fields replaced)."""
        changes = dict(self.by_bits.get(bits, {}))
        if "options" in changes:
            changes["options"] = {**self.options, **changes["options"]}
        return Method.model_validate({**self.model_dump(), **changes, "by_bits": {}})


def split_scheme(text: str) -> tuple[str, str]:
    """``(bits, rest)`` of a scheme without a grid letter; the arena's methods bring their own.

    Raises:
        ValueError: for another text.

    Example:
        >>> split_scheme("W1.58G64")
        ('1.58', 'G64')
    """
    match = _SCHEME.match(text.strip())
    if not match:
        raise ValueError(
            f"scheme {text!r} is not of the form W<1|1.58|2..8>[G<size>], e.g. W2G64; methods choose the grid letter"
            + _fix(text.strip())
        )
    Scheme.parse(text.strip())
    return match["bits"], match["rest"]


def _fix(text: str) -> str:
    """The scheme that was probably meant, as the end of a message; nothing where none is near."""
    plain = re.sub(r"^(W[\d.]+)[HK]?(A\d+)?(KV\d+)?", r"\1", text.upper())
    return f"; write {plain}" if plain != text and _SCHEME.match(plain) else ""


def rule_for(name: str, method: Method, scheme: str, *, num_steps: int) -> dict[str, Any]:
    """The one rule of the method's recipe, as data.

    Args:
        name: of the method, for messages.
        method: the row.
        scheme: such as ``W2G64``.
        num_steps: optimizer steps of the run.

    Raises:
        NotForScheme: if the method is not defined there.

    Example:
        >>> from fewbits.arena.table import METHODS
        >>> rule_for("quest", METHODS["quest"], "W1", num_steps=200)["surrogate"]
        {'name': 'clipped_ste', 'edge': 1.3}
    """
    bits, rest = split_scheme(scheme)
    if method.init not in PTQ_METHODS:
        raise NotForScheme(f"{name} starts with {method.init!r}, which this fewbits does not have")
    if bits in method.missing:
        raise NotForScheme(f"{name} at {bits} bits: {method.missing[bits]}")
    here = method.at(bits)
    options = dict(here.options)
    rotation = options.pop("rotation", None)
    if rotation is not None:
        options["rotation"] = Rotation(**rotation)
    parsed = Scheme.parse(f"W{bits}{here.letter}{rest}", **options)
    rule: dict[str, Any] = {"scheme": parsed.to_dict(), "surrogate": _with_interval(here.surrogate, num_steps)}
    if here.drive is not None:
        rule["drive"] = here.drive
    if here.parametrization is not None:
        rule["parametrization"] = here.parametrization
    return json.loads(json.dumps(rule))


def recipe_fields(
    name: str, method: Method, scheme: str, *, learning_rate: float | None, num_steps: int
) -> dict[str, Any]:
    """What the method says of a recipe, as data: all but model, text, seed and budget.

    Args:
        name: of the method, for messages.
        method: the row.
        scheme: such as ``W2G64``.
        learning_rate: the common one, which ``rate_factor`` multiplies; None leaves the recipe's default.
        num_steps: optimizer steps of the run.

    Raises:
        NotForScheme: if the method is not defined there.

    Example:
        >>> from fewbits.arena.table import METHODS
        >>> recipe_fields("lion", METHODS["lion"], "W2", learning_rate=1e-3, num_steps=200)["train"]
        {'learning_rate': 0.0003, 'optim': 'lion'}
    """
    rule = rule_for(name, method, scheme, num_steps=num_steps)
    here = method.at(split_scheme(scheme)[0])
    train: dict[str, Any] = {}
    if learning_rate is not None:
        train["learning_rate"] = learning_rate * here.rate_factor
        if here.rate_factor != 1 and "rest_optim" in here.train:
            train |= {"scale_learning_rate": learning_rate, "rest_learning_rate": learning_rate}
    fields: dict[str, Any] = {"rules": [rule], "init": here.init, "train": train | here.train}
    if here.objective is not None:
        fields["objective"] = here.objective
    if here.codebooks is not None:
        fields["codebooks"] = here.codebooks
    return fields


def _with_interval(surrogate: str | dict[str, Any], num_steps: int) -> str | dict[str, Any]:
    if isinstance(surrogate, str):
        return surrogate
    if surrogate["name"] == "ewgs" and surrogate.get("hessian") is not None:
        return {
            **surrogate,
            "hessian": {**surrogate["hessian"], "interval": min(100, max(1, num_steps // MEASUREMENTS))},
        }
    if surrogate["name"] != "jacquant":
        return surrogate
    return {**surrogate, "interval": min(100, max(1, num_steps // REFRESHES))}


def choose_methods(text: str, table: dict[str, Method]) -> tuple[str, ...]:
    """Names from ``all`` or a comma-separated list, in the table's order.

    Raises:
        ValueError: for an unknown name, with the known ones.

    Example:
        >>> from fewbits.arena.table import METHODS
        >>> choose_methods("quest, ste", METHODS)
        ('ste', 'quest')
    """
    if text.strip() == "all":
        return tuple(table)
    asked = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(asked - set(table)):
        near = did_you_mean(unknown[0], table)
        raise ValueError(f"unknown arena method {unknown[0]!r}; {near}known methods: all, {', '.join(table)}")
    if not asked:
        raise ValueError("no method given; use all, or names separated by commas")
    return tuple(name for name in table if name in asked)
