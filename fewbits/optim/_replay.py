"""Running the same minibatch once more at other weights, with the same random draws, and leaving no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewbits.convert import owned_layers


def _wide(p: Tensor) -> torch.dtype:
    """Gradients of half-precision weights are averaged and subtracted in fp32."""
    return torch.promote_types(p.dtype, torch.float32)


class Replay:
    """Swaps weights and gains of a model for older ones and back; no tensor is copied by a swap.

    Args:
        model: the module; the surrogate states of its QAT layers (gains) are swapped with the weights.
        params: the trained parameters; one that stands there twice counts once.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor]) -> None:
        self.model = model
        self.params = list({id(p): p for p in params}.values())
        self._reached: set[int] = set()

    @property
    def gains(self) -> list[Tensor]:
        """Tensors of the surrogates' states; looked up anew, since ``model.to`` replaces buffers."""
        return [value for _, layer in owned_layers(self.model) for value in layer.state().values()]

    @property
    def reached(self) -> list[int]:
        """Places of the parameters that some loss has reached."""
        return sorted(self._reached)

    @reached.setter
    def reached(self, places: Sequence[int]) -> None:
        """What a saved state had."""
        self._reached = set(places)

    @property
    def devices(self) -> list[int]:
        """CUDA devices of the weights."""
        return sorted({p.device.index or 0 for p in self.params if p.device.type == "cuda"})

    @property
    def anchor_bytes(self) -> int:
        """Size of one copy of weights and gains."""
        return sum(t.numel() * t.element_size() for t in [*self.params, *self.gains])

    @property
    def gradient_bytes(self) -> int:
        """Size of one gradient as it is kept here, fp32 or wider."""
        return sum(p.numel() * _wide(p).itemsize for p in self.params)

    def check(self, anchor: list[Tensor] | None, mean: list[Tensor] | None, table: list[list[Tensor]]) -> None:
        """Refuse a saved state whose shapes are not those of the weights.

        Raises:
            ValueError: naming the first two shapes that differ.
        """
        live = [tuple(t.shape) for t in [*self.params, *self.gains]]
        for found in (anchor, mean, *table):
            expected = live if found is anchor else live[: len(self.params)]
            if found is not None and [tuple(t.shape) for t in found] != expected:
                raise ValueError(f"the state has {[tuple(t.shape) for t in found][:2]}, the model {expected[:2]}, ...")

    def copy_state(self) -> list[Tensor]:
        """A copy of weights and gains."""
        return [t.detach().clone() for t in [*self.params, *self.gains]]

    def stream(self) -> list[Tensor]:
        """State of torch's random streams: the CPU's, then one per CUDA device of the weights."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]

    def take_gradients(self) -> list[Tensor]:
        """Move the gradients out of ``.grad``; zeros for parameters that the loss did not reach."""
        taken = []
        for i, p in enumerate(self.params):
            if p.grad is not None:
                self._reached.add(i)
            grad = torch.zeros_like(p, dtype=_wide(p)) if p.grad is None else p.grad.detach().to(_wide(p))
            taken.append(grad)
            p.grad = None
        return taken

    def give_gradients_(self, gradients: Sequence[Tensor]) -> None:
        """Put copies into ``.grad`` in the parameters' dtype (copies, since clipping changes them in place).

        Parameters that no loss has reached keep None, so that the optimizer passes them over as it does without.
        """
        for i, (p, g) in enumerate(zip(self.params, gradients, strict=True)):
            p.grad = g.to(p.dtype, copy=True) if i in self._reached else None

    @contextmanager
    def aside(self, seed: int) -> Iterator[None]:
        """Random draws from a stream of their own; buffers and the training stream come back afterwards."""
        swapped = {id(t) for t in self.gains}
        buffers = [b for b in self.model.buffers() if id(b) not in swapped]
        kept = [b.detach().clone() for b in buffers]
        try:
            with torch.random.fork_rng(devices=self.devices):
                torch.manual_seed(seed)
                yield
        finally:
            for b, old in zip(buffers, kept, strict=True):
                b.data.copy_(old)

    @contextmanager
    def at(self, anchor: Sequence[Tensor], stream: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the model has the anchor's weights and gains and the given state of the random streams."""
        live = [*self.params, *self.gains]
        current = [t.data for t in live]
        with self.aside(0):
            torch.set_rng_state(stream[0])
            for device, state in zip(self.devices, stream[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            try:
                for t, old in zip(live, anchor, strict=True):
                    t.data = old
                yield
            finally:
                for t, now in zip(live, current, strict=True):
                    t.data = now
