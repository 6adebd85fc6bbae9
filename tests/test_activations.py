"""Activation quantizers as pure functions: golden vectors, limit cases, and every gradient against a closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.activations import (
    PRESETS,
    ActivationScheme,
    dynamic_scale,
    fake_quantize_activation,
    full_name,
    learned_thresholds,
    read_spellings,
    split_scheme,
)
from fewbits.activations.quantize import gradient_factor
from fewbits.fake_quant import fake_quantize
from fewbits.scheme import Scheme

GOLDEN = torch.tensor([[-1.3, -0.6, -0.2, 0.05, 0.12, 0.45, 0.9, 2.0]], dtype=torch.float64)
"""The vector of the method specification (its section 0.4), whose results were computed there independently."""
PRINTED = 5e-6
"""Half a unit of the last digit printed there."""
SUM_OF_FP64 = 1e-12


def scheme(preset: str | None = None, num_bits: int = 8, **fields: Any) -> ActivationScheme:
    data = {"num_bits": num_bits, **({"preset": preset} if preset else {}), **fields}
    parsed = ActivationScheme.parse(data)
    assert parsed is not None
    return parsed


def gradients(x: Tensor, upstream: Tensor, how: ActivationScheme, **numbers: Tensor) -> dict[str, Tensor]:
    """By name, d(sum upstream * output)/d(.)."""
    leaves = {"x": x.clone().requires_grad_(), **{k: v.clone().requires_grad_() for k, v in numbers.items()}}
    out = fake_quantize_activation(leaves["x"], how, *(leaves.get(k) for k in ("scale", "offset", "lengths")))
    (out * upstream).sum().backward()
    return {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in leaves.items()}


# forward ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bits", "step", "values", "mask", "slopes"),
    [
        (2, 0.5, [-1, -0.5, 0, 0, 0, 0.5, 0.5, 0.5], [0, 1, 1, 1, 1, 1, 0, 0],
         [-2, 0.2, 0.4, -0.1, -0.24, 0.1, 1, 1]),
        (3, 0.32, [-1.28, -0.64, -0.32, 0, 0, 0.32, 0.96, 0.96], [0, 1, 1, 1, 1, 1, 1, 0],
         [-4, -0.125, -0.375, -0.15625, -0.375, -0.40625, 0.1875, 3]),
    ],
)  # fmt: skip
def test_static_lsq_has_the_golden_values_mask_and_slopes(
    num_bits: int, step: float, values: list[float], mask: list[float], slopes: list[float]
) -> None:
    how, scale = scheme("lsq", num_bits), torch.tensor(step, dtype=torch.float64)
    out = fake_quantize_activation(GOLDEN, how, scale)
    torch.testing.assert_close(out[0], torch.tensor(values, dtype=torch.float64), rtol=0, atol=SUM_OF_FP64)
    assert gradients(GOLDEN, torch.ones_like(GOLDEN), how, scale=scale)["x"][0].tolist() == mask
    factor = gradient_factor(how, 8)
    for i, slope in enumerate(slopes):
        one = torch.zeros_like(GOLDEN)
        one[0, i] = 1
        found = gradients(GOLDEN, one, how, scale=scale)["scale"] / factor
        assert found.item() == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize(
    ("num_bits", "expected"),
    [
        (1, [-0.75269] * 3 + [0.75269] * 5),
        (2, [-1.40894, -0.46965, -0.46965, 0.46965, 0.46965, 0.46965, 0.46965, 1.40894]),
        (4, [-1.42292, -0.47431, -0.1581, 0.1581, 0.1581, 0.47431, 0.79051, 2.05533]),
    ],
)
def test_quest_has_the_golden_values_and_trust_mask(num_bits: int, expected: list[float]) -> None:
    how = scheme("quest", num_bits, rotation={"kind": "none"})
    out = fake_quantize_activation(GOLDEN, how)
    torch.testing.assert_close(out[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2 * PRINTED)
    mask = gradients(GOLDEN, torch.ones_like(GOLDEN), how)["x"][0].tolist()
    assert mask == ([1.0] * 8 if num_bits == 4 else [0.0 if num_bits == 1 else 1.0] + [1.0] * 6 + [0.0])


@pytest.mark.parametrize(("num_bits", "masked"), [(1, None), (2, 0.0464), (3, 0.0191), (4, 0.0073)])
def test_quest_masks_the_share_of_a_gaussian_that_the_law_says(num_bits: int, masked: float | None) -> None:
    """Levels within half a step: 2 Q(s + step/2); at one bit 1.3 s with a rotation and 1.25 s without."""
    x = torch.erfinv(2 * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 - 1) * math.sqrt(2)
    for rotated, bound in ((False, 1.25), (True, 1.3)):
        how = scheme("quest", num_bits, rotation={"kind": "none"})
        if rotated and num_bits > 1:
            continue
        limit = how.levels[1] + how.margin if not rotated else how.levels[1] + scheme("quest", 1).margin
        scale, _ = dynamic_scale(x[None], how)
        share = float((x.abs() > limit * scale).double().mean())
        law = masked if masked is not None else 2 * (1 - _cdf(bound * 0.7978845608))
        assert share == pytest.approx(law, abs=2e-4)


def _cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_bitnet_is_the_formula() -> None:
    x = torch.randn(64, 40, dtype=torch.float64)
    largest = x.abs().amax(-1, keepdim=True)
    expected = largest / 127 * (127 * x / largest).round().clamp(-128, 127)
    torch.testing.assert_close(fake_quantize_activation(x, scheme("bitnet")), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 8])
def test_centred_activations_are_quest_weights_bit_for_bit(num_bits: int) -> None:
    """The other half of the package: a token is a row, so both quantizers must agree."""
    x = torch.randn(7, 64)
    weights = Scheme.parse("W1" if num_bits == 1 else f"W{num_bits}H", rule="rms", dtype="fp32", mode="dynamic")
    out = fake_quantize_activation(x, scheme("quest", num_bits, rotation="none"))
    torch.testing.assert_close(out, fake_quantize(x, weights), rtol=3e-6, atol=1e-7)


def test_a_dynamic_zero_point_keeps_zero_and_covers_the_range() -> None:
    x = torch.randn(50, 33).exp() - 0.3
    x[0] = 0
    how = scheme(num_bits=4, symmetric=False)
    out = fake_quantize_activation(x, how)
    scale, zero = dynamic_scale(x, how)
    assert zero is not None
    codes = (out / scale + zero).round()
    assert torch.equal(codes, codes.clamp(0, 15))
    assert bool(((out - x).abs() <= 1.001 * scale).all())
    assert torch.equal(out[0], torch.zeros(33))
    assert torch.equal(fake_quantize_activation(torch.cat([x, x * 0], -1), how)[:, 33:], x * 0)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_every_preset_holds_the_common_promises(preset: str, num_bits: int) -> None:
    """At most 2**b levels, dtype and shape kept, rows of zeros finite, and equal to itself at float64 to rounding."""
    how = scheme(preset, num_bits, rotation="none")
    numbers: dict[str, Tensor] = {}
    if how.mode == "static":
        numbers["scale"] = torch.tensor(0.3)
        if not how.symmetric:
            numbers["offset"] = torch.tensor(0.1)
        if how.thresholds == "learned":
            numbers["lengths"] = torch.linspace(0.5, 1.5, 2**num_bits - 1)
    x = torch.randn(3, 5, 512)
    x[0, 0] = 0
    arguments = [numbers.get(k) for k in ("scale", "offset", "lengths")]
    for dtype in (torch.float32, torch.bfloat16):
        out = fake_quantize_activation(x.to(dtype), how, *arguments)
        assert (out.dtype, out.shape) == (dtype, x.shape)
        assert bool(torch.isfinite(out).all())
        assert max(len(row.unique()) for row in out.view(-1, 512)) <= 2**num_bits
    assert ActivationScheme.parse(how.to_dict()) == how
    assert how.deployed().deployed() == how.deployed()


def test_rotation_is_around_the_quantizer() -> None:
    x = torch.randn(4, 64, dtype=torch.float64)
    plain, turned = scheme("quest", 4, rotation="none"), scheme("quest", 4)
    expected = turned.rotation.invert(fake_quantize_activation(turned.rotation.apply(x), plain))
    assert torch.equal(fake_quantize_activation(x, turned), expected)
    assert float(fake_quantize_activation(3 * x, turned).sub(3 * expected).abs().max()) < 1e-12  # scale equivariance


# backward -----------------------------------------------------------------------------------------------------------


def lsq_by_autograd(x: Tensor, scale: Tensor, offset: Tensor | float, low: float, high: float) -> Tensor:
    """LSQ(+) as differentiable arithmetic: the rounding alone is passed straight through."""
    v = ((x - offset) / scale).clamp(low, high)
    return scale * (v + (v.round() - v).detach()) + offset


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("preset", ["lsq", "lsq_plus", "dorefa"])
def test_static_gradients_are_those_of_autograd(preset: str, num_bits: int) -> None:
    how = scheme(preset, num_bits)
    x, upstream = torch.randn(2, 6, 50, dtype=torch.float64), torch.randn(2, 6, 50, dtype=torch.float64)
    numbers = {"scale": torch.tensor(1.5 / max(1.0, how.levels[1]), dtype=torch.float64)}
    if preset == "lsq_plus":
        numbers["offset"] = torch.tensor(0.37, dtype=torch.float64)
    found = gradients(x, upstream, how, **numbers)
    leaf, s = x.clone().requires_grad_(), numbers["scale"].clone().requires_grad_()
    beta = numbers.get("offset", torch.tensor(0.0, dtype=torch.float64)).clone().requires_grad_()
    out = lsq_by_autograd(leaf, s, beta, *how.levels)
    assert leaf.grad is None
    (out * upstream).sum().backward()
    assert leaf.grad is not None
    assert s.grad is not None
    assert beta.grad is not None
    factor = 1 / math.sqrt(50 * max(1.0, how.levels[1]))
    torch.testing.assert_close(found["x"], leaf.grad, rtol=0, atol=SUM_OF_FP64)
    torch.testing.assert_close(found["scale"], s.grad * factor, rtol=1e-10, atol=SUM_OF_FP64)
    if preset == "lsq_plus":
        torch.testing.assert_close(found["offset"], beta.grad * factor, rtol=1e-10, atol=SUM_OF_FP64)


@pytest.mark.parametrize("preset", ["lsq", "n2uq"])
def test_euler_identity(preset: str) -> None:
    """The output is homogeneous of degree one in (x, s): x dQ/dx + s dQ/ds = Q, element by element."""
    how = scheme(preset, 3)
    scale = torch.tensor(0.45, dtype=torch.float64)
    numbers = {"scale": scale}
    if preset == "n2uq":
        numbers["lengths"] = torch.linspace(0.4, 1.7, 7, dtype=torch.float64)
    x = torch.randn(1, 12, dtype=torch.float64)
    out = fake_quantize_activation(x, how, scale, None, numbers.get("lengths"))
    for i in range(12):
        one = torch.zeros_like(x)
        one[0, i] = 1
        found = gradients(x, one, how, **numbers)
        total = x[0, i] * found["x"][0, i] + scale * found["scale"] / gradient_factor(how, 12)
        assert total.item() == pytest.approx(out[0, i].item(), abs=1e-12)


def test_lsq_plus_without_offset_is_lsq_and_moves_with_its_input() -> None:
    x, s = torch.randn(4, 32), torch.tensor(0.21)
    plus, plain = scheme("lsq_plus", 4), scheme("lsq", 4)
    assert torch.equal(fake_quantize_activation(x, plus, s, torch.tensor(0.0)), fake_quantize_activation(x, plain, s))
    moved = fake_quantize_activation(x + 0.5, plus, s, torch.tensor(0.5))
    torch.testing.assert_close(moved, fake_quantize_activation(x, plain, s) + 0.5, rtol=0, atol=1e-6)


def test_pact_is_a_clip_with_its_gradients() -> None:
    """Its absolute-value form is a clip; the gradient of alpha counts what lies at or above it, that of x what is
    strictly between; at eight bits the output is the clip itself to half a step; alpha to infinity is a ReLU."""
    how, alpha = scheme("pact", 8, signed=False), 1.5
    x = torch.cat([torch.randn(1, 200, dtype=torch.float64) * 2, torch.tensor([[0.0, alpha]], dtype=torch.float64)], -1)
    clip = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    assert torch.equal(clip.clamp(0, alpha), clip.clamp(0, alpha).double())
    torch.testing.assert_close(clip, x.clamp(0, alpha), rtol=0, atol=1e-15)
    scale = torch.tensor(alpha / 255, dtype=torch.float64)
    assert float((fake_quantize_activation(x, how, scale) - clip).abs().max()) <= alpha / 255 / 2 * (1 + 1e-9)
    upstream = torch.randn_like(x)
    found = gradients(x, upstream, how, scale=scale)
    assert found["scale"].item() / 255 == pytest.approx(float(upstream[x >= alpha].sum()), rel=1e-12)
    assert torch.equal(found["x"], upstream * ((x > 0) & (x < alpha)))
    wide = fake_quantize_activation(x, how, torch.tensor(1e-2, dtype=torch.float64))
    assert float((wide - x.relu().clamp_max(2.55)).abs().max()) <= 0.5e-2 * (1 + 1e-9)


def test_dorefa_activations_are_a_clip_to_the_unit_interval() -> None:
    x = torch.tensor([[-0.4, 0.1, 0.5, 0.9, 3.0]])
    out = fake_quantize_activation(x, scheme("dorefa", 2), torch.tensor(1 / 3))
    torch.testing.assert_close(out, (x.clamp(0, 1) * 3).round() / 3)


def test_trained_logarithms_have_the_gradient_of_the_scale_times_the_scale() -> None:
    how, log = scheme("sasq", 4), torch.tensor(-1.2, requires_grad=True)
    x, upstream = torch.randn(3, 20), torch.randn(3, 20)
    (fake_quantize_activation(x, how, log.exp()) * upstream).sum().backward()
    assert log.grad is not None
    expected = gradients(x, upstream, how, scale=log.detach().exp())["scale"] * log.detach().exp()
    torch.testing.assert_close(log.grad, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_bits", [2, 4])
def test_scale_gradient_has_the_sign_of_the_dither_averaged_objective(num_bits: int, seed: int) -> None:
    """With dither s e, e uniform on a step, the mean output is x inside and the outer level outside, so the objective
    has the slope of its outside part; LSQ's gradient, averaged, is that slope (inputs half a step from the edges)."""
    generator = torch.Generator().manual_seed(seed)
    how = scheme("lsq", num_bits)
    s = 1.6 / how.levels[1]
    x = torch.randn(1, 60, dtype=torch.float64, generator=generator) * 2
    distance = torch.stack([(x / s - edge).abs() for edge in how.levels]).amin(0)
    x = x[distance > 0.65][None]
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    dither = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000 - 0.5

    def objective(scale: float) -> float:
        out = fake_quantize_activation(x + scale * dither, how, torch.tensor(scale, dtype=torch.float64))
        return float((out * upstream).sum(-1).mean())

    h = 0.02 * s
    slope = (objective(s + h) - objective(s - h)) / (2 * h)
    noisy = x + s * dither
    found = gradients(noisy, upstream.expand_as(noisy), how, scale=torch.tensor(s, dtype=torch.float64))["scale"]
    mean = float(found) / gradient_factor(how, x.shape[-1]) / 20_000
    assert mean == pytest.approx(slope, rel=0.02)
    assert math.copysign(1, mean) == math.copysign(1, slope)


