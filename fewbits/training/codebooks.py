"""Codebooks in a training run: full precision first, fit once, freeze; now and then again if asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fewbits.convert import owned_layers, qat_layers
from fewbits.grids import Codebook
from fewbits.io import read_json_object, write_json
from fewbits.nn import QATLayer
from fewbits.optim.codebooks import CodebookFit, refit_codebooks_

CODEBOOKS_FILE = "codebooks.json"


class CodebookCallback(TrainerCallback):
    """Runs a :class:`CodebookFit`; layers with a codebook train in full precision until their first fit.

    Learned scales start anew at every fit (they are sizes of blocks), and so does the optimizer's memory of them.
    The codebooks are written into every checkpoint, since a model's tensors do not hold them.

    Args:
        fit: when.
    """

    def __init__(self, fit: CodebookFit) -> None:
        self.fit = fit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fit at once, or switch quantization off until the first fit."""
        model = extract_model_from_parallel(kwargs["model"])
        if state.global_step == 0 and self.fit.step == 0:
            refit_codebooks_(model, seed=self.fit.seed)
        enable_(model, state.global_step >= self.fit.step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fit if it is time."""
        if state.global_step == 0 or not self.fit.is_due(state.global_step):
            return
        model, optimizer = extract_model_from_parallel(kwargs["model"]), kwargs["optimizer"]
        weights = second_moments(model, optimizer) if self.fit.fisher else None
        refit_codebooks_(model, weights=weights, seed=self.fit.seed + state.global_step)
        for _, layer in codebook_layers(model):
            if isinstance(layer.weight_scale, nn.Parameter):
                _optimizer_state(optimizer).pop(layer.weight_scale, None)
        enable_(model, True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the codebooks beside the checkpoint."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            model = extract_model_from_parallel(kwargs["model"])
            books = {name: list(layer.scheme.grid.levels) for name, layer in codebook_layers(model)}
            write_json(folder / CODEBOOKS_FILE, books)

    def load(self, folder: Path, model: nn.Module) -> None:
        """Read the codebooks of a checkpoint back into the model.

        Raises:
            ValueError: if the file is missing, damaged, or of another model.
        """
        books = read_json_object(folder / CODEBOOKS_FILE)
        layers = dict(codebook_layers(model))
        if set(books) != set(layers):
            raise ValueError(f"{folder / CODEBOOKS_FILE} names other layers than the model has")
        for name, levels in books.items():
            try:
                grid = Codebook(tuple(levels))
            except TypeError:
                raise ValueError(f"{folder / CODEBOOKS_FILE}: {name} holds no list of levels") from None
            scheme = replace(layers[name].scheme, grid=grid)
            for _, layer in qat_layers(model):
                if layer.owner is layers[name]:
                    layer.scheme = scheme


def codebook_layers(model: nn.Module) -> list[tuple[str, QATLayer]]:
    """Layers that own a codebook, in order."""
    return [(name, layer) for name, layer in owned_layers(model) if isinstance(layer.scheme.grid, Codebook)]


def enable_(model: nn.Module, enabled: bool) -> None:
    """Switch fake quantization of the layers with codebooks on or off."""
    owners = {id(layer) for _, layer in codebook_layers(model)}
    for _, layer in qat_layers(model):
        if id(layer.owner) in owners:
            layer.fake_quant_enabled = enabled


def _optimizer_state(optimizer: Any) -> Any:
    """The plain optimizer's state, also below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer).state


def second_moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Adam's second moment of the latent weights, divided by its mean, by layer name.

    Raises:
        ValueError: if the optimizer keeps none for a layer.
    """
    state, found = _optimizer_state(optimizer), {}
    for name, layer in codebook_layers(model):
        moment = state.get(layer.weight, {}).get("exp_avg_sq")
        if moment is None:
            raise ValueError(f"fisher=True, but the optimizer keeps no second moment of {name}; use an Adam")
        moment = moment.t() if layer.transposed else moment
        found[name] = (moment / moment.mean().clamp_min(1e-30)).float()
    return found
