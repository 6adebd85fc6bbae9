"""Every test starts from the same seed, on one thread; hypothesis searches the same examples every time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("fewbits", deadline=None, derandomize=True, database=None)
settings.load_profile("fewbits")


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed torch's global stream and use one thread; the caller's thread count comes back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield 0
    torch.set_num_threads(threads)
