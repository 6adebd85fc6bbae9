"""Walking a model: transformer blocks one after the other, and what flows into the layers of each.

Nothing but this file and :mod:`fewbits.ptq.apply` knows of modules and hooks; the methods are pure tensors. A model is
cut into :class:`Stage` s: first its embeddings, then every transformer block, then the layers outside of them (an
untied output head). A model whose blocks cannot be told is one stage. Only the inputs of one block are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from fewbits.ptq.calibration import first_output, run_model


class _Enough(Exception):
    """No error: ends a forward pass whose rest nobody needs."""


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensor, and the normalization that wrote it (None for another source).

    Attributes:
        names: full names of the chosen layers, in the order in which they are called.
        norm: full name of the normalization, or None.
        others: linear layers that are not chosen but read the same tensor.
    """

    names: tuple[str, ...]
    norm: str | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Moments:
    """What is kept of a layer's inputs.

    Attributes:
        hessian: ``X^T X / n``, ``(in_features, in_features)`` float64.
        magnitude: mean abs(x) of every channel, ``(in_features,)`` float64.
    """

    hessian: Tensor
    magnitude: Tensor


@dataclass
class Stage:
    """A part of the model with its calibration inputs.

    Attributes:
        model: the whole model.
        name: of the block; empty for the whole model.
        layers: full names of the chosen layers in it, in model order.
        num_batches: calibration batches.
        targets: what the stage gave in full precision on inputs of the full-precision model, by batch (None unless
            asked for).
        data_free: no input of these layers is known (embeddings).
    """

    model: nn.Module
    name: str
    layers: tuple[str, ...]
    num_batches: int
    forward: Callable[[int], Tensor]
    targets: list[Tensor] | None = None
    data_free: bool = False
    _once: set[str] = field(default_factory=set)

    def module(self, name: str) -> nn.Module:
        """The module of this name as it is now."""
        return self.model.get_submodule(name)

    @torch.no_grad()
    def groups(self) -> list[Group]:
        """The chosen layers by common input, in the order of their calls; a layer that is never called comes last."""
        prefix = f"{self.name}." if self.name else ""
        inside = {prefix + key: module for key, module in self.module(self.name).named_modules()}
        layers = {k: m for k, m in inside.items() if k in self.layers or isinstance(m, nn.Linear | Conv1D)}
        with recording(layers, {k: m for k, m in inside.items() if is_norm(m)}) as (calls, norms):
            self.forward(0)
        order = [name for name, _ in calls]
        self._once = {name for name in self.layers if order.count(name) == 1}
        readers: list[tuple[Tensor, list[str]]] = []
        for name, x in calls:
            known = next((names for tensor, names in readers if is_same(tensor, x)), None)
            if known is None:
                readers.append((x, [name]))
            elif name not in known:
                known.append(name)
        found, seen = [], set()
        for x, names in readers:
            chosen = tuple(name for name in names if name in self.layers and name not in seen)
            seen |= set(chosen)
            if chosen:
                norm = next((name for name, out in norms if is_same(out, x)), None)
                found.append(Group(chosen, norm, tuple(name for name in names if name not in self.layers)))
        return found + [Group((name,)) for name in self.layers if name not in seen]

    @torch.no_grad()
    def moments(self, names: Sequence[str]) -> dict[str, Moments]:
        """Second and first absolute moments of each layer's inputs over all batches; 0 for one that is never called."""
        total = {name: _Sums.empty(self.module(name)) for name in names}
        waiting: set[str] = set()
        stop_early = self._once >= set(names)

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                total[name].add(args[0])
                waiting.discard(name)
                if stop_early and not waiting:
                    raise _Enough

            return hook

        with _hooks([self.module(name).register_forward_pre_hook(note(name)) for name in names]):
            for i in range(self.num_batches):
                waiting |= set(names)
                with _enough():
                    self.forward(i)
        return {name: sums.mean() for name, sums in total.items()}

    def hessians(self, names: Sequence[str]) -> dict[str, Tensor]:
        """:meth:`moments` without the magnitudes."""
        return {name: moments.hessian for name, moments in self.moments(names).items()}


@dataclass
class _Sums:
    second: Tensor
    first: Tensor
    count: int = 0

    @classmethod
    def empty(cls, layer: nn.Module) -> _Sums:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        width = int(getattr(layer, "in_features", weight.shape[0]))
        zeros = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
        return cls(zeros, zeros[0].clone())

    def add(self, x: Tensor) -> None:
        """One batch in fp32, the sum over batches in float64."""
        x = x.detach().reshape(-1, x.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        self.second += x.t() @ x
        self.first += x.abs().sum(0)
        self.count += len(x)

    def mean(self) -> Moments:
        return Moments(self.second / max(1, self.count), self.first / max(1, self.count))


@contextmanager
def _hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or a view of all of it (both alive)."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


@contextmanager
def recording(
    layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]
) -> Iterator[tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]]:
    """What reaches the layers and what the norms give while the block runs, with names, in the order of the calls."""
    reached: list[tuple[str, Tensor]] = []
    given: list[tuple[str, Tensor]] = []

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: reached.append((name, args[0]))

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, output: given.append((name, output))

    handles = [module.register_forward_pre_hook(before(name)) for name, module in layers.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in norms.items()]
    with _hooks(handles):
        yield reached, given


