r"""Zeroth-order training: gradients from pairs of forward passes, no backward pass and nothing kept for one.

.. math:: \hat g = \frac1q \sum_{i=1}^{q} \frac{L(\theta + \varepsilon u_i) - L(\theta - \varepsilon u_i)}
          {2\varepsilon}\,u_i, \qquad u_i \sim N(0, I)

It estimates the gradient of the *smoothed* loss :math:`E_u L(\theta + \varepsilon u)`, which exists although L, a loss
of rounded weights, is a staircase: no surrogate takes part. On a linear loss it is unbiased with
:math:`E\|\hat g - g\|^2 = \frac{d + 1}{q}\|g\|^2` in d dimensions, and even terms of L cancel in every pair.

**Perturbing in place and coming back exactly.** In floating point, w + e - e is not w. So every trained tensor lives on
a lattice: multiples of :math:`h = 2^{k - 22}` with :math:`2^k \ge \max(\max|w|, 8\varepsilon)`, fp32. Perturbations are
rounded to the same lattice. Sums and differences of multiples of h below :math:`2^{24} h` are exact in fp32, and
:math:`|w| + \varepsilon|u| \le 2 \cdot 2^k < 2^{24} h`, so the weights come back bit for bit without a copy. The price:
a weight moves by at most :math:`h/2 \le 2^{-22} \max|w|` when it is first put on the lattice, and updates are
rounded to it. Random numbers come from seeds, in pieces, and are drawn again whenever they are needed.

Reference: ZeroQAT, arXiv:2509.00031; MeZO, arXiv:2305.17333.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from fewbits.convert import closest_names, matches, owned_layers
from fewbits.optim.groups import parameter_groups
from fewbits.surrogates import STE

_PIECE = 2**16
"""Random numbers drawn at once."""
_LATTICE_BITS = 22
_MIN_STEPS = 16
_MAX_NORMAL = 8.0
"""No normal number of a float generator is larger: 8 standard deviations have probability 1e-15."""

Loss = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class ZerothOrder:
    """Options of the estimate.

    Args:
        num_directions: q, pairs of forward passes per micro-batch, >= 1.
        epsilon: size of the perturbation of weights, > 0; in units of the weights. The paper uses 1e-4 to 1e-3.
        scale_epsilon: the same for learned scales; None means ``epsilon``.
        seed: of the directions.
        only: patterns of parameter names that are trained; none means all. ZeroQAT's light variant is
            ``("*q_proj*", "*v_proj*")``.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> ZerothOrder(num_directions=4).epsilon
        0.001
    """

    num_directions: int = 1
    epsilon: float = 1e-3
    scale_epsilon: float | None = None
    seed: int = 0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.only, list):
            object.__setattr__(self, "only", tuple(self.only))
        if not isinstance(self.num_directions, int) or self.num_directions < 1:
            raise ValueError(f"num_directions={self.num_directions!r} must be a whole number of at least 1")
        for name in ("epsilon", "scale_epsilon"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be a positive number; the paper uses 1e-4 to 1e-3")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} must be a whole number of at least 0")
        if not isinstance(self.only, tuple) or not all(isinstance(pattern, str) for pattern in self.only):
            raise ValueError(f"only={self.only!r} must be a list of patterns of parameter names")


def gradient_from_dict(data: Mapping[str, Any] | str) -> ZerothOrder | None:
    """What a recipe's ``train.gradient`` says; None for ``backprop``. A plain name means the defaults.

    Raises:
        ValueError: for an unknown name or option.

    Example:
        >>> gradient_from_dict({"name": "zeroth_order", "num_directions": 2}).num_directions
        2
        >>> gradient_from_dict("backprop") is None
        True
    """
    options = {"name": data} if isinstance(data, str) else dict(data)
    name = options.pop("name", None)
    if name not in ("backprop", "zeroth_order"):
        raise ValueError(f"unknown gradient {name!r}; use backprop or zeroth_order")
    known = sorted(ZerothOrder.__dataclass_fields__) if name == "zeroth_order" else []
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"gradient {name!r} has no option {unknown[0]!r}; options: {', '.join(known) or 'none'}")
    return None if name == "backprop" else ZerothOrder(**options)


def check_beside_zeroth_order(
    *, optim: str, rest_optim: str | None, optim_options: Mapping[str, Any], max_grad_norm: float, checkpointing: bool
) -> None:
    """Refuse options that would do nothing without a backward pass.

    Raises:
        ValueError: naming the option and what to write.
    """
    for name, value, needed in (
        ("optim", optim, "sgd"),
        ("rest_optim", rest_optim, None),
        ("optim_options", dict(optim_options), {}),
        ("max_grad_norm", max_grad_norm, 0),
        ("activation_checkpointing", checkpointing, False),
    ):
        if value != needed:
            raise ValueError(
                f"{name}={value!r} does nothing with gradient zeroth_order, which steps by SGD in place and keeps no "
                f"gradient; write {name}: {'null' if needed is None else needed}"
            )


def build_zeroth_order(model: nn.Module, groups: Sequence[dict[str, Any]], settings: ZerothOrder) -> ZerothOrderSGD:
    """The optimizer over the parameters that ``settings.only`` names.

    Args:
        model: a prepared model with the identity STE: no surrogate acts without a backward pass.
        groups: of :func:`~fewbits.optim.groups.parameter_groups`.
        settings: of the estimate.

    Raises:
        ValueError: for another surrogate, a pattern that matches no trained parameter, or a parameter that is not fp32.
    """
    for name, layer in owned_layers(model):
        if not isinstance(layer.surrogate, STE):
            raise ValueError(
                f"{name}: surrogate {layer.surrogate.name!r} does nothing with gradient zeroth_order, which has no "
                "backward pass; write surrogate: ste"
            )
    names = {id(p): name for name, p in model.named_parameters()}
    trained = [names[id(p)] for group in groups for p in group["params"]]
    for pattern in settings.only:
        if not any(matches(pattern, name) for name in trained):
            raise ValueError(
                f"zeroth_order only={pattern!r} matches no trained parameter; near names: "
                f"{closest_names(pattern, trained)}"
            )
    if settings.only:
        groups = [
            {**group, "params": [p for p in group["params"] if any(matches(x, names[id(p)]) for x in settings.only)]}
            for group in groups
        ]
    return ZerothOrderSGD([group for group in groups if group["params"]], settings, names)


def lattice_step(p: Tensor, epsilon: float) -> float:
    """h of the lattice on which ``p`` can be perturbed and restored exactly.

    Example:
        >>> lattice_step(torch.tensor([0.3, -0.9]), 1e-3) == 2.0**-22
        True
    """
    low, high = torch.aminmax(p.detach())  # no temporary of the tensor's size, as abs() would be
    reach = max(-float(low), float(high), _MAX_NORMAL * epsilon)
    return 2.0 ** (math.ceil(math.log2(reach)) - _LATTICE_BITS) if math.isfinite(reach) else math.nan


def _pieces(p: Tensor, key: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of ``p`` as flat views, each with its standard normal numbers, a function of the key alone."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator(p.device).manual_seed(int.from_bytes(digest[:7], "little"))
    flat = p.detach().view(-1)
    for start in range(0, flat.numel(), _PIECE):
        part = flat[start : start + _PIECE]
        yield part, torch.randn(part.numel(), generator=generator, device=p.device).clamp_(-_MAX_NORMAL, _MAX_NORMAL)


def zeroth_order_optimizer(
    settings: ZerothOrder,
    name: str,
    model: nn.Module,
    args: TrainingArguments,
    *,
    scale_learning_rate: float | None = None,
    rest_learning_rate: float | None = None,
    rest_optim: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> ZerothOrderSGD:
    """:func:`build_zeroth_order` with the Trainer's rates; arguments as of :func:`fewbits.optim.build_optimizer`.

    Raises:
        ValueError: as :func:`check_beside_zeroth_order` and :func:`build_zeroth_order`.
    """
    check_beside_zeroth_order(
        optim=name,
        rest_optim=rest_optim,
        optim_options=options or {},
        max_grad_norm=args.max_grad_norm,
        checkpointing=bool(args.activation_checkpointing),
    )
    rate = args.learning_rate
    groups = parameter_groups(
        model,
        learning_rate=rate,
        scale_learning_rate=rate if scale_learning_rate is None else scale_learning_rate,
        rest_learning_rate=rate if rest_learning_rate is None else rest_learning_rate,
        weight_decay=args.weight_decay,
    )
    return build_zeroth_order(model, groups, settings)


class ZerothOrderSGD(torch.optim.Optimizer):
    r"""SGD on the estimate: :math:`\theta \leftarrow \theta - \eta(\hat g + \lambda\theta)`, per group.

    :meth:`accumulate` measures a micro-batch and keeps q numbers and their seeds; :meth:`step` draws the directions
    again and moves. Between them the weights are what they were, bit for bit. The state is one counter.

    Args:
        named_groups: groups as of :func:`~fewbits.optim.groups.parameter_groups`; ``params`` in fp32.
        settings: of the estimate.
        names: name of every parameter by its ``id``: seeds depend on names, not on order.

    Raises:
        ValueError: for a parameter that is not fp32, or patterns of ``only`` that match nothing.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = ZerothOrderSGD([{"params": [w], "lr": 0.1}], ZerothOrder(num_directions=8), {id(w): "w"})
        >>> for _ in range(50):
        ...     _ = optimizer.accumulate(lambda: w.square().sum())
        ...     optimizer.step()
        >>> bool(w.abs().max() < 0.1)
        True
    """

    def __init__(self, named_groups: Sequence[dict[str, Any]], settings: ZerothOrder, names: Mapping[int, str]) -> None:
        super().__init__([dict(group) for group in named_groups], {"lr": 1e-6, "weight_decay": 0.0})
        self.settings = settings
        self._names = dict(names)
        self._measured: list[list[tuple[str, float]]] = []
        for group in self.param_groups:
            group.setdefault("num_steps", 0)
            for p in group["params"]:
                if p.dtype != torch.float32 or not p.is_contiguous():
                    raise ValueError(
                        f"{names[id(p)]} is {p.dtype}; exact perturbation needs contiguous float32 parameters: load "
                        "the model in float32 (the forward pass may still run in bf16)"
                    )

    def _tensors(self) -> Iterator[tuple[Tensor, str, float, dict[str, Any]]]:
        """Every parameter with its name, epsilon and group."""
        s = self.settings
        for group in self.param_groups:
            scale = group.get("name") == "scale" and s.scale_epsilon is not None
            epsilon = s.scale_epsilon if scale else s.epsilon
            assert epsilon is not None
            for p in group["params"]:
                yield p, self._names[id(p)], epsilon, group

    @torch.no_grad()
    def _snap_(self) -> dict[str, float]:
        """Put the weights on their lattices (nothing moves once they are there); steps by name."""
        steps = {}
        for p, name, epsilon, _ in self._tensors():
            h = steps[name] = lattice_step(p, epsilon)
            if epsilon < _MIN_STEPS * h:
                raise ValueError(
                    f"{name} reaches {float(p.detach().abs().max()):.6g}; beside it epsilon={epsilon} is less than "
                    f"{_MIN_STEPS} steps of the lattice of exact fp32 sums; use a larger epsilon, or leave it out by "
                    "only="
                )
            if math.isfinite(h):
                p.div_(h).round_().mul_(h)  # h is a power of two: only the rounding rounds
        return steps

    @torch.no_grad()
    def _move_(self, key: str, factor: int, steps: Mapping[str, float]) -> None:
        """Add ``factor`` times the perturbation, in place; exact on the lattice."""
        for p, name, epsilon, _ in self._tensors():
            h = steps[name]
            if not math.isfinite(h):
                continue
            for part, u in _pieces(p, f"{key}/{name}"):
                part.add_(u.mul_(epsilon / h).round_(), alpha=factor * h)

    @torch.no_grad()
    def accumulate(self, loss: Loss) -> Tensor:
        """Measure the loss of a micro-batch along every direction; weights come back bit for bit, also on an error.

        Both passes of a pair see the same random state (dropout masks), and the stream goes on as after one pass.

        Args:
            loss: computes the loss of the micro-batch at the current weights, the same way at every call.

        Returns:
            Mean of all measured losses.

        Raises:
            ValueError: for a parameter beside whose largest entry ``epsilon`` is too small to be added exactly.
        """
        steps = self._snap_()
        measured: list[tuple[str, float]] = []
        total = torch.zeros(())
        devices = sorted({p.device.index or 0 for p, *_ in self._tensors() if p.device.type == "cuda"})
        cpu, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]

        def at(factor: int, key: str) -> Tensor:
            torch.set_rng_state(cpu)
            for device, state in zip(devices, cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            self._move_(key, factor, steps)
            try:
                return loss().detach().float().cpu()
            finally:
                self._move_(key, -factor, steps)

        number = self.param_groups[0]["num_steps"]
        for i in range(self.settings.num_directions):
            key = f"{self.settings.seed}/{number}/{len(self._measured)}/{i}"
            plus, minus = at(1, key), at(-1, key)
            measured.append((key, float((plus.double() - minus.double()) / 2)))
            total += (plus + minus) / 2
        self._measured.append(measured)
        return total / self.settings.num_directions

    @torch.no_grad()
    def gradient(self, name: str) -> Tensor:
        """The estimate for one parameter from what was accumulated, as a tensor; training never makes it."""
        for p, other, epsilon, _ in self._tensors():
            if other == name:
                result = torch.zeros_like(p)
                for key, weight in self._weights():
                    flat = _pieces(result, f"{key}/{name}")
                    for part, u in flat:
                        part.add_(self._direction(u, p, epsilon), alpha=weight / epsilon)
                return result
        raise ValueError(f"no parameter {name!r} is trained")

    def _weights(self) -> list[tuple[str, float]]:
        """Key and half difference of every measured pair, divided by their number."""
        pairs = [pair for measured in self._measured for pair in measured]
        return [(key, half / len(pairs)) for key, half in pairs]

    @staticmethod
    def _direction(u: Tensor, p: Tensor, epsilon: float) -> Tensor:
        """The direction as it was measured: rounded to the lattice."""
        h = lattice_step(p, epsilon)
        return u.mul_(epsilon / h).round_().mul_(h / epsilon)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move along the estimate of everything accumulated since the last step.

        Raises:
            ValueError: for a closure, or if nothing was accumulated.
        """
        if closure is not None:
            raise ValueError("a closure is not needed; call accumulate(loss) before step()")
        if not self._measured:
            raise ValueError("nothing was accumulated; call accumulate(loss) before step()")
        weights = self._weights()
        for p, name, epsilon, group in self._tensors():
            h, lr = lattice_step(p, epsilon), group["lr"]
            p.mul_(1 - lr * group["weight_decay"])
            for key, weight in weights:
                for part, u in _pieces(p, f"{key}/{name}"):
                    part.add_(u.mul_(epsilon / h).round_(), alpha=-lr * weight * h / epsilon**2)
        self._measured = []
        for group in self.param_groups:
            group["num_steps"] += 1