@pytest.mark.parametrize(("num_bits", "optimum", "above"), [(2, 1.0484, 0.06), (3, 0.6018, 0.03), (4, 0.3386, 0.015)])
def test_the_fixed_point_of_lsq_lies_just_above_the_least_error(num_bits: int, optimum: float, above: float) -> None:
    """Squared error, Gaussian inputs: the root of LSQ's gradient is 1 to 5 % above the best step (the straight-through
    part of the gradient is not the derivative), at no more than 1 % more error."""
    x = torch.erfinv(2 * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 - 1)[None] * math.sqrt(2)
    how = scheme("lsq", num_bits)

    def slope(s: float) -> float:
        scale = torch.tensor(s, dtype=torch.float64)
        return gradients(x, fake_quantize_activation(x, how, scale) - x, how, scale=scale)["scale"].item()

    assert slope(optimum * 0.98) < 0 < slope(optimum * (1 + above))


# N2UQ ---------------------------------------------------------------------------------------------------------------


def stochastic_mean(x: Tensor, scale: Tensor, lengths: Tensor, low: float) -> Tensor:
    """The expected output under stochastic rounding inside the intervals, as differentiable arithmetic."""
    edges = torch.cat([torch.zeros(1, dtype=lengths.dtype), lengths.cumsum(0)]) + low
    total = low + torch.zeros_like(x)
    for i in range(len(lengths)):
        total = total + ((x / scale - edges[i]) / lengths[i]).clamp(0, 1)
    return scale * total


