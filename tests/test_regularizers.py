"""Feature distillation, feature perturbation and consistency: closed forms, limits, and the trainer around them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from arena_common import write_checkpoint
from test_training import Interrupt, arguments, blocks
from torch import Tensor

from fewbits import Rule, prepare
from fewbits.objectives import Objective, feature_distance, standardize
from fewbits.pipeline import run
from fewbits.recipe import Recipe
from fewbits.testing.tiny import tiny_llama, toy_blocks
from fewbits.training import QATSettings, QATTrainer
from fewbits.training.activation_noise import ActivationNoise, perturbed
from fewbits.training.consistency import Consistency, token_dropout
from fewbits.training.metrics import read_metrics


def make_trainer(folder: Path, objective: Objective, *, noise: float = 0.0, **more: Any) -> QATTrainer:
    model = tiny_llama()
    teacher = copy.deepcopy(model)
    prepare(model, Rule(scheme="W2A16G32", surrogate="clipped_ste"))
    settings = QATSettings(objective=objective, telemetry_interval=3, activation_noise=noise)
    callbacks = more.pop("callbacks", None)
    return QATTrainer(
        model,
        arguments(folder, **more),
        teacher=teacher,
        settings=settings,
        train_dataset=blocks(),
        callbacks=callbacks,
    )


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


# feature distillation


def _labels(n: int) -> Tensor:
    return torch.zeros(1, n, dtype=torch.long)


def test_feature_distance_is_twice_one_minus_the_correlation() -> None:
    torch.manual_seed(0)
    z, t = torch.randn(1, 50, 7, dtype=torch.float64), torch.randn(1, 50, 7, dtype=torch.float64)
    rho = [float(torch.corrcoef(torch.stack([z[0, :, c], t[0, :, c]]))[0, 1]) for c in range(7)]
    expected = sum(2 * (1 - r) for r in rho) / 7
    value = feature_distance([1e4 * z], [1e4 * t], _labels(50), [0])  # far above epsilon
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_feature_distance_does_not_see_increasing_affine_maps_of_a_channel() -> None:
    torch.manual_seed(1)
    z = 1e3 * torch.randn(2, 9, 5, dtype=torch.float64)
    a, b = torch.rand(5, dtype=torch.float64) + 0.5, torch.randn(5, dtype=torch.float64)
    assert feature_distance([a * z + b], [z], torch.zeros(2, 9), [0]).item() < 1e-12
    assert feature_distance([-z], [z], torch.zeros(2, 9), [0]).item() == pytest.approx(4, rel=1e-6)
    assert feature_distance([z], [z], torch.zeros(2, 9), [0]).item() == 0


def test_feature_distance_leaves_out_masked_tokens_and_the_embedding() -> None:
    torch.manual_seed(2)
    z, t = torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    labels = torch.tensor([[-100, -100, 1, 1, 1, 1]])
    cut = feature_distance([z[:, 2:]], [t[:, 2:]], _labels(4), [0])
    assert torch.equal(feature_distance([z], [t], labels, [0]), cut)
    other = torch.randn(1, 6, 4)
    assert torch.equal(feature_distance([other, z], [z, t], labels), cut)
    assert torch.equal(feature_distance([other, z], [z, t], labels, [-1]), cut)


def test_standardized_channels_have_mean_0_and_variance_1_and_constants_are_0() -> None:
    torch.manual_seed(3)
    z = 50 * torch.randn(200, 3) + 7
    z[:, 2] = 3.0
    n = standardize(z)
    torch.testing.assert_close(n.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(n.var(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=1e-4)


def test_feature_distance_gives_no_gradient_to_the_teacher() -> None:
    z, t = torch.randn(1, 6, 4, requires_grad=True), torch.randn(1, 6, 4, requires_grad=True)
    feature_distance([z], [t], _labels(6), [0]).backward()
    assert t.grad is None
    assert z.grad is not None
    assert float(z.grad.abs().max()) > 0


# feature perturbation


def test_noise_of_one_step_regularizes_by_the_trace() -> None:
    """methods.md 6: E L(x + d) - L(x) = s^2 / 24 tr H; H = diag(1, 2, 5), s = .3: .0300; and Var d = s^2 / 12."""
    torch.manual_seed(0)
    h = torch.tensor([1.0, 2.0, 5.0, 0.0])
    x = torch.tensor([0.1, -0.2, 0.15, 0.3 * 7]).expand(400_000, 4)  # 4 bits: the largest entry makes the step .3
    moved = perturbed(x, 4)
    delta = moved - x
    assert float(delta.abs().max()) <= 0.15 + 1e-6
    assert float(delta.var()) == pytest.approx(0.09 / 12, rel=5e-3)
    gain = 0.5 * (h * moved**2).sum(-1) - 0.5 * (h * x**2).sum(-1)
    error = 4 * float(gain.std()) / 400_000**0.5
    assert float(gain.mean()) == pytest.approx(0.03, abs=error)
    assert error < 2e-3


def test_perturbation_is_off_in_eval_mode_and_at_probability_0() -> None:
    ids = toy_blocks(2, 16)
    model = prepare(tiny_llama(), Rule(scheme="W2G32"))
    clean = model(input_ids=ids).logits
    assert ActivationNoise(0.0).attach(model) == []
    handles = ActivationNoise(1.0).attach(model)
    assert len(handles) == 14
    assert torch.equal(model(input_ids=ids).logits, clean)
    model.train()
    noisy = model(input_ids=ids).logits
    assert not torch.equal(noisy, clean)
    assert not torch.equal(noisy, model(input_ids=ids).logits)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(input_ids=ids).logits, clean)


def test_a_share_of_the_layers_is_perturbed() -> None:
    torch.manual_seed(0)
    layer = prepare(torch.nn.Sequential(torch.nn.Linear(64, 4)), Rule(scheme="W2G32")).train()
    x = torch.ones(1, 64)
    clean = layer(x)
    ActivationNoise(0.25).attach(layer)
    hits = sum(not torch.equal(layer(x), clean) for _ in range(800))
    assert hits == pytest.approx(200, abs=4 * (800 * 0.25 * 0.75) ** 0.5)


# consistency


def test_equal_views_of_equal_models_agree_exactly() -> None:
    model = prepare(tiny_llama(), Rule(scheme="W2G32")).train()
    ids = toy_blocks(2, 16)
    term = Consistency(decay=0.0, dropout=0.0)
    term.ema.start(model)
    loss = term.loss(model, {"input_ids": ids}, ids)
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in model.parameters())
    assert model.training


def test_the_copy_is_quantized_slow_and_gets_no_gradient() -> None:
    """The loss is the divergence from a model that holds the mean, and its gradient is the student's alone."""
    model = prepare(tiny_llama(), Rule(scheme="W2G32")).train()
    ids = toy_blocks(2, 16)
    term = Consistency(decay=0.5, dropout=0.0)
    term.ema.start(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p).abs() * p.abs().mean())
    term.ema.update(model)
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.lerp_(q, 0.5)
    loss = term.loss(model, {"input_ids": ids}, ids)
    teacher = other.eval()(input_ids=ids).logits[:, :-1].log_softmax(-1)
    student = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    assert loss.item() > 1e-4
    (own,) = torch.autograd.grad(loss, model.lm_head.weight)
    p, q = student.exp(), teacher.exp().detach()
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    by_hand = torch.einsum("btv,btd->vd", (p - q) / p[..., 0].numel(), hidden)
    torch.testing.assert_close(own, by_hand, rtol=1e-4, atol=1e-6)


