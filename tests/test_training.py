"""The trainer: parameter groups, resume, telemetry, divergence, disk full."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from fewbits import Rule, prepare, surrogates
from fewbits.convert import owned_layers
from fewbits.data import TokenBlocks
from fewbits.objectives import Objective
from fewbits.optim import parameter_groups
from fewbits.testing.tiny import tiny_llama, toy_text
from fewbits.training import QATCallback, QATSettings, QATTrainer, TrainingDiverged
from fewbits.training.callback import refresh_generator
from fewbits.training.metrics import MetricsFile, read_metrics


def blocks(size: int = 16) -> TokenBlocks:
    data = np.frombuffer(toy_text(60).encode(), dtype=np.uint8)
    return TokenBlocks(data[: len(data) // size * size].reshape(-1, size).astype(np.int32), 1.0)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**options, **more})


def make_trainer(folder: Path, surrogate: Any = "ste", dropout: float = 0.0, **more: Any) -> QATTrainer:
    model = tiny_llama()
    model.config.attention_dropout = dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    teacher = copy.deepcopy(model)
    prepare(model, Rule(scheme="W2A16G32", surrogate=surrogate))
    settings = more.pop("settings", QATSettings(telemetry_interval=3))
    callbacks = more.pop("callbacks", None)
    return QATTrainer(
        model,
        arguments(folder, **more),
        teacher=teacher,
        settings=settings,
        train_dataset=blocks(),
        callbacks=callbacks,
    )


class Interrupt(TrainerCallback):
    """Kills the run after a step, as a user would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


JACQUANT = surrogates.JacQuant(interval=3, group_size=32, mode="probe", beta=0.5)


