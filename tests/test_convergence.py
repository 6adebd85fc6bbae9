"""A-T8 and its kin: rates and floors of learned-Jacobian training in closed form, and the page built from them."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.grids import HalfShifted, Int
from fewbits.surrogates import STE, ClippedSTE, JacQuant

SCRIPT = Path(__file__).parents[1] / "scripts" / "convergence.py"


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module; importing it computes nothing."""
    spec = importlib.util.spec_from_file_location("convergence_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("rate", "gain"), [(0.05, 1.0), (0.7, 1.0), (0.7, 0.5), (0.7, 2.0), (0.1, 1.5)])
def test_contraction_and_floor(script: Any, rate: float, gain: float) -> None:
    """Contraction 1 - eta b h, variance eta b h D^2 / (12 (2 - eta b h)), for right and wrong gains."""
    chains, x = 20_000, rate * gain
    factor, floor = script.measure(rate, gain, 1.0, num_steps=60 if x > 0.3 else 300)
    predicted = script.predict(rate, gain, 1.0)
    assert predicted.floor == pytest.approx(x / (12 * (2 - x)), rel=1e-12)
    assert factor == pytest.approx(abs(1 - x), rel=0.01)
    assert floor == pytest.approx(predicted.floor, rel=6 * math.sqrt(2 / chains))


def test_the_numbers_of_the_specification(script: Any) -> None:
    """papers.md A-T8: .04572 and 1.587e-4 (x = .7085 and .0038), measured .04569 and 1.591e-4."""
    for floor in (0.04572, 1.587e-4):
        x = 24 * floor / (1 + 12 * floor)  # the inverse of the formula
        assert script.predict(x, 1.0, 1.0).floor == pytest.approx(floor, rel=1e-9)


def test_the_floor_is_that_of_the_moments_of_the_dither(script: Any) -> None:
    """V = (1 - x)^2 V + x^2 D^2 / 12 is solved exactly, and q - w is uniform with variance D^2 / 12."""
    for x in (0.01, 0.5, 1.0, 1.9):
        v = script.predict(x, 1.0, 1.0).floor
        assert (1 - x) ** 2 * v + x * x / 12 == pytest.approx(v, rel=1e-12)
    w = torch.randn(100_000, dtype=torch.float64)
    r = torch.rand(100_000, dtype=torch.float64) - 0.5
    noise = Int(8).project_(w + r) - r - w
    assert noise.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert abs(noise.mean().item()) < 0.005
    assert abs(torch.corrcoef(torch.stack([w, noise]))[0, 1].item()) < 0.02


def test_unstable_rates_are_refused(script: Any) -> None:
    for x in (0.0, 2.0, 3.0):
        with pytest.raises(ValueError, match="outside"):
            script.predict(x, 1.0, 1.0)


def test_with_the_exact_jacobian_a_saturated_weight_never_returns_and_with_a_gain_it_walks(script: Any) -> None:
    assert script.saturated("J", start=4.0, target=0.5, num_steps=100) == (-1, 4.0)
    for gain, num_steps, exact in ((1.0, 60, 25), (0.25, 150, 100)):  # 2.5 / (0.1 gain)
        predicted = script.steps_to_return(4.0, target=0.5, rate=0.1, curvature=1.0, gain=gain, grid=HalfShifted(2))
        assert predicted == exact
        back, _ = script.saturated(gain, start=4.0, target=0.5, num_steps=num_steps)
        assert abs(back - predicted) <= 2


def test_beyond_the_grid_identity_drifts_without_end_and_the_jacobian_stops(script: Any) -> None:
    _, exact = script.saturated("J", start=1.0, target=3.0, num_steps=400)
    assert 1.5 < exact < 1.5 + 0.1 * 2.0  # at most one step beyond the edge
    _, half = script.saturated(1.0, start=1.0, target=3.0, num_steps=200)
    _, whole = script.saturated(1.0, start=1.0, target=3.0, num_steps=400)
    assert whole - half == pytest.approx(200 * 0.1 * 1.5, rel=0.01)


def test_under_sgd_a_constant_gain_is_a_learning_rate_on_the_network_too(script: Any) -> None:
    constant = JacQuant(granularity="element")
    ste = script.train(0, STE(), rate=0.1, passes=60)
    assert script.train(0, constant, gain=1.0, rate=0.1, passes=60) == ste
    assert script.train(0, constant, gain=0.25, rate=0.4, passes=60) == ste
    assert script.train(0, constant, gain=0.25, rate=0.1, passes=60) != ste


def test_training_the_network_lowers_its_loss_within_its_budget(script: Any) -> None:
    for form in ("none", "svrg", "saga"):
        settings = script.VarianceReduction(form=form, interval=32)
        losses = script.train(1, ClippedSTE(), passes=320, settings=settings)
        assert len(losses) == 10
        assert losses[-1] < 0.8 * script.full_loss(script.network(1, ClippedSTE()), script.problem(1))


def test_the_page_is_the_one_that_the_script_builds(script: Any) -> None:
    """Prose and the tables that are quick to compute and exact in float64."""
    page, prose = script.PAGE.read_text(encoding="utf-8"), script.PROSE.read_text(encoding="utf-8")
    for paragraph in prose.split("\n\n"):
        if not paragraph.strip().startswith("{"):
            assert paragraph.strip() in page
    assert "{" not in page
    for table in (script.saturated_table(), script.interior_table()):
        assert table in page
