"""Any method on a whole model: the result is a prepared model that holds exactly the method's codes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.convert import Rule, add_tied_partners_, replace_module_, select_layers, training_layer
from fewbits.nn import QATLayer
from fewbits.ptq._base import PTQResult
from fewbits.ptq.capture import Blocks, Stage, walk
from fewbits.ptq.gptq import gptq
from fewbits.ptq.rtn import rtn

LayerMethod = Callable[..., PTQResult]

LAYER_METHODS: dict[str, LayerMethod] = {"rtn": rtn, "gptq": gptq}
"""Methods that see one weight and the Hessian of its inputs, by name."""
DATA_FREE = ("rtn",)
"""Methods that need no calibration data."""
METHODS: tuple[str, ...] = (*LAYER_METHODS,)
"""Every method that :func:`apply_ptq` knows."""
WALK_OPTIONS = ("num_blocks", "batch_size", "quantized_prefix", "sequential")
"""Options of :func:`apply_ptq` itself, which go with every method."""
_NOT_OPTIONS = {"w", "scheme", "hessian", "inputs", "scale"}


def options_of(method: str) -> tuple[str, ...]:
    """Names of the options of a method.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> options_of("gptq")
        ('damping', 'act_order', 'static_groups', 'block_size')
    """
    if method not in METHODS:
        raise ValueError(f"unknown PTQ method {method!r}; use one of {', '.join(METHODS)}")
    return tuple(k for k in inspect.signature(LAYER_METHODS[method]).parameters if k not in _NOT_OPTIONS)


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse what a method does not take.

    Raises:
        ValueError: for an unknown method or option, with the known ones.
    """
    known = (*options_of(method), *WALK_OPTIONS)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"method {method!r} has no option {unknown[0]!r}; it takes {', '.join(known)}")


def apply_ptq(
    model: nn.Module,
    rules: Sequence[Rule] | Rule,
    method: str = "gptq",
    blocks: Blocks | None = None,
    *,
    ignore: Sequence[str] | None = None,
    num_blocks: int | None = None,
    batch_size: int = 8,
    quantized_prefix: bool = True,
    sequential: bool = True,
    **options: Any,
) -> nn.Module:
    """Quantize the layers that the rules choose by a method, in model order, and leave a prepared model.

    The result is what :func:`fewbits.prepare` gives, so it trains, converts and exports as it is; its latent weights
    and scales reproduce the method's codes exactly, and its surrogates and drives are those of the rules. Embeddings,
    and layers whose weight is tied to one, have no Hessian: a calibrated method rounds them to nearest.

    Args:
        model: a Transformers model, or any module with linear layers; changed in place. If this raises after it has
            begun, some layers are prepared and others are not: load the model again.
        rules: the first rule that matches a layer wins.
        method: one of :data:`METHODS`.
        blocks: calibration data: token blocks ``(n, length)``, a dataset of ``{"input_ids"}``, or float inputs of a
            plain module; not needed for :data:`DATA_FREE` methods.
        ignore: patterns of layers to leave alone; ``["lm_head"]`` if None.
        num_blocks: use only so many of the blocks, spread evenly over all; None for all.
        batch_size: blocks in one forward pass.
        quantized_prefix: whether a transformer block sees the outputs of the quantized blocks before it, or those of
            the full-precision ones.
        sequential: the same inside a block: whether a layer sees the quantized layers before it in its block.
        **options: of the method, see its own function.

    Returns:
        The same model, prepared.

    Raises:
        ValueError: as :func:`fewbits.prepare`; for an unknown method or option, missing data, or dynamic scales (which
            are found anew at every use and cannot hold a method's; only ``rtn`` allows them).

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> _ = apply_ptq(model, Rule(scheme="W2A16G64"), "gptq", torch.randn(128, 64))
        >>> type(model[0]).__name__
        'QATLinear'
    """
    check_options(method, options)
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    if not rules:
        raise ValueError("no rules: nothing to quantize; pass at least one Rule")
    if method not in DATA_FREE and blocks is None:
        raise ValueError(f"method {method!r} needs calibration data; pass blocks")
    chosen = choose(model, rules, method, ignore)
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        plan = _Plan(model, chosen)
        data = None if method in DATA_FREE else blocks
        common: dict[str, Any] = {
            "num_blocks": num_blocks,
            "batch_size": batch_size,
            "quantized_prefix": quantized_prefix,
        }
        for stage in walk(model, plan.owners, data, **common):
            _layer_by_layer(plan, stage, method, options, sequential)
        plan.finish_()
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
    return model


