"""Optimizers of latent weights: composition, resume, schedule-free's two modes, and the arena's rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from arena_common import write_checkpoint
from test_training import Interrupt, arguments, blocks
from torch import nn
from transformers import TrainerCallback

from fewbits import Rule, prepare, surrogates
from fewbits.arena import ArenaSettings
from fewbits.arena.cells import Cell, fingerprint
from fewbits.arena.shared import Start
from fewbits.checkpoint import load_prepared
from fewbits.convert import owned_layers
from fewbits.evaluate import EvalResult, evaluate
from fewbits.optim import Combined, build_optimizer
from fewbits.pipeline import load_blocks, run
from fewbits.recipe import Recipe
from fewbits.testing.tiny import tiny_llama
from fewbits.training import QATSettings, QATTrainer

SGD = {"optim": "sgd", "optim_options": {"momentum": 0.9}}
CHOICES: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch", "optim_options": {"betas": [0.9, 0.99]}},
    "sgd": SGD,
    "sgd_and_adamw": {**SGD, "rest_optim": "adamw_torch"},
    "lion": {"optim": "lion"},
    "muon": {"optim": "muon", "optim_options": {"ns_steps": 3}},
    "schedule_free": {"optim": "schedule_free_adamw"},
}
every_choice = pytest.mark.parametrize("choice", CHOICES)


def make_trainer(folder: Path, choice: str, rule: dict[str, Any] | None = None, **more: Any) -> QATTrainer:
    model = tiny_llama()
    teacher = copy.deepcopy(model)
    prepare(model, Rule(scheme="W2A16G32", **(rule or {"surrogate": "clipped_ste"})))
    more = {"lr_scheduler_type": "constant" if choice == "schedule_free" else "cosine", "warmup_steps": 2, **more}
    settings = QATSettings(scale_learning_rate=5e-4, telemetry_interval=3, **CHOICES[choice])
    extra = {key: more.pop(key) for key in ("callbacks", "eval_dataset") if key in more}
    return QATTrainer(
        model,
        arguments(folder, **more),
        teacher=teacher,
        settings=settings,
        train_dataset=blocks(),
        **extra,
    )


UPDATE: dict[str, Any] = {"surrogate": surrogates.JacQuant(interval=3, group_size=32, apply="update"), "drive": "winq"}
GRADIENT: dict[str, Any] = {"surrogate": surrogates.JacQuant(interval=3, group_size=32)}


@every_choice
def test_resume_is_bit_identical(tmp_path: Path, choice: str) -> None:
    rule = GRADIENT if choice == "schedule_free" else UPDATE
    whole = make_trainer(tmp_path / "whole", choice, rule)
    start = copy.deepcopy(whole.model.state_dict())
    whole.train()
    broken = make_trainer(tmp_path / "broken", choice, rule, callbacks=[Interrupt(6)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", choice, rule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert (tmp_path / "broken/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    trained = [name for name, p in whole.model.named_parameters() if p.requires_grad]
    assert all(not torch.equal(start[name], a[name]) for name in trained if "embed" not in name)


@pytest.mark.parametrize("choice", [c for c in CHOICES if c != "schedule_free"])
def test_a_gain_of_zero_on_the_update_freezes_latent_weights_only(tmp_path: Path, choice: str) -> None:
    rule = {"surrogate": surrogates.JacQuant(apply="update", interval=1000)}
    trainer = make_trainer(tmp_path, choice, rule, save_strategy="no", max_steps=3)
    layers = [layer for _, layer in owned_layers(trainer.model)]
    for layer in layers:
        layer.state()["gain"].zero_()
    before = [layer.weight.detach().clone() for layer in layers]
    scales = [layer.raw_scale().detach().clone() for layer in layers]
    trainer.train()
    assert all(torch.equal(layer.weight, w) for layer, w in zip(layers, before, strict=True))
    assert not any(torch.equal(layer.raw_scale(), s) for layer, s in zip(layers, scales, strict=True))


def test_two_optimizers_as_one_are_the_two_bit_for_bit() -> None:
    def pair(layer: nn.Linear) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([layer.weight], lr=0.1, momentum=0.9), torch.optim.AdamW([layer.bias], lr=0.01)]

    torch.manual_seed(0)
    alone = nn.Linear(5, 3)
    joined, again = copy.deepcopy(alone), copy.deepcopy(alone)
    apart, both, restored = pair(alone), Combined(pair(joined)), Combined(pair(again))
    schedule = torch.optim.lr_scheduler.StepLR(both, step_size=2, gamma=0.5)
    for step in range(6):
        x = torch.randn(4, 5)
        if step == 3:  # a fresh pair takes over from the state of the first
            again.load_state_dict(joined.state_dict())
            restored.load_state_dict(copy.deepcopy(both.state_dict()))
        runs = [(alone, apart), (joined, [both])] + ([(again, [restored])] if step >= 3 else [])
        for layer, optimizers in runs:
            layer.zero_grad()
            layer(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        schedule.step()
        for optimizer in (*apart, restored):
            for group, same in zip(
                optimizer.param_groups,
                both.param_groups if optimizer is restored else both.param_groups[apart.index(optimizer) :],
                strict=False,
            ):
                group["lr"] = same["lr"]
    for other in (joined, again):
        assert torch.equal(alone.weight, other.weight)
        assert torch.equal(alone.bias, other.bias)
    with pytest.raises(ValueError, match="at least one"):
        Combined([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Combined([torch.optim.SGD([alone.weight]), torch.optim.SGD([alone.weight])])


def test_muon_gets_matrices_of_linear_layers_and_adamw_everything_else(tmp_path: Path) -> None:
    model = tiny_llama(tie=True)
    prepare(model, [Rule(pattern="model.embed_tokens", scheme="W4G32", embeddings=True), Rule(scheme="W2G32")])
    args = arguments(tmp_path, weight_decay=0.01)
    optimizer = build_optimizer("muon", model, args, scale_learning_rate=1e-4)
    assert isinstance(optimizer, Combined)
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    mine = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert mine == {f"{name}.weight" for name, _ in owned_layers(model) if "embed" not in name}
    assert [group["name"] for group in adamw.param_groups] == ["latent_embedding", "scale", "rest_no_decay"]
    assert [group["lr"] for group in adamw.param_groups] == [1e-3, 1e-4, 1e-3]
    total = sum(len(group["params"]) for group in optimizer.param_groups)
    assert total == len(list(model.parameters()))


def test_muons_first_step_has_adamws_size_and_equal_singular_values(tmp_path: Path) -> None:
    """The orthogonalized step has RMS .2 lr, like AdamW's in steady state (AdamW's first step has RMS lr)."""
    trainer = make_trainer(tmp_path, "muon", save_strategy="no", max_steps=1, warmup_steps=0, weight_decay=0.0)
    layer = trainer.model.model.layers[0].mlp.down_proj
    before = layer.weight.detach().clone()
    trainer.train()
    step = (layer.weight.detach() - before) / 1e-3
    assert 0.1 < float(step.square().mean().sqrt()) < 0.3
    values = torch.linalg.svdvals(step / (0.2 * max(step.shape) ** 0.5))
    assert float(values.min()) > 0.05
    assert float(values.max()) < 1.5  # three Newton-Schulz steps; five bring them to .7 ... 1.2


class Sequences(TrainerCallback):
    """Keeps the iterate z and the trained point y after every step."""

    def __init__(self) -> None:
        self.z: list[torch.Tensor] = []
        self.y: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        p = kwargs["model"].model.layers[0].mlp.up_proj.weight
        optimizer = kwargs["optimizer"].optimizer
        self.z.append(optimizer.state[p]["z"].double().clone())
        self.y.append(p.detach().double().clone())
        self.beta = optimizer.param_groups[0]["betas"][0]


def test_schedule_free_evaluates_and_ships_the_weighted_mean_of_its_iterates(tmp_path: Path) -> None:
    r"""x = sum r_t^2 z_t / sum r_t^2 with r_t the largest rate so far, and y = (1 - beta) z + beta x while training."""
    seen = Sequences()
    trainer = make_trainer(tmp_path, "schedule_free", save_strategy="no", callbacks=[seen], max_steps=6)
    trainer.train()
    weights = [min(1.0, (t + 1) / 2) ** 2 for t in range(6)]
    x = sum(w * z for w, z in zip(weights, seen.z, strict=True)) / sum(weights)
    p = trainer.model.model.layers[0].mlp.up_proj.weight
    assert torch.allclose(p.double(), x, rtol=0, atol=2e-6)  # fp32 steps against a float64 sum
    y = (1 - seen.beta) * seen.z[-1] + seen.beta * x
    assert torch.allclose(seen.y[-1], y, rtol=0, atol=2e-6)
    assert not torch.allclose(p.double(), seen.y[-1], rtol=0, atol=1e-5)
    # evaluation in the middle switches to x and back
    more: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 6, "eval_dataset": blocks()}
    other = make_trainer(tmp_path / "b", "schedule_free", save_strategy="no", max_steps=6, **more)
    other.train()
    row = next(r for r in other.state.log_history if "eval_loss" in r)
    assert row["eval_loss"] == other.evaluate()["eval_loss"]


def test_a_schedule_free_run_ships_what_it_evaluated(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    text = f"model: {tmp_path / 'model'}\nrules: [{{scheme: W2G32, surrogate: clipped_ste}}]\n"
    text += f"data: {{source: text, path: {tmp_path / 'text.txt'}, block_size: 32, eval_tokens: 256}}\n"
    text += "train: {optim: schedule_free_adamw, lr_scheduler_type: constant, max_steps: 4, warmup_steps: 1}"
    recipe = Recipe.parse(text)
    result = run(recipe, tmp_path / "run", quiet=True)
    shipped, tokenizer = load_prepared(tmp_path / "run" / "model")
    a, b = result.model.state_dict(), shipped.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    _, valid = load_blocks(recipe.data, tokenizer, shipped, 0)
    assert evaluate(shipped, valid).loss == result.scores["qat"].loss


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ({}, {"name": "muon", "options": {"beta": 1}}, "has no option 'beta'; options: adjust_lr_fn"),
        ({}, {"name": "sgd", "options": {"lr": 1}}, "has no option 'lr'"),
        (UPDATE, {"name": "schedule_free_adamw"}, "apply='update' cannot go with"),
        ({"drive": "cage"}, {"name": "schedule_free_adamw"}, "the drive 'cage' pulls"),
        ({}, {"name": "schedule_free_adamw", "rest_optim": "adamw_torch"}, "works alone"),
        ({}, {"name": "muon", "rest_optim": "schedule_free_adamw"}, "works alone"),
    ],
)
def test_what_cannot_go_together_is_refused(
    tmp_path: Path, rule: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model = prepare(tiny_llama(), Rule(scheme="W2G32", **rule))
    with pytest.raises(ValueError, match=message):
        build_optimizer(options.pop("name"), model, arguments(tmp_path), **options)


def test_muon_without_a_matrix_is_refused(tmp_path: Path) -> None:
    model = prepare(tiny_llama(), Rule(pattern="model.embed_tokens", scheme="W4G32", embeddings=True))
    with pytest.raises(ValueError, match="nothing to move"):
        build_optimizer("muon", model, arguments(tmp_path))


def test_recipes_check_optimizers_at_birth() -> None:
    with pytest.raises(ValueError, match=r"optimizer 'moun' is unknown; did you mean muon\? use one of muon, lion"):
        Recipe.parse("train: {optim: moun}")
    with pytest.raises(ValueError, match="lr_scheduler_type='constant'"):
        Recipe.parse("train: {optim: schedule_free_adamw}")
    with pytest.raises(ValueError, match="unknown"):
        QATSettings(rest_optim="adam")


def _start() -> Start:
    score = EvalResult(loss=1.0, perplexity=2.0, bits_per_byte=3.0, num_tokens=4, versions={})
    return Start(text_digest="t" * 64, model_digest="m" * 64, train_tokens=1000, tuning=score, report=score)


@pytest.mark.parametrize(
    ("method", "rate", "golden"),
    [
        ("jacquant_update", 6e-4, "7db20179b7a01e7476ca648226bea12d11f5ba64f1c9f0212b345451f1f7b679"),
        ("winq", 6e-4, "6eb62b32dc06b109d72ffded9a3436888c5df15af9b23044332d74d77cf9957f"),
        ("paretoq_ce", 6e-4, "bb1171567098159a158ba2713cab4ec3e40adec9abe08ed6e8b7c42a8d99e27d"),
        ("rtn", None, "c5eeb5929360b87a8e6374c72e4b349d4a0cef8939c1ea719bb4438a5c070fa9"),
    ],
)
def test_fingerprints_of_cells_that_were_measured_do_not_change(method: str, rate: float | None, golden: str) -> None:
    """Goldens were computed at commit 5f34dfa, before the recipe had any of the fields that came later."""
    cell = Cell(scheme="W2G64", method=method, learning_rate=rate, seed=1)
    assert fingerprint(ArenaSettings(methods=(method,)), cell, _start()) == golden


def test_a_young_field_counts_where_it_is_set() -> None:
    cell = Cell(scheme="W2G64", method="clipped_ste", learning_rate=6e-4, seed=1)
    plain = ArenaSettings(methods=("clipped_ste",))
    changed = ArenaSettings(methods=("clipped_ste",), overrides=("train.rest_optim=adamw_torch",))
    assert fingerprint(plain, cell, _start()) != fingerprint(changed, cell, _start())


def test_rows_with_another_step_size_state_a_multiple_of_the_common_rate() -> None:
    settings = ArenaSettings(schemes=("W2G64",))
    sgd = settings.recipe("W2G64", "jacquant_sgd", 2e-4, 0).train
    assert (sgd.learning_rate, sgd.scale_learning_rate, sgd.rest_learning_rate) == (2e-4 * 30, 2e-4, 2e-4)
    muon = settings.recipe("W2G64", "jacquant_muon", 2e-4, 0).train
    assert (muon.optim, muon.learning_rate, muon.scale_learning_rate) == ("muon", 2e-4, None)
    assert settings.recipe("W2G64", "lion", 1e-3, 0).train.learning_rate == pytest.approx(3e-4)
