"""Surrogates: the shared contract, golden masks, and StableQAT's closed forms on every grid."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.surrogates import (
    SURROGATES,
    ClippedSTE,
    ElementwiseSurrogate,
    JacQuant,
    StableQAT,
    Surrogate,
    surrogate_from_dict,
)
from fewbits.surrogates.stableqat import mean_gain
from fewbits.testing.contracts import check_surrogate
from fewbits.testing.oracles import stableqat_gain

GRIDS: list[AnyGrid] = [
    Binary(),
    Ternary(),
    Int(2),
    HalfShifted(2),
    Codebook((-3.0, -1.0, 1.0, 7.0)),
    Int(1),
    Int(4),
    HalfShifted(1),
    HalfShifted(3),
    Codebook.lloyd_max(8),
]
"""Every kind once, then more."""
VARIANTS: list[Surrogate] = [
    ClippedSTE(edge="bin"),
    ClippedSTE(edge="none"),
    *(cls() for cls in SURROGATES.values()),
    StableQAT(amplitude=0.15, num_harmonics=3, normalize=True, edge="bin"),
    JacQuant(granularity="element", compose_mask=True),
    JacQuant(group_size=7, gain_min=0.25),
    JacQuant(apply="update"),
    JacQuant.preset("paper_literal"),
]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@pytest.mark.parametrize("grid", GRIDS[:5], ids=lambda g: g.kind)
@pytest.mark.parametrize("surrogate", VARIANTS, ids=str)
def test_the_contract_holds(surrogate: Surrogate, grid: AnyGrid) -> None:
    check_surrogate(surrogate, grid)


# golden vector (methods.md 0.4) -------------------------------------------------------------------------------------

W = torch.tensor([-1.3, -0.6, -0.2, 0.05, 0.12, 0.45, 0.9, 2.0])


@pytest.mark.parametrize(
    ("grid", "scale", "surrogate", "gain"),
    [
        (Int(2), 0.5, ClippedSTE(), [0, 1, 1, 1, 1, 1, 0, 0]),
        (Int(3), 0.32, ClippedSTE(), [0, 1, 1, 1, 1, 1, 1, 0]),
        (Ternary(), 2 / 3, ClippedSTE(edge="bin"), [0, 1, 1, 1, 1, 1, 1, 0]),
        (HalfShifted(2), 0.5, ClippedSTE(edge="bin"), [0, 1, 1, 1, 1, 1, 1, 0]),
        (Ternary(), 0.7025, ClippedSTE(edge="none"), [1] * 8),
        (Binary(), 0.752691, ClippedSTE(edge="bin"), [1, 1, 1, 1, 1, 1, 1, 0]),
        (HalfShifted(2), 2 * 1.408938 / 3, ClippedSTE(edge="bin"), [1, 1, 1, 1, 1, 1, 1, 0]),
        (HalfShifted(4), 2 * 2.371537 / 15, ClippedSTE(edge="bin"), [1] * 8),
        (Int(2), 0.5, StableQAT(), [0, 0.13972, 0.55242, 0.05969, 0.19038, 0.05969, 0, 0]),
    ],
    ids=["lsq2", "lsq3", "seq1.58", "seq2", "bitnet", "quest1", "quest2", "quest4", "stableqat"],
)
def test_golden_gains(grid: AnyGrid, scale: float, surrogate: ElementwiseSurrogate, gain: list[float]) -> None:
    found = surrogate.gain(W / scale, grid)
    torch.testing.assert_close(found, torch.tensor(gain, dtype=torch.float32), rtol=0, atol=6e-6)


def test_masks_include_the_edge_itself() -> None:
    v = torch.tensor([-2.0, 1.0, math.nextafter(1.0, 2.0), 1.5, math.nextafter(1.5, 2.0)], dtype=torch.float64)
    assert ClippedSTE().gain(v, Int(2)).tolist() == [1, 1, 0, 0, 0]
    assert ClippedSTE(edge="bin").gain(v, Int(2)).tolist() == [1, 1, 1, 1, 0]


# StableQAT ----------------------------------------------------------------------------------------------------------


def cells(n: int = 100_000) -> torch.Tensor:
    """Midpoint rule over one cell."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5


