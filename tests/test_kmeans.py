"""One-dimensional k-means: fixed points, closed forms of the Gaussian, block normalisation."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbits.convert import Rule, convert, prepare
from fewbits.grids import Codebook
from fewbits.kmeans import SortedSample, block_scale, fit_codebook, kmeans_levels, lloyd, plus_plus
from fewbits.optim.codebooks import refit_codebooks_
from fewbits.qtensor import quantize
from fewbits.rotations import Rotation
from fewbits.scales import ScaleSpec, stored_scale
from fewbits.scheme import Scheme
from fewbits.testing.oracles import best_levels

BLOCKS = ScaleSpec(granularity="per_group", group_size=64, rule="absmax", dtype="fp32")
LLOYD_MAX = {  # methods.md 1 (b): positive levels and distortion on N(0, 1)
    2: ([0.79788], 0.363380),
    3: ([0.0, 1.22401], 0.190174),
    4: ([0.45278, 1.51042], 0.117482),
    8: ([0.24509, 0.75601, 1.34391, 2.15195], 0.034548),
    16: ([0.1284, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259], 0.009501),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantiles(n: int) -> Tensor:
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def distortion(x: Tensor, levels: Tensor, weights: Tensor | None = None) -> float:
    """Brute force: every value against every level."""
    error = (x.double()[:, None] - levels).square().amin(1)
    h = torch.ones_like(error) if weights is None else weights.double()
    return ((error * h).sum() / h.sum()).item()


# the iteration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", LLOYD_MAX)
def test_lloyd_max_of_the_gaussian(num_levels: int) -> None:
    x = quantiles(300_000)
    levels = kmeans_levels(x, num_levels)
    positive, error = LLOYD_MAX[num_levels]
    half = num_levels // 2
    # finite data stop Lloyd's iteration a little early: no value changes its cell any more (error ~ K^2 / n)
    assert levels[half:].tolist() == pytest.approx(positive, abs=2e-3)
    assert (-levels.flip(0)).tolist() == pytest.approx(levels.tolist(), abs=4e-3)
    assert distortion(x, levels) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_levels", [2, 3, 4, 16])
def test_fixed_point_and_monotone_distortion(num_levels: int, weighted: bool) -> None:
    x = torch.cat([normal(3000), 4 + 0.3 * normal(500, seed=1)]).double()
    h = torch.rand(3500, generator=torch.Generator().manual_seed(2)).double() if weighted else torch.ones(3500).double()
    sample = SortedSample.of(x, h)
    levels = plus_plus(sample, num_levels, torch.Generator().manual_seed(3))
    errors = [distortion(x, levels, h)]
    for _ in range(30):
        levels = lloyd(sample, levels, max_iterations=1)
        errors.append(distortion(x, levels, h))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    levels = lloyd(sample, levels)
    cell = (x[:, None] - levels).abs().argmin(1)  # nearest level: boundaries are midpoints
    for k in range(num_levels):
        inside = cell == k
        mean = (h[inside] * x[inside]).sum() / h[inside].sum()
        assert levels[k].item() == pytest.approx(mean.item(), abs=1e-10)
    again = lloyd(sample, levels)
    torch.testing.assert_close(again, levels, rtol=0, atol=1e-12)


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=40, unique=True),
    num_levels=st.integers(2, 4),
    seed=st.integers(0, 5),
)
def test_any_data_gives_ascending_levels_within_its_range(values: list[float], num_levels: int, seed: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    levels = kmeans_levels(x, num_levels, seed=seed)
    assert (levels.diff() > 0).all()
    assert levels[0] >= x.min()
    assert levels[-1] <= x.max()
    uniform = torch.linspace(x.min().item(), x.max().item(), num_levels, dtype=torch.float64)
    sample = SortedSample.of(x)
    assert distortion(x, lloyd(sample, uniform)) <= distortion(x, uniform) + 1e-9


@pytest.mark.parametrize("weighted", [False, True])
def test_against_the_global_minimum_of_dynamic_programming(weighted: bool) -> None:
    """Never below it, mostly at it, and it is a fixed point of ours."""
    found = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20, generator=generator).double()
        h = torch.rand(20, generator=generator).double() + 0.05 if weighted else torch.ones(20).double()
        num_levels = 2 + seed % 3
        levels, lowest = best_levels(x.tolist(), num_levels, h.tolist())
        ours = distortion(x, kmeans_levels(x, num_levels, weights=h), h) * h.sum().item()
        assert ours >= lowest * (1 - 1e-12)
        found.append(ours <= lowest * (1 + 1e-9))
        best = torch.tensor(levels, dtype=torch.float64)
        torch.testing.assert_close(lloyd(SortedSample.of(x, h), best), best, rtol=0, atol=1e-12)
    assert sum(found) >= 36  # 8 seedings of a method that knows local minima only


def test_as_many_values_as_levels_are_kept() -> None:
    x = torch.tensor([3.0, -1.0, 0.25, 7.0]).repeat(5)
    assert kmeans_levels(x, 4).tolist() == [-1.0, 0.25, 3.0, 7.0]


def test_weights_are_repetitions() -> None:
    x = normal(300)
    counts = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(1))
    start = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    weighted = lloyd(SortedSample.of(x, counts), start)
    repeated = lloyd(SortedSample.of(x.repeat_interleave(counts)), start)
    torch.testing.assert_close(weighted, repeated, rtol=0, atol=1e-12)


def test_the_seed_decides_and_nothing_else() -> None:
    x = normal(5000)
    torch.manual_seed(1)
    first = kmeans_levels(x, 8, seed=4)
    torch.manual_seed(2)
    assert torch.equal(kmeans_levels(x.view(50, 100), 8, seed=4), first)
    state = torch.get_rng_state()
    kmeans_levels(x, 8, seed=5, first_sample=1000)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("weighted", [False, True])
def test_growing_samples_end_at_a_fixed_point_of_all_values(weighted: bool) -> None:
    x = normal(40_000)
    h = x.square() if weighted else None
    grown = kmeans_levels(x, 4, weights=h, first_sample=1000)
    whole = kmeans_levels(x, 4, weights=h)
    torch.testing.assert_close(grown, lloyd(SortedSample.of(x, h), grown), rtol=0, atol=1e-12)
    torch.testing.assert_close(grown, whole, rtol=0, atol=0.01)  # the same minimum, up to early stops
    if weighted:  # x^2 times the density has two modes, hence a worse minimum of 3 levels on one side
        assert grown[-1] > kmeans_levels(x, 4)[-1]
        sample = SortedSample.of(x, h)
        lopsided = lloyd(sample, torch.tensor([-2.0, 1.0, 1.7, 2.7], dtype=torch.float64))
        assert (lopsided > 0).sum() == 3
        assert (grown > 0).sum() == 2
        assert distortion(x, grown, h) < distortion(x, lopsided, h)
        assert sample.explained(grown) > sample.explained(lopsided)


def test_plus_plus_spreads_over_clusters() -> None:
    centres = torch.tensor([-10.0, -3.0, 2.0, 50.0])
    x = (centres[:, None] + 1e-3 * normal(4, 200)).flatten()
    seeds = plus_plus(SortedSample.of(x), 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(seeds.float(), centres, rtol=0, atol=0.01)


def test_bad_input_is_refused() -> None:
    x = normal(100)
    with pytest.raises(ValueError, match="num_levels"):
        kmeans_levels(x, 1)
    with pytest.raises(ValueError, match="first_sample"):
        kmeans_levels(x, 8, first_sample=4)
    with pytest.raises(ValueError, match="finite"):
        kmeans_levels(torch.tensor([0.0, torch.nan, 1.0]), 2)
    with pytest.raises(ValueError, match="weights"):
        kmeans_levels(x, 2, weights=-x.abs())
    with pytest.raises(ValueError, match="weights"):
        kmeans_levels(x, 2, weights=torch.ones(7))
    with pytest.raises(ValueError, match="1 distinct"):
        kmeans_levels(torch.zeros(50), 2)
    with pytest.raises(ValueError, match="distinct"):
        kmeans_levels(x, 2, weights=torch.zeros(100))


# blocks --------------------------------------------------------------------------------------------------------------


def test_block_scale_by_hand() -> None:
    w = torch.tensor([[3.0, -4.0, 0.0, 1.0], [0.0] * 4])
    for rule, expected in {"absmax": 4.0, "absmean": 2.0, "rms": (26 / 4) ** 0.5, "mse": (26 / 4) ** 0.5}.items():
        found = block_scale(w, ScaleSpec(rule=rule))  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor([[expected], [0.0]]))
    ragged = block_scale(torch.ones(2, 100), ScaleSpec(granularity="per_group", group_size=64, rule="absmean"))
    assert ragged.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_two_levels_on_absmean_blocks_are_signs() -> None:
    w = normal(4000, 64)
    spec = ScaleSpec(granularity="per_group", group_size=64, rule="absmean", dtype="fp32")
    grid = fit_codebook(w, 2, spec)
    assert [abs(x) for x in grid.levels] == pytest.approx([1.0, 1.0], abs=0.015)  # spec: -1.0066, .9935
    q = quantize(w, Scheme(grid=grid, scale=spec), scale=block_scale(w, spec))
    signs = torch.where(w > 0, 1, 0)
    assert (q.codes == signs).float().mean().item() > 0.99
    signed = torch.where(q.codes == 1, 1.0, -1.0) * block_scale(w, spec)
    torch.testing.assert_close(q.dequantize(), signed, rtol=0.015, atol=0)


@pytest.mark.parametrize(
    ("rule", "errors"),
    # methods.md 1 (d): relative error on Gaussian blocks of 64
    [("absmax", [0.3724, 0.1179, 0.0314, 0.0076]), ("absmean", [0.3563, 0.1159, 0.0342, 0.0095])],
)
def test_relative_error_on_gaussian_blocks(rule: str, errors: list[float]) -> None:
    w = normal(4000, 128)
    spec = ScaleSpec(granularity="per_group", group_size=64, rule=rule, dtype="fp32")  # type: ignore[arg-type]
    for num_bits, expected in enumerate(errors, start=1):
        grid = fit_codebook(w, 2**num_bits, spec)
        q = quantize(w, Scheme(grid=grid, scale=spec), scale=block_scale(w, spec))
        error = ((q.dequantize() - w).square().mean() / w.square().mean()).item()
        assert error == pytest.approx(expected, rel=0.015)


def test_levels_are_means_of_what_they_stand_for() -> None:
    w = normal(40, 160)  # the last block of a row is short; its padding must not count
    spec = ScaleSpec(granularity="per_group", group_size=64, rule="absmax")  # portable: the scale as stored
    grid = fit_codebook(w, 4, spec)
    u = w / spec.view(w.shape).expand(stored_scale(block_scale(w, spec), spec))
    codes = grid.encode(u)
    for k, level in enumerate(grid.levels):
        assert u[codes == k].mean().item() == pytest.approx(level, abs=1e-5)


def test_squared_scales_as_weights_minimise_the_error_of_the_weight() -> None:
    w = normal(200, 128) * torch.rand(200, 1, generator=torch.Generator().manual_seed(1)).exp().square()
    scale = BLOCKS.view(w.shape).expand(block_scale(w, BLOCKS))

    def error(grid: Codebook) -> float:
        q = quantize(w, Scheme(grid=grid, scale=BLOCKS), scale=block_scale(w, BLOCKS))
        return (q.dequantize() - w).square().mean().item()

    assert error(fit_codebook(w, 4, BLOCKS, weights=scale.square())) < error(fit_codebook(w, 4, BLOCKS))


def test_a_zero_weight_is_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match="distinct"):
        fit_codebook(torch.zeros(4, 64), 4, BLOCKS)


# layers --------------------------------------------------------------------------------------------------------------


def codebook_model(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(128, 16), "b": nn.Linear(64, 8), "embed": nn.Embedding(32, 64)})
    model["head"] = nn.Linear(64, 32, bias=False)
    model["head"].weight = model["embed"].weight
    codebook = Rule(pattern="[ah]*", scheme=Scheme.parse("W2KG64", **options), embeddings=True)
    return prepare(model, [codebook, Rule(pattern="b", scheme="W2")], ignore=[])


def test_refit_gives_every_layer_its_own_codebook_and_lowers_the_error() -> None:
    model = codebook_model(dtype="fp32")
    before = {name: model[name].qtensor().dequantize() for name in ("a", "b", "embed")}
    assert refit_codebooks_(model) == ["a", "head"]
    for name in ("a", "embed"):
        layer = model[name]
        w = layer.latent()
        assert isinstance(layer.scheme.grid, Codebook)
        assert len(layer.scheme.grid.levels) == 4
        q = layer.qtensor().dequantize()
        assert torch.equal(layer.quantized_weight(), q)
        assert torch.equal(layer.raw_scale(), block_scale(w, layer.scheme.scale))
        assert (q - w).square().mean() < 1.05 * (before[name] - w).square().mean()
    assert model["a"].scheme.grid != model["embed"].scheme.grid
    assert model["head"].scheme == model["embed"].scheme
    assert torch.equal(model["head"].quantized_weight(), model["embed"].quantized_weight())
    assert torch.equal(model["b"].qtensor().dequantize(), before["b"])
    x = normal(2, 128)
    expected = model["a"](x)
    assert torch.equal(convert(model)["a"](x), expected)


def test_refit_takes_importance_and_a_rotated_layer() -> None:
    plain, weighted = codebook_model(), codebook_model()
    refit_codebooks_(plain)
    refit_codebooks_(weighted, weights={"a": weighted["a"].weight.detach().square()})
    assert weighted["a"].scheme.grid.levels[-1] > plain["a"].scheme.grid.levels[-1]
    assert weighted["embed"].scheme.grid == plain["embed"].scheme.grid
    rotated = codebook_model(rotation=Rotation(kind="hadamard", block_size=64))
    assert refit_codebooks_(rotated) == ["a", "head"]
    with pytest.raises(ValueError, match="rotated"):
        refit_codebooks_(rotated, weights={"a": torch.ones(16, 128)})


def test_refit_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="no layer"):
        refit_codebooks_(prepare(nn.Sequential(nn.Linear(64, 4)), Rule(scheme="W2")))
    with pytest.raises(ValueError, match="'b'"):
        refit_codebooks_(codebook_model(), weights={"b": torch.ones(8, 64)})
    with pytest.raises(ValueError, match="dynamic"):
        refit_codebooks_(codebook_model(mode="dynamic"))
    model = codebook_model()
    with torch.no_grad():
        model["embed"].weight.zero_()
    grid = model["a"].scheme.grid
    with pytest.raises(ValueError, match="distinct"):
        refit_codebooks_(model)
    assert model["a"].scheme.grid == grid  # all or nothing
