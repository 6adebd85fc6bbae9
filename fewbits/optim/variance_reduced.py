r"""Control variates around any torch optimizer: L-SVRG, SVRG, SAGA-like and SARAH-like. Off by default.

With :math:`F_S(W, B)` the gradient of a minibatch S at weights W and gains B, the optimizer is given

========== ==================================================================== ==================================
form       gradient                                                             anchor
========== ==================================================================== ==================================
``none``   :math:`F_S(W, B)`                                                    none
``l_svrg`` :math:`F_S(W, B) - F_S(\tilde W, \tilde B) + \tilde g`               renewed with probability p
``svrg``   the same                                                             renewed every ``interval`` steps
``sarah``  the same                                                             the previous step; :math:`\tilde g` is
                                                                                the previous estimate, exact every
                                                                                ``interval`` steps
``saga``   :math:`F_i(W, B) - Y_i + \mathrm{mean}\,Y`, then :math:`Y_i = F_i`   one old gradient per batch
========== ==================================================================== ==================================

:math:`\tilde g` is the mean gradient of the reference batches at the anchor. Both terms see the same minibatch and
the same dropout masks (the same random state). At the anchor they cancel bit for bit, and so they do in a
code-preserving window (same codes, scales and gains): there the estimate for the latent weights *is* the reference
gradient (LSQ's scale gradient reads the latent weight itself and cancels to first order only).

Reference: JacQuant-VR, arXiv:2605.25469; L-SVRG arXiv:1901.08689; SAGA arXiv:1407.0202; SARAH arXiv:1703.00102.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fewbits.optim._replay import Replay

logger = logging.getLogger(__name__)

Form = Literal["none", "l_svrg", "svrg", "sarah", "saga"]
LossFunction = Callable[[Any], Tensor]
"""Maps a batch to a scalar loss that was computed with the model's current weights."""


@dataclass(frozen=True, kw_only=True)
class VarianceReduction:
    """Which control variate, and how often its anchor is renewed.

    Args:
        form: ``none``, ``l_svrg``, ``svrg``, ``sarah`` or ``saga``.
        probability: of a new anchor before each step, (0, 1]; ``l_svrg`` only. The paper's ablation uses 1e-3.
        interval: steps between exact reference gradients, >= 1; ``svrg`` and ``sarah`` only.
        seed: of the coin of ``l_svrg`` and of the dropout masks of reference gradients.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> VarianceReduction(form="l_svrg", probability=0.01).expected_passes(num_reference=50)
        2.5
    """

    form: Form = "none"
    probability: float = 1e-3
    interval: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"form={self.form!r} is unknown; use one of {', '.join(get_args(Form))}")
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability={self.probability} is outside (0, 1]; use form='none' for no anchor at all")
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be at least 1")

    def expected_passes(self, num_reference: int) -> float:
        r"""Forward-and-backward passes per step and minibatch in the long run; plain training makes one.

        :math:`2 + p n` (L-SVRG), :math:`2 + n / K` (SVRG, SARAH), 1 (SAGA, after n passes to fill its table).
        """
        if self.form in ("none", "saga"):
            return 1.0
        rate = self.probability if self.form == "l_svrg" else 1 / self.interval
        return 2.0 + rate * num_reference


