"""Codebooks in a training run: warm-up, fits, freezing, Fisher weights, resume, through the recipe as well."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from fewbits import Rule, prepare
from fewbits.data import TokenBlocks
from fewbits.numerics import round_scale
from fewbits.optim.codebooks import CodebookFit, refit_codebooks_
from fewbits.pipeline import run
from fewbits.qtensor import quantize
from fewbits.recipe import Recipe
from fewbits.scheme import Scheme
from fewbits.testing.tiny import tiny_llama, toy_text
from fewbits.training import QATSettings, QATTrainer
from fewbits.training.codebooks import CODEBOOKS_FILE, CodebookCallback, codebook_layers, second_moments


def blocks(size: int = 16) -> TokenBlocks:
    data = np.frombuffer(toy_text(60).encode(), dtype=np.uint8)
    return TokenBlocks(data[: len(data) // size * size].reshape(-1, size).astype(np.int32), 1.0)


class Watch(TrainerCallback):
    """Levels and the quantization switch after every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, dict[str, tuple[float, ...]]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = codebook_layers(kwargs["model"])
        assert len({layer.fake_quant_enabled for _, layer in layers}) == 1
        self.seen.append((layers[0][1].fake_quant_enabled, {n: x.scheme.grid.levels for n, x in layers}))


def trainer(
    folder: Path, fit: CodebookFit | None, *, scheme: str | Scheme = "W2KG32", **more: Any
) -> tuple[QATTrainer, Watch]:
    model = tiny_llama()
    teacher = copy.deepcopy(model)
    prepare(model, Rule(scheme=scheme))
    watch = Watch()
    arguments: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    made = QATTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**arguments, **more}),
        teacher=teacher,
        settings=QATSettings(codebooks=fit),
        train_dataset=blocks(),
    )
    made.add_callback(watch)  # after ours, so that it sees the step's fit
    return made, watch


def test_before_the_first_step_it_is_a_refit_of_the_checkpoint(tmp_path: Path) -> None:
    expected = prepare(tiny_llama(), Rule(scheme="W2KG32"))
    refit_codebooks_(expected, seed=3)
    made, watch = trainer(tmp_path, CodebookFit(seed=3))
    made.train()
    levels = {name: layer.scheme.grid.levels for name, layer in codebook_layers(expected)}
    assert watch.seen == [(True, levels)] * 6  # fitted once, frozen, never off


def test_warm_up_is_full_precision_and_then_fits_once(tmp_path: Path) -> None:
    made, watch = trainer(tmp_path, CodebookFit(step=3))
    before = {name: layer.scheme.grid.levels for name, layer in codebook_layers(made.model)}
    made.train()
    switches, levels = zip(*watch.seen, strict=True)
    assert switches == (False, False, True, True, True, True)
    assert levels[0] == levels[1] == before
    assert levels[2] != before
    assert levels[2] == levels[5]

    plain = tiny_llama()  # two steps of the same batches without any quantization end at the same weights, bit for bit
    teacher = copy.deepcopy(plain)
    prepare(plain, Rule(scheme="W2KG32"))
    for _, layer in codebook_layers(plain):
        layer.fake_quant_enabled = False
    made, _ = trainer(tmp_path, CodebookFit(step=3), max_steps=2, lr_scheduler_type="constant")
    made.train()
    twin = QATTrainer(plain, made.args, teacher=teacher, settings=QATSettings(), train_dataset=blocks())
    twin.train()
    for name, p in plain.named_parameters():
        assert torch.equal(p, dict(made.model.named_parameters())[name]), name


def test_refits_follow_the_weights_and_forget_the_moments_of_scales(tmp_path: Path) -> None:
    made, watch = trainer(tmp_path, CodebookFit(step=1, refit_interval=2), learning_rate=1e-2)
    made.train()
    levels = [seen[1] for seen in watch.seen]
    assert levels[0] == levels[1] != levels[2] == levels[3] != levels[4] == levels[5]
    _, layer = codebook_layers(made.model)[0]
    assert made.optimizer.state[layer.weight]["step"] == 6
    assert made.optimizer.state[layer.weight_scale]["step"] == 1  # anew since the fit after step 5


def test_fisher_weights_are_adams_second_moment_over_its_mean(tmp_path: Path) -> None:
    made, watch = trainer(tmp_path / "a", CodebookFit(step=3, fisher=True))
    plain, other = trainer(tmp_path / "b", CodebookFit(step=3))
    made.train()
    plain.train()
    assert watch.seen[2] != other.seen[2]
    moments = second_moments(made.model, made.optimizer)
    for name, layer in codebook_layers(made.model):
        v = made.optimizer.state[layer.weight]["exp_avg_sq"]
        assert torch.equal(moments[name], v / v.mean())
        assert abs(float(moments[name].mean()) - 1) < 1e-5
    sgd, _ = trainer(tmp_path / "c", CodebookFit(step=3, fisher=True), optim="sgd")
    with pytest.raises(ValueError, match="second moment"):
        sgd.train()


