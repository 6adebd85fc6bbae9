"""Scales that are functions of the weights: the rank-one term, against finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.convert import Rule, prepare, qat_layers
from fewbits.fake_quant import fake_quantize, scale_as_function, scale_gradient_factor
from fewbits.grids import AnyGrid, Binary, HalfShifted, Int, Ternary
from fewbits.qtensor import initial_scale
from fewbits.recipe import Recipe
from fewbits.rotations import Rotation
from fewbits.scales import GRID_FREE_RULES, ScaleSpec
from fewbits.scheme import Scheme
from fewbits.surrogates import ClippedSTE, JacQuant
from fewbits.testing.tiny import tiny_llama

GRIDS: list[AnyGrid] = [Binary(), Ternary(), Int(2), HalfShifted(2)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
SATURATING = pytest.mark.parametrize("rule", ["absmean", "gaussian"])
NUM_WEIGHTS = 40


def scheme_of(grid: AnyGrid, rule: Any) -> Scheme:
    return Scheme(grid=grid, scale=ScaleSpec(rule=rule, dtype="fp32", mode="dynamic"))


def weights() -> tuple[Tensor, Tensor]:
    return torch.randn(1, NUM_WEIGHTS), torch.randn(1, NUM_WEIGHTS)


def scale64(w: Tensor, scheme: Scheme) -> Tensor:
    """The scale in float64: a constant of the grid times the weights' own measure of size."""
    measure = {"absmax": lambda x: x.abs().amax(-1, keepdim=True), "absmean": lambda x: x.abs().mean(-1, keepdim=True)}
    size = measure.get(scheme.scale.rule, lambda x: x.square().mean(-1, keepdim=True).sqrt())
    probe = torch.tensor([[1.0, -1.0]])  # every measure of it is 1
    return initial_scale(probe, scheme).double() * size(w)


def scale_derivative(w: Tensor, scheme: Scheme) -> Tensor:
    w = w.double().requires_grad_()
    return torch.autograd.grad(scale64(w, scheme).sum(), w)[0]


def term(w: Tensor, upstream: Tensor, scheme: Scheme) -> Tensor:
    """What the scale path adds to the gradient of ``w``."""
    silent = JacQuant(granularity="element")
    state = {"gain": torch.zeros_like(w)}
    x = w.clone().requires_grad_()
    fake_quantize(x, scheme, scale_as_function(x, scheme), silent, state).backward(upstream)
    assert x.grad is not None
    return x.grad


def central_difference(function: Any, w: Tensor, h: float) -> Tensor:
    w = w.double()
    found = torch.zeros_like(w)
    for j in range(w.shape[1]):
        e = torch.zeros_like(w)
        e[0, j] = h
        found[0, j] = (function(w + e) - function(w - e)) / (2 * h)
    return found


@pytest.mark.parametrize("rule", ["absmax", "absmax_cover", "absmax_qmax", "absmean", "gaussian", "rms"])
@pytest.mark.parametrize("text", ["W1.58A16", "W2HA16", "W2HA16G32"])
@pytest.mark.parametrize("rotation", [Rotation(), Rotation(kind="hadamard", block_size=4)], ids=["plain", "rotated"])
def test_it_is_the_rule_and_its_derivative(rule: Any, text: str, rotation: Rotation) -> None:
    check_derivative(rule, text, rotation)


@pytest.mark.parametrize("rule", GRID_FREE_RULES)
@pytest.mark.parametrize("rotation", [Rotation(), Rotation(kind="hadamard", block_size=4)], ids=["plain", "rotated"])
def test_the_size_of_a_block_and_its_derivative(rule: Any, rotation: Rotation) -> None:
    check_derivative(rule, "W2KA16G32", rotation)


