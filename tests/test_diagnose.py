"""The diagnosis against direct computation: losses, rises, forecasts, recipes, pages, and that nothing is changed."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from fewbits.convert import Rule, owned_layers, prepare
from fewbits.data import TokenBlocks
from fewbits.diagnose import (
    DiagnosisSettings,
    TokenLoss,
    after_training,
    batched_gradient,
    batched_hessian,
    before_training,
    diagnose,
    find_sites,
    latent_weights,
    layer_sensitivity,
    propose_recipe,
    round_cells,
    token_loss,
    triple,
    write_diagnosis,
)
from fewbits.diagnose.words import BROKEN, FREE, LEAVES, judge
from fewbits.evaluate import evaluate
from fewbits.geometry import difference, dot, gradient, hvp, loss_value, norm, random_like
from fewbits.io import read_json
from fewbits.recipe import Recipe
from fewbits.scheme import Scheme
from fewbits.testing.tiny import tiny_gpt2, tiny_llama, toy_blocks

SCHEMES = {name: Scheme.parse(name) for name in ("W4", "W2", "W1")}
QUICK = DiagnosisSettings(
    num_random=2, num_bisections=3, num_probes=2, num_monte_carlo=2, profile_points=3, curvature_blocks=1,
    num_lanczos_steps=4, num_normals=2, slice_points=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def blocks() -> TokenBlocks:
    return TokenBlocks(toy_blocks(6, 16).numpy(), 1.0)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_losses_are_those_of_evaluate(blocks: TokenBlocks, batch_size: int) -> None:
    model = tiny_llama()
    assert (
        loss_value(token_loss(model, blocks, batch_size=batch_size))
        == evaluate(model, blocks, batch_size=batch_size).loss
    )
    prepared = prepare(copy.deepcopy(model), Rule(scheme="W2"))
    deployed = loss_value(token_loss(prepared, blocks))
    assert deployed == evaluate(prepared, blocks).loss
    assert loss_value(token_loss(prepared, blocks, latent=True)) == evaluate(model, blocks).loss != deployed
    assert loss_value(token_loss(prepared, blocks)) == deployed  # fake quantization is back on
    with pytest.raises(RuntimeError, match="inside"), latent_weights(prepared):
        raise RuntimeError("inside")
    assert all(layer.fake_quant_enabled for _, layer in owned_layers(prepared))


def test_dropout_is_off_and_modes_come_back(blocks: TokenBlocks) -> None:
    model = tiny_gpt2()
    model.train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    loss = token_loss(model, blocks)
    value = loss_value(loss)
    assert value == loss_value(loss)
    assert [m.training for m in model.modules()] == modes
    assert value == evaluate(model, blocks).loss


def test_halves_are_disjoint_and_parts_add_up(blocks: TokenBlocks) -> None:
    loss = token_loss(tiny_llama(), blocks, batch_size=4)
    even, odd = loss.halves()
    assert torch.equal(torch.stack([even.tokens, odd.tokens], dim=1).view_as(loss.tokens), loss.tokens)
    assert (loss_value(even) + loss_value(odd)) / 2 == pytest.approx(loss_value(loss), rel=1e-12)
    assert sum(share * loss_value(part) for share, part in loss.parts()) == pytest.approx(loss_value(loss), rel=1e-12)
    with pytest.raises(ValueError, match="two token blocks"):
        token_loss(tiny_llama(), blocks.take(1)).halves()
    with pytest.raises(ValueError, match="batch_size=0"):
        token_loss(tiny_llama(), blocks, batch_size=0)


def test_batched_derivatives_are_the_plain_ones(blocks: TokenBlocks) -> None:
    loss = token_loss(tiny_llama(), blocks, batch_size=4)
    params = [site.weight for site in find_sites(loss.model, [SCHEMES["W2"]])]
    direction = random_like(params, torch.Generator().manual_seed(0))
    pairs = [
        (batched_gradient(loss, params), gradient(loss, params)),
        (batched_hessian(loss, params)(direction), hvp(loss, params, direction)),
    ]
    for got, expected in pairs:
        assert norm(difference(got, expected)) < 1e-4 * norm(expected)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_sites_round_as_prepare_does(build, blocks: TokenBlocks) -> None:
    model = build()
    scheme = Scheme.parse("W1.58A16G32")
    sites = find_sites(model, [scheme])
    layers = dict(owned_layers(prepare(copy.deepcopy(model), Rule(scheme=scheme))))
    assert [s.name for s in sites] == list(layers)
    for site in sites:
        assert torch.equal(site.stored(layers[site.name].quantized_weight()), site.rounded(scheme))
        assert site.rounded(scheme).shape == site.weight.shape
        assert site.size_in_bits(scheme) == round(scheme.bits_per_weight(site.shape) * site.weight.numel())


@pytest.mark.parametrize("name", ["W4", "W2", "W1", "W1.58A16G32"])
def test_cells_bound_the_error_and_name_the_clipped(name: str) -> None:
    sites = find_sites(tiny_llama(), [Scheme.parse(name)])
    cells = round_cells(sites, Scheme.parse(name))
    clipped = 0
    for site, q, pitch, clip in zip(sites, cells.rounded, cells.pitch, cells.clip_error, strict=True):
        error = (q - site.weight).detach()
        outside = pitch == 0
        assert (error.abs() <= pitch / 2 * (1 + 1e-4))[~outside].all()
        assert torch.equal(clip, torch.where(outside, error, 0.0))
        clipped += int(outside.sum())
    assert cells.clipped_share == clipped / sum(s.weight.numel() for s in sites) > 0


def test_before_agrees_with_direct_computation_and_restores(blocks: TokenBlocks) -> None:
    model = tiny_llama()
    model.train()
    before = state_of(model)
    loss = token_loss(model, blocks)
    sites = find_sites(model, list(SCHEMES.values()))
    baseline, reports = before_training(loss, sites, SCHEMES, QUICK)
    assert_same_state(model, before)
    assert baseline.loss == evaluate(model, blocks).loss
    assert baseline.tol == max(0.02, 3 * baseline.noise.half_to_half_sd)
    params = [s.weight for s in sites]
    grad = gradient(loss, params)
    assert baseline.gradient_norm == pytest.approx(norm(grad), rel=1e-4)
    for report in reports:
        scheme = SCHEMES[report.scheme]
        rounded = prepare(copy.deepcopy(model), Rule(scheme=scheme))
        assert report.loss == evaluate(rounded, blocks).loss
        assert report.rise == report.loss - baseline.loss
        error = difference([s.rounded(scheme) for s in sites], params)
        assert report.error_norm == norm(error)
        bend = dot(error, hvp(loss, params, error))
        assert report.quadratic_rise == pytest.approx(dot(grad, error) + bend / 2, rel=1e-3, abs=1e-6)
        assert report.profile.losses[0] == baseline.loss
        assert report.kappa == report.error_norm / report.width.plus.t
        assert report.forecast is not None
        assert report.forecast.limit == pytest.approx(2 * baseline.tol)
        assert (report.verdict == FREE) == (report.rise <= baseline.tol)


def test_the_pitch_forecast_is_the_mean_energy_of_random_errors(blocks: TokenBlocks) -> None:
    """Monte Carlo oracle of E e'He with uniform errors in the cells and the known clip errors."""
    loss = token_loss(tiny_llama(), blocks)
    scheme = SCHEMES["W1"]
    sites = find_sites(loss.model, [scheme])
    settings = DiagnosisSettings(num_random=1, num_bisections=0, num_probes=48, num_monte_carlo=0, tol=0.02)
    _, (report,) = before_training(loss, sites, {"W1": scheme}, settings)
    params, cells = [s.weight for s in sites], round_cells(sites, scheme)
    generator = torch.Generator().manual_seed(5)
    hessian = batched_hessian(loss, params)
    samples = []
    for _ in range(48):
        error = [
            (torch.rand(p.shape, generator=generator) - 0.5) * p + c
            for p, c in zip(cells.pitch, cells.clip_error, strict=True)
        ]
        samples.append(dot(error, hessian(error)))
    mean = sum(samples) / len(samples)
    spread = math.sqrt(sum((x - mean) ** 2 for x in samples) / (len(samples) - 1) / len(samples))
    assert report.forecast is not None
    assert report.forecast.monte_carlo is None
    slack = 4 * (spread + report.forecast.trace.standard_error / 12)
    assert abs(report.forecast.energy - mean) < slack


