"""DSQ with a learned alpha: its gradient against the soft weight's, its range, training, resume and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewbits import Rule, prepare
from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.convert import owned_layers
from fewbits.fake_quant import fake_quantize
from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.optim import parameter_groups
from fewbits.scheme import Scheme
from fewbits.surrogates import DSQ, surrogate_from_dict
from fewbits.surrogates.dsq import ALPHA_RANGE, sharpness
from fewbits.testing.contracts import check_surrogate
from fewbits.testing.tiny import tiny_llama, toy_blocks
from fewbits.testing.training import tiny_trainer
from fewbits.training import QATSettings, QATTrainer
from fewbits.training.metrics import read_metrics

GRIDS: list[AnyGrid] = [Binary(), Ternary(), Int(2), HalfShifted(3), Codebook.lloyd_max(4)]


def soft_levels(v: Tensor, grid: AnyGrid, alpha: Tensor) -> Tensor:
    """The soft staircase by a loop over weights: ends of the interval, their middle, a tanh between them."""
    levels = grid.levels
    result = []
    for x in v.flatten():
        place = float(x.detach())
        i = max(0, min(sum(place >= level for level in levels) - 1, len(levels) - 2))
        low, high = levels[i], levels[i + 1]
        t = (x - (low + high) / 2) / (high - low)
        curve = torch.tanh(torch.log(2 / alpha - 1) * t) / (1 - alpha)
        inside = levels[0] <= place <= levels[-1]
        result.append((low + high) / 2 + (high - low) / 2 * curve if inside else x.new_tensor(0.0) * alpha)
    return torch.stack(result).view_as(v)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.9])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradients_are_those_of_the_soft_weight(grid: AnyGrid, alpha: float) -> None:
    torch.manual_seed(0)
    v = (1.5 * grid.max_level * torch.randn(4, 9)).double().requires_grad_()
    upstream = torch.randn(4, 9).double()
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    expected_v, expected_a = torch.autograd.grad(soft_levels(v, grid, a), (v, a), upstream)
    surrogate = DSQ(alpha=alpha, learned=True)
    state = {"alpha": torch.tensor(alpha, dtype=torch.float64)}
    (found,) = surrogate.state_gradient(upstream, v.detach(), grid, state)
    assert float(found) == pytest.approx(float(expected_a), rel=1e-6)  # codebooks keep fp32 tables
    torch.testing.assert_close(surrogate.pullback(upstream, v.detach(), grid, state), expected_v, rtol=1e-6, atol=1e-6)


def test_closed_form_of_one_weight() -> None:
    """A quarter cell above the boundary: tanh(K/4)/(1-a)^2 - K'..., times scale over two, by hand."""
    w = torch.tensor([[0.375]], requires_grad=True)  # v = .75 on {-2 .. 1}
    a = 0.2
    alpha = torch.tensor(a, requires_grad=True)
    out = fake_quantize(w, Scheme.parse("W2"), torch.tensor([[0.5]]), DSQ(learned=True), {"alpha": alpha})
    assert out.item() == 0.5
    (2 * out).backward()
    curve = np.tanh(sharpness(a) / 4)
    slope = curve / (1 - a) ** 2 - 0.25 * 2 / (a * (2 - a)) * (1 - curve**2) / (1 - a)
    assert alpha.grad is not None
    assert alpha.grad.item() == pytest.approx(2 * 0.5 * 0.5 * slope, rel=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_alpha_has_no_gradient_on_levels_and_boundaries(grid: AnyGrid) -> None:
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    v = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])[None]
    (found,) = DSQ(learned=True).state_gradient(torch.ones_like(v), v, grid, {"alpha": torch.tensor(0.2)})
    assert abs(float(found)) < 1e-6


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_alpha_stays_in_its_range(sign: float) -> None:
    """Beyond an end alpha counts as that end, and only a gradient that leads back acts."""
    v, grad = torch.tensor([[0.75, 0.3]]), torch.tensor([[sign, 0.0]])
    low, high = ALPHA_RANGE
    surrogate = DSQ(learned=True)
    for raw, end, outward in ((low - 0.3, low, 1.0), (high + 0.3, high, -1.0)):
        state = {"alpha": torch.tensor(raw)}
        at_end = DSQ(alpha=end, learned=True)
        assert torch.equal(surrogate.pullback(grad, v, Int(2), state), grad * at_end.gain(v, Int(2)))
        (found,) = surrogate.state_gradient(grad, v, Int(2), state)
        (free,) = surrogate.state_gradient(grad, v, Int(2), {"alpha": torch.tensor(0.5)})
        assert (float(found) == 0) == (float(free) * outward > 0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_contract(grid: AnyGrid) -> None:
    check_surrogate(DSQ(learned=True), grid)
    check_surrogate(DSQ(alpha=0.6, learned=True, edge="bin"), grid)


def test_learned_starts_where_the_fixed_one_stays() -> None:
    v = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    for alpha in (0.05, 0.2, 0.8):
        torch.testing.assert_close(
            DSQ(alpha=alpha, learned=True).gain(v, Int(3)), DSQ(alpha=alpha).gain(v, Int(3)), rtol=1e-5, atol=1e-6
        )


LEARNED = {"name": "dsq", "learned": True}


def trainer(folder: Path, rule: dict[str, Any], **more: Any) -> QATTrainer:
    settings = QATSettings(telemetry_interval=2, scale_learning_rate=1e-2)
    return tiny_trainer(folder, Rule(**rule), settings, **{"max_steps": 4, "save_steps": 2, **more})


def alphas(model: Any) -> dict[str, float]:
    return {name: float(layer.state()["alpha"].detach()) for name, layer in owned_layers(model)}


def test_alpha_is_trained_saved_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    rule = {"scheme": "W2A16G32", "surrogate": LEARNED}
    whole = trainer(tmp_path / "whole", rule)
    whole.train()
    found = alphas(whole.model)
    assert len(set(found.values())) == len(found)
    assert all(0.1 < value < 0.3 and value != np.float32(0.2) for value in found.values())
    lines = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "qat/alpha" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert {name: values["alpha"] for name, values in lines[-1]["layers"].items()} == found

    again = trainer(tmp_path / "whole", rule)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    a, b = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)

    save_prepared(whole.model, None, tmp_path / "model")
    loaded, _ = load_prepared(tmp_path / "model")
    assert alphas(loaded) == found
    assert all(isinstance(layer.state()["alpha"], nn.Parameter) for _, layer in owned_layers(loaded))
    tokens = toy_blocks(1, 16)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, whole.model.eval()(input_ids=tokens).logits)  # type: ignore


