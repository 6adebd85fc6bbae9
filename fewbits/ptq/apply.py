"""Any method on a whole model: the result is a prepared model that holds exactly the method's codes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fewbits.convert import Rule
from fewbits.ptq.capture import Blocks, walk
from fewbits.ptq.gptq import gptq
from fewbits.ptq.plan import Plan, choose
from fewbits.ptq.rtn import rtn
from fewbits.ptq.stages import LayerMethod, awq_stage, each_layer, without_data
from fewbits.ptq.stream import rotate_


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method is run on a model.

    Attributes:
        stage: quantizes all layers of a stage that has data; takes the method's options.
        data_free: quantizes one weight without data: always, or (for embeddings) where a calibrated method has none.
        options_from: the functions whose keyword arguments are the method's options.
        needs_data: whether calibration data must be given.
        layerwise: whether layers of a block are quantized one after the other.
    """

    stage: Callable[..., None] | None = None
    data_free: LayerMethod = rtn
    options_from: tuple[Callable[..., Any], ...] = ()
    needs_data: bool = True
    layerwise: bool = False


_METHODS: dict[str, Method] = {
    "rtn": Method(needs_data=False),
    "gptq": Method(stage=partial(each_layer, method=gptq), options_from=(gptq,), layerwise=True),
    "awq": Method(stage=awq_stage, options_from=(awq_stage,)),
}
METHODS: tuple[str, ...] = tuple(_METHODS)
"""Every method that :func:`apply_ptq` knows."""
WALK_OPTIONS = ("num_blocks", "batch_size", "quantized_prefix", "sequential", "rotate", "seed")
"""Options of :func:`apply_ptq` itself, which go with every method."""
_NOT_OPTIONS = {"w", "scheme", "hessian", "inputs", "scale", "plan", "stage", "method"}


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
    names = [k for function in _METHODS[method].options_from for k in inspect.signature(function).parameters]
    return tuple(dict.fromkeys(k for k in names if k not in _NOT_OPTIONS))


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
            plain module; not needed for ``rtn``.
        ignore: patterns of layers to leave alone; ``["lm_head"]`` if None.
        num_blocks: use only so many of the blocks, spread evenly over all; None for all.
        batch_size: blocks in one forward pass.
        quantized_prefix: whether a transformer block sees the outputs of the quantized blocks before it, or those of
            the full-precision ones.
        sequential: the same inside a block: whether a layer sees the quantized layers before it in its block.
        rotate: fold a random rotation of the residual stream into the weights first, see
            :func:`~fewbits.ptq.stream.rotate_`.
        seed: of the rotation, and of methods that draw.
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
        common: dict[str, Any] = {
            "num_blocks": num_blocks,
            "batch_size": batch_size,
            "quantized_prefix": quantized_prefix,
        }
        for stage in walk(model, plan.owners, blocks if how.stage else None, **common):
            if stage.data_free or how.stage is None:
                without_data(plan, stage, how.data_free, **({} if how.stage else options))
            elif how.layerwise:
                how.stage(plan, stage, sequential=sequential, **options)
            else:
                how.stage(plan, stage, **options)
        plan.finish_()
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
    return model
