"""Which optimizer moves which parameters: names, options, and two optimizers that work as one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from fewbits.convert import owned_layers, qat_layers
from fewbits.drives import Drive
from fewbits.naming import did_you_mean
from fewbits.nn import QATEmbedding
from fewbits.optim.groups import parameter_groups
from fewbits.surrogates import JacQuant

OWN_NAMES = ("muon", "lion")
"""Optimizers that ``transformers.TrainingArguments`` has no name for."""


def check_optimizer_name(name: str) -> str:
    """The name, if there is such an optimizer.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> check_optimizer_name("muon")
        'muon'
    """
    known = [*OWN_NAMES, *(str(member.value) for member in OptimizerNames)]
    if name not in known:
        raise ValueError(f"optimizer {name!r} is unknown; {did_you_mean(name, known)}use one of {', '.join(known)}")
    return name


def is_schedule_free(name: str | None) -> bool:
    """Whether the optimizer keeps a running average that evaluation and deployment use in place of its iterate."""
    return name is not None and name.startswith("schedule_free")


class Combined(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters as one: one list of groups, one state, one ``step``.

    Schedules, checkpoints and clipping see a plain optimizer whose groups are those of the parts in order.

    Args:
        parts: optimizers without a closure of their own; they must not share parameters.

    Raises:
        ValueError: without a part, or if a parameter is in two of them.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> both = Combined([torch.optim.SGD([layer.weight], lr=0.1), torch.optim.AdamW([layer.bias], lr=0.01)])
        >>> [group["lr"] for group in both.param_groups]
        [0.1, 0.01]
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        if not parts:
            raise ValueError("Combined needs at least one optimizer")
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], defaults={})
        self._share_()

    def _share_(self) -> None:
        """Parts look at slices of the one list of groups and at the one state."""
        first = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            first += count

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What ``load_state_dict`` ends with; it replaces groups and state."""
        super().__setstate__(state)
        self._share_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every part, after one call of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def _class_and_defaults(name: str, args: TrainingArguments, model: nn.Module) -> tuple[type, dict[str, Any]]:
    rate = {"lr": args.learning_rate}
    if name == "muon":
        # the update has the size of AdamW's, so that one learning rate means the same for both
        return torch.optim.Muon, {**rate, "adjust_lr_fn": "match_rms_adamw"}
    if name == "lion":
        try:
            from lion_pytorch import Lion
        except ImportError as error:
            raise ImportError("optim='lion' needs lion-pytorch: pip install 'fewbits[optim]'") from error
        return Lion, rate
    asked = args.optim
    try:
        args.optim = OptimizerNames(name)
        cls, defaults = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    except ImportError as error:
        if is_schedule_free(name):
            raise ImportError(f"optim={name!r} needs schedulefree: pip install 'fewbits[optim]'") from error
        raise
    finally:
        args.optim = asked
    if unsupported := {"params", "model", "optimizer_dict"} & set(defaults):
        raise ValueError(f"optim={name!r} builds its own groups ({', '.join(unsupported)}); use another")
    return cls, defaults


def _make(
    name: str, groups: list[dict[str, Any]], args: TrainingArguments, model: nn.Module, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    cls, defaults = _class_and_defaults(name, args, model)
    known = set(inspect.signature(cls).parameters) - {"params", "lr", "weight_decay"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"optim={name!r} has no option {unknown[0]!r}; options: {', '.join(sorted(known))}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return cls(groups, **{**defaults, **given})


def build_optimizer(
    name: str,
    model: nn.Module,
    args: TrainingArguments,
    *,
    scale_learning_rate: float | None = None,
    rest_learning_rate: float | None = None,
    rest_optim: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    r"""The optimizer of latent weights, and of everything else.

    Muon orthogonalizes the momentum of a matrix, so it takes the latent weights of linear layers only; AdamW takes
    scales, norms, biases and embeddings, quantized ones included. Its update is scaled to the size of AdamW's
    (:math:`.2\sqrt{\max(\mathrm{out}, \mathrm{in})}`, arXiv:2502.16982).

    Args:
        name: of the optimizer of latent weights: ``muon``, ``lion``, or one of ``TrainingArguments.optim``, among them
            ``adamw_torch``, ``sgd`` and ``schedule_free_adamw``.
        model: a prepared model.
        args: learning rate, weight decay and the betas of the Trainer.
        scale_learning_rate: of learned scales; None means ``args.learning_rate``.
        rest_learning_rate: of norms, biases and embeddings in full precision; None as above, 0 leaves them fixed.
        rest_optim: optimizer of all but the latent weights; None means the same one (for Muon: AdamW).
        options: keyword arguments of the first optimizer, such as ``{"momentum": 0.9}``.

    Raises:
        ValueError: for an unknown name or option, or a schedule-free optimizer beside another one, beside JacQuant's
            ``apply="update"`` or beside a drive that pulls: they move one of its two sequences without the other.
        ImportError: with the install line, if a package is missing.

    Reference: Muon arXiv:2502.16982; Lion arXiv:2302.06675; schedule-free arXiv:2405.15682.
    """
    if is_schedule_free(name) or is_schedule_free(rest_optim):
        if rest_optim is not None:
            raise ValueError(f"optim={name!r} with rest_optim={rest_optim!r}: schedule-free works alone")
        _refuse_moves(name, model)
    rate = args.learning_rate
    groups = parameter_groups(
        model,
        learning_rate=rate,
        scale_learning_rate=rate if scale_learning_rate is None else scale_learning_rate,
        rest_learning_rate=rate if rest_learning_rate is None else rest_learning_rate,
        weight_decay=args.weight_decay,
    )
    if name == "muon":
        rest_optim = rest_optim or "adamw_torch"
    options = options or {}
    if rest_optim is None:
        return _make(name, groups, args, model, options)
    tables = {id(w) for _, m in qat_layers(model) if isinstance(m, QATEmbedding) for w in m.trained_weights()}
    first, second = _split(groups, tables if name == "muon" else set())
    if not first:
        raise ValueError(f"optim={name!r} has nothing to move: every latent weight is frozen or an embedding")
    parts = [_make(name, first, args, model, options)]
    if second:
        parts.append(_make(rest_optim, second, args, model, {}))
    return Combined(parts)


def _split(groups: list[dict[str, Any]], tables: set[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Latent weights, and the rest with the latent weights that are ``tables``."""
    first, second = [], []
    for group in groups:
        if group["name"] != "latent":
            second.append(group)
            continue
        kept = [p for p in group["params"] if id(p) not in tables]
        moved = [p for p in group["params"] if id(p) in tables]
        if kept:
            first.append({**group, "params": kept})
        if moved:
            second.insert(0, {**group, "params": moved, "name": "latent_embedding"})
    return first, second


def _refuse_moves(name: str, model: nn.Module) -> None:
    for layer_name, layer in owned_layers(model):
        if isinstance(layer.surrogate, JacQuant) and layer.surrogate.apply == "update":
            raise ValueError(f"{layer_name}: apply='update' cannot go with optim={name!r}; use apply='grad'")
        if layer.drive is not None and type(layer.drive).pull is not Drive.pull:
            raise ValueError(f"{layer_name}: the drive {layer.drive.name!r} pulls and cannot go with optim={name!r}")
