"""HQQ with scales only: the shrinkage, its limits, and outliers that no longer stretch a group."""

from __future__ import annotations

import pytest
import torch
from ptq_common import over
from torch import Tensor

from fewbits.convert import Rule, owned_layers
from fewbits.ptq import apply_ptq, hqq, rtn, shrink
from fewbits.qtensor import initial_scale, quantize
from fewbits.rotations import Rotation
from fewbits.scheme import Scheme
from fewbits.testing.tiny import tiny_llama

SCHEMES = [
    Scheme.parse(text, **options)
    for text, options in [
        ("W4", {}),
        ("W2G32", {"rule": "absmax"}),
        ("W3", {"granularity": "per_tensor", "rule": "absmax"}),
        ("W2HG32", {"rule": "absmax"}),
        ("W1.58G32", {}),
        ("W1G32", {}),
        ("W2KG32", {}),
        ("W2G32", {"superblock": 64}),
        ("W2HG32", {"rotation": Rotation(kind="random_hadamard", block_size=16)}),
    ]
]
every_scheme = over(SCHEMES)


def heavy(rows: int = 8, width: int = 80) -> Tensor:
    """A weight in which one entry of thirty is ten times as large."""
    w = torch.randn(rows, width) * 0.05
    return w * torch.where(torch.rand(rows, width) < 1 / 30, 10.0, 1.0)


def p_error(w: Tensor, q: Tensor, p: float = 0.7) -> Tensor:
    return (w - q).abs().pow(p).sum()


def test_shrinkage_golden_values() -> None:
    x = torch.tensor([0.0, 0.17, -0.1702, 0.3, -0.3, 1.0, 100.0], dtype=torch.float64)
    found = shrink(x, p=0.7, beta=10.0)
    expected = [0.0, 0.0, -0.00010, 0.15650, -0.15650, 0.9, 99.97488]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)
    threshold = 10 ** (-1 / 1.3)
    assert threshold == pytest.approx(0.1701, abs=1e-4)
    edge = torch.tensor([threshold * 0.999, threshold * 1.001], dtype=torch.float64)
    assert (shrink(edge, p=0.7, beta=10.0) > 0).tolist() == [False, True]


def test_p_of_one_is_the_soft_threshold() -> None:
    x = torch.linspace(-1, 1, 41)
    torch.testing.assert_close(shrink(x, p=1.0, beta=4.0), torch.nn.functional.softshrink(x, 0.25))


def least_squares(w: Tensor, scheme: Scheme, steps: int) -> Tensor:
    """Alternating codes and least-squares scales, written for rows of one group."""
    scale = initial_scale(w, scheme)
    for _ in range(steps):
        q = scheme.grid.decode(scheme.grid.encode(w / scale))
        scale = (w * q).sum(1, keepdim=True) / q.square().sum(1, keepdim=True)
    return scale


def test_small_beta_is_least_squares_and_large_beta_keeps_the_scale() -> None:
    scheme = Scheme.parse("W3", rule="absmax", dtype="fp32")
    w = torch.randn(6, 64)
    soft = hqq(w, scheme, beta=1e-9, p=1.0, iterations=3, relative=True)
    candidates = [least_squares(w, scheme, n) for n in range(4)]
    errors = torch.stack([(w - quantize(w, scheme, s).dequantize()).abs().sum(1) for s in candidates])
    best = torch.stack(candidates)[errors.argmin(0), torch.arange(6)]
    torch.testing.assert_close(soft.scale, best, rtol=1e-5, atol=0)
    hard = hqq(w, scheme, beta=1e9, relative=True)
    torch.testing.assert_close(hard.scale, initial_scale(w, scheme), rtol=1e-5, atol=0)


@every_scheme
@pytest.mark.parametrize("relative", [True, False])
def test_no_group_is_ever_worse_in_the_p_norm(scheme: Scheme, relative: bool) -> None:
    w = heavy()
    result = hqq(w, scheme, relative=relative)
    turn, view = scheme.rotation.apply, scheme.scale.view(w.shape)

    def each(q: Tensor) -> Tensor:
        return view.split((turn(w) - turn(q)).abs().pow(0.7)).sum(-1)

    before, after = each(rtn(w, scheme).qtensor.dequantize()), each(result.qtensor.dequantize())
    if scheme.scale.superblock is None:
        assert bool((after <= before * (1 + 1e-4)).all())
    assert torch.equal(result.latent, w)
    assert torch.equal(quantize(w, scheme, result.scale).codes, result.qtensor.codes)


def test_outliers_do_not_stretch_a_group() -> None:
    """The scale comes near to the best one of the group without its outlier; least squares does not."""
    scheme = Scheme.parse("W3", rule="absmax", dtype="fp32")
    w = torch.randn(16, 64)
    clean = initial_scale(w, scheme.with_scale(rule="mse"))
    w[:, 5] = 6.0
    robust = hqq(w, scheme, relative=True, iterations=60).scale
    squares = hqq(w, scheme, relative=True, iterations=60, beta=1e-9, p=1.0).scale
    assert (robust / clean).log().abs().mean() < 0.5 * (squares / clean).log().abs().mean()
    assert p_error(w, quantize(w, scheme, robust).dequantize()) < p_error(w, quantize(w, scheme, squares).dequantize())


def test_relative_units_do_not_depend_on_the_units_of_the_weight() -> None:
    w = heavy()
    scheme = Scheme.parse("W2HG32", rule="absmax", dtype="fp32")
    for relative, same in ((True, True), (False, False)):
        small, large = (hqq(c * w, scheme, relative=relative).qtensor.codes for c in (1.0, 16.0))
        assert torch.equal(small, large) is same


def test_padding_of_a_ragged_group_has_no_part() -> None:
    scheme = Scheme.parse("W2HG64", rule="absmax", dtype="fp32")
    w = heavy(width=96)
    whole = hqq(w, scheme, relative=True).scale[:, 1:]
    alone = hqq(w[:, 64:], Scheme.parse("W2HG32", rule="absmax", dtype="fp32"), relative=True).scale
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=0)


def test_a_model_needs_no_data() -> None:
    rule = Rule(scheme=Scheme.parse("W2G32", rule="absmax"))
    model, plain = tiny_llama(), tiny_llama()
    apply_ptq(model, rule, "hqq", iterations=5)
    for name, layer in owned_layers(model):
        expected = hqq(plain.get_submodule(name).weight, rule.scheme, iterations=5)  # type: ignore[arg-type]
        assert torch.equal(layer.qtensor().codes, expected.qtensor.codes)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"p": 0.0}, {"p": 1.5}, {"beta": 0.0}])
def test_what_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        hqq(heavy(), SCHEMES[0], **options)  # type: ignore[arg-type]
