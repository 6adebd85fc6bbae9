"""Peak memory of a piece of code on any device, counted tensor by tensor, so that tests get the same number always."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    """Bytes of storages that operations make and that still live, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in given or key in self._known:  # a view, or an operation in place
                continue
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)
        return result


def peak_bytes(function: Callable[[], Any]) -> int:
    """Largest number of bytes that tensors made inside ``function`` take at one time; without workspaces of kernels.

    Example:
        >>> peak_bytes(lambda: (torch.zeros(1000) + 1).sum())
        8000
    """
    with _Watch() as watch:
        function()
    return watch.peak
