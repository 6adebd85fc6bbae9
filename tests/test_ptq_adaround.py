"""AdaRound: where it starts, what hardens, and that it finds the best of the two neighbours of every weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from ptq_common import SCHEMES, data, every_scheme

from fewbits.convert import Rule, qat_layers
from fewbits.nn import QATLayer
from fewbits.ptq import adaround, apply_ptq, clip_scale, hessian_of, output_error, rtn
from fewbits.ptq.adaround import beta_at, between_levels, hardening, inverse_soft_rounding, soft_rounding
from fewbits.qtensor import initial_scale, quantize
from fewbits.scheme import Scheme
from fewbits.testing.tiny import tiny_llama, toy_blocks


def test_it_starts_at_the_fraction() -> None:
    f = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(soft_rounding(inverse_soft_rounding(f)), f, atol=1e-12, rtol=0)
    assert inverse_soft_rounding(torch.tensor(0.5)) == 0
    assert float(inverse_soft_rounding(torch.tensor(1.0))) == pytest.approx(2.397895, abs=1e-6)  # log 11
    assert soft_rounding(torch.tensor([-2.5, 2.5])).tolist() == [0.0, 1.0]


@every_scheme
def test_the_relaxed_weight_starts_at_the_weight_itself(scheme: Scheme) -> None:
    w, _ = data()
    v = w / scheme.scale.view(w.shape).expand(initial_scale(w, scheme))
    lower, upper, fraction = between_levels(v, torch.tensor(scheme.grid.levels))
    start = lower + soft_rounding(inverse_soft_rounding(fraction)) * (upper - lower)
    torch.testing.assert_close(start, v.clamp(*scheme.grid.level_edge), atol=2e-6, rtol=0)
    assert bool((scheme.grid.encode(upper).int() - scheme.grid.encode(lower).int() == 1).all())


def test_the_hardening_term_and_its_schedule() -> None:
    h = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert hardening(h, 2.0).tolist() == [0.0, 0.75, 1.0, 0.0]
    assert hardening(h, 20.0)[1] == pytest.approx(1 - 0.5**20)
    values = [beta_at(step, 100, 0.2) for step in range(101)]
    assert values[:21] == [20.0] * 21
    assert values[-1] == 2.0
    assert all(a > b for a, b in itertools.pairwise(values[20:]))


@every_scheme
def test_it_lowers_the_output_error_by_neighbours_alone(scheme: Scheme) -> None:
    w, x = data()
    h, plain = hessian_of(x), rtn(w, scheme)
    result = adaround(w, scheme, hessian=h, iterations=300)
    assert output_error(w, result.qtensor.dequantize(), h) < 0.7 * output_error(w, plain.qtensor.dequantize(), h)
    assert torch.equal(result.qtensor.scale, plain.qtensor.scale)
    moved = (result.qtensor.codes.int() - plain.qtensor.codes.int()).abs()
    assert moved.max() == 1
    again = quantize(result.latent, scheme, result.scale)
    assert torch.equal(again.codes, result.qtensor.codes)
    if scheme.rotation.kind == "none":
        kept = result.qtensor.codes == plain.qtensor.codes
        assert torch.equal(result.latent[kept], w[kept])
        assert torch.equal(result.latent[~kept], result.qtensor.dequantize()[~kept])


def test_it_is_among_the_best_of_all_roundings_of_a_few_weights() -> None:
    scheme = Scheme.parse("W3", dtype="fp32")
    x = torch.randn(100, 2) @ torch.randn(2, 8) + 0.3 * torch.randn(100, 8)
    h, ranks = hessian_of(x), []
    for seed in range(15):
        w = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        scale = initial_scale(w, scheme)
        lower, upper, _ = between_levels(w / scale, torch.tensor(scheme.grid.levels))
        choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))
        delta = ((lower + choices * (upper - lower)) * scale - w).double()
        errors = ((delta @ h) * delta).sum(1)
        found, plain = (output_error(w, f(w, scheme, hessian=h).qtensor.dequantize(), h) for f in (adaround, rtn))
        ranks.append(int((errors < found * (1 - 1e-5)).sum()))
        assert found <= plain
        assert errors.min() <= found * (1 + 1e-5)
    assert sorted(ranks)[7] <= 3  # of 256; the relaxation finds a local optimum


def test_with_independent_inputs_it_is_rtn() -> None:
    w, _ = data()
    for scheme in SCHEMES[:4]:
        result = adaround(w, scheme, hessian=torch.eye(80), iterations=50)
        assert torch.equal(result.qtensor.codes, rtn(w, scheme).qtensor.codes)


def test_clip_improves_the_scales_first() -> None:
    w, x = data()
    scheme, h = Scheme.parse("W2G32"), hessian_of(x)
    result = adaround(w, scheme, hessian=h, iterations=5, clip=True)
    torch.testing.assert_close(result.scale, clip_scale(w, scheme, h, initial_scale(w, scheme)), rtol=0, atol=0)


def test_a_model_holds_its_codes() -> None:
    model = apply_ptq(tiny_llama(), Rule(scheme="W2A16G32"), "adaround", toy_blocks(8), iterations=100)
    plain = apply_ptq(tiny_llama(), Rule(scheme="W2A16G32"), "rtn")
    for name, layer in qat_layers(model):
        other = plain.get_submodule(name)
        assert isinstance(other, QATLayer)
        assert (layer.qtensor().codes.int() - other.qtensor().codes.int()).abs().max() == 1
        assert torch.equal(layer.qtensor().scale, other.qtensor().scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"regularization": -1.0}, "regularization=-1.0 >= 0"),
        ({"warmup": 1.0}, "warmup=1.0 in"),
        ({"hessian": None}, "exactly one of hessian"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    w, x = data()
    with pytest.raises(ValueError, match=message):
        adaround(w, SCHEMES[0], **{"hessian": hessian_of(x), **options})  # type: ignore[arg-type]
