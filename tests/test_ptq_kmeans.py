"""k-means after training: oracles, fixed points, what data are worth, models, recipes and files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_common import byte_level, llama
from ptq_common import data, over
from targets_common import byte_tokenizer
from torch import Tensor, nn

from fewbits.convert import Rule, owned_layers, qat_layers
from fewbits.export import export_verified
from fewbits.fake_quant import fake_quantize
from fewbits.grids import Codebook
from fewbits.kmeans import block_scale, fit_codebook
from fewbits.pipeline import check_target, load_any, ptq_recipe, run
from fewbits.ptq import apply_ptq, hessian_of, kmeans, output_error, rtn
from fewbits.qtensor import quantize
from fewbits.recipe import Recipe
from fewbits.rotations import Rotation
from fewbits.scales import stored_scale
from fewbits.scheme import Scheme
from fewbits.targets import TARGETS, get_target
from fewbits.testing.oracles import best_levels
from fewbits.testing.tiny import TINY_MODELS, tiny_llama, toy_blocks, toy_text

SCHEMES = [
    Scheme.parse(text, **options)
    for text, options in [
        ("W2KG32", {}),
        ("W4K", {}),
        ("W1KG32", {"rule": "absmean"}),
        ("W3K", {"granularity": "per_tensor"}),
        ("W2KG32", {"superblock": 64}),
        ("W2KG32", {"rule": "block_absmax", "mode": "dynamic"}),
        ("W2KG32", {"rotation": Rotation(kind="random_hadamard", block_size=16)}),
        ("W2", {"grid": Codebook((-1.0, 0.0, 1.0))}),
    ]
]
every_scheme = over(SCHEMES)


def squared_error(w: Tensor, scheme: Scheme, **options: Any) -> float:
    return float((kmeans(w, scheme, **options).qtensor.dequantize() - w).double().square().sum())


# one matrix --------------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("with_data", [False, True])
def test_the_result_is_the_nearest_level_and_holds_its_codes(scheme: Scheme, with_data: bool) -> None:
    w, x = data()
    result = kmeans(w, scheme, inputs=x if with_data else None)
    q = result.qtensor
    assert torch.equal(result.latent, w)
    assert torch.equal(stored_scale(result.scale, scheme.scale), q.scale)
    assert replace(q.scheme, grid=scheme.grid) == scheme
    assert len(q.scheme.grid.levels) == len(scheme.grid.levels)
    assert torch.equal(quantize(w, q.scheme, result.scale).codes, q.codes)
    assert torch.equal(fake_quantize(w, q.scheme, result.scale), q.dequantize())
    if scheme.scale.mode == "dynamic":
        assert torch.equal(quantize(w, q.scheme).codes, q.codes)  # the rule finds these very scales
    again = kmeans(w, scheme, inputs=x if with_data else None)
    assert torch.equal(again.qtensor.codes, q.codes)
    assert again.qtensor.scheme == q.scheme


@pytest.mark.parametrize("weighted", [False, True])
def test_levels_are_at_the_global_minimum_of_few_weights(weighted: bool) -> None:
    """Against dynamic programming: w / s by hand, weighed by h s^2 by hand."""
    hits = 0
    for seed in range(10):
        torch.manual_seed(seed)
        w = torch.randn(6, 6) * torch.rand(6, 1).exp()
        h = torch.diag(torch.rand(6) + 0.1)
        scheme = Scheme.parse("W1K" if seed % 2 else "W2K", rule="block_absmax", dtype="fp32")
        result = kmeans(w, scheme, hessian=h, weighted=weighted)
        s = w.abs().amax(1, keepdim=True)
        weights = (h.diagonal() * s.square()) if weighted else torch.ones_like(w)
        levels, lowest = best_levels((w / s).flatten().tolist(), len(scheme.grid.levels), weights.flatten().tolist())
        delta = result.qtensor.dequantize() / s - w / s
        found = float((weights * delta.square()).double().sum())
        assert found >= lowest * (1 - 1e-5)
        if found <= lowest * (1 + 1e-5):
            hits += 1
            assert list(result.qtensor.scheme.grid.levels) == pytest.approx(levels, rel=1e-5)
        if weighted:
            assert output_error(w, result.qtensor.dequantize(), h) == pytest.approx(found, rel=1e-4)
    assert hits >= 8  # k-means knows local minima only


@pytest.mark.parametrize("rule", ["absmax", "absmean", "rms"])
def test_without_weights_and_rounds_it_is_the_published_fit(rule: str) -> None:
    w, x = data(16, 128)
    scheme = Scheme.parse("W2KG64")
    spec = replace(scheme.scale, rule=f"block_{rule}")  # type: ignore[arg-type]
    expected = quantize(w, replace(scheme, grid=fit_codebook(w, 4, spec)), block_scale(w, spec))
    found = kmeans(w, scheme, inputs=x, block=rule, rounds=0, weighted=False)  # type: ignore[arg-type]
    assert torch.equal(found.qtensor.dequantize(), expected.dequantize())
    by_rule = kmeans(w, scheme.with_scale(rule=f"block_{rule}"), inputs=x, weighted=False)
    assert torch.equal(by_rule.qtensor.dequantize(), expected.dequantize())


def test_a_weight_of_few_values_is_kept() -> None:
    sizes = torch.tensor([0.5, 1.0, 2.0, 0.25])[:, None]
    w = sizes * torch.tensor([-1.0, -0.25, 0.5, 1.0]).repeat(16)
    for options in ({}, {"block": "absmax", "rounds": 0, "weighted": False}):
        assert torch.equal(kmeans(w, Scheme.parse("W2KG32", rule="absmax"), **options).qtensor.dequantize(), w)


@over([s for s in SCHEMES if s.scale.rule == "mse"])
def test_rounds_and_data_never_make_it_worse(scheme: Scheme) -> None:
    w, x = data(16, 96)
    hessian = hessian_of(x)
    errors = [squared_error(w, scheme, rounds=n) for n in (0, 1, 3)]
    assert sorted(errors, reverse=True) == pytest.approx(errors, rel=1e-6)
    if scheme.scale.granularity != "per_tensor":  # one scale for all levels is a change of units
        assert errors[-1] < errors[0]
    gaussian = rtn(w, replace(scheme, grid=Codebook.lloyd_max(len(scheme.grid.levels)))).qtensor.dequantize()
    assert errors[-1] < float((gaussian - w).double().square().sum())
    for n in (0, 1, 3):
        seeing, blind = (kmeans(w, scheme, hessian=h, rounds=n).qtensor.dequantize() for h in (hessian, None))
        assert output_error(w, seeing, hessian) <= output_error(w, blind, hessian)
    assert squared_error(w, scheme, hessian=hessian) >= errors[-1] * (1 - 1e-6)


def test_columns_that_no_input_reaches_do_not_count() -> None:
    w, _ = data(16, 64)
    w[:, 40] = 3.0
    h = torch.rand(64) * (torch.arange(64) < 32)
    scheme, scale = Scheme.parse("W2K"), torch.full((16, 1), 0.05)
    found = kmeans(w, scheme, hessian=h.diag(), scale=scale, rounds=0).qtensor.scheme.grid.levels
    alone = kmeans(w[:, :32], scheme, hessian=h[:32].diag(), scale=scale, rounds=0).qtensor.scheme.grid.levels
    assert found == pytest.approx(alone, rel=1e-6)
    assert max(found) < 5  # the outlier is at 60
    never = kmeans(w, scheme, hessian=torch.zeros(64, 64))  # a layer that is never called has no data
    assert torch.equal(never.qtensor.dequantize(), kmeans(w, scheme).qtensor.dequantize())


def test_one_bit_on_mean_blocks_is_sign_times_mean() -> None:
    w = torch.randn(2000, 64)
    q = kmeans(w, Scheme.parse("W1KG64", dtype="fp32"), block="absmean", rounds=0, weighted=False).qtensor
    assert [abs(x) for x in q.scheme.grid.levels] == pytest.approx([1.0, 1.0], abs=0.02)  # methods.md 1 (a)


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("W2G32", {}, "has the int grid.* letter K"),
        ("W2HG32", {}, "has the half_shifted grid"),
        ("W2KG32", {"rounds": -1}, "rounds=-1"),
        ("W2KG32", {"block": "median"}, "block='median' is unknown; use one of absmax, absmean, rms"),
        ("W2KG32", {"scale": torch.ones(3, 3)}, "scale has shape"),
        ("W2KG32", {"hessian": torch.eye(3)}, "Hessian has shape"),
        (Scheme.parse("W2KG32", mode="dynamic", rule="absmax"), {}, "dynamic scales .*block_absmax"),
        (Scheme.parse("W2KG32", mode="dynamic", rule="block_rms"), {"rounds": 1}, "rounds=0"),
        (Scheme.parse("W2KG32", mode="dynamic", rule="block_rms"), {"block": "absmax"}, "no other block"),
    ],
)
def test_what_is_refused(scheme: str | Scheme, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(torch.randn(4, 64), Scheme.parse(scheme) if isinstance(scheme, str) else scheme, **options)
    with pytest.raises(ValueError, match="distinct"):
        kmeans(torch.zeros(4, 64), Scheme.parse("W2KG32"))


# models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_every_layer_has_a_codebook_of_its_own(kind: str) -> None:
    model = apply_ptq(TINY_MODELS[kind](), Rule(scheme="W2KG32"), "kmeans", toy_blocks(4), rounds=1)
    layers = dict(owned_layers(model))
    assert len({layer.scheme.grid for layer in layers.values()}) == len(layers)
    assert all(layer.scheme.grid != Codebook.lloyd_max(4) for layer in layers.values())


def test_data_are_worth_their_price_on_a_model_and_are_not_needed() -> None:
    blocks, held_out = toy_blocks(16), toy_blocks(8, seed=9)
    teacher = tiny_llama()

    def error(method: str, blocks: Tensor | None, **options: Any) -> float:
        model = apply_ptq(tiny_llama(), Rule(scheme="W2KG32"), method, blocks, **options)
        with torch.no_grad():
            return float((model(input_ids=held_out).logits - teacher(input_ids=held_out).logits).square().mean())

    assert error("kmeans", blocks) < 0.9 * error("kmeans", None)
    assert error("kmeans", None) < error("rtn", None)


def test_tied_weights_embeddings_and_dynamic_scales() -> None:
    scheme = Scheme.parse("W2KG32", rule="block_absmax", mode="dynamic")
    rules = [Rule(pattern="*embed_tokens", scheme="W4KG32", embeddings=True), Rule(scheme=scheme)]
    model = apply_ptq(TINY_MODELS["llama_tied"](), rules, "kmeans", toy_blocks(4))
    layers = dict(qat_layers(model))
    embedding = layers["model.embed_tokens"]
    assert layers["lm_head"].owner is embedding
    assert layers["lm_head"].scheme == embedding.scheme
    expected = kmeans(tiny_llama(tie=True).model.embed_tokens.weight, Scheme.parse("W4KG32"))  # type: ignore[union-attr]
    assert torch.equal(embedding.qtensor().codes, expected.qtensor.codes)
    inner = next(layer for layer in layers.values() if layer.scheme.scale.mode == "dynamic")
    assert inner.weight_scale is None
    assert torch.equal(inner.quantized_weight(), inner.qtensor().dequantize())


def test_grids_and_scales_are_checked_before_anything_is_changed() -> None:
    model = tiny_llama()
    rules = [Rule(pattern="*.0.*", scheme="W2KG32"), Rule(scheme="W2G32")]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.\S+ W2A16G32 has the int grid"):
        apply_ptq(model, rules, "kmeans")
    with pytest.raises(ValueError, match="dynamic scales"):
        apply_ptq(model, Rule(scheme=Scheme.parse("W2KG32", mode="dynamic")), "kmeans")
    assert not list(qat_layers(model))


# recipes and files -------------------------------------------------------------------------------------------------


def test_the_command_takes_the_codebook_of_as_many_bits() -> None:
    for text, expected in {"W2A16G64": "W2KA16G64", "W1G64": "W1KG64", "W4KG32": "W4KG32", "W2A8": "W2KA8"}.items():
        recipe = ptq_recipe("embedded", "kmeans", text)
        assert recipe.rules[0].scheme == expected
        assert isinstance(recipe.rules[0].build().scheme.grid, Codebook)
    for text, message in {"W1.58G64": "three levels takes 2 bits; use W2K", "W2HG64": "of its own; use W2K"}.items():
        with pytest.raises(ValueError, match=message):
            ptq_recipe("embedded", "kmeans", text)
    with pytest.raises(ValueError, match="not of the form"):
        ptq_recipe("embedded", "kmeans", "W9")


def test_a_recipe_must_have_codebooks_and_fit_them_once() -> None:
    assert Recipe.parse("{init: kmeans, rules: [{scheme: W2KG64}]}").init == "kmeans"
    with pytest.raises(ValueError, match=r"rules\.0: init is kmeans, but W2A16G64 has the int grid"):
        Recipe.parse("{init: kmeans}")
    with pytest.raises(ValueError, match="start anew; drop one"):
        Recipe.parse("{init: kmeans, rules: [{scheme: W2KG64}], codebooks: {step: 3}}")


def test_targets_are_judged_by_what_is_fitted_and_not_by_what_is_written() -> None:
    grid = "{kind: codebook, codebook: [-7.0, -2.0, 2.0, 7.0]}"
    rules = f"rules: [{{scheme: {{grid: {grid}, scale: {{granularity: per_group, group_size: 32}}}}}}]"
    check_target(tiny_llama(), Recipe.parse(f"{{target: mlx, {rules}}}"))
    for fit in ("init: kmeans", "codebooks: {step: 0}"):
        with pytest.raises(ValueError, match=r"'mlx' cannot hold .*not multiples of 1/1024"):
            check_target(tiny_llama(), Recipe.parse(f"{{target: mlx, {rules}, {fit}}}"))


@pytest.fixture(scope="module")
def fitted() -> nn.Module:
    torch.manual_seed(0)
    return apply_ptq(llama(), Rule(scheme="W2KG64"), "kmeans", rounds=0).eval()


@pytest.mark.parametrize("name", TARGETS)
def test_targets_hold_it_bit_for_bit_or_refuse(name: str, fitted: nn.Module, tmp_path: Path) -> None:
    target = get_target(name)
    layer = next(layer for _, layer in owned_layers(fitted))
    if reason := target.holds(layer.scheme, (256, 256)):
        assert len(reason) > 20
        with pytest.raises(ValueError, match="cannot hold"):
            export_verified(fitted, name, tmp_path / "out", tokenizer=byte_level())
        return
    where, report = export_verified(fitted, name, tmp_path / "out", tokenizer=byte_level())
    assert report.passed, report.to_text()
    if name in ("hf", "gguf:f32", "dequantized:fp32"):  # the others round once, and say so
        tensors = target.read_tensors(where)
        codes = target.read_codes(where)
        for key, held in owned_layers(fitted):
            weight = tensors[f"{key}.weight"] if codes is None else codes[key].dequantize()
            assert torch.equal(weight, held.quantized_weight()), key


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llama().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(toy_text(300))
    return folder


def test_a_run_leaves_a_folder_that_exports_and_training_starts_there(checkpoint: Path, tmp_path: Path) -> None:
    model, text = str(checkpoint / "model"), checkpoint / "text.txt"
    start = ptq_recipe(model, "kmeans", "W2A16G32", text=text, options=["num_blocks=4"])
    start = Recipe.parse(start.to_yaml(), ["data.eval_tokens=512"])
    before = run(start, tmp_path / "ptq", quiet=True)
    assert list(before.scores) == ["fp", "rtn", "kmeans"]
    where, report = export_verified(tmp_path / "ptq", "hf")
    assert report.passed
    tokens = toy_blocks(2, 24)
    with torch.no_grad():
        assert torch.equal(load_any(where)[0](tokens).logits, before.model(tokens).logits)
    train = Recipe.parse(start.to_yaml(), ["train.max_steps=2", "train.batch_size=2", "train.learning_rate=1e-12"])
    after = run(train, tmp_path / "qat", quiet=True)
    assert after.scores["kmeans"] == before.scores["kmeans"]
    ours, theirs = dict(qat_layers(after.model)), dict(qat_layers(before.model))
    assert all(torch.equal(ours[n].qtensor().codes, theirs[n].qtensor().codes) for n in theirs)
    assert all(ours[n].scheme == theirs[n].scheme for n in theirs)


def test_training_from_it_resumes_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    start = ptq_recipe(
        str(checkpoint / "model"), "kmeans", "W2A16G32", text=checkpoint / "text.txt", options=["num_blocks=4"]
    )
    recipe = Recipe.parse(
        start.to_yaml(), ["train.max_steps=3", "train.batch_size=2", "train.save_steps=2", "data.eval_tokens=512"]
    )
    whole = run(recipe, tmp_path / "whole", quiet=True)
    run(recipe, tmp_path / "parts", quiet=True)
    shutil.rmtree(tmp_path / "parts" / "model")  # as if it had been interrupted after the second step
    shutil.rmtree(tmp_path / "parts" / "checkpoint-3", ignore_errors=True)
    resumed = run(recipe, tmp_path / "parts", resume=True, quiet=True)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    ours, theirs = dict(qat_layers(resumed.model)), dict(qat_layers(whole.model))
    assert all(ours[n].scheme == theirs[n].scheme for n in theirs)
