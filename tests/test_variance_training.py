"""Variance reduction, windows and calibration through the trainer, the recipe and the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from arena_common import tiny_arena, write_checkpoint
from test_training import Interrupt, blocks, make_trainer
from torch import Tensor
from transformers import TrainerCallback
from typer.testing import CliRunner

from fewbits.arena import Cell
from fewbits.arena.cells import fingerprint
from fewbits.arena.shared import Start
from fewbits.cli import app
from fewbits.objectives import Objective
from fewbits.optim import VarianceReduction
from fewbits.pipeline import training_settings
from fewbits.recipe import Recipe
from fewbits.surrogates import JacQuant
from fewbits.training import QATSettings
from fewbits.training.metrics import read_metrics
from fewbits.training.variance import VARIANCE_FILE, FixedBatches, reference_indices

JACQUANT = JacQuant(interval=3, group_size=32, mode="probe", beta=0.5)
FORMS: list[Any] = ["l_svrg", "sarah", "saga"]


def reduced(form: Any, **more: Any) -> QATSettings:
    vr = VarianceReduction(form=form, probability=0.4, interval=3)
    return QATSettings(telemetry_interval=3, variance_reduction=vr, num_reference_batches=4, **more)


def weights(trainer: Any) -> dict[str, Tensor]:
    return dict(trainer.model.state_dict())


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_form_none_is_plain_training_bit_for_bit(tmp_path: Path, accumulation: int) -> None:
    """The same batches, dropout masks, gradients and logged losses."""
    found = []
    for name, settings in (("plain", QATSettings(telemetry_interval=3)), ("none", reduced("none"))):
        trainer = make_trainer(
            tmp_path / name,
            JACQUANT,
            dropout=0.1,
            settings=settings,
            save_strategy="no",
            max_steps=4,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        found.append((weights(trainer), losses(tmp_path / name)))
    assert found[0][0].keys() == found[1][0].keys()
    assert all(torch.equal(found[0][0][key], found[1][0][key]) for key in found[0][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-7)


def test_at_a_fresh_anchor_every_step_is_a_step_of_the_reference_gradient(tmp_path: Path) -> None:
    """Renewed at each step both minibatch terms cancel: the minibatch does not matter, dropout masks included."""
    found = []
    for seed in (1, 2):
        vr = VarianceReduction(form="l_svrg", probability=1.0)
        settings = QATSettings(variance_reduction=vr, num_reference_batches=4)
        trainer = make_trainer(
            tmp_path / str(seed), dropout=0.1, settings=settings, save_strategy="no", max_steps=3, data_seed=seed
        )
        trainer.train()
        found.append((weights(trainer), losses(tmp_path / str(seed))))
        assert trainer.variance is not None
        assert trainer.variance.num_passes == 3 * (2 + 4)
    assert found[0][1] != found[1][1], "the minibatches differ"
    assert all(torch.equal(found[0][0][key], found[1][0][key]) for key in found[0][0])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_of_a_step_is_the_estimate_of_its_micro_batches(tmp_path: Path, accumulation: int) -> None:
    """Against the estimate put together by hand from plain gradients, distillation included."""
    kept: dict[str, Any] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:  # the third step; the anchor is the start
                kept["estimate"] = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
                kept["now"] = [p.detach().clone() for p in trainer.model.parameters()]

    seen: list[dict[str, Tensor]] = []
    trainer: Any = make_trainer(
        tmp_path,
        settings=reduced("svrg"),
        save_strategy="no",
        max_steps=3,
        max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation,
        callbacks=[Watch()],
    )
    start = [p.detach().clone() for p in trainer.model.parameters()]
    step = trainer.training_step

    def watched(model: Any, inputs: Any, num_items: Any = None) -> Tensor:
        seen.append(inputs)
        return step(model, inputs, num_items)

    trainer.training_step = watched
    trainer.train()

    def gradient(at: list[Tensor], batches: Any) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(trainer.model.parameters(), at, strict=True):
                p.copy_(value)
        trainer.model.zero_grad()
        for batch in batches:
            (trainer.compute_loss(trainer.model, batch) / len(batches)).backward()
        return [p.grad.clone() for p in trainer.model.parameters()]

    assert trainer.variance is not None
    mine = seen[2 * accumulation :]
    assert len(mine) == accumulation
    parts = gradient(kept["now"], mine), gradient(start, mine), gradient(start, trainer.variance.reference)
    for estimate, a, b, g in zip(kept["estimate"], *parts, strict=True):
        torch.testing.assert_close(estimate, a - b + g, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_resume_is_bit_identical(tmp_path: Path, form: str) -> None:
    options: dict[str, Any] = {"dropout": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = make_trainer(tmp_path / "whole", JACQUANT, settings=reduced(form), **options)
    whole.train()
    broken = make_trainer(tmp_path / "broken", JACQUANT, settings=reduced(form), callbacks=[Interrupt(6)], **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    checkpoint = tmp_path / "broken" / "checkpoint-4"
    assert (checkpoint / VARIANCE_FILE).exists()
    resumed = make_trainer(tmp_path / "broken", JACQUANT, settings=reduced(form), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert whole.variance is not None
    assert resumed.variance is not None
    assert whole.variance.num_passes == resumed.variance.num_passes
    assert (tmp_path / "broken/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, settings=reduced("svrg"), max_steps=1, save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    again: dict[str, Any] = {"max_steps": 2}
    with pytest.raises(ValueError, match="of form 'svrg', the settings say 'sarah'"):
        make_trainer(tmp_path, settings=reduced("sarah"), **again).train(resume_from_checkpoint=str(checkpoint))
    data = (checkpoint / VARIANCE_FILE).read_bytes()
    (checkpoint / VARIANCE_FILE).write_bytes(data[:100])
    with pytest.raises(ValueError, match=f"{VARIANCE_FILE} is damaged"):
        make_trainer(tmp_path, settings=reduced("svrg"), **again).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / VARIANCE_FILE).unlink()
    with pytest.raises(ValueError, match="saved without variance reduction"):
        make_trainer(tmp_path, settings=reduced("svrg"), **again).train(resume_from_checkpoint=str(checkpoint))


def test_the_cost_is_announced_before_the_first_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer: Any = make_trainer(tmp_path, settings=reduced("l_svrg"), callbacks=[Stop()])
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        trainer.train()
    weight_bytes = sum(p.numel() * 4 for p in trainer.model.parameters())
    message = next(r.getMessage() for r in caplog.records if "variance reduction" in r.getMessage())
    assert f"keeps {2 * weight_bytes / 2**20:.1f} MiB more" in message
    assert "3.60 forward-and-backward passes" in message  # 2 + .4 * 4


def test_what_does_not_work_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_reference_batches=99 is outside 1\.\."):
        make_trainer(
            tmp_path,
            settings=QATSettings(variance_reduction=VarianceReduction(form="svrg"), num_reference_batches=99),
            per_device_train_batch_size=8,
        )
    with pytest.raises(ValueError, match="needs one loss along the run"):
        make_trainer(tmp_path, settings=reduced("svrg", objective=Objective(consistency=0.1)))
    with pytest.raises(ValueError, match="num_reference_batches=0 must be at least 1"):
        QATSettings(num_reference_batches=0)
    from fewbits import Rule, prepare
    from fewbits.testing.tiny import tiny_llama
    from fewbits.training.variance import check_drives

    check_drives(prepare(tiny_llama(), Rule(scheme="W2A16G32", drive="winq")))
    with pytest.raises(ValueError, match=r"drive 'parq' of .* changes it"):
        check_drives(prepare(tiny_llama(), Rule(scheme="W2A16G32", drive="parq")))


def test_reference_batches_are_spread_and_fixed_batches_keep_their_examples() -> None:
    assert reference_indices(100, 4, 5) == [list(range(i, i + 4)) for i in (0, 20, 40, 60, 80)]
    with pytest.raises(ValueError, match=r"outside 1\.\.2, the whole batches of 4 in 11 examples"):
        reference_indices(11, 4, 3)
    batches = reference_indices(len(blocks()), 4, 6)
    sampler = FixedBatches(batches, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        flat = list(sampler)
        assert len(flat) == len(sampler)
        split = [flat[i : i + 4] for i in range(0, len(flat), 4)]
        assert sorted(split) == batches
        orders.append(split)
    assert orders[0] == orders[2] != orders[1]


# the recipe, the command line and the report -------------------------------------------------------------------------


def test_recipes_without_the_new_fields_are_what_they_were() -> None:
    recipe = Recipe.parse("rules: [{scheme: W2}]")
    settings = training_settings(recipe)
    assert (settings.variance_reduction, settings.calibration) == (None, False)
    with pytest.raises(ValueError, match=r"variance_reduction\.form"):
        Recipe.parse("train: {variance_reduction: {form: storm}}")
    vr = training_settings(
        Recipe.parse("{seed: 7, train: {variance_reduction: {probability: 0.2}}}")
    ).variance_reduction
    assert vr == VarianceReduction(form="l_svrg", probability=0.2, seed=7)


def test_new_fields_count_for_cells_only_where_they_act(tmp_path: Path) -> None:
    settings = tiny_arena(tmp_path)
    start = Start.model_construct(model_digest="m", text_digest="t")
    cell = Cell(scheme="W2G32", method="clipped_ste", learning_rate=1e-3, seed=0)
    plain = fingerprint(settings, cell, start)
    same = settings.model_copy(update={"overrides": ("train.window_interval=null",)})
    other = settings.model_copy(update={"overrides": ("train.variance_reduction.form=svrg",)})
    assert fingerprint(same, cell, start) == plain
    assert fingerprint(other, cell, start) != plain


def test_the_command_line_trains_and_the_report_shows(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
model: {checkpoint / "model"}
rules: [{{scheme: W2A16G32, surrogate: {{name: jacquant, interval: 2, beta: 0.5}}}}]
data: {{source: text, path: {checkpoint / "text.txt"}, block_size: 32, eval_tokens: 256}}
train:
  max_steps: 6
  batch_size: 2
  learning_rate: 3e-3
  warmup_steps: 0
  logging_steps: 1
  telemetry_calibration: true
  window_interval: 1
  variance_reduction: {{form: l_svrg, probability: 0.5, num_reference_batches: 3}}
""")
    folder = tmp_path / "run"
    result = CliRunner().invoke(app, ["train", str(recipe), "-o", str(folder), "--quiet"])
    assert result.exit_code == 0, result.output
    data = json.loads((folder / "windows.json").read_text())
    assert (data["interval"], data["first_step"], data["last_step"]) == (1, 0, 6)
    assert all(layer["num_steps"] == 6 for layer in data["layers"].values())
    assert sum(layer["flip_rate"] for layer in data["layers"].values()) > 0
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "qat/slope_mean" in row] == [2, 4, 6]
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    page = (folder / "report.html").read_text()
    for text in ("Calibration of the gain, run", "Code windows", "back to the code before", "Completed windows"):
        assert text in page
    (folder / "windows.json").write_text('{"layers": {"a": {}}}')
    damaged = CliRunner().invoke(app, ["report", str(folder)])
    assert damaged.exit_code != 0
