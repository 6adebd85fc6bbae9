"""DSQ, EWGS, Rotation Trick, numeric clip edges, dither laws and drift-based refresh."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbits.fake_quant import fake_quantize
from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.scheme import Scheme
from fewbits.surrogates import (
    DSQ,
    EWGS,
    STE,
    SURROGATES,
    ClippedSTE,
    JacQuant,
    RotationTrick,
    StableQAT,
    Surrogate,
    surrogate_from_dict,
)
from fewbits.surrogates.dsq import soft_step
from fewbits.surrogates.ewgs import curvature_delta
from fewbits.surrogates.rotation_trick import rotate_back
from fewbits.surrogates.sensitivity import cell_width, dither_exact, drift, needs_refresh

UNIFORM: list[AnyGrid] = [Binary(), Ternary(), Int(2), Int(4), HalfShifted(2), HalfShifted(3)]
GRIDS: list[AnyGrid] = [*UNIFORM, Codebook((-3.0, -1.0, 1.0, 7.0))]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
FIELD: list[Surrogate] = [
    DSQ(),
    DSQ(alpha=0.7, edge="bin"),
    EWGS(delta=0.3),
    RotationTrick(group_size=4),
    RotationTrick(group_size=None),
    ClippedSTE(edge=1.3),
    JacQuant(law="triangular"),
    JacQuant(law="gaussian", law_width=0.25),
    JacQuant(refresh="drift", drift_steps=0.1, check_interval=5),
]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def boundaries(grid: AnyGrid) -> Tensor:
    t = torch.tensor(grid.levels, dtype=torch.float64)
    return (t[1:] + t[:-1]) / 2


# the registry --------------------------------------------------------------------------------------------------------


def test_the_registry_lists_every_surrogate() -> None:
    def subclasses(cls: type) -> set[type]:
        return {c for sub in cls.__subclasses__() for c in {sub, *subclasses(sub)}}

    concrete = {c for c in subclasses(Surrogate) if "name" in vars(c) and c.__module__.startswith("fewbits.")}
    assert concrete == set(SURROGATES.values())


@pytest.mark.parametrize("surrogate", FIELD, ids=repr)
def test_dict_round_trip(surrogate: Surrogate) -> None:
    assert surrogate_from_dict(surrogate.to_dict()) == surrogate


@pytest.mark.parametrize("surrogate", FIELD, ids=repr)
@every_grid
def test_the_forward_pass_and_the_scale_gradient_do_not_depend_on_the_surrogate(
    surrogate: Surrogate, grid: AnyGrid
) -> None:
    scheme = Scheme(grid=grid)
    grads, outputs = [], []
    for s in (surrogate, STE()):
        w = rand(5, 12, dtype=torch.float32).requires_grad_()
        scale = torch.full((5, 1), 0.4, requires_grad=True)
        out = fake_quantize(w, scheme, scale, s)
        (out * rand(5, 12, seed=1, dtype=torch.float32)).sum().backward()
        assert w.grad is not None
        assert torch.isfinite(w.grad).all()
        outputs.append(out.detach())
        grads.append(scale.grad)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(grads[0], grads[1])


# clip edges as numbers -----------------------------------------------------------------------------------------------


def test_a_number_is_a_multiple_of_the_outermost_levels() -> None:
    v = torch.tensor([-1.31, -1.3, -1.01, 0.0, 1.0, 1.29, 1.31])
    assert ClippedSTE(edge=1.3).gain(v, Binary()).tolist() == [0, 1, 1, 1, 1, 1, 0]
    wide = torch.tensor([-3.0, -2.6, -2.5, 1.3, 1.35])
    assert ClippedSTE(edge=1.3).gain(wide, Int(2)).tolist() == [0, 1, 1, 1, 0]


@every_grid
def test_edge_one_is_the_level_edge(grid: AnyGrid) -> None:
    v = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    assert torch.equal(ClippedSTE(edge=1.0).gain(v, grid), ClippedSTE(edge="level").gain(v, grid))


def test_quest_one_bit_mask_fraction() -> None:
    # s = S_1 rms: P(|x| > 1.3 S_1) of a Gaussian, S_1 = sqrt(2/pi)
    x = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    s = math.sqrt(2 / math.pi)
    masked = 1 - ClippedSTE(edge=1.3).gain(x / s, Binary()).mean().item()
    assert masked == pytest.approx(math.erfc(1.3 * s / math.sqrt(2)), abs=2e-5)


@pytest.mark.parametrize("edge", [0, -1.0, math.nan, math.inf, True, "levels", None])
def test_bad_edges_are_refused(edge: object) -> None:
    with pytest.raises(ValueError, match="edge"):
        ClippedSTE(edge=edge)  # type: ignore[arg-type]


# DSQ -----------------------------------------------------------------------------------------------------------------


def test_dsq_golden_values() -> None:
    # spec: alpha = .2 gives phi(-.5, -.25, 0, .25) = (-1, -.625, 0, .625), slope 1.3733 at the centre, .4944 on a level
    phi = soft_step(torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5], dtype=torch.float64), 0.2)
    torch.testing.assert_close(phi, torch.tensor([-1, -0.625, 0, 0.625, 1], dtype=torch.float64), rtol=0, atol=1e-12)
    gain = DSQ(alpha=0.2).gain(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), Int(3))
    assert gain.tolist() == pytest.approx([0.49438, 1.37327, 0.49438], abs=1e-5)


@every_grid
@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.6, 0.99])
def test_dsq_mean_slope_between_neighbouring_levels_is_one(grid: AnyGrid, alpha: float) -> None:
    n = 20_000
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for low, high in zip(grid.levels, grid.levels[1:], strict=False):
        mean = DSQ(alpha=alpha).gain(low + t * (high - low), grid).mean().item()
        assert mean == pytest.approx(1.0, abs=1e-6)  # midpoint rule, h = 5e-5


@every_grid
def test_dsq_is_the_derivative_of_its_curve_and_peaks_on_boundaries(grid: AnyGrid) -> None:
    v = (grid.levels[0] + torch.linspace(0.01, 0.97, 33, dtype=torch.float64)).requires_grad_()
    u = grid.cell_coordinate(v) - grid.cell_coordinate(torch.tensor(grid.levels[0], dtype=torch.float64))
    width = grid.levels[1] - grid.levels[0]
    inside = u < 1
    curve = 0.5 * width * soft_step(u - 0.5, 0.3)  # the soft level over the first cell
    (slope,) = torch.autograd.grad(curve.sum(), v)
    expected = DSQ(alpha=0.3).gain(v.detach(), grid)
    torch.testing.assert_close(expected[inside], slope[inside], rtol=1e-10, atol=0)
    fine = torch.linspace(grid.levels[0], grid.levels[1], 2001, dtype=torch.float64)
    assert fine[DSQ().gain(fine, grid).argmax()].item() == pytest.approx(boundaries(grid)[0].item(), abs=1e-9)


@every_grid
def test_dsq_limits(grid: AnyGrid) -> None:
    v = torch.linspace(-9, 9, 997, dtype=torch.float64)
    near_one = DSQ(alpha=1 - 1e-9).gain(v, grid)
    torch.testing.assert_close(near_one, ClippedSTE().gain(v, grid), rtol=0, atol=1e-8)
    spikes = DSQ(alpha=1e-12).gain(v, grid)
    far = (v[:, None] - boundaries(grid)).abs().amin(1) > 0.3 * (grid.levels[-1] - grid.levels[-2])
    assert spikes[far].max().item() < 1e-3


def test_dsq_outside_keeps_falling() -> None:
    gain = DSQ(edge="none").gain(torch.tensor([0.5, 1.0, 1.5, 2.5], dtype=torch.float64), Int(2))
    assert (gain.diff() < 0).all()
    assert DSQ().gain(torch.tensor([1.01]), Int(2)).item() == 0


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_dsq_refuses_alpha_outside(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        DSQ(alpha=alpha)


# EWGS ----------------------------------------------------------------------------------------------------------------


def test_ewgs_golden_values() -> None:
    # spec: levels k/3 on [0, 1], x = (.05, .3, .45, .8), delta = .5 with the whole range as unit; 4 levels => /3 here
    x = torch.tensor([0.05, 0.3, 0.45, 0.8], dtype=torch.float64)
    s = EWGS(delta=0.5 / 3)
    v = 3 * x - 2  # the codes 0..3 of the range are -2..1 of the grid
    up = s.pullback(torch.ones(4, dtype=torch.float64), v, Int(2), s.init_state(v.shape))
    down = s.pullback(-torch.ones(4, dtype=torch.float64), v, Int(2), s.init_state(v.shape))
    assert up.tolist() == pytest.approx([1.025, 0.98333, 1.05833, 1.06667], abs=1e-5)
    assert down.tolist() == pytest.approx([-0.975, -1.01667, -0.94167, -0.93333], abs=1e-5)


@every_grid
@pytest.mark.parametrize("edge", ["level", "bin", "none", 1.3])
def test_ewgs_with_delta_zero_is_the_straight_through_estimator(grid: AnyGrid, edge: str) -> None:
    v, grad = 3 * rand(6, 8), rand(6, 8, seed=1)
    s = EWGS(delta=0.0, edge=edge)
    expected = ClippedSTE(edge=edge).pullback(grad, v, grid, {})
    assert torch.equal(s.pullback(grad, v, grid, s.init_state(v.shape)), expected)


@every_grid
def test_ewgs_on_a_level_is_ste_and_below_two_it_keeps_signs(grid: AnyGrid) -> None:
    s = EWGS(delta=1.99)
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    grad = rand(len(levels), seed=2)
    assert torch.equal(s.pullback(grad, levels, grid, s.init_state(levels.shape)), grad)
    if not isinstance(grid, Codebook):  # half the widest gap of a codebook is more than half a mean cell
        v, grad = 3 * rand(500), rand(500, seed=1)
        out = s.pullback(grad, v, grid, s.init_state(v.shape))
        kept = ClippedSTE().gain(v, grid) > 0
        assert torch.equal(out[kept].sign(), grad[kept].sign())


def test_ewgs_delta_follows_the_curvature() -> None:
    # layer loss (w - a)' diag(h) (w - a) / 2: tr H / N = mean h
    s = EWGS(delta=0.0)
    state = s.init_state((4,))
    s.set_delta_(state, curvature_delta(trace=1 + 2 + 3 + 6, num_weights=4, gradient_std=0.5))
    assert state["delta"].item() == 2.0
    assert curvature_delta(-1.0, 4, 0.5) == 0.0
    out = s.pullback(torch.ones(1), torch.tensor([0.25]), Int(2), state)
    assert out.item() == 1.5
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="delta"):
            EWGS(delta=bad)
        with pytest.raises(ValueError, match="delta"):
            s.set_delta_(state, bad)
    with pytest.raises(ValueError, match="gradient_std"):
        curvature_delta(1.0, 4, 0.0)


# Rotation Trick ------------------------------------------------------------------------------------------------------


def test_rotation_against_the_explicit_matrix() -> None:
    e, q, g = rand(7), rand(7, seed=1), rand(7, seed=2)
    a, b = e / e.norm(), q / q.norm()
    r = (a + b) / (a + b).norm()
    rotation = torch.eye(7, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(rotation @ a, b)
    expected = (q.norm() / e.norm()) * rotation.T @ g
    torch.testing.assert_close(rotate_back(g, e, q), expected)
    # it is the vector-Jacobian product of x -> (|q|/|e|) R x with the map held constant, which takes e to q
    x = e.clone().requires_grad_()
    out = (q.norm() / e.norm()) * rotation @ x
    torch.testing.assert_close(out.detach(), q)
    (vjp,) = torch.autograd.grad(out, x, g)
    torch.testing.assert_close(vjp, expected)


@every_grid
def test_rotation_trick_keeps_angles_and_the_product_with_the_weight(grid: AnyGrid) -> None:
    v, grad = rand(3, 10), rand(3, 10, seed=1)
    out = RotationTrick(group_size=4).pullback(grad, v, grid, {})
    q = grid.project_(v.clone())
    for group in (slice(0, 4), slice(4, 8), slice(8, 10)):  # the last group is short
        e, p, g, o = v[:, group], q[:, group], grad[:, group], out[:, group]
        defined = p.norm(dim=1) > 0
        torch.testing.assert_close((o * e).sum(1)[defined], (g * p).sum(1)[defined])
        cosine = torch.nn.functional.cosine_similarity
        torch.testing.assert_close(cosine(o, e)[defined], cosine(g, p)[defined])
        torch.testing.assert_close(o.norm(dim=1)[defined], (g.norm(dim=1) * p.norm(dim=1) / e.norm(dim=1))[defined])


@every_grid
def test_rotation_trick_is_the_identity_on_the_grid(grid: AnyGrid) -> None:
    v, grad = grid.project_(2 * rand(4, 16)), rand(4, 16, seed=1)
    torch.testing.assert_close(RotationTrick(group_size=8).pullback(grad, v, grid, {}), grad, rtol=1e-12, atol=1e-12)


def test_rotation_trick_passes_gradients_where_no_rotation_exists() -> None:
    grad = rand(3, 4, seed=1)
    v = torch.tensor([[0.1, -0.2, 0.3, 0.0], [0.0] * 4, [1.0, 0.0, -1.0, 1.0]], dtype=torch.float64)
    out = RotationTrick(group_size=4).pullback(grad, v, Ternary(), {})
    assert torch.equal(out[:2], grad[:2])  # rounds to zero; is zero
    assert torch.equal(rotate_back(grad[0], v[2], -v[2]), grad[0])  # opposite
    with pytest.raises(ValueError, match="group_size"):
        RotationTrick(group_size=1)


# smoothing laws ------------------------------------------------------------------------------------------------------

POINTS = [0.25, 0.5, 0.7, 0.76, 0.9, 1.0, 1.25]
TABLE = {  # papers.md 3.3: 2-bit SEQ with alpha = 1, step .5
    ("uniform", None): [1, 1, 1, 0, 0, 0, 0],
    ("triangular", None): [1, 1, 0.6, 0.48, 0.2, 0, 0],
    ("gaussian", None): [0.977, 0.906, 0.595, 0.472, 0.223, 0.108, 0.009],
    ("gaussian", 0.1): [0, 3.99, 0.001, 0, 0, 0, 0],
}


@pytest.mark.parametrize(("law", "width"), TABLE, ids=str)
def test_laws_reproduce_the_table(law: str, width: float | None) -> None:
    v = torch.tensor(POINTS, dtype=torch.float64) / 0.5
    found = dither_exact(v, HalfShifted(2), law=law, law_width=width)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx(TABLE[law, width], abs=1.1e-3)


def draw(law: str, n: int, seed: int) -> Tensor:
    """Standard dither, natural width, in cells."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(2, n, generator=generator, dtype=torch.float64) - 0.5
    if law == "gaussian":
        return 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    return u[0] if law == "uniform" else u[0] + u[1]


