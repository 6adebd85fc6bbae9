"""LAPQ: optima of the Lp norm, the vertex of a parabola, Powell's method, and scales chosen by the task's loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from ptq_common import every_scheme
from torch import Tensor, nn

from fewbits.convert import Rule, qat_layers
from fewbits.ptq import (
    apply_ptq,
    hessian_of,
    lapq,
    lp_scale,
    output_error,
    powell,
    quadratic_vertex,
    rtn,
    search_scales,
)
from fewbits.ptq.calibration import Calibration
from fewbits.ptq.lapq import gaussian_lp_step
from fewbits.qtensor import quantize
from fewbits.scales import find_scale
from fewbits.scheme import Scheme
from fewbits.testing.tiny import tiny_llama, toy_blocks


@pytest.mark.parametrize(
    ("p", "outermost"),
    [
        (2.0, (1.4935, 2.0511, 2.5140)),  # QuEST's S_b
        (2.5, (1.5977, 2.2003, 2.7069)),
        (3.0, (1.6942, 2.3386, 2.8857)),
        (4.0, (1.8698, 2.5903, 3.2110)),
    ],
)
def test_optima_of_the_gaussian(p: float, outermost: tuple[float, ...]) -> None:
    """Outermost levels of the half-shifted grid in units of the rms, computed by quadrature elsewhere."""
    for num_bits, expected in zip((2, 3, 4), outermost, strict=True):
        step = gaussian_lp_step(Scheme.parse(f"W{num_bits}H"), p)
        assert step * (2**num_bits - 1) / 2 == pytest.approx(expected, rel=3e-3)  # the line search's last steps


@every_scheme
def test_lp_scales_are_no_worse_than_any_on_a_fine_grid(scheme: Scheme) -> None:
    w = torch.randn(3, 80) * 0.05
    view = scheme.scale.view(w.shape)
    for p in (2.0, 3.5):
        found = lp_scale(w, scheme, p)

        def error(s: Tensor, p: float = p) -> Tensor:
            spread = view.expand(s)
            return view.split((w - scheme.grid.project_(w / spread) * spread).abs().pow(p)).sum(-1)

        reference = torch.stack([error(found * m) for m in torch.linspace(0.5, 2.0, 200).tolist()]).amin(0)
        assert bool((error(found) <= reference * 1.02).all())


def test_p_of_two_is_the_mse_scale() -> None:
    scheme = Scheme.parse("W3G32")
    w = torch.randn(16, 64)
    ours = quantize(w, scheme, lp_scale(w, scheme, 2.0)).dequantize()
    theirs = quantize(w, scheme, find_scale(w, scheme.grid, scheme.scale)).dequantize()
    assert float((ours - w).square().sum()) == pytest.approx(float((theirs - w).square().sum()), rel=0.02)


def test_larger_p_clips_less() -> None:
    w = torch.randn(8, 256)
    scales = [lp_scale(w, Scheme.parse("W3H"), p).mean() for p in (1.0, 2.0, 3.0, 4.0, 8.0)]
    assert all(a < b for a, b in itertools.pairwise(scales))


def test_the_vertex_of_a_parabola() -> None:
    x = np.linspace(2, 4, 10)
    assert quadratic_vertex(x, 3 * (x - 2.7) ** 2 + 1) == pytest.approx(2.7, abs=1e-9)
    assert quadratic_vertex(x, (x - 9.0) ** 2) == 4.0  # kept between the points
    assert quadratic_vertex(x, -((x - 2.5) ** 2)) == 4.0  # opens downwards: the lowest point
    noisy = quadratic_vertex(x, (x - 3.0) ** 2 + 0.01 * np.sin(40 * x))
    assert noisy == pytest.approx(3.0, abs=0.05)
    with pytest.raises(ValueError, match="three points"):
        quadratic_vertex([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="not all finite"):
        quadratic_vertex([1.0, 2.0, 3.0], [1.0, float("nan"), 2.0])


def test_powell_solves_a_separable_quadratic_in_one_sweep() -> None:
    target = np.array([0.3, -0.2, 0.05, 0.4])
    weight = np.array([1.0, 5.0, 0.2, 3.0])
    found = powell(
        lambda x: float((weight * (x - target) ** 2).sum()), [0.0] * 4, iterations=1, low=-0.5, high=0.5, tolerance=1e-8
    )
    np.testing.assert_allclose(found.x, target, atol=1e-5)
    outside = powell(lambda x: float(((x - 2.0) ** 2).sum()), [0.0, 0.0], iterations=2, low=-0.5, high=0.5)
    np.testing.assert_allclose(outside.x, [0.5, 0.5], atol=2e-2)


def test_the_search_finds_scales_that_a_common_p_cannot_give() -> None:
    scheme = Scheme.parse("W3H", dtype="fp32")
    weights = [torch.randn(4, 2048), torch.randn(4, 2048)]  # long rows: their scales are smooth in p
    wanted = [1.25 * lp_scale(weights[0], scheme, 2.8), 0.8 * lp_scale(weights[1], scheme, 2.8)]

    def loss(scales: Sequence[Tensor]) -> float:
        return sum(float((s / t).log().square().sum()) for s, t in zip(scales, wanted, strict=True))

    found, trace = search_scales(weights, [scheme] * 2, loss, iterations=2)
    for s, t in zip(found, wanted, strict=True):
        assert (s / t).log().abs().mean() < 0.05
    assert trace.end_loss <= trace.start_loss <= min(trace.losses)
    assert trace.end_loss == pytest.approx(loss(found))
    assert trace.end_loss < 0.1 * trace.start_loss
    only_p, short = search_scales(weights, [scheme] * 2, loss, iterations=0)
    assert short.end_loss == short.start_loss == pytest.approx(loss(only_p))
    assert short.evaluations == 11


@every_scheme
def test_a_layer_by_its_output_error(scheme: Scheme) -> None:
    x = torch.randn(300, 6) @ torch.randn(6, 80) + torch.randn(300, 80)
    w, h = torch.randn(8, 80) * 0.05, hessian_of(x)
    result = lapq(w, scheme, hessian=h, num_p=4)
    assert torch.equal(quantize(w, scheme, result.scale).codes, result.qtensor.codes)
    squares = rtn(w, scheme, scale=lp_scale(scheme.rotation.apply(w), scheme, 2.0))
    assert output_error(w, result.qtensor.dequantize(), h) <= output_error(w, squares.qtensor.dequantize(), h)


@pytest.mark.parametrize("mode", ["learned", "frozen"])
def test_a_model_ends_no_worse_than_every_p(mode: str) -> None:
    blocks, rule = toy_blocks(4), Rule(pattern="*.mlp.*", scheme=Scheme.parse("W2G32", mode=mode))

    def loss(model: nn.Module) -> float:
        return Calibration.of(model, [blocks]).mean_loss()

    short = loss(apply_ptq(tiny_llama(), rule, "lapq", blocks, num_p=3, iterations=0))
    model = apply_ptq(tiny_llama(), rule, "lapq", blocks, num_p=3)
    assert loss(model) < short
    plain = apply_ptq(tiny_llama(), rule, "rtn")
    for (name, layer), (_, other) in zip(qat_layers(model), qat_layers(plain), strict=True):
        assert not torch.equal(layer.qtensor().scale, other.qtensor().scale), name
        assert torch.equal(layer.weight, other.weight)
    for p in (2.0, 3.0, 4.0):
        for _, layer in qat_layers(plain):
            with torch.no_grad():
                layer.raw_scale().copy_(lp_scale(layer.latent(), rule.scheme, p))
        assert short <= loss(plain) + 1e-6


@pytest.mark.parametrize("options", [{"num_p": 2}, {"iterations": -1}, {"max_multiplier": 1.0}])
def test_what_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        lapq(torch.randn(2, 32), Scheme.parse("W2"), hessian=torch.eye(32), **options)
    with pytest.raises(ValueError, match=r"p=0.5 must be at least 1"):
        lp_scale(torch.randn(2, 32), Scheme.parse("W2"), 0.5)
