"""Weight averages and the best deployed iterate: closed forms, resume, and equality of what is scored and shipped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from arena_common import write_checkpoint
from test_training import Interrupt, arguments, blocks
from torch import nn

from fewbits import Rule, convert, prepare
from fewbits.checkpoint import load_model, load_prepared
from fewbits.evaluate import evaluate
from fewbits.pipeline import hold_out_best, load_blocks, run
from fewbits.recipe import Recipe
from fewbits.testing.tiny import tiny_llama
from fewbits.training import KeepBest, QATSettings, QATTrainer, WeightEMA
from fewbits.training.averaging import deployed
from fewbits.training.metrics import read_metrics


def make_trainer(folder: Path, *, best: bool = False, **more: Any) -> QATTrainer:
    model = tiny_llama()
    teacher = copy.deepcopy(model)
    prepare(model, Rule(scheme="W2A16G32", surrogate="clipped_ste"))
    names = ("optim", "ema_decay", "keep_best_interval")
    settings = QATSettings(telemetry_interval=3, **{name: more.pop(name) for name in names if name in more})
    callbacks = more.pop("callbacks", None)
    train, held = blocks().split(0.1)
    return QATTrainer(
        model,
        arguments(folder, **more),
        teacher=teacher,
        settings=settings,
        best_blocks=held if best else None,
        train_dataset=train,
        callbacks=callbacks,
    )


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def best_rows(folder: Path) -> dict[int, float]:
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row["keep_best/loss"] for row in rows if "keep_best/loss" in row}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_mean_has_its_closed_form(decay: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    thetas = [layer.weight.detach().clone()]
    ema = WeightEMA(decay)
    ema.start(layer)
    for _ in range(7):
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight))
        ema.update(layer)
        thetas.append(layer.weight.detach().clone())
    t = len(thetas) - 1
    closed = sum((1 - decay) * decay**k * thetas[t - k] for k in range(t)) + decay**t * thetas[0]
    with ema.swapped(layer):
        assert torch.allclose(layer.weight, closed, rtol=0, atol=1e-14)  # float64 sums in another order
    assert torch.equal(layer.weight, thetas[-1])
    if decay == 0:
        ema.copy_to_(layer)
        assert torch.equal(layer.weight, thetas[-1])


def test_half_precision_weights_are_averaged_in_fp32() -> None:
    """At decay .999 a bf16 mean would never move: the step is below half a unit in the last place."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(layer.weight, 1.0)
    ema = WeightEMA(0.999)
    ema.start(layer)
    nn.init.constant_(layer.weight, 2.0)
    for _ in range(100):
        ema.update(layer)
    assert float(ema.mean["weight"]) == pytest.approx(2 - 0.999**100, rel=1e-5)


def test_an_average_changes_the_result_and_not_the_training(tmp_path: Path) -> None:
    runs = {}
    for name, decay in (("none", None), ("zero", 0.0), ("mean", 0.9)):
        trainer = make_trainer(tmp_path / name, ema_decay=decay, save_strategy="no")
        trainer.train()
        runs[name] = trainer.model.state_dict()
    assert losses(tmp_path / "none") == losses(tmp_path / "zero") == losses(tmp_path / "mean")
    assert all(torch.equal(runs["none"][k], runs["zero"][k]) for k in runs["none"])
    assert not torch.equal(runs["none"]["lm_head.weight"], runs["mean"]["lm_head.weight"])
    name = "model.layers.0.mlp.up_proj.weight_scale"
    assert not torch.equal(runs["none"][name], runs["mean"][name])


SCHEDULE_FREE: dict[str, Any] = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "best": True}