def test_token_dropout_drops_a_share_and_leaves_no_hook() -> None:
    torch.manual_seed(0)
    model = tiny_llama()
    ids = toy_blocks(64, 32)
    with token_dropout(model, 0.25):
        rows = model.get_input_embeddings()(ids)
    dropped = (rows == 0).all(-1)
    assert int(dropped.sum()) == pytest.approx(512, abs=4 * (2048 * 0.25 * 0.75) ** 0.5)
    clean = model.get_input_embeddings()(ids)
    assert torch.equal(rows[~dropped], clean[~dropped])
    state = torch.get_rng_state()
    with token_dropout(model, 0.0):
        assert torch.equal(model.get_input_embeddings()(ids), clean)
    assert torch.equal(torch.get_rng_state(), state)


# the trainer


def test_weights_of_zero_are_the_old_training_bit_for_bit(tmp_path: Path) -> None:
    """Whatever else the terms are set to, at weight 0 nothing is computed or drawn."""
    zero = Objective(features=0.0, feature_layers=(1,), consistency=0.0, consistency_decay=0.5)
    runs = []
    for name, objective in (("plain", Objective()), ("zero", zero)):
        trainer = make_trainer(tmp_path / name, objective, save_strategy="no")
        trainer.train()
        runs.append((losses(tmp_path / name), trainer.model.state_dict(), torch.get_rng_state()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    assert torch.equal(runs[0][2], runs[1][2])


@pytest.mark.parametrize(
    ("objective", "noise"),
    [(Objective(features=1.0), 0.5), (Objective(consistency=1.0, consistency_decay=0.9, cross_entropy=0.1), 0.0)],
    ids=["fpq", "consistency"],
)
def test_resume_is_bit_identical_and_the_term_matters(tmp_path: Path, objective: Objective, noise: float) -> None:
    whole = make_trainer(tmp_path / "whole", objective, noise=noise)
    whole.train()
    broken = make_trainer(tmp_path / "broken", objective, noise=noise, callbacks=[Interrupt(6)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", objective, noise=noise)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    plain = make_trainer(tmp_path / "plain", Objective(cross_entropy=objective.cross_entropy), save_strategy="no")
    plain.train()
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")


def test_features_bring_hidden_states_closer(tmp_path: Path) -> None:
    ids = torch.stack([blocks()[i]["input_ids"] for i in range(8)])
    distance = {}
    for weight in (0.0, 3.0):
        trainer = make_trainer(
            tmp_path / str(weight), Objective(features=weight), save_strategy="no", max_steps=40, learning_rate=3e-3
        )
        trainer.train()
        trainer.model.eval()
        with torch.no_grad():
            states = [
                m(input_ids=ids, output_hidden_states=True).hidden_states for m in (trainer.model, trainer.teacher)
            ]
        distance[weight] = float(feature_distance(*states, ids))
    assert distance[3.0] < 0.8 * distance[0.0]


def test_sqakd_is_the_plain_divergence_with_temperature_and_ewgs() -> None:
    """gamma = 0, alpha = 1, beta = 0, T = 4: dL/dz = T (p_s - p_t) / tokens, and no label is read."""
    recipe = Recipe.load("sqakd")
    assert recipe.rules[0].build().surrogate.name == "ewgs"
    objective = recipe.objective.build()
    z, t = torch.randn(1, 5, 9, requires_grad=True), torch.randn(1, 5, 9)
    loss = objective(z, torch.randint(0, 9, (1, 5)), t)
    assert torch.equal(loss, objective(z, torch.randint(0, 9, (1, 5)), t))
    loss.backward()
    expected = 4 * ((z / 4).softmax(-1) - (t / 4).softmax(-1))[:, :-1] / 4
    assert z.grad is not None
    torch.testing.assert_close(z.grad[:, :-1], expected.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["fpq", "consistency", "sqakd"])
def test_shipped_recipes_run_a_few_steps(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path)
    small = [
        f"model={tmp_path / 'model'}", "rules.0.scheme=W2A16G32", "data.source=text",
        f"data.path={tmp_path / 'text.txt'}", "data.block_size=32", "data.eval_tokens=256", "data.max_tokens=4000",
        "train.max_steps=3", "train.warmup_steps=1",
    ]  # fmt: skip
    result = run(Recipe.load(name, small), tmp_path / "run", quiet=True)
    assert result.scores["qat"].loss != result.scores["rtn"].loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(features=-1.0), "features=-1.0 must be"),
        (lambda: Objective(consistency=float("inf")), "finite"),
        (lambda: Objective(consistency_decay=1.0), "outside"),
        (lambda: Objective(feature_layers=()), "feature_layers is empty"),
        (lambda: ActivationNoise(1.5), "outside"),
        (lambda: ActivationNoise(0.5, 1), "use 2 to 16"),
        (lambda: Consistency(dropout=1.0), "outside"),
        (lambda: feature_distance([torch.zeros(1, 2, 3)], [], _labels(2)), "1 hidden states, the teacher 0"),
        (lambda: feature_distance([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 3)], _labels(2), [1]), "does not exist"),
        (lambda: feature_distance([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 4)], _labels(2), [0]), "teacher's"),
    ],
)
def test_values_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
