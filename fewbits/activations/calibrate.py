r"""Static activation scales from data, with the weights already quantized and the activations not yet.

``absmax``: the mean over samples (sequences) of each sample's :math:`\max|x|/\ell_+` (SASQ, arXiv:2512.14481), with an
offset the means of minimum and maximum; ``rms``: the mean of each sample's RMS times the best step of a Gaussian;
``mse``: of 80 scales from .02 to 1.05 times the largest sample's absmax scale, that of the least squared error over all
samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewbits.activations.module import InputQuantizer, input_quantizers
from fewbits.activations.quantize import fake_quantize_activation, rms_step, working_dtype
from fewbits.activations.scheme import ActivationScheme

_MARKS = torch.logspace(-1.7, 0.0212, 80, dtype=torch.float64)


class Statistics:
    """What calibration keeps of the inputs of one quantizer: sums over samples, and errors by candidate scale."""

    def __init__(self, scheme: ActivationScheme) -> None:
        self.scheme, self.count = scheme, 0
        self.absmax = self.least = self.most = self.rms = self.peak = 0.0
        self.errors = torch.zeros(len(_MARKS), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count samples ``(samples, .., features)``."""
        flat = self._rotated(x).flatten(1)
        size = flat.abs() if self.scheme.signed else flat
        self.count += len(flat)
        self.absmax += float(size.amax(1).double().sum())
        self.peak = max(self.peak, float(size.max()))
        self.least += float(flat.amin(1).double().sum())
        self.most += float(flat.amax(1).double().sum())
        self.rms += float(flat.double().square().mean(1).sqrt().sum())

    def add_errors(self, x: Tensor) -> None:
        """Squared errors of every candidate scale; after :meth:`add` has seen all samples."""
        rotated = self._rotated(x)
        scheme = ActivationScheme(
            num_bits=self.scheme.num_bits, mode="static", granularity="tensor", grid=self.scheme.grid,
            signed=self.scheme.signed,
        )  # fmt: skip
        for i, scale in enumerate(self._candidates()):
            error = fake_quantize_activation(rotated, scheme, scale.to(rotated)) - rotated
            self.errors[i] += error.double().square().sum().cpu()

    def _candidates(self) -> Tensor:
        return _MARKS * (self.peak / self.scheme.levels[1])

    def _rotated(self, x: Tensor) -> Tensor:
        return self.scheme.rotation.apply(x.detach().to(working_dtype(x)))

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Scale and offset.

        Raises:
            ValueError: if nothing was seen, or only zeros.
        """
        if self.count == 0:
            raise ValueError("it was not used: no calibration input reached it")
        low, high = self.scheme.levels
        if not self.scheme.symmetric:
            least, most = self.least / self.count, self.most / self.count
            scale = (most - least) / (high - low)
            offset: Tensor | None = torch.tensor(least - low * scale)
        else:
            offset = None
            scale = self.absmax / self.count / high
            if self.scheme.rule == "rms":
                scale = self.rms / self.count * rms_step(self.scheme)
            elif self.scheme.rule == "mse":
                scale = float(self._candidates()[int(self.errors.argmin())])
        if not scale > 0:
            raise ValueError("its calibration inputs are all zero, or not finite")
        return torch.tensor(scale), offset


@torch.no_grad()
def calibrate_activations_(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set every static scale (and offset) that has no start of its own, in place.

    The model runs in eval mode with its weights quantized as they are and all input quantizers passing through.

    Args:
        model: prepared, with its weights' scales final.
        batches: token batches ``(samples, length)`` or float inputs of a plain module; run twice for ``rule='mse'``.

    Returns:
        The number of quantizers set.

    Raises:
        ValueError: without data, or for a layer that no input reaches.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> scheme = ActivationScheme(num_bits=8, mode="static", granularity="tensor")
        >>> model[0].add_module("input_quantizer", InputQuantizer(scheme))
        >>> model[0].register_forward_pre_hook(lambda layer, x: layer.input_quantizer(x[0]))  # doctest: +ELLIPSIS
        <torch...>
        >>> calibrate_activations_(model, [torch.tensor([[1.27, 0.0, 0.0, 0.0], [0.0, -3.81, 0.0, 0.0]])])
        1
        >>> round(model[0].input_quantizer.static_scale().item(), 4)
        0.02
    """
    wanted = {
        name: quantizer
        for name, quantizer in input_quantizers(model)
        if quantizer.scheme.mode == "static" and quantizer.scheme.start_clip is None
    }
    if not wanted:
        return 0
    batches = list(batches)
    if not batches:
        raise ValueError("no calibration data: static activation scales need at least one batch")
    found = {name: Statistics(quantizer.scheme) for name, quantizer in wanted.items()}
    with _passing_through(model):
        for second in (False, True):
            chosen = {n: q for n, q in wanted.items() if not second or q.scheme.rule == "mse"}
            if chosen:
                _run(model, chosen, found, batches, second)
    for name, quantizer in wanted.items():
        try:
            quantizer.set_(*found[name].result())
        except ValueError as error:
            raise ValueError(f"the input of {name} cannot be calibrated: {error}") from None
    return len(wanted)


def _run(
    model: nn.Module,
    chosen: dict[str, InputQuantizer],
    found: dict[str, Statistics],
    batches: list[Tensor],
    second: bool,
) -> None:
    handles = []
    for name, quantizer in chosen.items():
        add = found[name].add_errors if second else found[name].add
        handles.append(quantizer.register_forward_pre_hook(lambda _, inputs, add=add: add(inputs[0])))
    try:
        device = next(iter(model.parameters())).device
        for batch in batches:
            model(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _passing_through(model: nn.Module) -> Iterator[None]:
    quantizers = [module for module in model.modules() if isinstance(module, InputQuantizer)]
    modes = {module: module.training for module in model.modules()}
    states = [quantizer.enabled for quantizer in quantizers]
    model.eval()
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in zip(quantizers, states, strict=True):
            quantizer.enabled = enabled
        for module, training in modes.items():
            module.training = training
