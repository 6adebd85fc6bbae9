"""Any method on a whole model: the result is a prepared model that holds exactly the method's codes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fewbits.convert import Rule
from fewbits.naming import did_you_mean
from fewbits.ptq.adaround import adaround
from fewbits.ptq.blockwise import block_ap_stage, signround_stage, train_scales
from fewbits.ptq.calibration import Blocks, Calibration, to_batches
from fewbits.ptq.capture import walk
from fewbits.ptq.gptq import gptq
from fewbits.ptq.hqq import hqq
from fewbits.ptq.kmeans import kmeans
from fewbits.ptq.plan import Plan, choose
from fewbits.ptq.rtn import rtn
from fewbits.ptq.stages import LayerMethod, awq_stage, each_layer, lapq_model, without_data
from fewbits.ptq.stream import rotate_


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method is run on a model.

    Attributes:
        stage: quantizes all layers of a stage that has data; None if no stage needs any.
        data_free: quantizes one weight without data, where the stage has none (embeddings; everything without
            ``stage``).
        after: goes on with the whole quantized model.
        functions: whose keyword arguments are the method's options.
        needs_data: whether calibration data must be given.
        needs_targets: whether a stage is compared with what it gave in full precision.
        layerwise: whether the layers of a block are quantized one after the other.
    """

    stage: Callable[..., None] | None = None
    data_free: LayerMethod = rtn
    after: Callable[..., None] | None = None
    functions: tuple[Callable[..., Any], ...] = ()
    needs_data: bool = True
    needs_targets: bool = False
    layerwise: bool = False


_METHODS: dict[str, Method] = {
    "rtn": Method(needs_data=False),
    "gptq": Method(stage=partial(each_layer, method=gptq), functions=(gptq,), layerwise=True),
    "adaround": Method(stage=partial(each_layer, method=adaround), functions=(adaround,), layerwise=True),
    "awq": Method(stage=awq_stage, functions=(awq_stage,)),
    "hqq": Method(data_free=hqq, functions=(hqq,), needs_data=False),
    "kmeans": Method(
        stage=partial(each_layer, method=kmeans),
        data_free=kmeans,
        functions=(kmeans,),
        needs_data=False,
        layerwise=True,
    ),
    "lapq": Method(after=lapq_model, functions=(lapq_model,)),
    "signround": Method(stage=signround_stage, functions=(signround_stage,), needs_targets=True),
    "block_ap": Method(
        stage=block_ap_stage, after=train_scales, functions=(block_ap_stage, train_scales), needs_targets=True
    ),
}
METHODS: tuple[str, ...] = tuple(_METHODS)
"""Every method that :func:`apply_ptq` knows."""
_NOT_OPTIONS = {"w", "scheme", "hessian", "inputs", "scale", "plan", "stage", "data", "method", "seed"}


def options_of(method: str) -> tuple[str, ...]:
    """Names of the options that a method takes in :func:`apply_ptq`, those of the walk included.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> options_of("awq")
        ('num_ratios', 'clip', 'num_blocks', 'batch_size', 'quantized_prefix', 'rotate', 'seed')
    """
    if method not in _METHODS:
        raise ValueError(
            f"unknown PTQ method {method!r}; {did_you_mean(method, METHODS)}use one of {', '.join(METHODS)}"
        )
    how = _METHODS[method]
    names = [name for function in how.functions for name in _keywords(function) if name not in _NOT_OPTIONS]
    if how.stage is not None or how.after is not None:
        names += ["num_blocks", "batch_size"]
    if how.stage is not None:
        names += ["quantized_prefix"]
    if how.layerwise:
        names += ["sequential"]
    return tuple(dict.fromkeys([*names, "rotate", "seed"]))


def _keywords(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _for(function: Callable[..., Any], options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The options that one function takes, and the seed if it draws."""
    names = _keywords(function)
    taken = {key: value for key, value in options.items() if key in names}
    return taken | ({"seed": seed} if "seed" in names else {})


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse what a method does not take.

    Raises:
        ValueError: for an unknown method or option, with the known ones, or a value of another type than the default's.
    """
    known = options_of(method)
    if unknown := sorted(set(options) - set(known)):
        near = did_you_mean(unknown[0], known)
        raise ValueError(f"method {method!r} has no option {unknown[0]!r}; {near}it takes {', '.join(known)}")
    defaults: dict[str, Any] = {"num_blocks": 64, "batch_size": 8, "seed": 0}
    for function in _METHODS[method].functions:
        defaults |= {key: p.default for key, p in inspect.signature(function).parameters.items()}
    for key, value in options.items():
        kind = type(defaults.get(key))
        taken = (int, float) if kind is float else (kind,)
        if kind in (bool, int, float) and (not isinstance(value, taken) or isinstance(value, bool) != (kind is bool)):
            words = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"option {key}={value!r} of {method!r} must be {words}, such as {defaults[key]!r}")


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
    sequential: bool | None = None,
    rotate: bool = False,
    seed: int = 0,
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
            plain module; ``rtn``, ``hqq`` and ``kmeans`` do without.
        ignore: patterns of layers to leave alone; ``["lm_head"]`` if None.
        num_blocks: use only so many of the blocks, spread evenly over all; None for all.
        batch_size: blocks in one forward pass.
        quantized_prefix: whether a transformer block sees the outputs of the quantized blocks before it, or those of
            the full-precision ones.
        sequential: the same inside a block, for methods that go layer by layer: whether a layer sees the quantized
            layers before it in its block (the default).
        rotate: fold a random rotation of the residual stream into the weights first, see
            :func:`~fewbits.ptq.stream.rotate_`.
        seed: of the rotation, and of methods that draw.
        **options: of the method, see its own function.

    Returns:
        The same model, prepared.

    Raises:
        ValueError: as :func:`fewbits.prepare`; for an unknown method or option, missing data, or dynamic scales (which
            are found anew at every use and cannot hold a method's; only ``rtn`` allows them, and ``kmeans`` those that
            are sizes of blocks).

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> _ = apply_ptq(model, Rule(scheme="W2A16G64"), "gptq", torch.randn(128, 64))
        >>> type(model[0]).__name__
        'QATLinear'
    """
    check_options(method, options if sequential is None else {**options, "sequential": sequential})
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    if not rules:
        raise ValueError("no rules: nothing to quantize; pass at least one Rule")
    how = _METHODS[method]
    if how.needs_data and blocks is None:
        raise ValueError(f"method {method!r} needs calibration data; pass blocks")
    if rotate:
        rotate_(model, seed=seed)
    chosen = choose(model, rules, method, ignore)
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        plan = Plan(model, chosen)
        batches = []
        if blocks is not None and (how.stage is not None or how.after is not None):
            batches = to_batches(blocks, batch_size, num_blocks, next(iter(model.parameters())).device)
        data = None if how.after is None else Calibration.of(model, batches)
        stages = walk(
            model,
            plan.owners,
            batches if how.stage is not None else [],
            quantized_prefix=quantized_prefix,
            need_targets=how.needs_targets,
        )
        extra = {"sequential": sequential is not False} if how.layerwise else {}
        for stage in stages:
            if stage.data_free or how.stage is None:
                without_data(plan, stage, how.data_free, **_for(how.data_free, options, seed))
            else:
                how.stage(plan, stage, **_for(how.functions[0], options, seed), **extra)
        if how.after is not None:
            how.after(plan, data, **_for(how.after, options, seed))
        plan.finish_()
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
    return model