@pytest.mark.parametrize("surrogate", [surrogates.ClippedSTE(), JACQUANT], ids=["clipped_ste", "jacquant"])
def test_resume_gives_bit_identical_metrics_and_weights(tmp_path: Path, surrogate: Any) -> None:
    whole = make_trainer(tmp_path / "whole", surrogate, dropout=0.1)
    whole.train()
    broken = make_trainer(tmp_path / "broken", surrogate, dropout=0.1, callbacks=[Interrupt(6)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", surrogate, dropout=0.1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert (tmp_path / "broken/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_jacquant_with_no_new_estimate_leaves_the_training_stream_untouched(tmp_path: Path) -> None:
    """beta = 0 keeps B = 1: dropout, data and losses equal the identity STE's bit for bit (A-T5, dagger)."""
    frozen = surrogates.JacQuant(interval=2, mode="probe", beta=0.0)
    losses = []
    for name, surrogate in (("ste", surrogates.STE()), ("jacquant", frozen)):
        trainer = make_trainer(tmp_path / name, surrogate, dropout=0.1, save_strategy="no")
        trainer.train()
        losses.append([row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row])
    assert losses[0] == losses[1]


def test_refresh_happens_every_interval_and_the_gain_is_constant_between(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            layer = next(iter(owned_layers(kwargs["model"])))[1]
            seen.append(layer.state()["gain"].clone())

    make_trainer(tmp_path, surrogates.JacQuant(interval=3), callbacks=[Watch()], save_strategy="no").train()
    changes = [i for i in range(1, len(seen)) if not torch.equal(seen[i], seen[i - 1])]
    assert changes == [3, 6]  # before steps 4 and 7, that is after steps 3 and 6


def test_ranks_agree_on_the_estimators_stream() -> None:
    a, b = refresh_generator(1, "x", 100), refresh_generator(1, "x", 100)
    assert torch.equal(torch.randn(5, generator=a), torch.randn(5, generator=b))
    c = refresh_generator(1, "x", 200)
    assert not torch.equal(torch.randn(5, generator=a), torch.randn(5, generator=c))


def test_update_mode_multiplies_the_optimizers_step(tmp_path: Path) -> None:
    """apply='update' with gain 0 freezes the latent weights under AdamW; apply='grad' with a small gain does not."""
    for apply, frozen in (("update", True), ("grad", False)):
        trainer = make_trainer(tmp_path / apply, surrogates.JacQuant(apply=apply, interval=1000), save_strategy="no")
        layers = [layer for _, layer in owned_layers(trainer.model)]
        for layer in layers:
            layer.state()["gain"].fill_(0.0 if apply == "update" else 1e-3)
        before = [layer.weight.detach().clone() for layer in layers]
        trainer.train()
        same = all(torch.equal(layer.weight, w) for layer, w in zip(layers, before, strict=True))
        assert same is frozen


def test_telemetry_counts_what_changed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, surrogates.JacQuant(interval=4), learning_rate=3e-3, save_strategy="no")
    start = {name: layer.qtensor().codes for name, layer in owned_layers(trainer.model)}
    trainer.args.max_steps = 4
    trainer.train()
    row = next(r for r in read_metrics(tmp_path / "metrics.jsonl") if "layers" in r)
    for name, layer in owned_layers(trainer.model):
        rate = (layer.qtensor().codes != start[name]).float().mean().item()
        assert row["layers"][name]["flip_rate"] == pytest.approx(rate)
        assert 0 < rate < 1
        assert row["layers"][name]["gain_mean"] <= 1
    assert "qat/zero_share" in row


def test_parameter_groups() -> None:
    model = tiny_llama(tie=True)
    prepare(model, Rule(scheme="W2A16G32"))
    groups = {
        g["name"]: g
        for g in parameter_groups(model, learning_rate=1.0, scale_learning_rate=2.0, rest_learning_rate=3.0)
    }
    assert {k: g["lr"] for k, g in groups.items()} == {"latent": 1.0, "scale": 2.0, "rest": 3.0, "rest_no_decay": 3.0}
    total = sum(len(g["params"]) for g in groups.values())
    assert total == len(list(model.parameters()))
    assert len(groups["latent"]["params"]) == len(groups["scale"]["params"]) == 14
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to train"):
        parameter_groups(model, learning_rate=1.0, scale_learning_rate=1.0, rest_learning_rate=1.0)
    with pytest.raises(ValueError, match="prepare first"):
        parameter_groups(tiny_llama(), learning_rate=1.0, scale_learning_rate=1.0, rest_learning_rate=1.0)


def test_rest_learning_rate_zero_fixes_the_rest(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, settings=QATSettings(rest_learning_rate=0.0), save_strategy="no")
    before = trainer.model.model.norm.weight.detach().clone()
    trainer.train()
    assert torch.equal(trainer.model.model.norm.weight, before)


def test_gradient_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    losses = []
    for batch, accumulation in ((4, 1), (2, 2)):
        trainer = make_trainer(
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            max_steps=3,
        )
        trainer.train()
        losses.append([r["loss"] for r in read_metrics(tmp_path / str(batch) / "metrics.jsonl") if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_nan_loss_stops_with_step_layer_and_checkpoint(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                kwargs["model"].model.layers[1].mlp.up_proj.weight_scale.data.fill_(float("nan"))

    trainer = make_trainer(tmp_path, callbacks=[Poison()])
    with pytest.raises(TrainingDiverged, match=r"step 6; first non-finite: .*up_proj\.weight_scale.*checkpoint-4"):
        trainer.train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()


def test_a_checkpoint_that_cannot_be_finished_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)

    def full(self: Any, folder: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match=r"could not be written.*No space left"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_wrong_setups_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="prepare"):
        QATTrainer(model, arguments(tmp_path), teacher=copy.deepcopy(model), train_dataset=blocks())
    prepared = prepare(tiny_llama(), Rule(scheme="W2A16G32"))
    with pytest.raises(ValueError, match="no teacher"):
        QATTrainer(prepared, arguments(tmp_path), train_dataset=blocks())
    with pytest.raises(ValueError, match="share tensors"):
        QATTrainer(prepared, arguments(tmp_path), teacher=prepared, train_dataset=blocks())
    with pytest.raises(ValueError, match="scale_learning_rate"):
        QATSettings(scale_learning_rate=-1)
    with pytest.raises(ValueError, match="telemetry_interval"):
        QATCallback(telemetry_interval=0)


def test_the_callback_works_in_somebody_elses_trainer(tmp_path: Path) -> None:
    model = prepare(tiny_llama(), Rule(scheme="W1A16G32", surrogate=surrogates.JacQuant(interval=2, beta=1.0)))
    callback = QATCallback(tmp_path / "metrics.jsonl")
    Trainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=blocks(), callbacks=[callback]).train()
    assert callback.last
    gains = [values["gain_mean"] for values in callback.last.values()]
    assert all(0.3 < g < 0.9 for g in gains)  # a Gaussian row has 57 % of its weights within the levels of sign


def test_training_improves_the_quantized_model(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        settings=QATSettings(objective=Objective(cross_entropy=1.0, kl=0.0)),
        max_steps=40,
        learning_rate=3e-3,
        save_strategy="no",
    )
    trainer.train()
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_metrics_file_drops_later_and_torn_lines(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        file.write(step, {"loss": step, "train_runtime": 9.0})
    with file.path.open("a") as handle:
        handle.write('{"step": 2, "lo')
    file.resume_at(2)
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2},
    ]
    with pytest.raises(ValueError, match="does not exist"):
        read_metrics(tmp_path / "none.jsonl")