class VarianceReduced:
    r"""Steps of a torch optimizer with a variance-reduced gradient.

    The closure may hold anything: distillation from a teacher, autocast, several losses. Gradient accumulation: pass
    several micro-batches to :meth:`step`; the estimate is that of their mean. Learning-rate schedules act on
    ``optimizer`` as ever; to clip gradients, call :meth:`gradient_`, clip, then ``optimizer.step()``.

    Unbiased given the anchor (``l_svrg``, ``svrg``, ``saga``), if minibatches are drawn uniformly from the reference
    batches; ``sarah`` is biased between exact gradients. With dropout the reference gradient is one draw of the masks.
    The forward pass must stay the same function of weights and gains from one anchor to the next: call
    :meth:`renew_anchor` after refitting codebooks or changing a noise schedule.

    Memory: two tensors of the size of the weights (anchor and reference gradient) plus a copy of the gains; ``saga``
    instead keeps one gradient per reference batch, and their mean. It is announced at construction (logging, INFO)
    and allocated at the first step. During a step one more gradient is alive.

    Args:
        optimizer: any torch optimizer that needs no closure of its own.
        model: the module that the closure runs. Gains of its JacQuant layers belong to the anchor; its other buffers
            come back after each pass at the anchor (batch statistics are counted once).
        reference: the batches of the reference gradient; for ``saga`` every training batch must be one of them.
        settings: form and schedule; the default does nothing.

    Raises:
        ValueError: if a form other than ``none`` has no reference batch, or nothing is trained.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> batches = [torch.eye(2)[:1], torch.eye(2)[1:]]
        >>> vr = VarianceReduced(sgd, layer, batches, VarianceReduction(form="l_svrg"))
        >>> vr.extra_bytes
        16
        >>> loss = vr.step(lambda x: layer(x).square().sum(), batches[0])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        reference: Sequence[Any] = (),
        settings: VarianceReduction | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.settings = settings or VarianceReduction()
        self.reference = list(reference)
        self.num_steps = 0
        self.num_passes = 0
        """Forward-and-backward passes made so far, reference gradients included."""
        if self.settings.form != "none" and not self.reference:
            raise ValueError(f"form={self.settings.form!r} needs reference batches; pass reference=[batch, ...]")
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            raise ValueError("the optimizer has no parameter that requires a gradient; nothing is left to train")
        self._replay = Replay(model, params)
        self._anchor: list[Tensor] | None = None
        self._mean: list[Tensor] | None = None
        self._table: list[list[Tensor]] = []
        self._coin = torch.Generator().manual_seed(self.settings.seed)
        if self.extra_bytes:
            logger.info(
                "variance reduction (%s): %.1f MiB more memory, %.2f passes per step instead of 1",
                self.settings.form,
                self.extra_bytes / 2**20,
                self.settings.expected_passes(len(self.reference)),
            )

    @property
    def extra_bytes(self) -> int:
        """Bytes that the wrapper keeps between steps beyond those of the plain optimizer, on the weights' devices."""
        form = self.settings.form
        if form == "none":
            return 0
        if form == "saga":
            return self._replay.gradient_bytes * (len(self.reference) + 1)
        return self._replay.anchor_bytes + self._replay.gradient_bytes

    def step(self, loss_fn: LossFunction, *batches: Any) -> Tensor:
        """One optimizer step.

        Args:
            loss_fn: maps a batch to a scalar loss with a graph; called for every micro-batch, and again at the anchor.
            *batches: the minibatch, or the micro-batches of one step (equal weights).

        Returns:
            Mean loss of the minibatch at the current weights, detached.

        Raises:
            ValueError: without a batch, and for ``saga`` if a batch is not one of the reference or is given twice.
        """
        loss = self.gradient_(loss_fn, *batches)
        self.optimizer.step()
        return loss

    def gradient_(self, loss_fn: LossFunction, *batches: Any) -> Tensor:
        """Leave the estimate in the parameters' ``.grad``, as ``loss.backward()`` would; see :meth:`step`."""
        if not batches:
            raise ValueError("step needs at least one batch")
        form = self.settings.form
        if form == "saga":
            return self._saga_(loss_fn, batches)
        if form == "none":
            loss = self._run(loss_fn, batches)
            self.num_steps += 1
            return loss
        if self._renewal_is_due():
            self.renew_anchor(loss_fn)
        assert self._anchor is not None
        assert self._mean is not None
        stream = self._replay.stream()
        loss = self._run(loss_fn, batches)
        now = self._replay.take_gradients()
        with self._replay.at(self._anchor, stream):
            self._run(loss_fn, batches)
            before = self._replay.take_gradients()
        # in this order: at the anchor the first two cancel exactly, and the reference gradient is left
        estimate = [a.sub_(b).add_(g) for a, b, g in zip(now, before, self._mean, strict=True)]
        self._replay.give_gradients_(estimate)
        if form == "sarah":
            self._anchor, self._mean = self._replay.copy_state(), estimate
        self.num_steps += 1
        return loss

    def _renewal_is_due(self) -> bool:
        s = self.settings
        if s.form == "l_svrg":  # the coin is thrown at every step, so that its stream only depends on their number
            heads = float(torch.rand((), generator=self._coin)) < s.probability
            return heads or self._anchor is None
        return self._anchor is None or self.num_steps % s.interval == 0

    def renew_anchor(self, loss_fn: LossFunction) -> None:
        """Put the anchor at the current weights and gains, and find the reference gradient (one pass per batch).

        The training stream is untouched: masks come from a stream of seed and step.
        """
        self._anchor = self._replay.copy_state()
        total: list[Tensor] | None = None
        with self._replay.aside(self._seed()):
            for batch in self.reference:
                self._run(loss_fn, (batch,))
                gradients = self._replay.take_gradients()
                total = gradients if total is None else [t.add_(g) for t, g in zip(total, gradients, strict=True)]
        assert total is not None
        self._mean = [t.div_(len(self.reference)) for t in total]

    def _seed(self) -> int:
        return self.settings.seed * 1_000_003 + self.num_steps

    def _saga_(self, loss_fn: LossFunction, batches: Sequence[Any]) -> Tensor:
        index = [next((i for i, r in enumerate(self.reference) if r is batch), -1) for batch in batches]
        if -1 in index:
            raise ValueError("form='saga' knows the reference batches only; pass the same objects to step")
        if len(set(index)) < len(index):
            raise ValueError("form='saga' was given a batch twice in one step; its table has one place for it")
        if not self._table:
            with self._replay.aside(self._seed()):
                for batch in self.reference:
                    self._run(loss_fn, (batch,))
                    self._table.append(self._replay.take_gradients())
            self._mean = [sum(column).div_(len(self._table)) for column in zip(*self._table, strict=True)]
        assert self._mean is not None
        losses, shift = [], [torch.zeros_like(m) for m in self._mean]
        for i, batch in zip(index, batches, strict=True):
            losses.append(self._run(loss_fn, (batch,)))
            now = self._replay.take_gradients()
            for total, new, old in zip(shift, now, self._table[i], strict=True):
                total.add_(new - old)
            self._table[i] = now
        self._replay.give_gradients_([s / len(batches) + m for s, m in zip(shift, self._mean, strict=True)])
        for s, mean in zip(shift, self._mean, strict=True):
            mean.add_(s / len(self.reference))
        self.num_steps += 1
        return torch.stack(losses).mean()

    def _run(self, loss_fn: LossFunction, batches: Sequence[Any]) -> Tensor:
        """Mean loss of the batches; its gradient is in ``.grad``, which was empty before."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch in batches:
            loss = loss_fn(batch)
            (loss if len(batches) == 1 else loss / len(batches)).backward()
            losses.append(loss.detach())
            self.num_passes += 1
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, anchor, reference gradient or table, coin and counters: enough to go on bit for bit."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "form": self.settings.form,
            "anchor": self._anchor,
            "mean": self._mean,
            "table": self._table,
            "coin": self._coin.get_state(),
            "reached": self._replay.reached,
            "num_steps": self.num_steps,
            "num_passes": self.num_passes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: if it is of another form, or of other weights.
        """
        if state["form"] != self.settings.form:
            raise ValueError(f"the state is of form {state['form']!r}, the settings say {self.settings.form!r}")
        self._replay.check(state["anchor"], state["mean"], state["table"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._anchor, self._mean = _copied(state["anchor"]), _copied(state["mean"])
        self._table = [_copied(row) for row in state["table"]]
        self._coin.set_state(state["coin"])
        self._replay.reached = state.get("reached", [])
        self.num_steps, self.num_passes = state["num_steps"], state["num_passes"]


def _copied(tensors: Any) -> Any:
    return None if tensors is None else [t.clone() for t in tensors]
