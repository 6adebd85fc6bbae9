"""The control arm: full-precision training that is the run's in all but the rounding, and the arms side by side."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from fewbits.convert import Rule, prepare
from fewbits.data import TokenBlocks
from fewbits.diagnose import (
    DiagnosisSettings,
    after_training,
    control_recipe,
    measure_arm,
    token_loss,
    train_control,
    triple,
)
from fewbits.diagnose.arms import CONTROL, PTQ, QAT, compare_arms
from fewbits.diagnose.control import CONTROL_FILE, rounded_start
from fewbits.geometry import gradient, loss_value
from fewbits.recipe import Recipe, RuleSpec, TrainSpec
from fewbits.testing.tiny import tiny_llama, toy_blocks

BLOCKS = TokenBlocks(toy_blocks(4, 16).numpy(), 1.0)
QUICK = DiagnosisSettings(num_random=2, num_bisections=2)


def recipe(**train: object) -> Recipe:
    fields = {"max_steps": 1, "batch_size": 4, "warmup_steps": 0, "max_grad_norm": 0.0} | train
    return Recipe(rules=[RuleSpec(scheme="W2")], train=TrainSpec(**fields))  # type: ignore[arg-type]


def test_one_step_of_the_control_is_one_step_of_gradient_descent(tmp_path: Path) -> None:
    """By hand: w - lr * gradient of the cross-entropy on the one batch, for latent weights and the rest alike."""
    model = tiny_llama()
    before = copy.deepcopy(model)
    chosen = recipe(optim="sgd", learning_rate=0.5, lr_scheduler_type="constant")
    trained = train_control(model, chosen, BLOCKS, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    params = list(before.parameters())
    grads = gradient(token_loss(before, BLOCKS), params)
    for p, g, after in zip(params, grads, trained.parameters(), strict=True):
        torch.testing.assert_close(after.detach(), p.detach() - 0.5 * g, rtol=1e-4, atol=1e-6)
    assert not trained.training
    assert not list(tmp_path.glob("control-*"))  # checkpoints are gone


def test_a_finished_control_is_kept_and_another_one_is_trained_anew(tmp_path: Path) -> None:
    model = tiny_llama()
    chosen = recipe(max_steps=2, batch_size=2)
    first = train_control(model, chosen, BLOCKS, tmp_path)
    mark = (tmp_path / CONTROL_FILE).stat().st_mtime_ns
    again = train_control(model, chosen, BLOCKS, tmp_path)
    assert (tmp_path / CONTROL_FILE).stat().st_mtime_ns == mark
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    train_control(model, recipe(max_steps=1, batch_size=2), BLOCKS, tmp_path)
    assert (tmp_path / CONTROL_FILE).stat().st_mtime_ns != mark
    path = tmp_path / CONTROL_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="delete it"):
        train_control(model, chosen, BLOCKS, tmp_path)
    with pytest.raises(ValueError, match="max_steps"):
        train_control(model, recipe(max_steps=0), BLOCKS, tmp_path)


def test_a_killed_control_goes_on_and_ends_where_the_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbits.training import QATTrainer

    model = tiny_llama()
    chosen = recipe(max_steps=8, batch_size=2)
    whole = train_control(model, chosen, BLOCKS, tmp_path / "a")
    real = QATTrainer.training_step
    steps: list[int] = []

    def step(self: QATTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(QATTrainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        train_control(model, chosen, BLOCKS, tmp_path / "b")
    resumed = train_control(model, chosen, BLOCKS, tmp_path / "b")
    assert steps == [0, 1, 2, 3, 4, 4, 5, 6, 7]  # saved every second step; the fifth was lost
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_what_must_differ_differs() -> None:
    chosen = Recipe(rules=[RuleSpec(scheme="W2", surrogate="clipped_ste", drive="winq")])
    control = control_recipe(chosen)
    assert control.rules[0].drive is None
    assert control.train == chosen.train
    assert control.data == chosen.data
    assert control.seed == chosen.seed
    other = chosen.model_copy(update={"teacher": "smollm2"})
    assert control_recipe(other).objective == other.objective


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_the_arms_start_as_the_run_does(method: str) -> None:
    model = tiny_llama()
    chosen = Recipe(rules=[RuleSpec(scheme="W2")], init=method)  # type: ignore[arg-type]
    start = triple(model, rounded_start(model, chosen, BLOCKS))
    plain = triple(model, prepare(copy.deepcopy(model), Rule(scheme="W2")))
    same = all(torch.equal(a, b) for a, b in zip(start.deployed, plain.ptq, strict=True))
    assert same == (method == "rtn")


def test_the_arms_are_measured_where_they_are() -> None:
    fp = tiny_llama()
    trained = prepare(copy.deepcopy(fp), Rule(scheme="W2"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.1 * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    loss, points = token_loss(fp, BLOCKS), triple(fp, trained)
    after = after_training(loss, trained, tol=0.02, num_points=2)
    here = [p.detach().clone() for p in points.params]
    ptq = measure_arm(loss, points, here, points.ptq, QUICK, tol=0.02)
    qat = measure_arm(loss, points, points.latent, points.deployed, QUICK, tol=0.02)
    assert all(torch.equal(a, b) for a, b in zip(points.params, here, strict=True))
    assert (ptq.loss_latent, ptq.loss_deployed) == (after.loss_fp, after.loss_ptq)
    assert (qat.loss_latent, qat.loss_deployed) == (after.loss_latent, after.loss_deployed)
    assert ptq.moved == 0
    assert ptq.angle is None
    assert qat.angle == after.angle_latent
    assert qat.error_norm == pytest.approx(after.rounding_error_qat)
    assert ptq.kappa_rand == pytest.approx(ptq.error_norm / ptq.random_width)
    assert qat.inward.at_rounded.slope == pytest.approx(after.inward_qat.at_rounded.slope, rel=1e-3)
    assert qat.inward.quadratic_slope == pytest.approx(after.inward_qat.quadratic_slope, rel=1e-3)
    assert loss_value(loss) == after.loss_fp

    def verdict(control_loss: float) -> str:
        arms = {PTQ: ptq, CONTROL: dataclasses.replace(ptq, loss_deployed=control_loss), QAT: qat}
        return compare_arms(arms, objective="", num_steps=1, learning_rate=0.1, loss_fp=after.loss_fp, tol=0.02).verdict

    assert "do not bring it" in verdict(qat.loss_deployed + 1)
    assert "within the basin" in verdict(qat.loss_deployed)
    assert "does not pay" in verdict(qat.loss_deployed - 1)
