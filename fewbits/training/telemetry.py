"""What a quantized layer did since the last look: flips, saturation, drift of the scale, calibration of the gain."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbits.activations.module import input_scheme
from fewbits.activations.text import full_name
from fewbits.convert import owned_layers
from fewbits.nn import QATLayer
from fewbits.scales import stored_scale
from fewbits.surrogates._base import inside
from fewbits.training.windows import calibration

TELEMETRY_FILE = "fewbits_telemetry.safetensors"


class Telemetry:
    """Remembers codes and scales of every layer between looks; its state is part of each checkpoint.

    Memory: one byte per quantized weight, and the scales twice, on the CPU; with ``calibration`` a copy of the weights
    too.

    Args:
        calibration: also measure how well the gain predicted the moves of the deployed weights since the last look, see
            :func:`fewbits.training.windows.calibration`. May be set until training starts.
    """

    def __init__(self, *, calibration: bool = False) -> None:
        self.calibration = calibration
        self._old: dict[str, Tensor] = {}
        self._codes: dict[str, Tensor] = {}
        self._start_scale: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Remember where training starts (layers that are already known keep what they have)."""
        for name, layer in owned_layers(model):
            if name not in self._codes:
                q = layer.qtensor()
                self._codes[name], self._start_scale[name] = q.codes.cpu(), q.scale.cpu()
            if self.calibration and name not in self._old:
                self._old[name] = layer.latent().detach().to("cpu", copy=True)

    @torch.no_grad()
    def look(self, name: str, layer: QATLayer) -> dict[str, float]:
        """Statistics of one layer since the last look at it.

        Returns:
            ``flip_rate``: share of codes that changed; ``saturated_share``: share of weights outside the outermost
            levels; ``scale_drift``: mean abs(log2(scale / start)); ``scale_mean``; what a surrogate trains, such as
            ``alpha``; with ``calibration``, the entries of :func:`fewbits.training.windows.calibration`. Look before
            the gain is refreshed.
        """
        scheme = layer.scheme
        q = layer.qtensor()
        codes, scale = q.codes.cpu(), q.scale.cpu()
        rotated = scheme.rotation.apply(layer.latent().float())
        v = rotated / scheme.scale.view(q.shape).expand(stored_scale(layer.raw_scale(), scheme.scale))
        result = {
            "flip_rate": float((codes != self._codes[name]).float().mean()),
            "saturated_share": 1.0 - float(inside(v, scheme.grid, "level").float().mean()),
            "scale_drift": float((scale / self._start_scale[name]).log2().abs().mean()),
            "scale_mean": float(scale.mean()),
            **{key: float(layer.state()[key].float().mean()) for key in layer.surrogate.trained},
        }
        self._codes[name] = codes
        if self.calibration:
            result |= calibration(layer, self._old[name])
            self._old[name] = layer.latent().detach().to("cpu", copy=True)
        return result

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder."""
        tensors = {f"codes/{k}": v.contiguous() for k, v in self._codes.items()}
        tensors |= {f"start_scale/{k}": v.contiguous() for k, v in self._start_scale.items()}
        tensors |= {f"old_weight/{k}": v.contiguous() for k, v in self._old.items()}
        save_file(tensors, folder / TELEMETRY_FILE)

    def load(self, folder: Path) -> None:
        """Read the state back; a checkpoint without it (made by another trainer) starts afresh."""
        path = folder / TELEMETRY_FILE
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                kind, _, name = key.partition("/")
                stores = {"codes": self._codes, "start_scale": self._start_scale, "old_weight": self._old}
                stores[kind][name] = file.get_tensor(key)


def weight_histogram(model: nn.Module, *, num_bins: int = 120) -> dict[str, dict[str, list[float] | float]]:
    """Histogram of ``v = w / scale`` over the grid, one per grid of the model: what the report draws.

    Returns:
        By grid name: ``edges`` (num_bins + 1), ``density`` per bin, ``levels``.
    """
    found: dict[str, dict[str, list[float] | float]] = {}
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for _, layer in owned_layers(model):
            scheme = layer.scheme
            grid = scheme.grid
            low, high = grid.bin_edge
            margin = (high - low) / 4
            edges = torch.linspace(low - margin, high + margin, num_bins + 1)
            w = layer.latent().float()
            v = scheme.rotation.apply(w) / scheme.scale.view(w.shape).expand(
                stored_scale(layer.raw_scale(), scheme.scale)
            )
            counts = torch.histogram(v.flatten().cpu(), edges).hist
            key = full_name(scheme.name, input_scheme(layer))
            sums[key] = sums.get(key, torch.zeros(num_bins)) + counts
            found[key] = {"edges": edges.tolist(), "levels": list(grid.levels)}
    for key, counts in sums.items():
        edges = torch.tensor(found[key]["edges"])
        found[key]["density"] = (counts / counts.sum().clamp_min(1) / (edges[1] - edges[0])).tolist()
    return found