def choose(
    model: nn.Module, rules: Sequence[Rule], method: str, ignore: Sequence[str] | None
) -> dict[str, tuple[Rule, nn.Module]]:
    """The layers that will be quantized, tied ones included, with every check of :func:`fewbits.prepare`."""
    chosen = select_layers(model, rules, ignore)
    for name, (rule, module) in chosen.items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device; load the weights first")
        rule.scheme.check_shape(latent_of(module).shape, name=f"{name}.weight")
        if rule.scheme.scale.mode == "dynamic" and method != "rtn":
            raise ValueError(
                f"{name} has dynamic scales, which are found anew at every use and cannot hold those of {method!r}; "
                "use mode='learned' or 'frozen'"
            )
    add_tied_partners_(model, chosen, ignore)
    return chosen


def latent_of(module: nn.Module) -> torch.Tensor:
    """The weight of a layer as ``(out_features, in_features)``."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


class _Plan:
    """Which layer gets which rule, which layers share a weight, and how a result gets into the model."""

    def __init__(self, model: nn.Module, chosen: Mapping[str, tuple[Rule, nn.Module]]) -> None:
        self.model = model
        self.rules = {name: rule for name, (rule, _) in chosen.items()}
        first: dict[int, str] = {}
        self.partners: dict[str, str] = {}
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        for name in sorted(chosen, key=order.__getitem__):
            weight = chosen[name][1].weight
            if id(weight) in first:
                self.partners[name] = first[id(weight)]
            first.setdefault(id(weight), name)
        self.owners = list(first.values())

    @torch.no_grad()
    def set_(self, name: str, result: PTQResult) -> None:
        """Put a training layer in the place of ``name`` that holds the result's codes."""
        rule, module = self.rules[name], self.model.get_submodule(name)
        new = training_layer(module)
        latent_of(module).copy_(result.latent)
        new.setup_(result.qtensor.scheme, rule.surrogate, scale=result.scale, drive=rule.drive)
        new.train(module.training)
        replace_module_(self.model, name, new)
        held = new.qtensor()
        assert torch.equal(held.codes, result.qtensor.codes), f"{name} does not hold the codes of its method"
        assert torch.equal(held.scale, result.qtensor.scale), f"{name} does not hold the scales of its method"

    def finish_(self) -> None:
        """Layers whose weight is tied to a quantized one use it."""
        for name, owner_name in self.partners.items():
            owner, module = self.model.get_submodule(owner_name), self.model.get_submodule(name)
            assert isinstance(owner, QATLayer)
            new = training_layer(module)
            new.setup_(owner.scheme, owner.surrogate, owner)
            new.train(module.training)
            replace_module_(self.model, name, new)


def _layer_by_layer(plan: _Plan, stage: Stage, method: str, options: Mapping[str, Any], sequential: bool) -> None:
    """One group of layers with a common input after the other, each with the Hessian of what reaches it then."""
    if stage.data_free:
        solve, kept = (LAYER_METHODS[method], options) if method in DATA_FREE else (rtn, {})
        for name in stage.layers:
            plan.set_(name, solve(latent_of(stage.module(name)), plan.rules[name].scheme, **kept))
        return
    groups = [group.names for group in stage.groups()]
    known = {} if sequential else stage.hessians([names[0] for names in groups])
    for names in groups:
        hessian = known[names[0]] if known else stage.hessians(names[:1])[names[0]]
        for name in names:
            scheme = plan.rules[name].scheme
            with naming(name):
                result = LAYER_METHODS[method](latent_of(stage.module(name)), scheme, hessian=hessian, **options)
            plan.set_(name, result)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of the layer in front of a method's error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
