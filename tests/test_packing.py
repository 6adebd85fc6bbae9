"""Packing: dense words of 1 to 8 bits and five trits a byte, against big integers, round trips and damage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.packing import pack_codes, packed_width, unpack_codes
from fewbits.testing.oracles import pack_loop, pack_trits_loop, unpack_loop

GRIDS: list[AnyGrid] = [
    Binary(),
    Ternary(),
    *(Int(b) for b in range(1, 9)),
    *(HalfShifted(b) for b in (1, 2, 5, 8)),
    Codebook((-3.0, -1.0, 1.0)),
    Codebook.lloyd_max(5),
    Codebook.lloyd_max(16),
    Codebook(tuple(float(i) for i in range(256))),
]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.kind}{g.num_levels}")


def codes_of(data: st.DataObject, grid: AnyGrid, width: int, rows: int) -> torch.Tensor:
    row = st.lists(st.integers(grid.qmin, grid.qmax), min_size=width, max_size=width)
    return torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=grid.code_dtype)


@every_grid
@settings(max_examples=40)
@given(data=st.data(), width=st.integers(1, 45), rows=st.integers(1, 3))
def test_round_trip_against_big_integers(grid: AnyGrid, data: st.DataObject, width: int, rows: int) -> None:
    codes = codes_of(data, grid, width, rows)
    packed = pack_codes(codes, grid)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(width, grid))
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        if isinstance(grid, Ternary):
            assert bytes(stored) == pack_trits_loop(row)
        else:
            assert bytes(stored) == pack_loop(row, grid.num_bits, grid.qmin)
            assert unpack_loop(bytes(stored), width, grid.num_bits, grid.qmin) == row
    back = unpack_codes(packed, width, grid)
    assert back.dtype == grid.code_dtype
    assert torch.equal(back, codes)


@given(codes=st.lists(st.integers(-1, 1), min_size=1, max_size=40))
def test_trits_against_the_loop(codes: list[int]) -> None:
    """Missing trits of the last byte are the digit 0, as in the loop."""
    assert bytes(pack_codes(torch.tensor([codes]), Ternary())[0].tolist()) == pack_trits_loop(codes)


@every_grid
@pytest.mark.parametrize("width", [1, 5, 8, 64, 100, 257])
def test_the_width_is_dense(grid: AnyGrid, width: int) -> None:
    bits = 8 / 5 if isinstance(grid, Ternary) else grid.num_bits
    assert packed_width(width, grid) * 8 < width * bits + 8
    assert packed_width(width, grid) * 8 >= width * grid.storage_bits


def test_rows_start_on_a_byte_so_that_one_row_can_be_read_alone() -> None:
    codes = torch.randint(-4, 4, (5, 33), dtype=torch.int8)
    packed = pack_codes(codes, Int(3))
    for i in range(5):
        assert torch.equal(unpack_codes(packed[i : i + 1], 33, Int(3)), codes[i : i + 1])


def test_every_byte_value_of_five_trits_is_a_code_row() -> None:
    packed = torch.arange(3**5, dtype=torch.uint8)[:, None]
    codes = unpack_codes(packed, 5, Ternary())
    assert len(codes.unique(dim=0)) == 3**5
    assert torch.equal(pack_codes(codes, Ternary()), packed)


@pytest.mark.parametrize(
    ("codes", "grid", "message"),
    [
        ([[-3, 0]], Int(2), r"codes run from -3 to 0; Int\(num_bits=2\) allows -2 to 1"),
        ([[0, 2]], Int(2), "codes run from 0 to 2"),
        ([[0, 2]], Ternary(), r"Ternary\(\) allows -1 to 1"),
        ([[0, 3]], Codebook((0.0, 1.0, 2.0)), "allows 0 to 2"),
    ],
)
def test_codes_outside_the_grid_are_refused(codes: list[list[int]], grid: AnyGrid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_codes(torch.tensor(codes, dtype=grid.code_dtype), grid)


@pytest.mark.parametrize(
    ("packed", "width", "grid", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.uint8), 4, Int(2), r"uint8 \(rows, 1\) is needed for 4 codes of Int"),
        (torch.zeros(1, 1, dtype=torch.int32), 4, Int(2), "packed codes are torch.int32"),
        (torch.zeros(1, dtype=torch.uint8), 4, Int(2), "is needed"),
        (torch.tensor([[243]], dtype=torch.uint8), 5, Ternary(), "packed byte 243 is not five trits"),
        (
            torch.tensor([[255]], dtype=torch.uint8),
            4,
            Codebook((0.0, 1.0, 2.0)),
            "packed codes hold 3; .* has 3 levels",
        ),
    ],
)
def test_damaged_bytes_are_refused(packed: torch.Tensor, width: int, grid: AnyGrid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_codes(packed, width, grid)