@pytest.mark.parametrize(
    ("amplitude", "mean", "variance"),
    [(0.05, 0.75872, 0.01188), (0.1, 0.57814, 0.03239), (0.15, 0.43687, 0.05225), (0.21, 0.30246, 0.07221)],
)
def test_mean_and_variance_of_the_gain(amplitude: float, mean: float, variance: float) -> None:
    """Theorem 4.2 of arXiv:2601.19320; numbers as recomputed in methods.md 14."""
    gain = StableQAT(amplitude=amplitude).gain(cells(), Int(4))
    assert gain.mean().item() == pytest.approx(mean, abs=5e-6)
    assert gain.var().item() == pytest.approx(variance, abs=6e-6)
    assert mean_gain(amplitude, 1) == pytest.approx(gain.mean().item(), rel=1e-9)


def test_mean_and_variance_at_the_ends_of_the_amplitude() -> None:
    largest = StableQAT(amplitude=0.225078).gain(cells(), Int(4))
    assert largest.mean().item() == pytest.approx(4 / math.pi - 1, abs=1e-4)
    assert largest.var().item() == pytest.approx(16 / (3 * math.pi) - 16 / math.pi**2, abs=1e-4)
    smallest = StableQAT(amplitude=1e-9).gain(cells(), Int(4))
    torch.testing.assert_close(smallest, torch.ones_like(smallest), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("num_harmonics", "gains"),
    [  # origin: methods.md 14, A = .21, at distance 0, .1, .25, .4, .5 of a level
        (1, [0.03466, 0.05969, 0.20501, 0.55242, 1.0]),
        (2, [0.23304, 0.17334, 0.06403, 0.29877, 1.0]),
        (3, [0.10582, 0.17334, 0.14436, 0.1584, 1.0]),
    ],
)
def test_points_of_the_published_curve(num_harmonics: int, gains: list[float]) -> None:
    v = torch.tensor([0.0, 0.1, 0.25, 0.4, 0.5], dtype=torch.float64)
    found = StableQAT(num_harmonics=num_harmonics).gain(v, Int(4))
    torch.testing.assert_close(found, torch.tensor(gains, dtype=torch.float64), rtol=0, atol=6e-6)


@every_grid
@pytest.mark.parametrize("amplitude", [0.05, 0.21])
@pytest.mark.parametrize("num_harmonics", [1, 2, 5])
def test_the_gain_is_aligned_to_the_levels_of_every_grid(grid: AnyGrid, amplitude: float, num_harmonics: int) -> None:
    surrogate = StableQAT(amplitude=amplitude, num_harmonics=num_harmonics)
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    boundaries = (levels[1:] + levels[:-1]) / 2
    assert bool(((surrogate.gain(boundaries, grid) - 1).abs() < 1e-9).all()), "1 on every boundary"
    if num_harmonics == 1:
        c = math.sqrt(2) * math.pi * amplitude
        assert bool(((surrogate.gain(levels, grid) - (1 - c) / (1 + c)).abs() < 1e-9).all()), "smallest on levels"
        inside = torch.linspace(grid.min_level, grid.max_level, 4001, dtype=torch.float64)
        gain = surrogate.gain(inside, grid)
        assert gain.min() > (1 - c) / (1 + c) - 1e-9
        assert gain.max() < 1 + 1e-9


@every_grid
@settings(max_examples=40)
@given(values=st.lists(st.integers(-4096, 4096).map(lambda k: k / 512), min_size=1, max_size=16))
def test_the_gain_equals_its_definition_level_by_level(grid: AnyGrid, values: list[float]) -> None:
    for num_harmonics in (1, 3):
        surrogate = StableQAT(amplitude=0.2, num_harmonics=num_harmonics)
        found = surrogate.gain(torch.tensor(values, dtype=torch.float64), grid).tolist()
        expected = [
            stableqat_gain(v, grid, 0.2, num_harmonics) if grid.min_level <= v <= grid.max_level else 0.0
            for v in values
        ]
        assert found == pytest.approx(expected, abs=1e-12)


def test_the_gain_is_even_and_periodic() -> None:
    delta = cells(1000)
    gain = StableQAT(num_harmonics=2).gain(delta, Int(4))
    torch.testing.assert_close(gain.flip(0), gain, rtol=0, atol=1e-12)
    for shift in (-3, 2, 6):
        torch.testing.assert_close(StableQAT(num_harmonics=2).gain(delta + shift, Int(4)), gain, rtol=0, atol=1e-11)


