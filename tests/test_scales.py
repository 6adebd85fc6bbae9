"""Scales: views, rules against closed Gaussian values, rounding to the stored dtype, double quantization."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.numerics import SCALE_DTYPES, STORED_DTYPE, is_representable, round_scale, sqnr_db
from fewbits.scales import (
    GRID_FREE_RULES,
    QUEST_S,
    GroupView,
    ScaleRule,
    ScaleSpec,
    block_size,
    combine,
    double_quantize,
    find_scale,
    gaussian_size,
    gaussian_step,
    stored_scale,
)
from fewbits.testing.contracts import check_scale_rule
from fewbits.testing.oracles import gaussian_distortion, scale_index

GRIDS: list[AnyGrid] = [
    Binary(),
    Ternary(),
    Int(1),
    Int(2),
    Int(4),
    HalfShifted(1),
    HalfShifted(2),
    HalfShifted(4),
    Codebook.lloyd_max(4),
    Codebook((-3.0, -1.0, 1.0, 7.0)),
]
RULES = get_args(ScaleRule)
REFUSED = (
    {("rms", g) for g in GRIDS if isinstance(g, Int | Codebook)}
    | {(rule, Int(1)) for rule in ("absmax_qmax", "absmean")}
    | {(rule, g) for rule in GRID_FREE_RULES for g in GRIDS if not isinstance(g, Codebook)}
)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_contract_holds(rule: ScaleRule, grid: AnyGrid) -> None:
    assert check_scale_rule(rule, grid) == ((rule, grid) not in REFUSED)


# views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group", "per_token"])
@given(rows=st.integers(1, 4), width=st.integers(1, 130), group_size=st.integers(32, 256))
def test_a_view_agrees_with_index_arithmetic(granularity: str, rows: int, width: int, group_size: int) -> None:
    size = group_size if granularity == "per_group" else None
    view = GroupView((rows, width), granularity, size)  # type: ignore[arg-type]
    scale = torch.arange(math.prod(view.scale_shape)).view(view.scale_shape)
    layout = "per_tensor" if granularity == "per_tensor" else "per_group"
    expected = [[scale[scale_index(i, j, layout, size)].item() for j in range(width)] for i in range(rows)]
    assert view.expand(scale).tolist() == expected
    w = torch.randn(rows, width)
    assert torch.equal(view.merge(view.split(w)), w)
    assert int(view.counts().sum()) * view.rows == w.numel()


def test_a_view_copies_only_where_the_last_group_is_ragged() -> None:
    even, ragged = torch.randn(4, 96), torch.randn(4, 100)
    assert GroupView((4, 96), "per_group", 32).split(even).data_ptr() == even.data_ptr()
    padded = GroupView((4, 100), "per_group", 32).split(ragged)
    assert padded.shape == (4, 4, 32)
    assert not padded[:, -1, 4:].any()


@pytest.mark.parametrize("w", [torch.randn(4, 100), torch.randn(100, 4).t()], ids=["plain", "transposed"])
@pytest.mark.parametrize("group_size", [None, 32, 50])
def test_both_directions_are_contiguous(w: torch.Tensor, group_size: int | None) -> None:
    """Else the same weight, stored in another order, would give sums and logits that differ in the last bit."""
    view = GroupView((4, 100), "per_channel" if group_size is None else "per_group", group_size)
    split = view.split(w)
    assert split.is_contiguous()
    assert view.merge(split).is_contiguous()
    assert torch.equal(view.merge(split), w)


# rules on the golden vector and on Gaussian weights ----------------------------------------------------------------

FLAT_OPTIMUM = 5e-4
"""A squared error summed in fp32 tells scales apart no finer than the root of its rounding, 3e-4."""
W = torch.tensor([[-1.3, -0.6, -0.2, 0.05, 0.12, 0.45, 0.9, 2.0]])
MEAN, RMS = 0.7025, 0.9433584


@pytest.mark.parametrize(
    ("rule", "grid", "expected"),
    [  # origin: methods.md 0.4, 7 and 13; SEQ's alpha is 2**(b-1) steps, its ternary one 1.5 steps
        ("absmean", Binary(), MEAN),
        ("absmean", Ternary(), MEAN),
        ("absmean", Int(2), 2 * MEAN),
        ("absmean", Int(4), 2 * MEAN / math.sqrt(7)),
        ("absmax_cover", Ternary(), 2.0 / 1.5),
        ("absmax_cover", HalfShifted(2), 2.0 / 2),
        ("absmax_qmax", Int(3), 2.0 / 3),
        ("absmax", HalfShifted(2), 2.0 / 1.5),
        ("absmax", Int(2), 2.0 / 1.5),
        ("rms", Binary(), 0.752691),
        ("rms", HalfShifted(2), 2 * 1.408938 / 3),
        ("rms", HalfShifted(4), 2 * 2.371537 / 15),
        ("gaussian", Int(2), RMS * 1.0484),
        ("block_absmax", Codebook((-3.0, -1.0, 1.0, 7.0)), 2.0),
        ("block_absmean", Codebook((-3.0, -1.0, 1.0, 7.0)), MEAN),
        ("block_rms", Codebook((-3.0, -1.0, 1.0, 7.0)), RMS),
    ],
)
def test_rules_on_the_golden_vector(rule: ScaleRule, grid: AnyGrid, expected: float) -> None:
    assert find_scale(W, grid, ScaleSpec(rule=rule)).item() == pytest.approx(expected, rel=5e-5)


@pytest.mark.parametrize("rule", GRID_FREE_RULES)
def test_the_size_of_a_block_knows_no_grid(rule: ScaleRule) -> None:
    spec = ScaleSpec(granularity="per_group", group_size=32, rule=rule)
    w = torch.randn(8, 80)  # the last group is short: its padding must not count
    by_hand = {
        "block_absmax": lambda x: x.abs().amax(1),
        "block_absmean": lambda x: x.abs().sum(1) / x.shape[1],
        "block_rms": lambda x: x.square().sum(1).div(x.shape[1]).sqrt(),
    }[rule]
    expected = torch.stack([by_hand(part) for part in w.split(32, 1)], 1)
    for grid in (Codebook.lloyd_max(4), Codebook((-3.0, -1.0, 1.0, 7.0)), Codebook((-2.0, -1.0))):
        torch.testing.assert_close(find_scale(w, grid, spec), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [64, 256])
@pytest.mark.parametrize("rule", GRID_FREE_RULES)
def test_expected_size_of_a_gaussian_block(rule: ScaleRule, count: int) -> None:
    w = torch.randn(20_000, count)
    size = block_size(w[:, None], torch.tensor([count]), rule)
    mean = size.square().mean().sqrt() if rule == "block_rms" else size.mean()
    assert mean.item() == pytest.approx(gaussian_size(rule, count), rel=3e-3)  # sampling: 20000 blocks


@pytest.mark.parametrize(
    ("grid", "scale", "distortion"),
    [  # origin: methods.md 0.2 (MSE-optimal rows, N(0, 1)) and 7
        (Binary(), math.sqrt(2 / math.pi), 1 - 2 / math.pi),
        (Ternary(), 1.836 / 1.5, 0.190174),
        (Int(2), 1.0484, 0.1494),
        (Int(3), 0.6018, 0.0406),
        (Int(4), 0.3386, 0.0119),
        (HalfShifted(2), 1.9914 / 2, 0.118846),
        (HalfShifted(3), 2.3441 / 4, 0.0374397),
        (HalfShifted(4), 2.6816 / 8, 0.0115429),
        (HalfShifted(5), 2 * 2.9160938835 / 31, 0.00349521),
    ],
    ids=str,
)
def test_gaussian_step_is_the_published_optimum(grid: AnyGrid, scale: float, distortion: float) -> None:
    step = gaussian_step(grid)
    assert step == pytest.approx(scale, rel=2e-4)
    assert gaussian_distortion(grid.levels, step) == pytest.approx(distortion, rel=6e-3 if distortion < 0.05 else 5e-4)
    for factor in (0.999, 1.001):
        assert gaussian_distortion(grid.levels, factor * step) > gaussian_distortion(grid.levels, step)


@pytest.mark.parametrize("num_levels", QUEST_S)
def test_quest_factors_are_the_argmin_of_the_gaussian_error(num_levels: int) -> None:
    """Up to 5 bits; the published 6 to 8 bit values lie .04 to 1 % under the optimum (methods.md 7)."""
    grid = {2: Binary(), 3: Ternary()}.get(num_levels) or HalfShifted(int(math.log2(num_levels)))
    outermost = gaussian_step(grid) * grid.max_level
    if num_levels <= 32:
        assert QUEST_S[num_levels] == pytest.approx(outermost, abs=1e-4)
    else:
        optimum = {64: 3.2780, 128: 3.6111, 256: 3.9222}[num_levels]
        assert outermost == pytest.approx(optimum, abs=1e-4)
        assert 0.0004 < 1 - QUEST_S[num_levels] / outermost < 0.011


def test_seq_and_quest_are_one_grid() -> None:
    """alpha_SEQ = S_QuEST * 2**b / (2**b - 1), and 1.5 times the ternary level (methods.md 0.2)."""
    for bits in (2, 3, 4):
        alpha = gaussian_step(HalfShifted(bits)) * 2 ** (bits - 1)
        assert alpha == pytest.approx(QUEST_S[2**bits] * 2**bits / (2**bits - 1), abs=2e-4)


@pytest.mark.parametrize(
    ("rule", "grid", "relative_error"),
    [  # origin: methods.md 0.2, rows of 2048 Gaussian weights
        ("absmax_cover", Ternary(), 0.4645),
        ("absmax_cover", HalfShifted(2), 0.2756),
        ("absmax_qmax", Int(2), 0.7906),
        ("absmax_qmax", Int(3), 0.1217),
        ("absmax_qmax", Int(4), 0.0224),
        ("absmean", Int(2), 0.2210),
        ("absmean", Int(3), 0.0711),
        ("absmean", Int(4), 0.0303),
        ("absmean", Ternary(), 0.2634),
        ("absmean", Binary(), 1 - 2 / math.pi),
        ("mse", Ternary(), 0.1902),
        ("mse", Int(2), 0.1494),
        ("mse", Int(3), 0.0406),
        ("mse", Int(4), 0.0119),
        ("mse", HalfShifted(2), 0.1188),
        ("mse", HalfShifted(4), 0.0115),
    ],
)
def test_gaussian_error_of_every_start(rule: ScaleRule, grid: AnyGrid, relative_error: float) -> None:
    w = torch.randn(128, 2048)
    scale = find_scale(w, grid, ScaleSpec(rule=rule))
    error = (w - grid.project_(w / scale) * scale).square().mean() / w.square().mean()
    assert error.item() == pytest.approx(relative_error, rel=0.03)  # sampling: 262144 weights


def test_bitnet_share_of_zeros() -> None:
    w = torch.randn(64, 4096)
    codes = Ternary().encode(w / find_scale(w, Ternary(), ScaleSpec(granularity="per_tensor", rule="absmean")))
    assert (codes == 0).float().mean().item() == pytest.approx(math.erf(1 / (2 * math.sqrt(math.pi))), abs=0.003)


def test_binary_mean_is_the_least_squares_scale() -> None:
    w = torch.randn(16, 64, dtype=torch.float64)
    signs = Binary().project_(w.clone())
    scale = w.abs().mean(1, keepdim=True)
    torch.testing.assert_close(((w - scale * signs) * signs).sum(1), torch.zeros(16).double(), rtol=0, atol=1e-12)
    found = find_scale(w, Binary(), ScaleSpec(rule="mse"))
    torch.testing.assert_close(found, scale.float(), rtol=FLAT_OPTIMUM, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mse_beats_every_other_rule(grid: AnyGrid) -> None:
    w = torch.randn(32, 128).mul_(torch.rand(32, 1)).pow_(3)  # heavy tails, many magnitudes

    def errors(rule: ScaleRule) -> torch.Tensor:
        scale = find_scale(w, grid, ScaleSpec(rule=rule)).clamp_min(1e-30)
        return (w - grid.project_(w / scale) * scale).square().sum(1)

    for rule in RULES:
        if (rule, grid) not in REFUSED and not (rule.startswith("absmax") and grid == Int(1)):
            assert bool((errors("mse") <= 1.02 * errors(rule)).all()), rule


# rounding to the stored dtype ---------------------------------------------------------------------------------------

positive = st.floats(2.0**-14, 65280.0, width=32)


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@given(value=positive)
def test_rounded_scales_are_exact_in_their_dtype(dtype: str, value: float) -> None:
    rounded = round_scale(torch.tensor([value]), dtype)  # type: ignore[arg-type]
    assert torch.equal(rounded.to(STORED_DTYPE[dtype]).float(), rounded)
    assert torch.equal(round_scale(rounded, dtype), rounded)  # type: ignore[arg-type]
    assert is_representable(rounded, dtype)  # type: ignore[arg-type]
    bound = {"portable": 2.0**-8, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 0.0}[dtype]
    assert abs(rounded.item() - value) <= bound * value
    if dtype == "portable":
        assert rounded.half().float().item() == rounded.bfloat16().float().item() == rounded.item()


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_extreme_scales_stay_positive_and_finite_but_nan_is_seen(dtype: str) -> None:
    rounded = round_scale(torch.tensor([0.0, -1.0, 1e-40, 1e30, math.inf, math.nan]), dtype)  # type: ignore[arg-type]
    assert bool((rounded[:4] > 0).all())
    assert bool(torch.isfinite(rounded[:4]).all())
    assert math.isnan(rounded[-1])


def test_unknown_scale_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="scale dtype 'fp8' is unknown; use one of portable, fp16, bf16, fp32"):
        round_scale(torch.ones(1), "fp8")  # type: ignore[arg-type]


# double quantization --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4, 6, 8])
@pytest.mark.parametrize("groups", [1, 7, 8, 19])
def test_double_quantization_against_a_loop(bits: int, groups: int) -> None:
    spec = ScaleSpec(granularity="per_group", group_size=32, superblock=256, multiplier_bits=bits, dtype="fp16")
    scale = torch.rand(3, groups) + 0.01
    super_scale, multipliers = double_quantize(scale, spec)
    assert super_scale.shape == (3, -(-groups // 8))
    top = 2**bits - 1
    for i in range(3):
        for j in range(groups):
            block = scale[i, j // 8 * 8 : j // 8 * 8 + 8]
            d = (block.max() / top).half().float()
            assert super_scale[i, j // 8] == d
            assert multipliers[i, j].item() == min(top, max(1, round((scale[i, j] / d).item())))
    assert torch.equal(stored_scale(scale, spec), combine(super_scale, multipliers, spec))
    assert torch.equal(stored_scale(stored_scale(scale, spec), spec), stored_scale(scale, spec)) or bits == 1


# validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "layerwise"}, "granularity='layerwise' is unknown; use one of per_tensor"),
        ({"rule": "max"}, "rule='max' is unknown"),
        ({"mode": "static"}, "mode='static' is unknown"),
        ({"dtype": "fp8"}, "scale dtype 'fp8' is unknown"),
        ({"granularity": "per_group"}, "give group_size with per_group"),
        ({"group_size": 64}, "give group_size with per_group"),
        ({"granularity": "per_group", "group_size": 16}, "outside 32..256"),
        ({"granularity": "per_group", "group_size": 257}, "outside 32..256"),
        ({"granularity": "per_token"}, "use mode='dynamic'"),
        ({"superblock": 256}, "superblock=256 needs per_group"),
        ({"granularity": "per_group", "group_size": 64, "superblock": 96}, "divides it"),
        ({"granularity": "per_group", "group_size": 64, "superblock": 64}, "smaller"),
        ({"granularity": "per_group", "group_size": 64, "superblock": 256, "multiplier_bits": 9}, "outside 1..8"),
    ],
)
def test_bad_scale_specs_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleSpec(**fields)  # type: ignore[arg-type]


def test_rules_without_meaning_are_refused_by_find_scale() -> None:
    for rule in ("absmax_qmax", "absmean"):
        with pytest.raises(ValueError, match="no positive level"):
            find_scale(W, Int(1), ScaleSpec(rule=rule))
    with pytest.raises(ValueError, match="not centred, use 'gaussian'"):
        find_scale(W, Int(2), ScaleSpec(rule="rms"))


def test_signal_to_noise_in_decibels() -> None:
    x = torch.ones(4)
    assert sqnr_db(x, 0.9 * x) == pytest.approx(20.0, abs=1e-5)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(0 * x, x) == -math.inf