def test_learned_thresholds_have_the_gradient_of_the_expected_output() -> None:
    x, upstream = torch.randn(3, 30, dtype=torch.float64), torch.randn(3, 30, dtype=torch.float64)
    lengths, scale = torch.rand(7, dtype=torch.float64) + 0.3, torch.tensor(0.4, dtype=torch.float64)
    found = gradients(x, upstream, scheme("n2uq", 3), scale=scale, lengths=lengths)
    leaf, a = x.clone().requires_grad_(), lengths.clone().requires_grad_()
    (stochastic_mean(leaf, scale, a, -4.0) * upstream).sum().backward()
    assert leaf.grad is not None
    assert a.grad is not None
    torch.testing.assert_close(found["x"], leaf.grad, rtol=1e-12, atol=SUM_OF_FP64)
    torch.testing.assert_close(found["lengths"], a.grad, rtol=1e-10, atol=SUM_OF_FP64)


def test_equal_lengths_are_the_uniform_quantizer() -> None:
    x, s = torch.randn(4, 64), torch.tensor(0.3)
    upstream = torch.randn(4, 64)
    ones = torch.ones(15)
    assert torch.equal(learned_thresholds(x, s, ones, -8.0), fake_quantize_activation(x, scheme("lsq", 4), s))
    uniform = gradients(x, upstream, scheme("lsq", 4), scale=s)
    learned = gradients(x, upstream, scheme("n2uq", 4), scale=s, lengths=ones)
    assert torch.equal(uniform["x"], learned["x"])
    torch.testing.assert_close(uniform["scale"], learned["scale"], rtol=1e-5, atol=1e-6)


