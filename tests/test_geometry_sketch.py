"""The count sketch against exact inner products: linear, unbiased, with the variance that it promises."""

from __future__ import annotations

import math

import pytest
import torch

from fewbits.geometry import CountSketch

F64 = torch.float64


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(40, 30, generator=generator, dtype=F64) for name in ("a", "b")}


def test_linear_and_independent_of_the_order() -> None:
    sketch, x, y = CountSketch(size=256), tensors(0), tensors(1)
    both = sketch({name: 2 * x[name] - y[name] for name in x})
    torch.testing.assert_close(both, 2 * sketch(x) - sketch(y), rtol=0, atol=1e-12)
    torch.testing.assert_close(sketch(dict(reversed(x.items()))), sketch(x), rtol=0, atol=1e-12)
    assert not torch.equal(sketch({"a": x["a"]}), sketch({"b": x["a"]}))
    assert not torch.equal(CountSketch(size=256, seed=1)(x), sketch(x))


def test_unbiased_with_the_stated_spread() -> None:
    x, y = tensors(0), tensors(1)
    exact = float(sum((x[name] * y[name]).sum() for name in x))
    scale = math.sqrt(float(sum(v.square().sum() for v in x.values()) * sum(v.square().sum() for v in y.values())))
    estimates = torch.stack([CountSketch(size=64, seed=s)(x) @ CountSketch(size=64, seed=s)(y) for s in range(400)])
    bound = CountSketch(size=64).relative_error * scale
    assert abs(float(estimates.mean()) - exact) < 4 * bound / 20
    # For unrelated vectors the variance is half of the bound, which a vector with itself attains.
    assert float(estimates.std()) == pytest.approx(bound / math.sqrt(2), rel=0.15)
    own = torch.stack([CountSketch(size=64, seed=s)(x).square().sum() for s in range(400)])
    norm = float(sum(v.square().sum() for v in x.values()))
    assert float(own.std()) == pytest.approx(CountSketch(size=64).relative_error * norm, rel=0.15)


def test_a_bucket_for_every_coordinate_still_has_the_right_mean() -> None:
    one = {"w": torch.tensor([3.0], dtype=F64)}
    assert all(float(CountSketch(size=8, seed=s)(one).norm()) == 3.0 for s in range(10))
    for wrong in ({"size": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CountSketch(**wrong)
