"""Long work in stages: each result is saved when it is there, and not computed again when the same call is repeated.

A stage is one JSON file. It carries a digest of everything that the result depends on (weights, tokens, settings,
versions), so a file of another model or of other settings is never taken for an answer; it is computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fewbits.io import write_text

T = TypeVar("T")
Watch = Callable[[str, int, int], None]
"""``watch(stage, done, total)``: called before a stage starts and once more at the end with an empty name."""


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in hexadecimal.

    Example:
        >>> a, b = tensor_digest({"w": torch.zeros(2)}), tensor_digest({"w": torch.zeros(2, 1)})
        >>> len(a), a == b
        (64, False)
    """
    found = hashlib.sha256()
    for name, value in tensors.items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # As bytes, since numpy has no bfloat16; a scalar has no last dimension to view.
        found.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Digest of a model: its class and its whole state."""
    return f"{type(model).__name__} {tensor_digest(dict(model.state_dict()))}"


class Stages:
    """The stages of one long measurement.

    Args:
        folder: where the JSON files go; None keeps nothing.
        common: plain values that every stage depends on, such as digests and versions.
        total: number of stages to come, for the progress bar.
        watch: told of every stage, see :data:`Watch`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first = Stages(Path(folder), {"model": "a"}).run("x", float, lambda: 1.5)
        ...     again = Stages(Path(folder), {"model": "a"}).run("x", float, lambda: 2.5)
        ...     other = Stages(Path(folder), {"model": "b"}).run("x", float, lambda: 3.5)
        >>> first, again, other
        (1.5, 1.5, 3.5)
    """

    def __init__(
        self,
        folder: Path | None,
        common: Mapping[str, Any],
        *,
        total: int = 0,
        watch: Watch = lambda name, done, total: None,
    ) -> None:
        self.folder, self.common, self.total, self.watch = folder, dict(common), total, watch
        self.done = self.reused = 0

    def run(self, name: str, kind: Any, compute: Callable[[], T], /, **inputs: Any) -> T:
        """The result of a stage: the saved one if it was made from the same inputs, else a fresh one, saved at once.

        Args:
            name: of the stage and its file.
            kind: type of the result: a dataclass of plain numbers, or a container or union of such.
            compute: makes it.
            inputs: plain values that this stage depends on beside the common ones.
        """
        self.watch(name, self.done, self.total)
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        path = None if self.folder is None else self.folder / f"{name}.json"
        text = json.dumps([name, self.common, inputs], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        result = None if path is None else _read(path, digest, adapter)
        if result is None:
            result = (compute(),)
            if path is not None:
                # Python's JSON keeps NaN, infinity and every bit of a float.
                data = {"digest": digest, "result": adapter.dump_python(result[0])}
                write_text(path, json.dumps(data, indent=1) + "\n")
        else:
            self.reused += 1
        self.done += 1
        return result[0]

    def step(self, name: str) -> None:
        """Count and announce a stage that keeps its result itself."""
        self.watch(name, self.done, self.total)
        self.done += 1

    def finish(self) -> None:
        """Tell the watcher that all is done."""
        self.watch("", self.done, self.total)


def _read(path: Path, digest: str, adapter: TypeAdapter[T]) -> tuple[T] | None:
    """The saved result; None where there is none, it is of other inputs, or the file is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["digest"] != digest:
            return None
        return (adapter.validate_python(data["result"]),)
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None
