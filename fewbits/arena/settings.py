"""What is compared, on what, at which budget: one validated value that the arena's folder keeps."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewbits.arena.methods import NotForScheme, recipe_fields, rule_for, split_scheme
from fewbits.arena.table import METHODS
from fewbits.recipe import Recipe

_BUDGET = re.compile(r"^(?P<unit>tokens|steps)=(?P<number>\d+(\.\d+)?)(?P<suffix>[KMG]?)$")
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_FIXED = (
    "model", "teacher", "target", "rules", "init", "data", "seed", "train.max_steps", "train.batch_size",
    "train.learning_rate", "train.gradient_accumulation_steps",
)  # fmt: skip
"""Recipe keys that the arena decides."""
WARMUP_SHARE = 0.05
"""Share of the steps in which the learning rate rises; a cosine takes it to 0 afterwards."""


def parse_budget(text: str, tokens_per_step: int) -> int:
    """Optimizer steps of a budget such as ``tokens=2M`` or ``steps=300``; a part of a step is not made.

    Args:
        text: ``tokens=`` or ``steps=`` and a number, with K, M or G for thousands, millions and milliards.
        tokens_per_step: tokens in the batch of one optimizer step.

    Raises:
        ValueError: for another text, or less than one step.

    Example:
        >>> parse_budget("tokens=2M", 1024), parse_budget("steps=1.5K", 1024)
        (1953, 1500)
    """
    match = _BUDGET.match(text.strip())
    if not match:
        raise ValueError(f"budget {text!r} is not of the form tokens=2M or steps=300")
    amount = float(match["number"]) * _SUFFIX[match["suffix"]]
    steps = int(amount // tokens_per_step if match["unit"] == "tokens" else amount)
    if steps < 1:
        raise ValueError(f"budget {text!r} is less than one step of {tokens_per_step} tokens; give more")
    return steps


class ArenaSettings(BaseModel):
    """Everything that decides what a cell measures.

    Attributes:
        model: as in a recipe.
        schemes: such as ``W2G64``; methods bring the grid letter.
        methods: names of :data:`fewbits.arena.METHODS`.
        budget: of every cell, see :func:`parse_budget`.
        seeds: cells per method at the chosen rate; a seed decides the data order (and the noise, where there is one).
        learning_rates: the search, equal for every method.
        tuning_seeds: seeds at which all rates run; the rate of the lowest mean loss on the tuning text is chosen.
        text: file or folder to train on, whose last part is held out; None for the embedded text.
        eval_tokens: in each of the two held-out texts, the one for tuning and the one that is reported.
        block_size: tokens in a block.
        batch_size: blocks in a step.
        threads: CPU threads of a cell.
        overrides: ``key=value`` for the recipe of every cell, such as ``train.weight_decay=0.1``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "embedded"
    schemes: tuple[str, ...] = Field(default=("W2G64", "W1.58", "W1"), min_length=1)
    methods: tuple[str, ...] = Field(default=tuple(METHODS), min_length=1)
    budget: str = "tokens=2M"
    seeds: int = Field(default=5, ge=1)
    learning_rates: tuple[float, ...] = Field(default=(2e-4, 6e-4, 1.8e-3), min_length=1)
    tuning_seeds: int = Field(default=1, ge=1)
    text: str | None = None
    eval_tokens: int = Field(default=16_384, ge=2)
    block_size: int = Field(default=256, ge=2)
    batch_size: int = Field(default=4, ge=1)
    threads: int = Field(default=1, ge=1)
    overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ArenaSettings:
        for scheme in self.schemes:
            split_scheme(scheme)
        for kind, values in (("scheme", self.schemes), ("method", self.methods), ("rate", self.learning_rates)):
            if len(set(values)) < len(values):
                raise ValueError(f"a {kind} is given twice in {', '.join(map(str, values))}")
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"unknown arena method {unknown[0]!r}; known methods: {', '.join(METHODS)}")
        if min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates={self.learning_rates} must be positive")
        if self.tuning_seeds > self.seeds:
            raise ValueError(f"tuning_seeds={self.tuning_seeds} is more than seeds={self.seeds}")
        parse_budget(self.budget, self.tokens_per_step)
        for override in self.overrides:
            key = override.partition("=")[0]
            if any(key == fixed or key.startswith(f"{fixed}.") or fixed.startswith(f"{key}.") for fixed in _FIXED):
                raise ValueError(f"override {override!r} would change what the arena itself decides; use its options")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.batch_size * self.block_size

    @property
    def num_steps(self) -> int:
        """Optimizer steps of every trained cell."""
        return parse_budget(self.budget, self.tokens_per_step)

    def command(self) -> str:
        """The command line of these settings, without the folder.

        Example:
            >>> ArenaSettings(schemes=("W2G64", "W1"), methods=("ste", "rtn"), seeds=3).command()
            'fewbits arena --model embedded --schemes W2G64,W1 --methods ste,rtn --budget tokens=2M --seeds 3'
        """
        methods = "all" if self.methods == tuple(METHODS) else ",".join(self.methods)
        words = ["--model", self.model, "--schemes", ",".join(self.schemes), "--methods", methods]
        words += ["--budget", self.budget, "--seeds", str(self.seeds)]
        options = {
            "learning_rates": ",".join(f"{rate:g}" for rate in self.learning_rates),
            **{
                key: str(getattr(self, key))
                for key in ("tuning_seeds", "text", "eval_tokens", "block_size", "batch_size", "threads")
            },
        }
        for key, value in options.items():
            if getattr(self, key) != type(self).model_fields[key].default:
                words += [f"--{key.replace('_', '-')}", value]
        return shlex.join(["fewbits", "arena", *words, *self.overrides])

    def allows(self, scheme: str, name: str) -> str | None:
        """None, or why the method does not exist at the scheme."""
        try:
            rule_for(name, METHODS[name], scheme, num_steps=self.num_steps)
        except NotForScheme as error:
            return str(error)
        return None

    def recipe(self, scheme: str, name: str, learning_rate: float | None, seed: int) -> Recipe:
        """The whole recipe of one cell.

        Raises:
            NotForScheme: if the method does not exist at the scheme.
            ValueError: for overrides that no recipe takes.

        Example:
            >>> settings = ArenaSettings(schemes=("W2G64",), methods=("ste",), budget="steps=40")
            >>> settings.recipe("W2G64", "ste", 1e-3, 3).train.warmup_steps
            2
        """
        method = METHODS[name]
        steps = 0 if method.stage == "ptq" else self.num_steps
        fields = recipe_fields(name, method, scheme, learning_rate=learning_rate, num_steps=self.num_steps)
        data: dict[str, Any] = {"block_size": self.block_size, "eval_tokens": 2 * self.eval_tokens + self.block_size}
        data |= {"source": "embedded"} if self.text is None else {"source": "text", "path": self.text}
        train: dict[str, Any] = {
            "max_steps": steps,
            "batch_size": self.batch_size,
            "warmup_steps": round(WARMUP_SHARE * steps),
            "telemetry_interval": max(1, steps),
            "logging_steps": max(1, steps),
        }
        fields |= {"model": self.model, "data": data, "train": train | fields["train"], "seed": seed}
        return Recipe.parse(yaml.safe_dump(fields, sort_keys=False), self.overrides)