def test_short_intervals_are_held_and_get_no_gradient() -> None:
    x = torch.randn(2, 30)
    lengths = torch.tensor([1.0, -0.5, 1.0])
    found = gradients(x, torch.ones_like(x), scheme("n2uq", 2), scale=torch.tensor(0.5), lengths=lengths)
    assert found["lengths"][1] == 0
    held = torch.tensor([1.0, 1e-3, 1.0])
    assert torch.equal(learned_thresholds(x, torch.tensor(0.5), lengths, -2.0),
                       learned_thresholds(x, torch.tensor(0.5), held, -2.0))  # fmt: skip


# words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("W2A8G64", ("W2G64", "A8", None)),
        ("W4A4KV4", ("W4", "A4", "KV4")),
        ("W4KV4", ("W4", None, "KV4")),
        ("W4KA8KV4G-1", ("W4KG-1", "A8", "KV4")),
        ("W4K", ("W4K", None, None)),
        ("W1.58A16G256", ("W1.58G256", "A16", None)),
        ("W2", ("W2", None, None)),
        ("A8", ("A8", None, None)),
    ],
)
def test_the_short_spelling_splits(text: str, parts: tuple[str, str | None, str | None]) -> None:
    assert split_scheme(text) == parts
    if text.startswith("W") and "KA" not in text:
        weights, act, kv = parts
        name = full_name(Scheme.parse(weights).name, read_spellings("", act, None), read_spellings("", kv, None))
        assert split_scheme(name)[0] == split_scheme(Scheme.parse(weights).name)[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("B8", "not of the form"),
        ("A9", "whole number from 1 to 8"),
        ({"preset": "sasq"}, "needs num_bits"),
        ({"num_bits": 4, "preset": "foo"}, "presets: bitnet"),
        ({"num_bits": 4, "nobits": 1}, "unknown key 'nobits'"),
        ({"num_bits": 1}, "needs grid='centred'"),
        ({"num_bits": 4, "mode": "static"}, "per tensor"),
        ({"num_bits": 4, "rule": "mse"}, "calibration data"),
        ({"num_bits": 4, "parameter": "clip"}, "needs mode='static'"),
        ({"num_bits": 4, "preset": "quest", "symmetric": False}, "no offset"),
        ({"num_bits": 4, "preset": "pact", "decay": -1.0}, "finite and >= 0"),
        ({"num_bits": 4, "preset": "pact", "start_clip": 0.0}, "finite and > 0"),
        ({"num_bits": 4, "gradient": "tanh"}, "ste, clip, trust"),
        (7, "text such as A8"),
    ],
)
def test_wrong_schemes_are_refused_with_the_reason(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationScheme.parse(value)


def test_bits_are_given_once() -> None:
    assert read_spellings("activation", "A4", {"preset": "quest"}) == scheme("quest", 4)
    with pytest.raises(ValueError, match="give the bits once"):
        read_spellings("activation", "A4", {"num_bits": 8})
    with pytest.raises(ValueError, match="give the bits once"):
        read_spellings("activation", "A16", "A8")


def test_static_numbers_must_be_those_of_the_scheme() -> None:
    with pytest.raises(ValueError, match="needs"):
        fake_quantize_activation(torch.zeros(1, 4), scheme("lsq", 4))
    with pytest.raises(ValueError, match="needs"):
        fake_quantize_activation(torch.zeros(1, 4), scheme(), torch.tensor(1.0))
