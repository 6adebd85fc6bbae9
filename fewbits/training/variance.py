"""Variance reduction inside the trainer: which batches are the reference, in which order SAGA sees them, what is saved.

The estimates themselves are :mod:`fewbits.optim.variance_reduced`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler

from fewbits.convert import owned_layers
from fewbits.drives import Drive
from fewbits.optim.variance_reduced import VarianceReduced

VARIANCE_FILE = "fewbits_variance.safetensors"


def reference_indices(num_examples: int, batch_size: int, num_batches: int) -> list[list[int]]:
    """Examples of each reference batch: whole batches of neighbours, spread evenly over the data.

    Args:
        num_examples: of the training data.
        batch_size: examples of one batch.
        num_batches: how many batches, >= 1.

    Raises:
        ValueError: if the data has fewer whole batches.

    Example:
        >>> reference_indices(9, 2, 2)
        [[0, 1], [4, 5]]
    """
    available = num_examples // batch_size
    if not 1 <= num_batches <= available:
        raise ValueError(
            f"num_reference_batches={num_batches} is outside 1..{available}, the whole batches of {batch_size} in "
            f"{num_examples} examples"
        )
    firsts = [i * available // num_batches * batch_size for i in range(num_batches)]
    return [list(range(first, first + batch_size)) for first in firsts]


class FixedBatches(Sampler[int]):
    """Yields the examples of fixed batches, the batches in an order of seed and epoch.

    SAGA remembers one gradient per batch, so its batches may not be mixed anew in each epoch.

    Example:
        >>> sorted(FixedBatches([[0, 1], [4, 5]], seed=0))
        [0, 1, 4, 5]
    """

    def __init__(self, batches: Sequence[Sequence[int]], *, seed: int) -> None:
        self.batches = batches
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        for i in torch.randperm(len(self.batches), generator=generator).tolist():
            yield from self.batches[i]


def collect_batches(
    dataset: Any, indices: Sequence[Sequence[int]], collate: Callable[[list[Any]], Any]
) -> list[dict[str, Tensor]]:
    """The batches as the trainer's collator makes them."""
    return [collate([dataset[i] for i in batch]) for batch in indices]


def the_same_batch(batch: Mapping[str, Tensor], reference: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The reference batch with the same tokens, which SAGA knows by identity.

    Raises:
        ValueError: if there is none.
    """
    for known in reference:
        if torch.equal(known["input_ids"], batch["input_ids"]):
            return known
    raise ValueError("form='saga' was given a batch that is none of its reference batches; keep the trainer's sampler")


def check_drives(model: nn.Module) -> None:
    """Refuse drives that change the forward pass along the run: their anchors would be of another function.

    Raises:
        ValueError: naming layer and drive.
    """
    for name, layer in owned_layers(model):
        drive = layer.drive
        if drive is not None and type(drive).forward_weight is not Drive.forward_weight:
            raise ValueError(
                f"variance reduction needs one forward pass along the run; drive {drive.name!r} of {name} changes it"
            )


def save_variance(variance: VarianceReduced, folder: Path) -> None:
    """Anchor, reference gradient or table, coin and counters, beside the optimizer's own state in a checkpoint."""
    state = variance.state_dict()
    tensors: dict[str, Tensor] = {"coin": state["coin"]}
    for key in ("num_steps", "num_passes"):
        tensors[key] = torch.tensor(state[key])
    tensors["reached"] = torch.tensor(state["reached"], dtype=torch.int64)
    for key in ("anchor", "mean"):
        tensors |= {f"{key}/{i}": t.contiguous() for i, t in enumerate(state[key] or [])}
    for row, gradients in enumerate(state["table"]):
        tensors |= {f"table/{row}/{i}": t.contiguous() for i, t in enumerate(gradients)}
    save_file(tensors, folder / VARIANCE_FILE, metadata={"form": str(state["form"])})


def load_variance(variance: VarianceReduced, folder: Path) -> None:
    """Take over what :func:`save_variance` wrote; the optimizer's state is loaded by the trainer.

    Raises:
        ValueError: for a checkpoint without it, a damaged file, or another form or model.
    """
    path = folder / VARIANCE_FILE
    if not path.exists():
        raise ValueError(f"{folder} was saved without variance reduction; resume with the settings it was started with")
    device = variance.optimizer.param_groups[0]["params"][0].device
    try:
        with safe_open(path, framework="pt") as file:
            form = (file.metadata() or {}).get("form")
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the handle is not iterable
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None

    def column(prefix: str) -> list[Tensor] | None:
        num = sum(key.startswith(prefix) and key[len(prefix) :].isdigit() for key in found)
        return [found[f"{prefix}{i}"].to(device) for i in range(num)] or None

    rows = {key.split("/")[1] for key in found if key.startswith("table/")}
    try:
        state = {
            "optimizer": variance.optimizer.state_dict(),
            "form": form,
            "anchor": column("anchor/"),
            "mean": column("mean/"),
            "table": [column(f"table/{row}/") or [] for row in range(len(rows))],
            "coin": found["coin"],
            "reached": found["reached"].tolist(),
            "num_steps": int(found["num_steps"]),
            "num_passes": int(found["num_passes"]),
        }
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no {error}") from None
    variance.load_state_dict(state)
