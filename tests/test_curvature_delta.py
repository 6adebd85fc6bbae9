"""EWGS's delta from the Hessian: closed forms, brute force, in training and after resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fewbits import Rule, prepare
from fewbits.arena import METHODS
from fewbits.arena.methods import rule_for
from fewbits.convert import owned_layers, qat_layers
from fewbits.data import TokenBlocks
from fewbits.grids import HalfShifted, Int
from fewbits.recipe import Recipe
from fewbits.rotations import Rotation
from fewbits.scales import stored_scale
from fewbits.scheme import Scheme
from fewbits.surrogates import EWGS, HessianSchedule, surrogate_from_dict
from fewbits.testing.contracts import check_surrogate
from fewbits.testing.tiny import tiny_llama, toy_blocks
from fewbits.testing.training import tiny_trainer
from fewbits.training import CurvatureRefresh, QATCallback, QATSettings, QATTrainer
from fewbits.training.curvature import at_quantized_weights, measure_curvature
from fewbits.training.metrics import read_metrics


def linear(scheme: Scheme, rows: int = 4, width: int = 64) -> Any:
    """One prepared float64 layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, rows, bias=False)).double()
    return prepare(model, Rule(scheme=scheme, surrogate="ewgs"))


def quadratic(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """``1/2 |x W^T - y|^2``: its Hessian with respect to a row of W is ``x^T x``, whatever W is."""
    return lambda: (model(x) - y).square().sum() / 2


def exact(layer: Any, hessian: Tensor, grad: Tensor) -> tuple[float, float]:
    """``(tr, std)`` per cell with the dense rotation, for a Hessian shared by all rows and a gradient at w_hat."""
    shape, scheme = layer.weight.shape, layer.scheme
    pitch = scheme.grid.step * scheme.scale.view(shape).expand(stored_scale(layer.raw_scale().detach(), scheme.scale))
    pitch = pitch.double()
    dense = scheme.rotation.apply(torch.eye(shape[1], dtype=torch.float64)).t()  # R: x -> dense @ x
    turned = dense @ hessian @ dense.t()
    trace = sum(float((p[:, None] * turned * p[None, :]).diagonal().sum()) for p in pitch)
    return trace, float((pitch * (grad @ dense.t())).std(correction=0))


@pytest.mark.parametrize("rotation", [Rotation(), Rotation(kind="random_hadamard", block_size=4)], ids=lambda r: r.kind)
@pytest.mark.parametrize("grid", [Int(2), HalfShifted(3)], ids=str)
def test_a_quadratic_has_its_trace_and_its_delta_in_closed_form(grid: Any, rotation: Rotation) -> None:
    model = linear(Scheme.parse("W2G32", grid=grid, rotation=rotation))
    layer = model[0]
    torch.manual_seed(1)
    # orthonormal columns times 3: the Hessian is 9 times the identity in every basis, so one probe is exact
    x = 3 * torch.linalg.qr(torch.randn(70, 64, dtype=torch.float64))[0]
    y = torch.randn(70, 4, dtype=torch.float64)
    grad = (layer.quantized_weight().detach() @ x.t() - y.t()) @ x
    trace, std = exact(layer, x.t() @ x, grad)
    found = measure_curvature(
        model, [quadratic(model, x, y)], {"0": layer}, num_probes=1, generator=torch.Generator().manual_seed(0)
    )["0"]
    # a rotated probe is rounded to fp32 once, a plain one is a signed pitch
    tolerance = 1e-12 if rotation.kind == "none" else 1e-6
    assert found.trace == pytest.approx(trace, rel=tolerance)
    assert found.gradient_std == pytest.approx(std, rel=tolerance)
    assert found.delta == pytest.approx(trace / layer.weight.numel() / (3 * std), rel=2 * tolerance)


def test_hutchinson_agrees_with_the_exact_trace() -> None:
    model = linear(Scheme.parse("W2G32", rotation=Rotation(kind="hadamard", block_size=64)))
    torch.manual_seed(1)
    x, y = torch.randn(6, 64, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    trace, _ = exact(model[0], x.t() @ x, torch.zeros(4, 64, dtype=torch.float64))
    single = [
        measure_curvature(
            model, [quadratic(model, x, y)], {"0": model[0]}, num_probes=1, generator=torch.Generator().manual_seed(i)
        )["0"].trace
        for i in range(200)
    ]
    values = torch.tensor(single, dtype=torch.float64)
    error = float(values.std() / len(single) ** 0.5)
    assert float(values.std()) > 0.01 * trace
    assert abs(float(values.mean()) - trace) < 3 * error


def test_every_layer_gets_the_trace_of_its_own_block() -> None:
    """A nonlinear model against the whole Hessian by brute force, two batches, one probe for all layers at once."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    prepare(model, Rule(scheme="W3", surrogate="ewgs"))
    data = [(torch.randn(5, 4).double(), torch.randn(5, 2).double()) for _ in range(2)]
    layers = dict(owned_layers(model))

    def whole(i: str) -> float:
        layer, total = layers[i], 0.0
        s = stored_scale(layer.raw_scale().detach(), layer.scheme.scale).double()
        start = layer.quantized_weight().detach()
        for x, y in data:

            def loss(w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
                w0 = w if i == "0" else layers["0"].quantized_weight()
                w2 = w if i == "2" else layers["2"].quantized_weight()
                hidden = torch.tanh(x @ w0.t() + model[0].bias)
                return (hidden @ w2.t() + model[2].bias - y).square().mean()

            full: Any = torch.autograd.functional.hessian(loss, start)
            diagonal = full.reshape(start.numel(), start.numel()).diagonal().view_as(start)
            total += float((diagonal * s.square()).sum()) / len(data)
        return total

    losses = [lambda x=x, y=y: (model(x) - y).square().mean() for x, y in data]
    runs = [
        measure_curvature(model, losses, layers, num_probes=2, generator=torch.Generator().manual_seed(i))
        for i in range(100)
    ]
    for name in layers:
        values = torch.tensor([run[name].trace for run in runs], dtype=torch.float64)
        assert abs(float(values.mean()) - whole(name)) < 3 * float(values.std()) / len(runs) ** 0.5


def test_measuring_leaves_no_trace() -> None:
    model: Any = tiny_llama(tie=True).train()
    rules = [Rule(scheme="W4G32", surrogate="ewgs", pattern="*", embeddings=True)]
    prepare(model, rules, ignore=[])
    tokens = toy_blocks(2, 16, seed=1)
    layers = dict(owned_layers(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream = torch.get_rng_state()

    def loss() -> Tensor:
        assert not model.training
        return model(input_ids=tokens, labels=tokens).loss

    found = measure_curvature(model, [loss], layers, num_probes=1, generator=torch.Generator())
    assert set(found) == set(layers)
    assert all(np.isfinite(curvature.trace) and curvature.gradient_std > 0 for curvature in found.values())
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all("quantized_weight" not in layer.__dict__ for _, layer in qat_layers(model))


def test_tied_layers_share_one_leaf() -> None:
    model: Any = tiny_llama(tie=True)
    prepare(model, Rule(scheme="W4G32", embeddings=True), ignore=[])
    layers = dict(owned_layers(model))
    with at_quantized_weights(layers, model) as leaves:
        assert model.lm_head.quantized_weight() is model.model.embed_tokens.quantized_weight()
        assert len(leaves) == len(layers)
    with pytest.raises(RuntimeError, match="stop"), at_quantized_weights(layers, model):
        raise RuntimeError("stop")
    assert "quantized_weight" not in model.lm_head.__dict__


SCHEDULED = {"name": "ewgs", "hessian": {"interval": 2, "num_probes": 1, "num_batches": 2}}


def trainer(folder: Path, surrogate: Any, **more: Any) -> QATTrainer:
    return tiny_trainer(
        folder, Rule(scheme="W2A16G32", surrogate=surrogate), QATSettings(telemetry_interval=100), **more
    )


def deltas(model: Any) -> dict[str, float]:
    return {name: float(layer.state()["delta"]) for name, layer in owned_layers(model)}


def test_delta_follows_the_curvature_in_training_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", SCHEDULED)
    whole.train()
    found = deltas(whole.model)
    assert all(value != np.float32(1e-3) for value in found.values())  # 0 where the trace is negative
    assert sum(value > 0 for value in found.values()) >= len(found) // 2
    lines = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "qat/delta" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["layers"].keys() == found.keys()

    resumed = trainer(tmp_path / "parts", SCHEDULED)
    resumed.train()
    again = trainer(tmp_path / "parts", SCHEDULED)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    a, b = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_schedule_that_is_never_due_changes_nothing(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", "ewgs", max_steps=3)
    later = trainer(tmp_path / "b", {"name": "ewgs", "hessian": {"interval": 4}}, max_steps=3)
    plain.train()
    later.train()
    a, b = plain.model.state_dict(), later.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_layer_without_gradient_keeps_its_delta() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2))
    prepare(model, Rule(scheme="W4", surrogate=SCHEDULED))
    refresh = CurvatureRefresh(
        lambda model, batch: model[0](batch).square().sum(), lambda num: [torch.ones(1, 4)] * num
    )
    assert refresh.refresh_(model, 1) == {}
    found = refresh.refresh_(model, 2)
    assert found["1"] == {"delta": np.float32(1e-3), "hessian_trace": 0.0}
    assert found["0"]["delta"] > 0.01


def test_another_trainer_must_bring_the_loss(tmp_path: Path) -> None:
    def run(callback: QATCallback) -> Any:
        model: Any = tiny_llama()
        prepare(model, Rule(scheme="W2A16G32", surrogate=SCHEDULED))
        data = TokenBlocks(toy_blocks(8, 16).numpy().astype(np.int32), 1.0)
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
            dataloader_pin_memory=False, per_device_train_batch_size=2,
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()
        return model

    with pytest.raises(ValueError, match=r"q_proj: ewgs with a Hessian schedule needs the loss"):
        run(QATCallback())
    tokens = toy_blocks(2, 16)
    refresh = CurvatureRefresh(lambda model, x: model(input_ids=x, labels=x).loss, lambda num: [tokens] * num)
    assert len(set(deltas(run(QATCallback(curvature=refresh))).values())) > 1


def test_the_surrogate_is_a_value_and_keeps_the_contract() -> None:
    surrogate = surrogate_from_dict(SCHEDULED)
    assert surrogate == EWGS(hessian=HessianSchedule(interval=2, num_probes=1, num_batches=2))
    assert surrogate_from_dict(json.loads(json.dumps(surrogate.to_dict()))) == surrogate
    assert EWGS(hessian={}).hessian == HessianSchedule()  # type: ignore[arg-type]
    check_surrogate(surrogate, Int(2))
    recipe = Recipe.parse("rules: [{scheme: W2G32, surrogate: {name: ewgs, hessian: {interval: 50}}}]")
    assert Recipe.parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"interval": 0}, "interval=0 must be a whole number of at least 1"),
        ({"num_probes": 1.5}, "num_probes=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"every": 3}, "must be null or a mapping of interval"),
        (3, "hessian=3 must be null or a mapping"),
    ],
)
def test_bad_schedules_are_refused(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        surrogate_from_dict({"name": "ewgs", "hessian": options})


def test_the_arena_row_measures_a_few_times_in_a_short_run() -> None:
    rule = rule_for("ewgs_hessian", METHODS["ewgs_hessian"], "W2G64", num_steps=62)
    assert rule["surrogate"]["hessian"] == {"interval": 12}
