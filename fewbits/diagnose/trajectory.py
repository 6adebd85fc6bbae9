"""The path of a training through weight space, kept as sketches and projected on a plane when the training is over.

A plane through the trained model is known only at the end, and a copy of the weights per step costs too much. The count
sketch of :mod:`fewbits.geometry.sketch` is linear, so 64 thousand numbers per point are enough for any plane.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbits.geometry import CountSketch, Plane, PlanePoint
from fewbits.io import atomic_file
from fewbits.nn import QATLayer

TRAJECTORY_FOLDER = "trajectory"


def weights_of(model: nn.Module, *, deployed: bool) -> dict[str, Tensor]:
    """The parameters that a plain model of the same architecture has, by its names; scales and the like are left out.

    Args:
        model: plain or prepared.
        deployed: rounded weights in place of the latent ones.
    """
    found = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix=prefix, recurse=False):
            if not isinstance(module, QATLayer):
                found[name] = p.detach()
            elif name.endswith(("weight", "bias")) and module.owner is module:
                found[name] = p.detach()
                if deployed and name.endswith("weight"):
                    matrix = module.qtensor().dequantize(p.dtype)
                    found[name] = matrix.t() if module.transposed else matrix
    unique = {}
    for name, _ in model.named_parameters():  # a tied tensor once, under its first name
        if name in found:
            unique[name] = found[name]
    return unique


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """Sketches ``(num_steps, size)`` of latent and deployed weights; ``names`` is a digest of the parameter names."""

    steps: tuple[int, ...]
    latent: Tensor
    deployed: Tensor
    sketch: CountSketch
    names: str

    def project(self, plane: Plane, names: Sequence[str], *, deployed: bool) -> tuple[PlanePoint, ...]:
        r"""Points in the plane, each coordinate off by about :math:`\sqrt{2/m}` of the distance from the origin.

        Args:
            plane: over the parameters of the plain model.
            names: of these parameters, in the plane's order.
            deployed: rounded weights, or latent ones.

        Raises:
            ValueError: if the trajectory is of a model with other parameters.
        """
        if digest_of_names(names) != self.names:
            raise ValueError("the trajectory was recorded on a model with other parameters")
        origin, e1, e2 = (self.sketch(dict(zip(names, v, strict=True))) for v in (plane.origin, plane.e1, plane.e2))
        points = []
        for row in self.deployed if deployed else self.latent:
            offset = row.double() - origin
            x, y = float(offset @ e1), float(offset @ e2)
            points.append(PlanePoint(x=x, y=y, residual=math.sqrt(max(float(offset @ offset) - x * x - y * y, 0.0))))
        return tuple(points)


def digest_of_names(names: Sequence[str]) -> str:
    """Short digest of a set of parameter names."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


class TrajectoryWriter:
    """Writes one small file per step, so that a killed run keeps what it had.

    Args:
        folder: made if it is not there.
        sketch: size and seed.
    """

    def __init__(self, folder: str | Path, sketch: CountSketch | None = None) -> None:
        self.folder, self.sketch = Path(folder), sketch or CountSketch()

    def resume_at(self, step: int) -> None:
        """Drop the points of steps after ``step``, which the resumed training will visit again."""
        for path in self.folder.glob("step-*.safetensors"):
            if _step_of(path) > step:
                path.unlink()

    def write(self, step: int, model: nn.Module) -> None:
        """Sketch latent and deployed weights of a prepared model."""
        latent, deployed = (weights_of(model, deployed=flag) for flag in (False, True))
        tensors = {name: self.sketch(w).float() for name, w in (("latent", latent), ("deployed", deployed))}
        metadata = {"seed": str(self.sketch.seed), "names": digest_of_names(list(latent))}
        with atomic_file(self.folder / f"step-{step:08d}.safetensors") as partial:
            save_file(tensors, partial, metadata=metadata)


def read_trajectory(folder: str | Path) -> Trajectory | None:
    """The trajectory in a folder; None if there is none.

    Raises:
        ValueError: for a damaged file, or files of different trainings.
    """
    paths = sorted(Path(folder).glob("step-*.safetensors"), key=_step_of)
    rows: list[Mapping[str, Tensor]] = []
    kinds: set[tuple[Any, ...]] = set()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                row = {name: file.get_tensor(name) for name in ("latent", "deployed")}
                kinds.add((int(metadata["seed"]), metadata["names"], len(row["latent"]), len(row["deployed"])))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not a point of a trajectory: {error}") from None
        rows.append(row)
    if not rows:
        return None
    if len(kinds) > 1:
        raise ValueError(f"{folder} mixes the points of different trainings or sketches")
    seed, names, size, _ = kinds.pop()
    return Trajectory(
        steps=tuple(map(_step_of, paths)),
        latent=torch.stack([row["latent"] for row in rows]),
        deployed=torch.stack([row["deployed"] for row in rows]),
        sketch=CountSketch(size=size, seed=seed),
        names=names,
    )


def _step_of(path: Path) -> int:
    text = path.stem.removeprefix("step-")
    if not text.isdigit():
        raise ValueError(f"{path} is not a point of a trajectory; its name should be step-NUMBER")
    return int(text)