@pytest.mark.parametrize("grid", UNIFORM, ids=str)
@pytest.mark.parametrize("law", ["uniform", "triangular", "gaussian"])
@pytest.mark.parametrize("factor", [1.0, 0.6])
def test_laws_by_monte_carlo(grid: AnyGrid, law: str, factor: float) -> None:
    # common random numbers: central difference of E Q(v + r) over eps; noise ~ sqrt(J step / (2 eps n)) < .012
    n, eps = 400_000, 0.05 * grid.step
    natural = {"uniform": 1.0, "triangular": 2.0, "gaussian": 0.5}[law]
    r = draw(law, n, seed=3) * factor * grid.step
    v = torch.tensor([0.13, 0.61, 1.27, -0.92], dtype=torch.float64) * grid.step
    for x in v:
        difference = (grid.project_(x + eps + r) - grid.project_(x - eps + r)).mean().item() / (2 * eps)
        fine = torch.linspace(-eps, eps, 2001, dtype=torch.float64) + x
        smoothed = dither_exact(fine, grid, law=law, law_width=natural * factor).mean().item()  # type: ignore[arg-type]
        assert difference == pytest.approx(smoothed, abs=0.03)


@every_grid
@pytest.mark.parametrize("law", ["uniform", "triangular", "gaussian"])
@pytest.mark.parametrize("width", [0.4, 1.0, 2.5])
def test_the_jacobian_integrates_to_the_range(grid: AnyGrid, law: str, width: float) -> None:
    # for a cell width that does not vary, the integral of d/dv E Q is Q(inf) - Q(-inf)
    if isinstance(grid, Codebook):
        grid = Codebook((-2.0, -1.0, 0.0, 1.0))
    v = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    total = torch.trapezoid(dither_exact(v, grid, law=law, law_width=width), v).item()  # type: ignore[arg-type]
    assert total == pytest.approx(grid.levels[-1] - grid.levels[0], abs=1e-3)