@pytest.mark.parametrize(
    "more", [{"ema_decay": 0.9}, {"ema_decay": 0.8, "best": True}, SCHEDULE_FREE], ids=["ema", "ema_best", "free_best"]
)
def test_resume_is_bit_identical(tmp_path: Path, more: dict[str, Any]) -> None:
    more = {**more, "learning_rate": 3e-3, "keep_best_interval": 2}
    whole = make_trainer(tmp_path / "whole", **more)
    whole.train()
    broken = make_trainer(tmp_path / "broken", **more, callbacks=[Interrupt(7)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert (tmp_path / "broken/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.7}, SCHEDULE_FREE], ids=["last", "ema", "free"])
def test_looking_does_not_change_training_and_the_best_is_what_is_left(tmp_path: Path, more: dict[str, Any]) -> None:
    more = {key: value for key, value in more.items() if key != "best"}
    more |= {"save_strategy": "no", "learning_rate": 1e-2, "keep_best_interval": 1}
    plain = make_trainer(tmp_path / "plain", **more)
    plain.train()
    trainer = make_trainer(tmp_path / "best", best=True, **more)
    trainer.train()
    assert losses(tmp_path / "plain") == losses(tmp_path / "best")
    rows = best_rows(tmp_path / "best")
    assert list(rows) == list(range(9))
    keeper = next(c for c in trainer.callback_handler.callbacks if isinstance(c, KeepBest))
    assert keeper.loss == min(rows.values())
    assert rows[keeper.step] == keeper.loss
    assert keeper.score(trainer.model) == keeper.loss  # zero tolerance: what was scored is what is there
    assert keeper.score(convert(copy.deepcopy(trainer.model))) == keeper.loss
    last = rows[8]
    plain.model.eval()
    assert keeper.score(plain.model) == last  # the last look saw exactly what would have shipped without keep_best


def test_training_that_only_harms_is_undone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, best=True, save_strategy="no", learning_rate=1.0, max_grad_norm=0.0, max_steps=3)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in start.items())
    assert best_rows(tmp_path)[0] < best_rows(tmp_path)[3]


def test_deployed_comes_back_even_if_scoring_fails() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    ema = WeightEMA(0.5)
    ema.start(layer)
    ema.mean["weight"] += 1

    def fail() -> None:
        with deployed(layer, None, ema):
            assert torch.equal(layer.weight, before + 1)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("options", ["ema_decay: 0.5", "keep_best: true", "keep_best: true, ema_decay: 0.9"])
def test_a_run_ships_what_it_scored(tmp_path: Path, options: str) -> None:
    write_checkpoint(tmp_path)
    text = f"model: {tmp_path / 'model'}\nrules: [{{scheme: W2G32, surrogate: clipped_ste}}]\n"
    text += f"data: {{source: text, path: {tmp_path / 'text.txt'}, block_size: 32, eval_tokens: 256}}\n"
    text += f"train: {{max_steps: 5, keep_best_interval: 2, keep_best_tokens: 320, learning_rate: 0.01, {options}}}"
    recipe = Recipe.parse(text)
    result = run(recipe, tmp_path / "run", quiet=True)
    shipped, tokenizer = load_prepared(tmp_path / "run" / "model")
    train, valid = load_blocks(recipe.data, tokenizer, shipped, 0)
    assert evaluate(shipped, valid).loss == result.scores["qat"].loss
    kept, best = hold_out_best(recipe, train)
    if "keep_best" not in options:
        assert best is None
        assert kept is train
        return
    assert best is not None
    assert len(best) == 10
    assert len(kept) + 10 == len(train)
    teacher = load_model(str(tmp_path / "model"))
    rows = best_rows(tmp_path / "run")
    assert list(rows) == [0, 2, 4, 5]
    assert evaluate(shipped, best, teacher=teacher).kl_to_teacher == min(rows.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightEMA(1.0), r"decay=1.0 is outside \[0, 1\)"),
        (lambda: QATSettings(ema_decay=-0.1), "outside"),
        (lambda: QATSettings(ema_decay=0.9, optim="schedule_free_adamw"), "has an average already"),
        (lambda: KeepBest(blocks(), interval=0), "at least 1"),
        (lambda: KeepBest(blocks(), kl=1.0), "kl a teacher"),
        (lambda: KeepBest(blocks(), cross_entropy=0.0), "needs a weight"),
        (
            lambda: Recipe.parse("train: {optim: schedule_free_adamw, lr_scheduler_type: constant, ema_decay: 0.9}"),
            "ships an average",
        ),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
