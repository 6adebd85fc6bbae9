"""Grids: the shared contract, exact rounding against brute force, and the golden vector of the field's quantizers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.grids import GRIDS, AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary, grid_from_dict
from fewbits.testing.contracts import check_grid
from fewbits.testing.oracles import gaussian_distortion, nearest_code

UNIFORM: list[AnyGrid] = [
    Binary(),
    Ternary(),
    *(Int(b) for b in range(1, 9)),
    *(HalfShifted(b) for b in range(1, 9)),
]
CODEBOOKS = [
    Codebook((-3.0, -1.0, 1.0, 7.0)),
    Codebook((0.0, 1.0)),
    Codebook.lloyd_max(3),
    Codebook.lloyd_max(4),
    Codebook.lloyd_max(16),
    Codebook(
        tuple(math.copysign(abs(i) ** 1.5, i) / 64 for i in range(-128, 128) if (abs(i) ** 1.5 / 64).is_integer())
    ),
]
EVERY_GRID = UNIFORM + CODEBOOKS
every_grid = pytest.mark.parametrize("grid", EVERY_GRID, ids=lambda g: f"{g.kind}{g.num_levels}")
uniform_grid = pytest.mark.parametrize("grid", UNIFORM, ids=lambda g: f"{g.kind}{g.num_levels}")
dyadic = st.integers(-(2**18), 2**18).map(lambda k: k / 1024)  # shifts by half a step are exact on these


@every_grid
def test_the_contract_holds(grid: AnyGrid) -> None:
    check_grid(grid)


@uniform_grid
@settings(max_examples=30)
@given(values=st.lists(dyadic, min_size=1, max_size=10))
def test_codes_equal_brute_force_with_ties_to_even(grid: AnyGrid, values: list[float]) -> None:
    assert grid.encode(torch.tensor(values)).tolist() == [nearest_code(v, grid) for v in values]


@every_grid
def test_ties_go_to_the_even_code(grid: AnyGrid) -> None:
    middle = [(a + b) / 2 for a, b in pairwise(grid.levels)]
    exact = [m for m in middle if torch.tensor(m).item() == m]
    assert grid.encode(torch.tensor(exact)).tolist() == [nearest_code(m, grid) for m in exact]


@pytest.mark.parametrize("grid", [g for g in UNIFORM if not isinstance(g, HalfShifted)], ids=str)
@settings(max_examples=30)
@given(values=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=10))
def test_rounding_of_unshifted_grids_is_exact_for_every_float(grid: AnyGrid, values: list[float]) -> None:
    assert grid.encode(torch.tensor(values)).tolist() == [nearest_code(v, grid) for v in values]


def test_sizes_and_levels() -> None:
    assert Binary().levels == (-1.0, 1.0)
    assert Ternary().levels == (-1.0, 0.0, 1.0)
    assert Int(3).levels == (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    assert HalfShifted(2).levels == (-1.5, -0.5, 0.5, 1.5)
    for bits in range(1, 9):
        assert Int(bits).num_levels == HalfShifted(bits).num_levels == 2**bits
    assert (Ternary().storage_bits, Ternary().num_bits) == (1.6, 2)
    assert Codebook.lloyd_max(5).num_bits == 3


def test_zero_never_makes_a_third_binary_level() -> None:
    assert Binary().encode(torch.tensor([0.0, -0.0])).tolist() == [1, 1]
    assert Binary().project_(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("grid", [Binary(), Ternary(), *(HalfShifted(b) for b in range(1, 9)), Codebook.lloyd_max(8)])
@settings(max_examples=30)
@given(values=st.lists(dyadic, min_size=1, max_size=10))
def test_symmetric_grids_are_odd_away_from_ties(grid: AnyGrid, values: list[float]) -> None:
    v = torch.tensor(values)
    u = grid.cell_coordinate(v)
    v = v[(u - u.floor() - 0.5).abs() > 1e-3]
    assert torch.equal(grid.project_(-v), -grid.project_(v.clone()))


def test_int_is_not_odd_at_its_extra_level() -> None:
    assert Int(2).project_(torch.tensor([-2.0, 2.0])).tolist() == [-2.0, 1.0]


@pytest.mark.parametrize("bits", range(1, 8))
def test_half_shifted_is_odd_levels_of_the_next_integer_grid(bits: int) -> None:
    assert {2 * level for level in HalfShifted(bits).levels} <= set(Int(bits + 1).levels)


W = torch.tensor([-1.3, -0.6, -0.2, 0.05, 0.12, 0.45, 0.9, 2.0])
MEAN, RMS = 0.7025, 0.9433584


@pytest.mark.parametrize(
    ("grid", "scale", "codes", "values"),
    [
        # origin: methods.md 0.4; LSQ's alpha is the step, SEQ's alpha = 2**(b-1) steps (ternary: 1.5 steps),
        # QuEST's outermost level s = (2**b - 1)/2 steps
        (Int(2), 0.5, [-2, -1, 0, 0, 0, 1, 1, 1], [-1, -0.5, 0, 0, 0, 0.5, 0.5, 0.5]),
        (Int(3), 0.32, [-4, -2, -1, 0, 0, 1, 3, 3], [-1.28, -0.64, -0.32, 0, 0, 0.32, 0.96, 0.96]),
        (Ternary(), 2 / 3, [-1, -1, 0, 0, 0, 1, 1, 1], [-2 / 3, -2 / 3, 0, 0, 0, 2 / 3, 2 / 3, 2 / 3]),
        (HalfShifted(2), 0.5, [-2, -2, -1, 0, 0, 0, 1, 1], [-0.75, -0.75, -0.25, 0.25, 0.25, 0.25, 0.75, 0.75]),
        (Binary(), MEAN, [0, 0, 0, 1, 1, 1, 1, 1], [-MEAN, -MEAN, -MEAN, MEAN, MEAN, MEAN, MEAN, MEAN]),
        (Ternary(), MEAN, [-1, -1, 0, 0, 0, 1, 1, 1], [-MEAN, -MEAN, 0, 0, 0, MEAN, MEAN, MEAN]),
        (Binary(), 0.752691, [0, 0, 0, 1, 1, 1, 1, 1], [-0.75269] * 3 + [0.75269] * 5),
        (
            HalfShifted(2),
            2 * 1.408938 / 3,
            [-2, -1, -1, 0, 0, 0, 0, 1],
            [-1.40894, -0.46965, -0.46965, 0.46965, 0.46965, 0.46965, 0.46965, 1.40894],
        ),
        (
            HalfShifted(4),
            2 * 2.371537 / 15,
            [-5, -2, -1, 0, 0, 1, 2, 6],
            [-1.42292, -0.47431, -0.1581, 0.1581, 0.1581, 0.47431, 0.79051, 2.05533],
        ),
    ],
    ids=["lsq2", "lsq3", "seq1.58", "seq2", "sign", "bitnet", "quest1", "quest2", "quest4"],
)
def test_golden_vector(grid: AnyGrid, scale: float, codes: list[int], values: list[float]) -> None:
    found = grid.encode(W / scale)
    assert found.tolist() == codes
    torch.testing.assert_close(grid.decode(found) * scale, torch.tensor(values), rtol=0, atol=5e-6)


def test_golden_statistics() -> None:
    assert W.abs().mean().item() == pytest.approx(MEAN, abs=1e-6)
    assert W.square().mean().sqrt().item() == pytest.approx(RMS, abs=1e-6)


LLOYD_MAX = {  # origin: Max 1960 as recomputed in methods.md section 1: upper half of the levels, distortion
    2: ([0.79788], 1 - 2 / math.pi),
    3: ([0.0, 1.22401], 0.190174),
    4: ([0.45278, 1.51042], 0.117482),
    8: ([0.24509, 0.75601, 1.34391, 2.15195], 0.034548),
    16: ([0.1284, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259], 0.009501),
}


@pytest.mark.parametrize("num_levels", LLOYD_MAX)
def test_lloyd_max_equals_the_published_table(num_levels: int) -> None:
    upper, distortion = LLOYD_MAX[num_levels]
    levels = Codebook.lloyd_max(num_levels).levels
    assert levels[-len(upper) :] == pytest.approx(upper, abs=6e-6)
    assert levels == tuple(-x for x in reversed(levels))
    assert gaussian_distortion(levels, 1.0) == pytest.approx(distortion, abs=6e-7)


@pytest.mark.parametrize("num_levels", [2, 3, 5, 16, 64])
def test_lloyd_max_is_a_fixed_point(num_levels: int) -> None:
    """Each level is the mean of its cell, so moving any one level either way makes the distortion larger."""
    levels = list(Codebook.lloyd_max(num_levels).levels)
    best = gaussian_distortion(levels, 1.0)
    for i in range(num_levels):
        for move in (-1e-3, 1e-3):
            moved = [x + move * (j == i) for j, x in enumerate(levels)]
            assert gaussian_distortion(moved, 1.0) > best


@pytest.mark.parametrize("num_bits", [0, 9, -1, 2.0, True, "2"])
@pytest.mark.parametrize("kind", [Int, HalfShifted])
def test_bits_out_of_range_are_refused(kind: type, num_bits: object) -> None:
    with pytest.raises(ValueError, match=r"num_bits=.*integer from 1 to 8"):
        kind(num_bits)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((1.0,), "has 1 levels"),
        (tuple(float(i) for i in range(257)), "has 257 levels"),
        ((0.0, math.inf), "not finite"),
        ((1.0, 0.0), "strictly ascending"),
        ((0.0, 0.0, 1.0), "strictly ascending"),
        ((0.0, 0.1), "exact in fp32"),
    ],
)
def test_bad_codebooks_are_refused(table: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(table)


def test_unknown_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=f"unknown grid 'nf4'; known grids: {', '.join(GRIDS)}"):
        grid_from_dict({"kind": "nf4"})
    with pytest.raises(ValueError, match="does not take"):
        grid_from_dict({"kind": "int", "num_bits": 2, "zero": 1})
    with pytest.raises(ValueError, match="lloyd_max with 1 levels"):
        Codebook.lloyd_max(1)


@pytest.mark.parametrize("name", ["binary", "ternary", "int2", "half2", "codebook"])
def test_a_nan_weight_stays_visible(name: str) -> None:
    grid = {
        "binary": Binary(),
        "ternary": Ternary(),
        "int2": Int(2),
        "half2": HalfShifted(2),
        "codebook": Codebook.lloyd_max(4),
    }[name]
    assert bool(grid.project_(torch.tensor([0.1, float("nan")])).isnan()[1])