def test_layer_rises_equal_brute_force(blocks: TokenBlocks) -> None:
    model = tiny_llama()
    before = state_of(model)
    loss = token_loss(model, blocks)
    sites = find_sites(model, list(SCHEMES.values()))
    seen: list[tuple[str, str]] = []
    table = layer_sensitivity(loss, sites, SCHEMES, on_value=lambda layer, name, _: seen.append((layer, name)))
    assert_same_state(model, before)
    assert len(seen) == len(sites) * len(SCHEMES)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        for name in SCHEMES:
            alone = prepare(copy.deepcopy(model), Rule(scheme=name, pattern=layer))
            assert table.rises[layer][name] == evaluate(alone, blocks).loss - table.base_loss
    known = {(layer, name): rise for layer, row in table.rises.items() for name, rise in row.items()}
    del known["model.layers.1.mlp.up_proj", "W2"]
    seen.clear()
    again = layer_sensitivity(loss, sites, SCHEMES, known=known, on_value=lambda a, b, _: seen.append((a, b)))
    assert again == table
    assert seen == [("model.layers.1.mlp.up_proj", "W2")]


@pytest.mark.parametrize("budget", [1.3, 2.5, 3.0, 5.0])
def test_the_recipe_keeps_the_budget_and_measures_itself(blocks: TokenBlocks, budget: float) -> None:
    model = tiny_llama()
    loss = token_loss(model, blocks)
    sites = find_sites(model, list(SCHEMES.values()))
    table = layer_sensitivity(loss, sites, SCHEMES)
    found = propose_recipe(loss, sites, SCHEMES, table, budget=budget)
    assert found.bits_per_weight <= budget
    assert found.allocation.loss <= min(sum(row["W1"] for row in table.rises.values()), 1e9)
    rules = [rule.build() for rule in found.recipe.rules]
    mixed = prepare(copy.deepcopy(model), rules)
    chosen = {name: layer.scheme for name, layer in owned_layers(mixed)}
    assert chosen == {name: SCHEMES[choice] for name, choice in found.allocation.choices.items()}
    assert found.measured_rise == evaluate(mixed, blocks).loss - table.base_loss
    assert found.uniform is not None
    assert found.uniform_rise is not None
    whole = prepare(copy.deepcopy(model), Rule(scheme=found.uniform))
    assert found.uniform_rise == evaluate(whole, blocks).loss - table.base_loss
    assert Recipe.parse(found.recipe.to_yaml()) == found.recipe


