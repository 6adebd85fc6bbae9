"""InputQuantizer: the module that holds an activation scheme and its stored numbers. No mathematics lives here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.activations.quantize import fake_quantize_activation
from fewbits.activations.scheme import ActivationScheme, check_basis
from fewbits.rotations import Rotation
from fewbits.scheme import Scheme

INPUT = "input_quantizer"
"""Name of the submodule of a layer."""
KV = "kv_quantizer"
"""Name of the submodule of an attention module."""


class InputQuantizer(nn.Module):
    """Fake quantization of what goes into a layer, or of keys and values.

    Stored numbers are fp32 whatever the dtype of the model: parameters where they are learned, buffers where not.
    A static scale is NaN, and using it an error, until it is calibrated, set or loaded.

    Args:
        scheme: how.
        device: of the stored numbers.

    Attributes:
        enabled: False rounds nothing (while calibrating); an input that is to stay rotated is rotated all the same.

    Example:
        >>> quantizer = InputQuantizer(ActivationScheme(num_bits=2))
        >>> quantizer(torch.tensor([[0.1, -1.0, 0.5]]))
        tensor([[ 0., -1.,  0.]])
    """

    def __init__(self, scheme: ActivationScheme, *, device: Any = None) -> None:
        super().__init__()
        self.scheme, self.enabled, self.ready = scheme, True, scheme.mode == "dynamic"
        if scheme.mode == "dynamic":
            return
        self._hold(scheme.parameter, torch.tensor(float("nan"), device=device))
        if not scheme.symmetric:
            self._hold("offset", torch.tensor(float("nan"), device=device))
        if scheme.thresholds == "learned":
            self._hold("lengths", torch.ones(2**scheme.num_bits - 1, device=device))
        if scheme.start_clip is not None and not self._raw().is_meta:
            self.set_(torch.tensor(scheme.start_clip / scheme.levels[1]))

    def _hold(self, name: str, value: Tensor) -> None:
        if self.scheme.learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _raw(self) -> Tensor:
        value = getattr(self, self.scheme.parameter)
        assert isinstance(value, Tensor)
        return value

    def static_scale(self) -> Tensor | None:
        """The static scale, units of x per step, > 0, differentiable in what is trained; None if dynamic."""
        if self.scheme.mode == "dynamic":
            return None
        raw = self._raw()
        if self.scheme.parameter == "log_scale":
            return raw.exp()
        return raw.abs() / self.scheme.levels[1] if self.scheme.parameter == "clip" else raw.abs()

    @torch.no_grad()
    def set_(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Store a static scale (and offset).

        Raises:
            ValueError: for a dynamic scheme, a scale that is not finite and positive, or an offset too many or missing.
        """
        if self.scheme.mode == "dynamic":
            raise ValueError(f"the scheme {self.scheme.summary!r} stores no scale; use mode='static'")
        if (offset is None) != self.scheme.symmetric:
            raise ValueError("an offset goes with symmetric=False, and only with it")
        if scale.numel() != 1 or not bool(torch.isfinite(scale).all()) or float(scale) <= 0:
            raise ValueError(f"the scale {scale} must be one finite number > 0")
        raw = self._raw()
        value = scale.detach().reshape(()).to(raw)
        name = self.scheme.parameter
        raw.copy_(value.log() if name == "log_scale" else value * self.scheme.levels[1] if name == "clip" else value)
        if offset is not None:
            held = self.get_parameter("offset") if self.scheme.learned else self.get_buffer("offset")
            held.copy_(offset.detach().reshape(()).to(raw))
        self.ready = True

    def forward(self, x: Tensor) -> Tensor:
        """The quantized and dequantized input.

        Raises:
            ValueError: for a static scale that has never been set.
        """
        if not self.enabled:
            return self.scheme.rotation.into_product(x)
        stored = self.stored()
        return fake_quantize_activation(
            x, self.scheme, self.static_scale(), stored.get("offset"), stored.get("lengths")
        )

    def stored(self) -> dict[str, Tensor]:
        """Everything stored, by name, the parameters and buffers themselves.

        Raises:
            ValueError: for a static scale that has never been set.
        """
        if not self.ready:
            raise ValueError(
                f"the static scale of {self.scheme.summary!r} has no value yet; run "
                "fewbits.activations.calibrate_activations_(model, batches) first"
            )
        return {k: v for k, v in (*self._parameters.items(), *self._buffers.items()) if v is not None}

    def load_(self, values: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`stored`, in place.

        Raises:
            ValueError: for a number that is missing, left over, of the wrong shape or not finite.
        """
        held = {k: v for k, v in (*self._parameters.items(), *self._buffers.items()) if v is not None}
        if set(values) != set(held):
            raise ValueError(f"{self.scheme.summary!r} stores {sorted(held)}, but {sorted(values)} are given")
        for name, value in values.items():
            if value.shape != held[name].shape or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} is {value}; finite numbers of shape {tuple(held[name].shape)} are needed")
            held[name].data = value.detach().to(held[name].device, torch.float32).clone()
        self.ready = True

    @torch.no_grad()
    def deployed(self) -> InputQuantizer:
        """The same forward pass, bit for bit, with constants: scales as scales, nothing to train.

        Raises:
            ValueError: for a static scale that has never been set.
        """
        new = InputQuantizer(self.scheme.deployed())
        scale = self.static_scale()
        if scale is not None:
            values = {**self.stored(), "scale": scale}
            for name in new._buffers:
                new._buffers[name] = values[name].detach().clone()
        new.ready = True
        return new.train(self.training)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.ready = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Devices change, the dtype does not: numbers pass as integers of their size."""
        return super()._apply(lambda t: fn(t.view(torch.int32)).view(torch.float32), recurse)

    def extra_repr(self) -> str:
        """The scheme."""
        return self.scheme.summary


def add_input_quantizer_(layer: nn.Module, scheme: ActivationScheme | None, *, device: Any = None) -> None:
    """Give a linear layer (not an embedding, whose inputs are tokens) a quantizer of its input, if asked for.

    Raises:
        ValueError: if the input would not be in the basis of the layer's weight.
    """
    if scheme is not None and isinstance(weight := getattr(layer, "scheme", None), Scheme):
        check_basis(weight.rotation, scheme, name=type(layer).__name__)
    if scheme is not None and not hasattr(layer, "num_embeddings"):
        layer.add_module(INPUT, InputQuantizer(scheme, device=device))


def quantize_input(layer: nn.Module, x: Tensor, rotation: Rotation) -> Tensor:
    """``x`` as the layer multiplies it: through its input quantizer, and in the basis that the weight's rotation asks.

    A quantizer rotates by itself (:func:`~fewbits.activations.scheme.check_basis`); without one nothing is rounded.
    """
    quantizer = layer._modules.get(INPUT)
    return rotation.into_product(x) if quantizer is None else quantizer(x)


def input_quantizer(layer: nn.Module) -> InputQuantizer | None:
    """The layer's input quantizer, or None."""
    found = layer._modules.get(INPUT)
    return found if isinstance(found, InputQuantizer) else None


def input_scheme(layer: nn.Module) -> ActivationScheme | None:
    """The scheme of the layer's input, None for full precision."""
    found = input_quantizer(layer)
    return None if found is None else found.scheme


def input_quantizers(model: nn.Module) -> Iterator[tuple[str, InputQuantizer]]:
    """Quantizers of layer inputs, by the name of their layer, in model order."""
    for name, module in model.named_modules():
        if (found := input_quantizer(module)) is not None:
            yield name, found


def kv_schemes(model: nn.Module) -> dict[str, ActivationScheme]:
    """Schemes of keys and values, by the name of the attention module, in model order."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(quantizer := module._modules.get(KV), InputQuantizer):
            found[name] = quantizer.scheme
    return found