def check_derivative(rule: Any, text: str, rotation: Rotation) -> None:
    scheme = Scheme.parse(text, rule=rule, dtype="fp32", mode="dynamic", rotation=rotation)
    x = torch.randn(3, 80).sign() * (0.2 + torch.rand(3, 80))  # no entry may cross 0 below
    x[:, ::16] *= 1.5  # and the largest one stays the largest
    w = rotation.invert(x).requires_grad_()
    s = scale_as_function(w, scheme)
    assert torch.equal(s, initial_scale(w, scheme))
    choice = torch.randn_like(s)
    (found,) = torch.autograd.grad((s * choice * scale_gradient_factor(scheme, w.shape)).sum(), w)
    direction, h = torch.randn(3, 80), 1e-3
    assert bool((rotation.apply(w.detach()).sign() == rotation.apply(w.detach() + 3 * h * direction).sign()).all())
    low, high = (initial_scale(w.detach() + sign * h * direction, scheme).double() for sign in (-1, 1))
    difference = ((high - low) / (2 * h) * choice).sum().item()
    assert (found.double() * direction).sum().item() == pytest.approx(difference, rel=2e-3, abs=2e-4)
    # Euler's identity: the scale is homogeneous of degree one
    assert (found * w).sum().item() == pytest.approx((s * choice).sum().item(), rel=1e-4, abs=1e-5)


def test_a_group_of_zeros_has_no_derivative() -> None:
    for rule in ("absmax", "absmean", "gaussian"):
        w = torch.zeros(2, 8, requires_grad=True)
        scheme = Scheme.parse("W2", rule=rule, mode="dynamic")
        fake_quantize(w, scheme, scale_as_function(w, scheme), ClippedSTE()).sum().backward()
        assert w.grad is not None
        assert bool(torch.isfinite(w.grad).all())


@every_grid
@SATURATING
def test_within_a_window_of_codes_the_hard_quantizer_moves_by_the_rank_one_term(grid: AnyGrid, rule: Any) -> None:
    """dQ = level (ds/dw . dw) exactly while no code flips; where the step counts v too, that part comes off."""
    scheme = scheme_of(grid, rule)
    w, upstream = weights()
    levels = grid.project_(w.double() / scale64(w.double(), scheme))

    def hard(x: Tensor) -> Tensor:
        s = scale64(x, scheme)
        now = grid.project_(x / s)
        assert torch.equal(now, levels)
        return (upstream * s * now).sum()

    v = w.double() / scale64(w.double(), scheme)
    low, high = grid.scale_edge
    follows = torch.zeros_like(v) if grid.scale_gradient == "level" else v * ((v >= low) & (v <= high))
    expected = central_difference(hard, w, 1e-7) - scale_derivative(w, scheme) * (upstream * follows).sum()
    torch.testing.assert_close(term(w, upstream, scheme).double(), expected, rtol=0, atol=2e-5)
    assert expected.abs().max() > 1e-2


def dithered_levels(v: Tensor, grid: AnyGrid) -> Tensor:
    """E_r[Q(v + r)] with r uniform over one step: each threshold t is passed with probability (v + step/2 - t)/step."""
    total = torch.full_like(v, grid.levels[0])
    for low, high in itertools.pairwise(grid.levels):
        total += (high - low) * ((v - (low + high) / 2) / grid.step + 0.5).clamp(0, 1)
    return total


def mean_field(x: Tensor, scheme: Scheme, upstream: Tensor) -> Tensor:
    """<upstream, E_r[Q(x + r) - r]>, the dither-averaged objective of a linear loss, as a function of x alone."""
    s = scale64(x, scheme)
    return (upstream.double() * s * dithered_levels(x / s, scheme.grid)).sum()


@every_grid
def test_the_average_over_the_dither_is_that_of_many_dithers(grid: AnyGrid) -> None:
    v = 3 * torch.randn(50, 1, dtype=torch.float64)
    r = ((torch.arange(20_001, dtype=torch.float64) + 0.5) / 20_001 - 0.5) * grid.step
    many = grid.project_(v + r).mean(1)
    torch.testing.assert_close(many, dithered_levels(v[:, 0], grid), rtol=0, atol=1e-4 * grid.step)