@every_grid
@pytest.mark.parametrize("edge", ["level", "bin", "none"])
def test_amplitude_zero_is_clipped_ste_bit_for_bit(grid: AnyGrid, edge: Any) -> None:
    v, grad = 3 * torch.randn(2, 1000), torch.randn(2, 1000)
    zero, clipped = StableQAT(amplitude=0.0, edge=edge), ClippedSTE(edge=edge)
    assert torch.equal(zero.pullback(grad, v, grid, {}), clipped.pullback(grad, v, grid, {}))


@pytest.mark.parametrize("num_harmonics", [1, 2, 3])
@pytest.mark.parametrize("amplitude", [0.1, 0.21])
def test_normalized_gains_have_mean_one(num_harmonics: int, amplitude: float) -> None:
    surrogate = StableQAT(amplitude=amplitude, num_harmonics=num_harmonics, normalize=True)
    assert surrogate.gain(cells(), Int(4)).mean().item() == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("amplitude", [0.225079, 0.2251, 0.2866, 1.0, -0.01, math.nan, math.inf])
def test_amplitudes_beyond_the_bound_are_refused(amplitude: float) -> None:
    with pytest.raises(ValueError, match=r"use 0 <= amplitude < 0\.225079 for num_harmonics=1"):
        StableQAT(amplitude=amplitude)


@pytest.mark.parametrize("num_harmonics", range(1, 17))
def test_every_admissible_amplitude_has_a_positive_gain(num_harmonics: int) -> None:
    with pytest.raises(ValueError, match=r"amplitude < 0\.2\d+") as refusal:
        StableQAT(amplitude=0.5, num_harmonics=num_harmonics)
    limit = float(str(refusal.value).split("amplitude < ")[1].split()[0])
    gain = StableQAT(amplitude=limit - 1e-6, num_harmonics=num_harmonics).gain(cells(), Int(4))
    assert bool((gain > 0).all())
    with pytest.raises(ValueError, match="amplitude"):
        StableQAT(amplitude=limit, num_harmonics=num_harmonics)


# registry and plain data --------------------------------------------------------------------------------------------


def test_every_final_subclass_is_registered() -> None:
    def leaves(cls: type) -> set[type]:
        below = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("fewbits.")]
        return {cls} if not below else set().union(*(leaves(sub) for sub in below))

    assert leaves(Surrogate) == set(SURROGATES.values())
    assert all(not inspect.isabstract(cls) and SURROGATES[cls.name] is cls for cls in SURROGATES.values())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("dsq2", rf"unknown surrogate 'dsq2'; did you mean dsq\? known surrogates: {', '.join(SURROGATES)}"),
        ({"amplitude": 0.1}, "unknown surrogate None"),
        ({"name": "stableqat", "amplitud": 0.1}, "'stableqat' has no option 'amplitud'; options: amplitude"),
        ({"name": "ste", "edge": "bin"}, "'ste' has no option 'edge'; options: none"),
        ({"name": "clipped_ste", "edge": "outer"}, "edge='outer' is unknown; use 'level', 'bin'"),
        ({"name": "stableqat", "num_harmonics": 17}, "num_harmonics=17 is outside 1..16"),
        ({"name": "jacquant", "preset": "paper"}, "unknown preset 'paper'; known presets: recommended"),
    ],
)
def test_bad_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        surrogate_from_dict(data)


def test_a_name_means_the_defaults() -> None:
    assert surrogate_from_dict("stableqat") == StableQAT()
    preset = surrogate_from_dict({"name": "jacquant", "preset": "paper_decay", "interval": 7})
    assert preset == JacQuant.preset("paper_decay", interval=7)


def test_neighbouring_cells_meet_without_a_jump() -> None:
    """Left and right of a boundary the codebook's cells have different widths, yet the gain is continuous (1)."""
    grid = Codebook((-3.0, -1.0, 1.0, 7.0))
    for a, b in pairwise(grid.levels):
        near = torch.tensor([(a + b) / 2 - 1e-7, (a + b) / 2 + 1e-7], dtype=torch.float64)
        assert bool(((StableQAT().gain(near, grid) - 1).abs() < 1e-5).all())
