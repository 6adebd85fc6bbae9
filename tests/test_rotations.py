"""Rotations: butterflies against a dense matrix, orthogonality, signs and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from fewbits.rotations import Rotation
from fewbits.testing.oracles import dense_hadamard

FP32_BUTTERFLIES = 2e-6
"""Twelve rounds of additions of numbers of order 1 in fp32."""
WIDTHS = [(2, 2), (6, 2), (64, 64), (96, 32), (100, 4), (128, 128), (384, 128)]


def dense(rotation: Rotation, width: int) -> torch.Tensor:
    """The whole transform as a float64 matrix that acts from the right."""
    block = dense_hadamard(rotation.block_for(width))
    matrix = torch.block_diag(*[block] * (width // len(block)))
    if rotation.kind == "random_hadamard":
        matrix = rotation._signs(width, torch.ones(1)).double()[:, None] * matrix
    return matrix


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard"])
@pytest.mark.parametrize(("width", "block"), WIDTHS)
def test_butterflies_equal_the_dense_matrix(kind: str, width: int, block: int) -> None:
    rotation = Rotation(kind=kind, seed=3)  # type: ignore[arg-type]
    assert rotation.block_for(width) == block
    matrix = dense(rotation, width)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width).double(), rtol=0, atol=1e-12)
    x = torch.randn(5, width)
    expected = (x.double() @ matrix).float()
    torch.testing.assert_close(rotation.apply(x), expected, rtol=FP32_BUTTERFLIES, atol=FP32_BUTTERFLIES)
    back = rotation.invert(rotation.apply(x))
    torch.testing.assert_close(back, x, rtol=FP32_BUTTERFLIES, atol=FP32_BUTTERFLIES)


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard"])
def test_the_inverse_is_the_transpose(kind: str) -> None:
    """<R x, y> = <x, R^-1 y>: the backward pass may use ``invert`` for the gradient."""
    rotation = Rotation(kind=kind)  # type: ignore[arg-type]
    x, y = torch.randn(2, 3, 96, dtype=torch.float64)
    assert (rotation.apply(x) * y).sum().item() == pytest.approx((x * rotation.invert(y)).sum().item(), rel=1e-12)
    assert rotation.apply(x).norm().item() == pytest.approx(x.norm().item(), rel=1e-12)


def test_a_spike_spreads_over_its_block() -> None:
    rotated = Rotation(kind="hadamard").apply(torch.eye(256)[:1])
    torch.testing.assert_close(rotated[0, :128], torch.full((128,), 1 / math.sqrt(128)), rtol=1e-6, atol=0)
    assert not rotated[0, 128:].any()


def test_rows_do_not_depend_on_the_batch() -> None:
    x = torch.randn(33, 128)
    rotation = Rotation(kind="random_hadamard")
    assert torch.equal(rotation.apply(x)[7:8], rotation.apply(x[7:8]))


def test_none_returns_the_tensor_itself() -> None:
    x = torch.randn(2, 7)
    assert Rotation().apply(x) is x
    assert Rotation().invert(x) is x


def test_signs_have_a_stream_of_their_own() -> None:
    x = torch.ones(1, 64)
    before = torch.get_rng_state()
    first = Rotation(kind="random_hadamard", seed=1).apply(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(Rotation(kind="random_hadamard", seed=1).apply(x), first)
    assert not torch.equal(Rotation(kind="random_hadamard", seed=2).apply(x), first)


@pytest.mark.parametrize("block_size", [0, 1, 3, 96, 8192, -2])
def test_bad_blocks_are_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size={block_size} must be a power of two from 2 to 4096"):
        Rotation(kind="hadamard", block_size=block_size)


def test_bad_kinds_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="rotation 'dct' is unknown; use one of none, hadamard, random_hadamard"):
        Rotation(kind="dct")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="odd width 33"):
        Rotation(kind="hadamard").apply(torch.ones(1, 33))
