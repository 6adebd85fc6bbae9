"""The zeroth order: statistics of the estimate in closed form, exact return, memory, training and resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from fewbits import Rule, prepare
from fewbits.convert import owned_layers
from fewbits.data import TokenBlocks
from fewbits.objectives import Objective
from fewbits.optim import VarianceReduction
from fewbits.optim.zeroth_order import ZerothOrder, ZerothOrderSGD, gradient_from_dict, lattice_step
from fewbits.recipe import Recipe
from fewbits.testing.memory import peak_bytes
from fewbits.testing.tiny import tiny_llama, toy_blocks
from fewbits.training import QATSettings, QATTrainer, TrainingDiverged

SIGMAS = 4.5
"""Width of the Monte Carlo bands, in standard errors."""


def optimizer_of(w: Tensor, lr: float = 0.1, **options: Any) -> ZerothOrderSGD:
    return ZerothOrderSGD([{"params": [w], "lr": lr}], ZerothOrder(**options), {id(w): "w"})


def estimates(w: nn.Parameter, loss: Any, count: int, **options: Any) -> Tensor:
    """Independent estimates ``(count, d)``; nothing moves."""
    optimizer = optimizer_of(w, lr=0.0, **options)
    found = []
    for _ in range(count):
        optimizer.accumulate(loss)
        found.append(optimizer.gradient("w").double())
        optimizer.step()
    return torch.stack(found)


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("q", [1, 4])
def test_linear_loss_is_unbiased_with_the_variance_of_the_dimension(q: int) -> None:
    r"""E g_hat = g and E|g_hat - g|^2 = (d + 1)/q |g|^2 for L = g w."""
    d, count = 10, 1500
    w = nn.Parameter(torch.zeros(d))
    g = torch.arange(1.0, d + 1)
    found = estimates(w, lambda: g @ w, count, epsilon=0.5, num_directions=q)
    error = (found.mean(0) - g).norm() / g.norm()
    assert error < SIGMAS * math.sqrt((d + 1) / q / count)
    excess = (found - g).square().sum(1) / g.square().sum()
    spread = float(excess.std()) / math.sqrt(count)
    assert abs(float(excess.mean()) - (d + 1) / q) < SIGMAS * spread


def test_quadratic_loss_gives_its_true_gradient() -> None:
    """Smoothing adds a constant to a quadratic, so the smoothed gradient is A w + b whatever epsilon is."""
    a = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]])
    b = torch.tensor([0.1, -0.2, 0.3])
    w = nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))
    truth = (a @ w + b).detach().double()
    found = estimates(w, lambda: 0.5 * w @ a @ w + b @ w, 2500, epsilon=0.25)
    spread = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - truth).abs() < SIGMAS * spread).all())


@pytest.mark.parametrize(("w", "epsilon", "expected"), [(0.2, 0.2, 0.6520), (0.45, 0.1, 3.5207), (0.5, 0.25, 1.5968)])
def test_a_staircase_has_the_gradient_of_its_smoothed_self(w: float, epsilon: float, expected: float) -> None:
    """For L = round(w): sum over k of phi((w - k - 1/2) / eps) / eps (methods.md)."""
    closed = sum(
        math.exp(-0.5 * ((w - k - 0.5) / epsilon) ** 2) / (epsilon * math.sqrt(2 * math.pi)) for k in range(-9, 9)
    )
    assert closed == pytest.approx(expected, abs=6e-5)
    p = nn.Parameter(torch.tensor([w]))
    found = estimates(p, lambda: p.round().sum(), 2500, epsilon=epsilon)
    assert abs(float(found.mean()) - closed) < SIGMAS * float(found.std()) / math.sqrt(len(found))


def test_even_terms_cancel_exactly_in_every_pair() -> None:
    w = nn.Parameter(torch.zeros(7))
    assert not estimates(w, lambda: w.square().sum() + w.pow(4).sum() + 3, 5, epsilon=0.3).any()


def test_inside_a_cell_there_is_no_gradient() -> None:
    w = nn.Parameter(torch.full((20,), 0.2))
    assert not estimates(w, lambda: w.round().sum(), 5, epsilon=1e-3).any()


def test_two_sizes_of_perturbation_estimate_one_gradient() -> None:
    w, s = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))
    groups = [{"params": [w], "lr": 0.0, "name": "latent"}, {"params": [s], "lr": 0.0, "name": "scale"}]
    settings = ZerothOrder(epsilon=0.1, scale_epsilon=0.01)
    optimizer = ZerothOrderSGD(groups, settings, {id(w): "w", id(s): "s"})
    g, h = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([20.0, -10.0])
    found: dict[str, list[Tensor]] = {"w": [], "s": []}
    for _ in range(1500):
        optimizer.accumulate(lambda: g @ w + h @ s)
        for name, values in found.items():
            values.append(optimizer.gradient(name).double())
        optimizer.step()
    for name, truth in (("w", g), ("s", h)):
        values = torch.stack(found[name])
        spread = values.std(0) / math.sqrt(len(values))
        assert bool(((values.mean(0) - truth).abs() < SIGMAS * spread).all())


# ------------------------------------------------------------------------------------------------------ exact and small


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-3, 1.0, 30.0])
def test_weights_come_back_bit_for_bit(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(size * torch.randn(70_000, generator=generator) * torch.rand(70_000, generator=generator) ** 9)
    start = w.detach().clone()
    optimizer = optimizer_of(w, num_directions=3)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(w.detach().clone())
        return w.sum()

    optimizer.accumulate(loss)
    first = w.detach().clone()
    h = lattice_step(first, 1e-3)
    assert bool(((first - start).abs() <= h / 2).all())  # the first time they are put on the lattice
    for _ in range(3):
        optimizer.accumulate(loss)
        assert torch.equal(w, first)
    for plus, minus in zip(seen[::2], seen[1::2], strict=True):
        assert not torch.equal(plus, first)
        assert torch.equal(plus - first, first - minus)  # exactly opposite
        assert torch.equal((plus / h).round() * h, plus)
    noise = 1e-3 * torch.randn(70_000, generator=generator)
    assert size == 0.0 or not torch.equal(start + noise - noise, start)  # why there is a lattice


def test_an_error_leaves_the_weights_as_they_were() -> None:
    w = nn.Parameter(torch.ones(5))

    def loss() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer_of(w).accumulate(loss)
    assert torch.equal(w, torch.ones(5))


def test_seeds_decide_everything() -> None:
    def run(seed: int) -> Tensor:
        w = nn.Parameter(torch.ones(6))
        optimizer = optimizer_of(w, seed=seed)
        for _ in range(4):
            optimizer.accumulate(lambda: w.square().sum())
            optimizer.step()
        return w.detach()

    stream = torch.get_rng_state()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(torch.get_rng_state(), stream)


def test_both_passes_of_a_pair_see_the_same_dropout() -> None:
    w = nn.Parameter(torch.zeros(50))
    found = estimates(w, lambda: nn.functional.dropout(torch.ones(1000), 0.5).sum() + 0 * w.sum(), 3)
    assert not found.any()


def prepared(**changes: Any) -> Any:
    model = tiny_llama()
    return prepare(model, Rule(**{"scheme": "W2A16G32", **changes}))


def parts(model: Any, **options: Any) -> ZerothOrderSGD:
    named = dict(model.named_parameters())
    return ZerothOrderSGD(
        [{"params": list(named.values()), "lr": 1e-4}], ZerothOrder(**options), {id(p): n for n, p in named.items()}
    )


def test_a_step_takes_the_memory_of_inference() -> None:
    """Within 1.1 of a forward pass, weights included: no activation, no gradient, no copy; backprop for comparison."""
    model = prepared().train()
    blocks = toy_blocks(4, 64)
    held = sum(p.nbytes for p in model.parameters())

    def forward() -> Tensor:
        return model(input_ids=blocks, labels=blocks).loss

    with torch.no_grad():
        inference = held + peak_bytes(forward)
    optimizer = parts(model)

    def step() -> None:
        optimizer.accumulate(forward)
        optimizer.step()

    assert held + peak_bytes(step) <= 1.1 * inference
    assert held + peak_bytes(lambda: forward().backward()) > 2 * inference


# ------------------------------------------------------------------------------------------------------------- training


def trainer(folder: Path, model: Any = None, *, zeroth_order: ZerothOrder | None = None, **more: Any) -> QATTrainer:
    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    callbacks = more.pop("callbacks", None)
    settings = QATSettings(
        objective=Objective(cross_entropy=1, kl=0),
        telemetry_interval=2,
        zeroth_order=zeroth_order or ZerothOrder(epsilon=1e-3, num_directions=2),
    )
    return QATTrainer(
        model or prepared(),
        TrainingArguments(output_dir=str(folder), **{**options, **more}),
        settings=settings,
        train_dataset=TokenBlocks(toy_blocks(16, 16).int().numpy(), 1.0),
        callbacks=callbacks,
    )


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    def dropping() -> Any:
        model = prepared()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return model

    whole = trainer(tmp_path / "whole", dropping())
    whole.train()
    broken = trainer(tmp_path / "broken", dropping(), callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(tmp_path / "broken", dropping())
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert (tmp_path / "broken/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_loss_of_a_tiny_model_decreases_and_nothing_has_a_gradient(tmp_path: Path) -> None:
    model = prepared()
    blocks = toy_blocks(16, 16)
    with torch.no_grad():
        before = float(model(input_ids=blocks, labels=blocks).loss)
    trainer(
        tmp_path,
        model,
        max_steps=40,
        learning_rate=2e-3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        save_strategy="no",
        lr_scheduler_type="constant",
        zeroth_order=ZerothOrder(num_directions=4, epsilon=1e-2),
    ).train()
    with torch.no_grad():
        after = float(model.eval()(input_ids=blocks, labels=blocks).loss)
    assert after < before - 0.05
    assert all(p.grad is None for p in model.parameters())


def test_only_the_named_layers_move(tmp_path: Path) -> None:
    model = prepared()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(tmp_path, model, zeroth_order=ZerothOrder(only=("*q_proj.weight", "*v_proj*"))).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.endswith("q_proj.weight") or "v_proj" in name for name in moved)
    assert any(name.endswith("v_proj.weight_scale") for name in moved)  # learned scales take part


def test_it_trains_low_rank_factors(tmp_path: Path) -> None:
    model = prepared(parametrization={"name": "low_rank", "rank": 2})
    trainer(tmp_path, model, save_strategy="no").train()
    assert all(layer.weight_a.any() for _, layer in owned_layers(model))


def test_a_loss_that_is_not_finite_stops_at_unperturbed_weights(tmp_path: Path) -> None:
    model = prepared()
    model.model.norm.weight.data[0] = math.inf
    run = trainer(tmp_path, model, save_strategy="no", zeroth_order=ZerothOrder(only=("*q_proj.weight",)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingDiverged, match=r"model\.norm\.weight"):
        run.train()
    h = max(lattice_step(layer.weight, 1e-3) for _, layer in owned_layers(model))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=h / 2)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 0}, "num_directions=0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"scale_epsilon": math.inf}, "scale_epsilon=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"only": "q_proj"}, "list of patterns"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZerothOrder(**options)


ZEROTH = ["train.gradient=zeroth_order", "train.optim=sgd", "train.max_grad_norm=0"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.gradient=forward"], "unknown gradient 'forward'"),
        (["train.gradient={name: zeroth_order, directions: 2}"], "no option 'directions'"),
        (["train.gradient={name: backprop, seed: 2}"], "no option 'seed'; options: none"),
        (["train.gradient=zeroth_order"], "optim='adamw_torch' does nothing.*write optim: sgd"),
        ([*ZEROTH, "train.max_grad_norm=1"], "write max_grad_norm: 0"),
        ([*ZEROTH, "train.activation_checkpointing=true"], "write activation_checkpointing: False"),
        ([*ZEROTH, "train.rest_optim=adamw_torch"], "write rest_optim: null"),
    ],
)
def test_recipes_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse("", overrides)


def test_more_errors(tmp_path: Path) -> None:
    assert Recipe.parse("", ZEROTH).train.gradient == "zeroth_order"
    assert gradient_from_dict({"name": "zeroth_order", "only": ["*q*"]}) == ZerothOrder(only=("*q*",))
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="nothing was accumulated"):
        optimizer_of(w).step()
    with pytest.raises(ValueError, match="closure"):
        optimizer_of(w).step(lambda: None)
    with pytest.raises(ValueError, match="no parameter 'x'"):
        optimizer_of(w).gradient("x")
    large = nn.Parameter(torch.full((2,), 1e4))
    with pytest.raises(ValueError, match=r"w reaches 10000.*epsilon=0\.001.*larger epsilon"):
        optimizer_of(large).accumulate(large.sum)
    with pytest.raises(ValueError, match="variance_reduction corrects a backward pass"):
        QATSettings(zeroth_order=ZerothOrder(), variance_reduction=VarianceReduction(form="svrg"))
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"w is torch\.bfloat16.*float32"):
        optimizer_of(half)
    with pytest.raises(ValueError, match="surrogate 'clipped_ste' does nothing"):
        trainer(tmp_path, prepared(surrogate="clipped_ste")).train()
    with pytest.raises(ValueError, match="matches no trained parameter"):
        trainer(tmp_path, zeroth_order=ZerothOrder(only=("*nothing*",))).train()