@contextmanager
def _enough() -> Iterator[None]:
    try:
        yield
    except _Enough:
        return


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a normalization with a gain: one axis of weights (and biases), no children."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and all(p.ndim == 1 for p in own.values()) and not list(module.children())


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the transformer blocks: the entries of the module list that holds the most of the layers."""
    layers = list(layers)
    best: list[str] = []
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        prefix = f"{name}." if name else ""
        inside = sum(layer.startswith(prefix) for layer in layers)
        if inside > most:
            best, most = [f"{prefix}{i}" for i in range(len(module))], inside
    return best


@dataclass
class _Call:
    """How a model calls its blocks on one batch: the first block's input, and the other arguments of each block."""

    hidden: Tensor
    rest: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, model: nn.Module, block: str, hidden: Tensor) -> Tensor:
        """What a block gives on another input, with the same other arguments."""
        args, kwargs = self.rest[block]
        return first_output(model.get_submodule(block)(hidden, *args, **kwargs))


@torch.no_grad()
def _record(model: nn.Module, blocks: Sequence[str], batch: Tensor) -> _Call | None:
    """None where the blocks are not called one after the other on each other's output."""
    inputs: list[tuple[str, Tensor]] = []
    outputs: list[Tensor] = []
    rest: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states", None)
            inputs.append((name, hidden))
            rest[name] = (args[1:], kwargs)

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(first_output(output))

    handles = [model.get_submodule(n).register_forward_pre_hook(before(n), with_kwargs=True) for n in blocks]
    handles += [model.get_submodule(n).register_forward_hook(after) for n in blocks]
    with _hooks(handles):
        run_model(model, batch)
    in_order = [name for name, _ in inputs] == list(blocks)
    if not in_order or not all(out is x for out, (_, x) in zip(outputs, inputs[1:], strict=False)):
        return None
    return _Call(inputs[0][1], rest)


def walk(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Tensor],
    *,
    quantized_prefix: bool = True,
    need_targets: bool = False,
) -> Iterator[Stage]:
    """Stages of a model in the order of its computation; change the layers of a stage before asking for the next.

    Args:
        model: in evaluation mode.
        layers: full names of the chosen layers.
        batches: calibration data, see :func:`~fewbits.ptq.calibration.to_batches`; without any the whole model is one
            stage that knows no inputs.
        quantized_prefix: whether a stage sees what the stages before it give now, or what they gave at the start.
        need_targets: whether :attr:`Stage.targets` is wanted; costs one more forward pass.
    """
    if not batches:
        yield Stage(model, "", tuple(layers), 0, _no_data, data_free=True)
        return
    tables = tuple(name for name in layers if isinstance(model.get_submodule(name), nn.Embedding))
    names = find_blocks(model, layers)
    calls = [_record(model, names, batch) for batch in batches] if names else []
    chain = [call for call in calls if call is not None]
    if len(chain) != len(batches):
        names, chain = [], []
    clean = [call.hidden for call in chain]  # the stream of the full-precision model
    outside = tuple(n for n in layers if n not in tables and not any(n.startswith(f"{b}.") for b in names))
    whole = _whole_targets(model, batches) if need_targets and outside else None
    if tables:
        yield Stage(model, "", tables, 0, _no_data, data_free=True)
        if chain and quantized_prefix:
            again = [_record(model, names, batch) for batch in batches]
            chain = [call for call in again if call is not None]
    hidden = [call.hidden for call in chain]
    follow_clean = need_targets or not quantized_prefix
    for name in names:
        inside = tuple(n for n in layers if n.startswith(f"{name}."))
        forward = _block_forward(model, name, chain, hidden if quantized_prefix else clean)
        with torch.no_grad():
            targets = [chain[i].run(model, name, x) for i, x in enumerate(clean)] if follow_clean else None
        if inside:
            yield Stage(model, name, inside, len(batches), forward, targets if need_targets else None)
        if quantized_prefix:
            with torch.no_grad():
                hidden = [forward(i) for i in range(len(batches))]
        if targets is not None:
            clean = targets
    if outside:
        yield Stage(model, "", outside, len(batches), lambda i: run_model(model, batches[i]), whole)


def _no_data(index: int) -> Tensor:
    raise AssertionError(f"a stage without data was asked for batch {index}")


@torch.no_grad()
def _whole_targets(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    return [run_model(model, batch) for batch in batches]


def _block_forward(
    model: nn.Module, name: str, calls: Sequence[_Call], hidden: Sequence[Tensor]
) -> Callable[[int], Tensor]:
    return lambda i: calls[i].run(model, name, hidden[i])