@pytest.mark.parametrize("grid", UNIFORM, ids=str)
def test_the_default_law_is_the_clip_mask_and_the_secant_of_the_quantizer(grid: AnyGrid) -> None:
    v, h = 2 * rand(2000), grid.step
    secant = (grid.project_(v + h / 2) - grid.project_(v - h / 2)) / h
    assert torch.equal(dither_exact(v, grid), ClippedSTE().gain(v, grid))
    torch.testing.assert_close(dither_exact(v, grid), secant, rtol=0, atol=1e-9)
    levels = torch.tensor(grid.levels, dtype=torch.float64)  # where the secant falls on two ties
    assert torch.equal(dither_exact(levels, grid), torch.ones_like(levels))


@every_grid
@pytest.mark.parametrize("width", [0.37, 1.7])
def test_a_uniform_law_of_any_width_is_the_secant(grid: AnyGrid, width: float) -> None:
    v = 2 * rand(2000)
    h = width * cell_width(v, grid)
    secant = (grid.project_(v + h / 2) - grid.project_(v - h / 2)) / h
    torch.testing.assert_close(dither_exact(v, grid, law_width=width), secant, rtol=0, atol=1e-9)


def test_gaussian_ripple_has_the_closed_form() -> None:
    v = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for s in (0.5, 0.25):
        j = dither_exact(v, Int(8), law="gaussian", law_width=s)
        first, second = (2 * math.exp(-2 * math.pi**2 * s * s * k * k) for k in (1, 2))
        assert (j.max() - 1).item() == pytest.approx(first + second, rel=1e-3)
        assert (1 - j.min()).item() == pytest.approx(first - second, rel=1e-3)