@every_grid
@SATURATING
def test_the_dither_averaged_objective_has_the_gains_and_a_term_of_saturated_weights_only(
    grid: AnyGrid, rule: Any
) -> None:
    """m = clip(w, s qmin, s qmax), hence J = inside, and dm/ds = the outermost level where saturated, 0 elsewhere."""
    scheme = scheme_of(grid, rule)
    w, upstream = weights()
    s = scale64(w.double(), scheme)
    v = w.double() / s
    gain = ((v >= grid.min_level) & (v <= grid.max_level)).double()
    clipped = v.clamp(grid.min_level, grid.max_level) * (1 - gain)
    expected = gain * upstream + scale_derivative(w, scheme) * (upstream * clipped).sum()
    found = central_difference(lambda x: mean_field(x, scheme, upstream), w, 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert 0 < gain.mean() < 1
    assert (found - gain * upstream).abs().max() > 1e-3  # dropping the term would be seen


@every_grid
@SATURATING
def test_autograd_is_that_gradient_plus_a_rounding_term(grid: AnyGrid, rule: Any) -> None:
    """Every difference between the pipeline's backward pass and the dither average is named, none is left."""
    scheme = scheme_of(grid, rule)
    w, upstream = weights()
    s = scale64(w.double(), scheme)
    v = w.double() / s
    inside = (v >= grid.min_level) & (v <= grid.max_level)
    clipped = v.clamp(grid.min_level, grid.max_level)
    derivative = scale_derivative(w, scheme)
    mean = inside * upstream + derivative * (upstream * clipped * ~inside).sum()
    levels = grid.project_(v.clone())
    if grid.scale_gradient == "level":  # binary: levels of unsaturated weights count in full, v is not taken off
        rest = levels * inside
    else:
        low, high = grid.scale_edge
        counted = (v >= low) & (v <= high)
        rest = (levels - v) * inside - v * (counted & ~inside)  # rounding; and SEQ's edge, half a cell further out
    x = w.clone().requires_grad_()
    fake_quantize(x, scheme, scale_as_function(x, scheme), ClippedSTE()).backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), mean + derivative * (upstream * rest).sum(), rtol=0, atol=2e-5)


def test_the_rounding_term_averages_to_zero_over_the_dither() -> None:
    """So for unsaturated weights the scale path is noise of the hard quantizer; there is nothing to add to B."""
    grid = Int(4)
    w, upstream = weights()
    scheme = scheme_of(grid, "absmean")
    s, derivative = scale64(w.double(), scheme), scale_derivative(w, scheme)
    w = w.clamp(-6 * s.float(), 6 * s.float())
    r = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 0.5
    v = (w.double() / s).T + r
    mean = (grid.project_(v.clone()) - v).mean(1)
    assert mean.abs().max() < 1e-3
    one = (derivative * (upstream * (grid.project_(v[:, :1].clone()) - v[:, :1]).T).sum()).abs().max()
    assert (derivative * (upstream * mean).sum()).abs().max() < 1e-2 * one


@pytest.mark.parametrize("grid", [Binary(), Ternary(), HalfShifted(2)], ids=str)
def test_an_absmax_scale_has_no_mean_field_term_on_a_symmetric_grid(grid: AnyGrid) -> None:
    """Nothing is saturated: m(w) = w and J = I. (On -2..1 the rule saturates weights above one step.)"""
    scheme = scheme_of(grid, "absmax")
    w, upstream = weights()
    away = w.abs() < 0.97 * w.abs().amax()
    found = central_difference(lambda x: mean_field(x, scheme, upstream), w, 1e-6)
    torch.testing.assert_close(found[away], upstream.double()[away], rtol=0, atol=1e-7)