def test_a_budget_below_the_smallest_scheme_is_refused(blocks: TokenBlocks) -> None:
    loss = token_loss(tiny_llama(), blocks)
    sites = find_sites(loss.model, list(SCHEMES.values()))
    with pytest.raises(ValueError, match="raise the budget"):
        propose_recipe(loss, sites, SCHEMES, layer_sensitivity(loss, sites, SCHEMES), budget=1.0)


def test_after_compares_the_three_models(blocks: TokenBlocks) -> None:
    fp = tiny_llama()
    trained = prepare(copy.deepcopy(fp), Rule(scheme="W2"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.1 * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    before = state_of(fp), state_of(trained)
    points = triple(fp, trained)
    found = after_training(token_loss(fp, blocks), trained, tol=0.01, num_points=3)
    assert_same_state(fp, before[0])
    assert_same_state(trained, before[1])
    assert found.loss_fp == evaluate(fp, blocks).loss
    assert found.loss_ptq == evaluate(prepare(copy.deepcopy(fp), Rule(scheme="W2")), blocks).loss
    assert found.loss_deployed == evaluate(trained, blocks).loss
    assert found.loss_latent == loss_value(token_loss(trained, blocks, latent=True))
    assert found.recovered == (found.loss_deployed - found.loss_fp <= 0.02)
    codes = [
        (layer.qtensor().codes, find.quantized(layer.scheme).codes)
        for (_, layer), find in zip(owned_layers(trained), find_sites(fp, [Scheme.parse("W2")]), strict=True)
    ]
    changed = sum(int((a != b).sum()) for a, b in codes) / sum(a.numel() for a, _ in codes)
    assert found.flip_rate == changed > 0
    assert found.angle_latent is not None
    assert (
        found.angle_latent.norm_a
        == found.rounding_error_ptq
        == norm(difference(points.codes_only(points.ptq), points.codes_only(points.params)))
    )
    fp_point, ptq_point, qat_point = found.slice.points
    assert (fp_point.x, fp_point.y, ptq_point.y) == pytest.approx((0, 0, 0), abs=1e-5)
    assert ptq_point.x == pytest.approx(found.rounding_error_ptq, rel=1e-5)
    assert qat_point.y > 0
    assert qat_point.residual < 1e-3
    assert found.inward_ptq.at_latent.gradient_norm == pytest.approx(
        norm(gradient(token_loss(fp, blocks), points.params))
    )
    with pytest.raises(ValueError, match="no prepared layer"):
        triple(fp, fp)


def test_verdicts() -> None:
    log_v = math.log(256)
    assert judge(rise=-0.1, tol=0.02, loss=9.0, vocab_size=256).short == FREE
    assert judge(rise=0.03, tol=0.02, loss=log_v - 0.1, vocab_size=256).short == LEAVES
    assert judge(rise=0.03, tol=0.02, loss=log_v, vocab_size=256).short == BROKEN
    assert judge(rise=math.nan, tol=0.02, loss=math.nan, vocab_size=256).short == BROKEN
    assert "did not foretell" in judge(rise=1.0, tol=0.02, loss=1.0, vocab_size=256).long(0.5)
    for wrong in ({"tol": 0.0}, {"num_probes": 1}, {"num_random": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DiagnosisSettings(**wrong)


def test_json_holds_every_number(blocks: TokenBlocks, tmp_path: Path) -> None:
    found = diagnose(tiny_llama(), blocks, ["W4", "W1"], settings=QUICK, budget=3.0, model_name="<tiny>")
    page = write_diagnosis(found, tmp_path / "d")
    data = read_json(tmp_path / "d" / "diagnosis.json")
    assert data == found.to_dict()
    assert data["schemes"][1]["rise"] == found.schemes[1].rise
    assert data["proposal"]["allocation"]["choices"].keys() == data["layers"]["rises"].keys()
    for name in ("schemes", "profiles", "layers"):
        assert (tmp_path / "d" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / "d" / f"{name}.svg").read_text().startswith("<svg")
    text = page.read_text()
    assert "&lt;tiny&gt;" in text
    assert "<tiny>" not in text
    assert Recipe.load(tmp_path / "d" / "proposed-recipe.yaml") == found.proposal.recipe


def test_what_cannot_be_diagnosed_says_why(blocks: TokenBlocks) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="no schemes"):
        diagnose(model, blocks, [])
    with pytest.raises(ValueError, match="larger than its in_features"):
        diagnose(model, blocks, ["W2A16G128"])
    with pytest.raises(ValueError, match="shape"):
        TokenLoss(model=model, tokens=torch.zeros(3, dtype=torch.long))
    scheme = Scheme.parse("W1", rule="absmean")
    sites = find_sites(model, [scheme])
    with torch.no_grad():
        for site in sites:
            site.weight.copy_(site.weight.sign() * 0.5)
    with pytest.raises(ValueError, match="on this grid already"):
        before_training(token_loss(model, blocks), sites, {"W1": scheme}, QUICK)
