"""Schemes of every kind and correlated inputs, for the tests of post-training methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.rotations import Rotation
from fewbits.scheme import Scheme

SCHEMES = [
    Scheme.parse(text, **options)
    for text, options in [
        ("W4", {}),
        ("W2G32", {}),
        ("W3", {"granularity": "per_tensor"}),
        ("W2HG32", {}),
        ("W1.58G32", {}),
        ("W1G32", {}),
        ("W2KG32", {}),
        ("W2G32", {"superblock": 64}),
        ("W2HG32", {"rotation": Rotation(kind="random_hadamard", block_size=16)}),
    ]
]


def over(schemes: list[Scheme]) -> pytest.MarkDecorator:
    """Run a test for each of the schemes."""
    return pytest.mark.parametrize("scheme", schemes, ids=lambda s: f"{s.name}-{s.scale.granularity}")


every_scheme = over(SCHEMES)


def data(rows: int = 8, width: int = 80) -> tuple[Tensor, Tensor]:
    """A weight, and correlated inputs."""
    x = torch.randn(300, 6) @ torch.randn(6, width) + torch.randn(300, width)
    return torch.randn(rows, width) * 0.05, x