def test_dynamic_layers_drop_the_term() -> None:
    """Documented: a layer's dynamic scale is a constant of its backward pass."""
    scheme = scheme_of(Ternary(), "absmean")
    layer: Any = prepare(nn.Sequential(nn.Linear(NUM_WEIGHTS, 1, bias=False)), Rule(scheme=scheme))[0]  # type: ignore[index]
    upstream = torch.randn(1, NUM_WEIGHTS)
    layer.quantized_weight().backward(upstream)
    assert torch.equal(layer.weight.grad, upstream)
    assert term(layer.weight.detach(), upstream, scheme).abs().max() > 1e-3


def test_a_line_search_is_refused() -> None:
    with pytest.raises(ValueError, match="rule 'mse' is a line search"):
        scale_as_function(torch.randn(2, 8), Scheme.parse("W2", rule="mse", mode="dynamic"))


# the flag of a rule --------------------------------------------------------------------------------------------------


def layer_of(rule: str, *, flag: bool, grid: AnyGrid | None = None) -> Any:
    torch.manual_seed(3)
    scheme = scheme_of(HalfShifted(2) if grid is None else grid, rule)
    made = Rule(scheme=scheme, surrogate=ClippedSTE(edge="bin"), differentiate_scale=flag)
    return prepare(nn.Sequential(nn.Linear(NUM_WEIGHTS, 5, bias=False)), made)[0]  # type: ignore[index]


@pytest.mark.parametrize("rule", ["absmax", "absmean", "gaussian"])
def test_a_layer_with_the_flag_has_the_gradient_of_the_function_and_the_same_forward_pass(rule: str) -> None:
    upstream = torch.randn(5, NUM_WEIGHTS)
    grads = []
    for flag in (False, True):
        layer = layer_of(rule, flag=flag)
        out = layer.quantized_weight()
        out.backward(upstream)
        grads.append((out.detach(), layer.weight.grad))
    w = layer_of(rule, flag=True).weight.detach().requires_grad_()
    scheme = scheme_of(HalfShifted(2), rule)
    fake_quantize(w, scheme, scale_as_function(w, scheme), ClippedSTE(edge="bin")).backward(upstream)
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[1][1], w.grad)
    assert not torch.equal(grads[0][1], grads[1][1])


@SATURATING
def test_euler_holds_with_the_flag_only(rule: str) -> None:
    """Q(c w) = c Q(w), so the gradient along w is the loss itself: by finite differences, and only with the term."""
    upstream = torch.randn(5, NUM_WEIGHTS)
    found = []
    for flag in (True, False):
        layer = layer_of(rule, flag=flag)
        layer.quantized_weight().backward(upstream)
        found.append(float((layer.weight.grad.double() * layer.weight.detach().double()).sum()))
    losses = []
    for factor in (1.125, 0.875):
        layer = layer_of(rule, flag=True)
        with torch.no_grad():
            layer.weight.mul_(factor)
            losses.append(float((upstream.double() * layer.quantized_weight().double()).sum()))
    difference = (losses[0] - losses[1]) / 0.25
    assert found[0] == pytest.approx(difference, rel=1e-4)
    assert abs(found[1] - difference) > 1e-2 * abs(difference)


def test_the_flag_is_refused_where_scales_are_no_functions_and_survives_saving(tmp_path: Any) -> None:
    for text, options in (("W2", {}), ("W2", {"mode": "dynamic", "rule": "mse"})):
        with pytest.raises(ValueError, match="only dynamic scales are functions of the weights"):
            Rule(scheme=Scheme.parse(text, **options), differentiate_scale=True)
    rule = Rule(scheme=Scheme.parse("W2", mode="dynamic", rule="absmean"), differentiate_scale=True)
    assert Rule(**rule.to_dict()) == rule
    assert "differentiate_scale" not in Rule(scheme=rule.scheme).to_dict()
    recipe = Recipe.parse("rules: [{scheme: W2, options: {mode: dynamic, rule: absmean}, differentiate_scale: true}]")
    assert recipe.rules[0].build().differentiate_scale
    folder = save_prepared(prepare(tiny_llama(), rule), None, tmp_path / "model")
    model, _ = load_prepared(folder)
    assert all(layer.differentiate_scale for _, layer in qat_layers(model))