@pytest.mark.parametrize("law", ["uniform", "triangular", "gaussian"])
def test_jacquant_uses_its_law(law: str) -> None:
    w, scheme, scale = 0.06 * rand(4, 64, dtype=torch.float32), Scheme.parse("W2H"), torch.full((4, 1), 0.03125)
    s = JacQuant(law=law, group_size=16)  # type: ignore[arg-type]
    found = s.estimate(w, scale, scheme, torch.Generator())
    expected = dither_exact(w / 0.03125, scheme.grid, law=law).view(4, 4, 16).mean(-1)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)


def test_laws_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="law"):
        JacQuant(law="cauchy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="law_width"):
        JacQuant(law_width=0.0)
    with pytest.raises(ValueError, match="dither_exact"):
        JacQuant(mode="probe", law="gaussian")
    with pytest.raises(ValueError, match="dither_exact"):
        JacQuant(mode="dither_crn", law_width=1.0)


# adaptive refresh ----------------------------------------------------------------------------------------------------


def test_drift_is_the_mean_move_in_cells() -> None:
    w = rand(3, 8)
    move = rand(3, 8, seed=1)
    scale = torch.tensor([[0.1], [0.2], [0.4]], dtype=torch.float64)
    for grid in (Binary(), HalfShifted(2)):
        expected = (move.abs() / scale / grid.step).mean().item()
        assert drift(w + move, w, scale, grid) == pytest.approx(expected, rel=1e-5)
        assert needs_refresh(w + move, w, scale, grid, drift_steps=0.99 * expected)
        assert not needs_refresh(w + move, w, scale, grid, drift_steps=1.01 * expected)
    assert needs_refresh(w, torch.full_like(w, torch.inf), scale, Int(2), drift_steps=1e9)
    assert needs_refresh(torch.full_like(w, torch.nan), w, scale, Int(2), drift_steps=1e9)


def test_drift_refresh_happens_when_weights_have_moved() -> None:
    s = JacQuant(refresh="drift", drift_steps=0.1, check_interval=5, group_size=16)
    scheme, scale = Scheme.parse("W2H"), torch.full((2, 1), 0.5)
    w = 0.3 * rand(2, 16, dtype=torch.float32)
    state = s.init_state(w.shape)
    assert set(state) == {"gain", "w_last"}
    refreshed = []
    for step in range(1, 61):
        w += 0.5 * 0.01  # a hundredth of a cell per step: due after more than 10 steps, looked at every 5
        if s.is_due(step, state, w, scale, scheme):
            refreshed.append(step)
            s.refresh_(state, w, scale, scheme, torch.Generator())
            assert torch.equal(state["w_last"], w)
    assert refreshed == [5, 20, 35, 50]
    still = [step for step in range(61, 121) if s.is_due(step, state, state["w_last"], scale, scheme)]
    assert still == []  # weights that do not move cost one comparison per check and no refresh


def test_interval_refresh_is_as_before() -> None:
    s = JacQuant(interval=7)
    w = rand(2, 16, dtype=torch.float32)
    state = s.init_state(w.shape)
    assert set(state) == {"gain"}
    due = [t for t in range(1, 30) if s.is_due(t, state, w, torch.ones(2, 1), Scheme.parse("W2H"))]
    assert due == [7, 14, 21, 28]
    with pytest.raises(ValueError, match="drift_steps"):
        JacQuant(refresh="drift", drift_steps=0.0)
    with pytest.raises(ValueError, match="refresh"):
        JacQuant(refresh="flip")  # type: ignore[arg-type]


def test_stableqat_takes_a_numeric_edge_too() -> None:
    v = torch.tensor([0.9, 1.2, 1.4])
    gain = StableQAT(edge=1.3).gain(v, Binary())
    assert (gain > 0).tolist() == [True, True, False]