def test_it_works_inside_low_rank_factors(tmp_path: Path) -> None:
    rule = {"scheme": "W2A16G32", "surrogate": LEARNED, "parametrization": {"name": "low_rank", "rank": 4}}
    run = trainer(tmp_path, rule, max_steps=2)
    run.train()
    assert all(value != np.float32(0.2) for value in alphas(run.model).values())


def test_alpha_goes_with_the_scales_and_can_be_frozen() -> None:
    model: Any = tiny_llama()
    prepare(model, Rule(scheme="W2A16G32", surrogate=LEARNED))  # type: ignore[arg-type]
    rates = {"learning_rate": 1e-3, "scale_learning_rate": 1e-4, "rest_learning_rate": 0.0, "weight_decay": 0.1}
    groups = {group["name"]: group for group in parameter_groups(model, **rates)}
    count = len(list(owned_layers(model)))
    assert set(groups) == {"latent", "scale"}
    assert len(groups["scale"]["params"]) == 2 * count
    assert groups["scale"]["weight_decay"] == 0
    for name, p in model.named_parameters():
        if name.endswith("weight_state_alpha"):
            p.requires_grad_(False)
    tokens = toy_blocks(1, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.state()["alpha"].grad is None for _, layer in owned_layers(model))
    assert all(layer.weight.grad is not None for _, layer in owned_layers(model))


def test_the_value() -> None:
    surrogate = surrogate_from_dict(LEARNED)
    assert surrogate_from_dict(json.loads(json.dumps(surrogate.to_dict()))) == surrogate == DSQ(learned=True)
    assert DSQ().trained == ()
    assert DSQ().init_state((2, 2)) == {}
    with pytest.raises(ValueError, match=r"alpha=0.001 is outside \[0.01, 0.99\]"):
        DSQ(alpha=0.001, learned=True)
    with pytest.raises(ValueError, match="learned='yes' must be true or false"):
        DSQ(learned="yes")  # type: ignore[arg-type]