@pytest.mark.parametrize("fit", [CodebookFit(step=2), CodebookFit(step=5), CodebookFit(step=1, refit_interval=4)])
def test_resume_is_bit_identical(tmp_path: Path, fit: CodebookFit) -> None:
    whole, watch = trainer(tmp_path / "whole", fit)
    whole.train()
    first, _ = trainer(tmp_path / "parts", fit, save_strategy="steps", save_steps=3)
    first.train()
    second, resumed = trainer(tmp_path / "parts", fit, save_strategy="steps", save_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert resumed.seen == watch.seen[3:]
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


# 1-Bit Wonder's own block scales, which follow the weights ---------------------------------------------------------


def published(w: Tensor, levels: tuple[float, ...], rule: str, block: int) -> Tensor:
    """The paper's forward pass, block by block; only the scale is rounded as the file holds it."""
    size = {
        "absmax": lambda b: b.abs().max(),
        "absmean": lambda b: b.abs().mean(),
        "rms": lambda b: b.square().mean().sqrt(),
    }
    c = torch.tensor(levels)
    middle = (c[1:] + c[:-1]) / 2
    out = torch.empty_like(w)
    for i in range(len(w)):
        for j in range(0, w.shape[1], block):
            part = w[i, j : j + block]
            s = round_scale(size[rule](part), "portable")
            out[i, j : j + block] = s * c[torch.bucketize(part / s, middle)]
    return out


@pytest.mark.parametrize("rule", ["absmax", "absmean", "rms"])
def test_dynamic_block_scales_are_the_published_quantizer_with_the_identity_as_gradient(rule: str) -> None:
    model = prepare(
        nn.Sequential(nn.Linear(96, 12)), Rule(scheme=Scheme.parse("W2KG32", rule=f"block_{rule}", mode="dynamic"))
    )
    refit_codebooks_(model)
    layer = model[0]
    levels = layer.scheme.grid.levels
    for _ in range(3):  # the scale follows whatever the weights do
        w = layer.weight.detach()
        quantized = layer.quantized_weight()
        torch.testing.assert_close(quantized, published(w, levels, rule, 32), rtol=2e-7, atol=0)
        assert torch.equal(quantized, layer.qtensor().dequantize())
        upstream = torch.randn_like(w)
        (grad,) = torch.autograd.grad(quantized, layer.weight, upstream)
        assert torch.equal(grad, upstream)
        with torch.no_grad():
            layer.weight.mul_(torch.rand(12, 96) + 0.5)
    assert layer.scheme.grid.levels == levels


def test_scales_are_homogeneous_and_codes_do_not_depend_on_the_size_of_a_block() -> None:
    scheme = Scheme.parse("W2KG32", rule="block_absmax", mode="dynamic")
    w = torch.randn(4, 64)
    factor = torch.tensor([1.0, 0.5, 8.0, 0.25])[:, None]
    assert torch.equal(quantize(w, scheme).codes, quantize(w * factor, scheme).codes)
    assert torch.equal(quantize(w * factor, scheme).dequantize(), quantize(w, scheme).dequantize() * factor)


def test_warm_up_fit_freeze_and_refits_with_dynamic_scales(tmp_path: Path) -> None:
    scheme = Scheme.parse("W2KG32", rule="block_absmax", mode="dynamic")
    made, watch = trainer(tmp_path, CodebookFit(step=2), scheme=scheme, learning_rate=1e-2)
    assert not [name for name, _ in made.model.named_parameters() if name.endswith("weight_scale")]
    sizes = {name: layer.raw_scale() for name, layer in codebook_layers(made.model)}
    made.train()
    switches, levels = zip(*watch.seen, strict=True)
    assert switches == (False, True, True, True, True, True)
    assert levels[0] != levels[1] == levels[5]  # fitted once, frozen
    for name, layer in codebook_layers(made.model):
        w = layer.latent().detach()
        assert torch.equal(layer.raw_scale(), w.view(len(w), -1, 32).abs().amax(-1))
        assert not torch.equal(layer.raw_scale(), sizes[name])
        assert torch.equal(layer.quantized_weight(), layer.qtensor().dequantize())
    made, watch = trainer(
        tmp_path, CodebookFit(step=1, refit_interval=2, fisher=True), scheme=scheme, learning_rate=1e-2
    )
    made.train()
    levels = [seen[1] for seen in watch.seen]
    assert levels[0] == levels[1] != levels[2] == levels[3] != levels[4] == levels[5]


def test_resume_with_dynamic_block_scales_is_bit_identical(tmp_path: Path) -> None:
    scheme, fit = Scheme.parse("W1KG32", rule="block_absmean", mode="dynamic"), CodebookFit(step=1, refit_interval=4)
    whole, watch = trainer(tmp_path / "whole", fit, scheme=scheme)
    whole.train()
    first, _ = trainer(tmp_path / "parts", fit, scheme=scheme, save_strategy="steps", save_steps=3)
    first.train()
    second, resumed = trainer(tmp_path / "parts", fit, scheme=scheme, save_strategy="steps", save_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert resumed.seen == watch.seen[3:]
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_dynamic_scales_that_know_the_levels_are_refused() -> None:
    model = prepare(nn.Sequential(nn.Linear(64, 4)), Rule(scheme=Scheme.parse("W2KG32", rule="absmax", mode="dynamic")))
    with pytest.raises(ValueError, match=r"'absmax', which depend on the levels; .* block_absmax"):
        refit_codebooks_(model)
    with pytest.raises(ValueError, match=r"'block_rms' is the size of a block.* use rule 'rms', or a codebook"):
        Scheme.parse("W2HG32", rule="block_rms")


def test_a_codebook_that_is_not_fitted_yet_is_in_units_of_the_rule() -> None:
    w = torch.randn(256, 256)
    errors = {}
    for rule in ("block_absmax", "block_absmean", "block_rms"):
        q = quantize(w, Scheme.parse("W2KG64", rule=rule))
        errors[rule] = ((q.dequantize() - w).square().mean() / w.square().mean()).item()
    # methods.md 1 (d): .1179 and .1159 for fitted ones
    assert errors == pytest.approx({"block_absmax": 0.118, "block_absmean": 0.116, "block_rms": 0.116}, rel=0.02)


def test_damaged_codebooks_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    model = prepare(tiny_llama(), Rule(scheme="W2KG32"))
    callback = CodebookCallback(CodebookFit())
    good = {name: list(layer.scheme.grid.levels) for name, layer in codebook_layers(model)}
    name = next(iter(good))
    file = tmp_path / CODEBOOKS_FILE
    for bad, match in [({}, "other layers"), ({**good, name: 3}, "list of levels"), ({**good, name: [1, 1]}, "ascend")]:
        file.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=match):
            callback.load(tmp_path, model)
    file.write_text(json.dumps(good)[:-5])
    with pytest.raises(ValueError):
        callback.load(tmp_path, model)
    file.write_text(json.dumps(good))
    callback.load(tmp_path, model)


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step=-1"):
        CodebookFit(step=-1)
    with pytest.raises(ValueError, match="refit_interval=0"):
        CodebookFit(refit_interval=0)
    with pytest.raises(ValueError, match="fisher"):
        CodebookFit(fisher=True)
    with pytest.raises(ValueError, match="no layer"):
        trainer(tmp_path, CodebookFit(), scheme="W2G32")
    with pytest.raises(ValueError, match="no codebook of its own"):
        QATTrainer(
            prepare(tiny_llama(), Rule(scheme="W2KG32")),
            TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
            teacher=tiny_llama(),
            settings=QATSettings(codebooks=CodebookFit(step=2), ema_decay=0.5),
            train_dataset=blocks(),
        )
    with pytest.raises(ValueError, match=r"codebooks\.fit_step|codebooks"):
        Recipe.parse("codebooks: {fit_step: 3}")


@pytest.mark.parametrize("options", ["{rule: absmax}", "{rule: block_absmax, mode: dynamic}"])
def test_a_recipe_fits_codebooks_and_the_file_holds_them(options: str, tmp_path: Path) -> None:
    from fewbits.convert import convert
    from fewbits.export import export_verified
    from fewbits.pipeline import load_any

    recipe = Recipe.parse(
        f"""
        model: embedded
        rules: [{{scheme: W2KG64, options: {options}}}]
        codebooks: {{step: 2}}
        data: {{block_size: 32, eval_tokens: 256, max_tokens: 2048}}
        train: {{max_steps: 3, batch_size: 2, warmup_steps: 0}}
        seed: 0
        """
    )
    result = run(recipe, tmp_path / "run", quiet=True)
    loaded, _ = load_any(tmp_path / "run")
    for (name, layer), (_, back) in zip(codebook_layers(result.model), codebook_layers(loaded), strict=True):
        assert layer.fake_quant_enabled, name
        assert back.scheme.grid.levels == layer.scheme.grid.levels, name
        assert layer.scheme.grid != Scheme.parse("W2KG64").grid
    tokens = torch.arange(24).view(1, -1)
    fake = result.model(tokens).logits
    assert torch.equal(loaded(tokens).logits, fake)
    where, report = export_verified(tmp_path / "run", "hf")
    assert report.passed, report.to_text()
    packed, _ = load_any(where)
    assert torch.equal(packed(tokens).logits, fake)
    assert torch.equal(convert(result.model)(tokens).logits, fake)
