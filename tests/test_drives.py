"""Drives: pulls toward the grid, noise before the quantizer, forward weights that harden."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fewbits.convert import Rule, convert, owned_layers, prepare
from fewbits.drives import CAGE, DRIVES, FPQ, PARQ, Drive, NoDrive, WinQ, drive_from_dict, driven_weight
from fewbits.drives.parq import inverse_slope, prox
from fewbits.fake_quant import fake_quantize
from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.nn import QATLayer
from fewbits.optim.driving import add_pulls_to_gradients_, apply_drives_, set_progress_
from fewbits.rotations import Rotation
from fewbits.scales import stored_scale
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, ClippedSTE
from fewbits.testing.tiny import TINY_MODELS

GOLDEN = [-1.3, -0.6, -0.2, 0.05, 0.12, 0.45, 0.9, 2.0]
GRIDS: list[AnyGrid] = [Binary(), Ternary(), Int(2), Int(4), HalfShifted(2), Codebook((-3.0, -1.0, 1.0, 7.0))]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
ACTIVE: list[Drive] = [
    WinQ(noise=0.05, scale_noise=0.01),
    WinQ(noise=0.3, noise_unit="step", scale_noise=0.1),
    FPQ(probability=1.0),
    PARQ(),
    PARQ(kind="binary_relax"),
]
RESTING: list[Drive] = [NoDrive(), CAGE(), WinQ(noise=0.0), FPQ(probability=0.0), PARQ(kind="hard")]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform_pitch(w: Tensor, pitch: float) -> Tensor:
    return torch.full((), pitch, dtype=w.dtype)


def layer_with(drive: Drive | None, scheme: str | Scheme = "W2HG64") -> QATLayer:
    torch.manual_seed(3)  # the same bias in every layer
    linear = nn.Linear(128, 8)
    with torch.no_grad():
        linear.weight.copy_(0.1 * rand(8, 128))
    model = prepare(nn.Sequential(linear), Rule(scheme=scheme, drive=drive))  # type: ignore[arg-type]
    assert isinstance(model[0], QATLayer)
    return model[0]


# values --------------------------------------------------------------------------------------------------------------


def test_the_registry_lists_every_drive() -> None:
    found = {c for c in Drive.__subclasses__() if c.__module__.startswith("fewbits.")}
    assert found == set(DRIVES.values())


@pytest.mark.parametrize("drive", ACTIVE + RESTING, ids=repr)
def test_dict_round_trip(drive: Drive) -> None:
    assert drive_from_dict(json.loads(json.dumps(drive.to_dict()))) == drive
    rule = Rule(scheme="W2", drive=drive)  # type: ignore[arg-type]
    assert Rule(**rule.to_dict()) == rule


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="winq"):
        drive_from_dict("winqq")
    with pytest.raises(ValueError, match="alpha"):
        drive_from_dict({"name": "winq", "alpha": 0.2})
    with pytest.raises(ValueError, match="Drive"):
        Rule(scheme="W2", drive=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (WinQ, {"toward_grid": 1.1}),
        (WinQ, {"interval": 0}),
        (WinQ, {"noise": -1.0}),
        (WinQ, {"noise": math.nan}),
        (WinQ, {"scale_noise": -1.0}),
        (WinQ, {"noise_unit": "relative"}),
        (CAGE, {"strength": -1.0}),
        (CAGE, {"silence": 1.0}),
        (CAGE, {"schedule": "cosine"}),
        (PARQ, {"kind": "soft"}),
        (PARQ, {"steepness": 0.0}),
        (PARQ, {"center": 1.5}),
        (PARQ, {"start": 0.5, "end": 0.5}),
        (FPQ, {"probability": 1.1}),
        (FPQ, {"width": 0.0}),
    ],
    ids=str,
)
def test_bad_values_are_refused(cls: type[Drive], options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        cls(**options)


# in a layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drive", ACTIVE + RESTING, ids=repr)
def test_evaluation_and_conversion_never_see_a_drive(drive: Drive) -> None:
    driven, plain = layer_with(drive), layer_with(None)
    model = nn.Sequential(driven).eval()
    x = rand(3, 128, seed=1)
    stream = torch.get_rng_state()
    assert torch.equal(model(x), plain(x))
    assert torch.equal(torch.get_rng_state(), stream)
    assert set(driven.state_dict()) == set(plain.state_dict())
    logits = model(x)
    assert torch.equal(convert(model)(x), logits)


@pytest.mark.parametrize("drive", [None, *RESTING], ids=repr)
def test_a_resting_drive_changes_nothing_in_training(drive: Drive | None) -> None:
    driven, plain = layer_with(drive), layer_with(None)
    x = rand(3, 128, seed=1)
    stream = torch.get_rng_state()
    outputs = [layer.train()(x) for layer in (driven, plain)]
    for out in outputs:
        out.square().sum().backward()
    if not isinstance(drive, FPQ):
        assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(outputs[0], outputs[1])
    for (_, a), (_, b) in zip(driven.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("drive", ACTIVE, ids=repr)
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_an_active_drive_acts_in_training_only(drive: Drive, rotation: str) -> None:
    scheme = Scheme.parse("W2HG64", rotation=Rotation(kind=rotation, block_size=32))  # type: ignore[arg-type]
    layer = layer_with(drive, scheme)
    hard = layer.qtensor().dequantize()
    assert not torch.equal(layer.train().quantized_weight(), hard)
    assert torch.equal(layer.eval().quantized_weight(), hard)
    layer.fake_quant_enabled = False
    assert layer.train().quantized_weight().data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("drive", ACTIVE[:3], ids=repr)
def test_noise_comes_from_torchs_stream_and_checkpointing_replays_it(drive: Drive) -> None:
    layer, x = layer_with(drive).train(), rand(3, 128, seed=1).requires_grad_()
    results = []
    for run in (layer, lambda y: checkpoint(layer, y, use_reentrant=False)):
        torch.manual_seed(5)
        layer.zero_grad()
        out = run(x)
        out.square().sum().backward()
        results.append((out.detach(), layer.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    assert torch.equal(first, results[0][0])
    assert not torch.equal(first, second)  # fresh noise in every forward pass


def test_tied_layers_share_one_drive_and_move_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(16, 64), "head": nn.Linear(64, 16, bias=False)})
    model["head"].weight = model["embed"].weight
    prepare(model, Rule(scheme="W2H", embeddings=True, drive=WinQ(toward_grid=0.5, interval=1, noise=0.0)), ignore=[])
    before, q = model["embed"].weight.detach().clone(), model["head"].quantized_weight().detach().clone()
    assert apply_drives_(model, step=1, total_steps=9, lr=0.0) == ["embed"]
    assert torch.equal(model["head"].weight, torch.lerp(before, q, 0.5))


def test_apply_drives_leaves_out_what_must_not_move() -> None:
    layers = {
        "plain": nn.Linear(64, 4),
        "frozen": nn.Linear(64, 4),
        "off": nn.Linear(64, 4),
        "moved": nn.Linear(64, 4),
        "conv": Conv1D(4, 64),
    }
    model = nn.ModuleDict(layers)
    drive = WinQ(toward_grid=1.0, interval=2, noise=0.0)
    prepare(model, [Rule(pattern="plain", scheme="W2"), Rule(scheme="W2", drive=drive)])
    model["frozen"].weight.requires_grad_(False)
    model["off"].fake_quant_enabled = False
    before = {name: layer.weight.detach().clone() for name, layer in model.items()}
    assert apply_drives_(model, step=1, total_steps=9, lr=0.1) == []
    assert apply_drives_(model, step=2, total_steps=9, lr=0.1) == ["moved", "conv"]
    for name in ("plain", "frozen", "off"):
        assert torch.equal(model[name].weight, before[name])
    for name in ("moved", "conv"):
        assert torch.equal(model[name].latent(), model[name].quantized_weight())  # a = 1: on the grid exactly
    assert model["moved"].progress == 2 / 9
    set_progress_(model, 0.25)
    assert all(layer.progress == 0.25 for layer in model.values())
    for step in (0, 10):
        with pytest.raises(ValueError, match="step"):
            apply_drives_(model, step=step, total_steps=9, lr=0.1)
    with pytest.raises(ValueError, match="progress"):
        set_progress_(model, 1.1)


# WinQ ----------------------------------------------------------------------------------------------------------------


def test_winq_golden_pull() -> None:
    # methods.md 0.4: LSQ at 2 bits, step .5, pull .4; the distance to the grid shrinks by exactly 1 - a
    w = torch.tensor([GOLDEN], dtype=torch.float64)
    scheme, scale = Scheme.parse("W2"), torch.tensor([[0.5]])
    q = fake_quantize(w, scheme, scale)
    before = w.clone()
    assert WinQ(toward_grid=0.4, interval=1).after_step_(w, q, step=1, total_steps=2, lr=0.0)
    assert w[0].tolist() == pytest.approx([-1.18, -0.56, -0.12, 0.03, 0.072, 0.47, 0.74, 1.4], abs=1e-12)
    assert torch.equal(fake_quantize(w, scheme, scale), q)
    assert ((w - q).norm() / (before - q).norm()).item() == pytest.approx(0.6, abs=1e-12)


@every_grid
def test_winq_moves_no_code_and_has_its_two_limits(grid: AnyGrid) -> None:
    scheme, w = Scheme(grid=grid), rand(4, 32)
    scale = torch.full((4, 1), 0.3)
    q = fake_quantize(w, scheme, scale)
    for a in (0.0, 0.3, 0.7, 1.0):
        moved = w.clone()
        changed = WinQ(toward_grid=a, interval=1).after_step_(moved, q, step=1, total_steps=2, lr=0.0)
        assert changed == (a > 0)
        assert torch.equal(fake_quantize(moved, scheme, scale), q)
        torch.testing.assert_close(moved - q, (1 - a) * (w - q), rtol=0, atol=1e-6)
        if a in (0.0, 1.0):
            assert torch.equal(moved, q if a else w)


def test_winq_pulls_when_it_should() -> None:
    def steps(drive: WinQ, total: int) -> list[int]:
        return [t for t in range(1, total + 1) if drive.pull(step=t, total_steps=total, lr=0.0) > 0]

    assert steps(WinQ(interval=30), 100) == [30, 60, 90]
    assert steps(WinQ(interval=25), 100) == [25, 50, 75]  # not after the last step
    assert steps(WinQ(), 100) == [25, 50, 75]  # a quarter of the run
    assert steps(WinQ(), 3) == [1, 2]


def test_a_dynamic_scale_moves_with_the_pull() -> None:
    w = rand(4, 64)
    scheme = Scheme.parse("W2H", rule="absmean", mode="dynamic")
    before = fake_quantize(w, scheme)
    WinQ(toward_grid=0.8, interval=1).after_step_(w, before, step=1, total_steps=2, lr=0.0)
    assert not torch.allclose(fake_quantize(w, scheme), before)


def test_winq_noise_has_its_size_and_passes_the_gradient() -> None:
    w = torch.zeros(400, 500)
    pitch = torch.linspace(0.1, 0.2, 400)[:, None]
    generator = torch.Generator().manual_seed(0)
    absolute = WinQ(noise=0.01).perturb(w, pitch, generator)
    relative = WinQ(noise=0.25, noise_unit="step").perturb(w, pitch, generator)
    assert absolute.std().item() == pytest.approx(0.01, rel=0.01)
    assert (relative / pitch).std().item() == pytest.approx(0.25, rel=0.01)
    assert abs(relative.mean().item()) < 5 * 0.25 * 0.15 / math.sqrt(w.numel())
    x = rand(2, 8).requires_grad_()
    WinQ(noise=0.1).perturb(x, pitch[:2], generator).backward(torch.ones(2, 8))
    assert torch.equal(x.grad, torch.ones(2, 8))


def test_winq_mean_of_a_noisy_sign_quantizer_is_an_error_function() -> None:
    n, sigma, s = 200_000, 0.3, 0.5
    for x in (-0.4, 0.05, 0.2):
        w = torch.full((1, n), x)
        out = driven_weight(
            WinQ(noise=sigma),
            w,
            Scheme.parse("W1"),
            torch.tensor([[s]]),
            STE(),
            {},
            progress=0.0,
            generator=torch.Generator().manual_seed(1),
        )
        assert set(out.unique().tolist()) <= {-s, s}
        assert out.mean().item() == pytest.approx(s * math.erf(x / (sigma * math.sqrt(2))), abs=6 * s / math.sqrt(n))


def test_winq_gradient_is_taken_at_the_noisy_point() -> None:
    # a clip mask: share of weights that the noise leaves within the levels
    n, sigma, x = 100_000, 0.5, 1.2
    w = torch.full((1, n), x).requires_grad_()
    scale = torch.ones(1, 1).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    out = driven_weight(
        WinQ(noise=sigma), w, Scheme.parse("W1"), scale, ClippedSTE(), {}, progress=0, generator=generator
    )
    out.sum().backward()
    expected = 0.5 * (math.erf((1 - x) / (sigma * math.sqrt(2))) - math.erf((-1 - x) / (sigma * math.sqrt(2))))
    assert w.grad.mean().item() == pytest.approx(expected, abs=0.006)
    assert scale.grad.abs().item() > 0


def test_scale_noise_passes_the_gradient_and_keeps_scales_positive() -> None:
    raw = torch.full((64, 1), 0.01).requires_grad_()
    noisy = WinQ(noise=0.0, scale_noise=0.02).perturb_scale(raw, torch.Generator().manual_seed(0))
    assert (noisy < 0).any()
    assert (stored_scale(noisy, Scheme.parse("W2").scale) > 0).all()
    relative = WinQ(noise=0.0, scale_noise=0.5, noise_unit="step").perturb_scale(raw, torch.Generator().manual_seed(0))
    torch.testing.assert_close(relative - raw, (noisy - raw) * 0.5 * 0.01 / 0.02)
    relative.sum().backward()
    assert torch.equal(raw.grad, torch.ones(64, 1))


# CAGE ----------------------------------------------------------------------------------------------------------------


def one_dimensional(
    cage: CAGE, start: float, *, lr: float, total: int, h: float = 2, a: float = 0.8
) -> Iterator[float]:
    """Gradient descent on h/2 (x - a)^2 with the gradient at round(x), then the pull: optimizer before drive."""
    x, grid = torch.tensor([start], dtype=torch.float64), Int(8)
    for step in range(1, total + 1):
        x -= lr * h * (grid.project_(x.clone()) - a)
        cage.after_step_(x, grid.project_(x.clone()), step=step, total_steps=total, lr=lr)
        yield x.item()


@pytest.mark.parametrize(("strength", "start", "q"), [(3.0, 0.2, 1), (10.0, 0.2, 0), (10.0, 0.7, 1)])
def test_cage_fixed_points_in_one_dimension(strength: float, start: float, q: int) -> None:
    # x = q + h (a - q) / lambda; in discrete form, pull after the step, times 1 - lr lambda
    lr, h, a = 0.002, 2.0, 0.8
    constant = CAGE(strength=strength, silence=0.0, schedule="constant")
    *_, x = one_dimensional(constant, start, lr=lr, total=4000)
    assert x == pytest.approx(q + (1 - lr * strength) * h * (a - q) / strength, abs=1e-8)
    assert x == pytest.approx({(3.0, 1): 0.8667, (10.0, 0): 0.1568, (10.0, 1): 0.96}[strength, q], abs=1e-3)


def test_cage_needs_silence_and_ramp_to_leave_the_wrong_cell() -> None:
    stuck = CAGE(strength=10.0, silence=0.0, schedule="constant")
    *_, x = one_dimensional(stuck, 0.2, lr=0.002, total=4000)
    assert round(x) == 0  # a = .8 should round to 1
    *_, x = one_dimensional(CAGE(strength=10.0, silence=0.8), 0.2, lr=0.002, total=8000)
    assert round(x) == 1


def test_without_cage_the_weight_oscillates_around_the_boundary() -> None:
    path = list(one_dimensional(CAGE(strength=0.0), 0.2, lr=0.002, total=6000))[1000:]
    assert all(abs(x - 0.5) < 0.005 for x in path)
    assert sum(x > 0.5 for x in path) / len(path) == pytest.approx(0.8, abs=0.01)


def test_cage_schedule() -> None:
    ramp = CAGE(strength=4.0, silence=0.5)
    assert [ramp.pull(step=t, total_steps=8, lr=0.1) for t in (1, 4)] == [0.0, 0.0]
    assert [ramp.pull(step=t, total_steps=8, lr=0.1) for t in (5, 6, 8)] == pytest.approx([0.1, 0.2, 0.4])
    flat = CAGE(strength=4.0, silence=0.5, schedule="constant")
    assert [flat.pull(step=t, total_steps=8, lr=0.1) for t in (4, 5, 8)] == pytest.approx([0.0, 0.4, 0.4])
    assert CAGE(silence=0.0).pull(step=8, total_steps=8, lr=0.0) == 0.0  # a learning rate that decayed to 0
    with pytest.raises(ValueError, match="strength"):
        CAGE(strength=20.0, silence=0.0).pull(step=8, total_steps=8, lr=0.1)


@pytest.mark.parametrize(("strength", "q"), [(3.0, 1), (10.0, 0)])
def test_coupled_cage_rests_exactly_at_the_stationary_point(strength: float, q: int) -> None:
    """q + h (a - q) / lambda, without the decoupled form's factor 1 - lr lambda; one start, cells 1 and 0."""
    cage = CAGE(strength=strength, silence=0.0, schedule="constant", coupled=True)
    h, a, lr, total = 2.0, 0.8, 0.002, 8000
    x = 0.2
    for step in range(1, total + 1):
        level = float(round(x))
        x -= lr * (h * (level - a) + cage.gradient_pull(step=step, total_steps=total) * (x - level))
        assert cage.pull(step=step, total_steps=total, lr=lr) == 0
    assert x == pytest.approx(q + h * (a - q) / strength, abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_coupled_pulls_are_added_to_gradients_of_driven_layers_only(name: str) -> None:
    cage = CAGE(strength=2.0, silence=0.5, coupled=True)
    rules = [Rule(pattern="*mlp*", scheme="W2", drive=cage), Rule(scheme="W2", drive=CAGE(strength=2.0))]
    model = prepare(TINY_MODELS[name](), rules)
    with pytest.raises(ValueError, match="there are none"):
        add_pulls_to_gradients_(model, step=4, total_steps=4)
    ids = torch.arange(24).view(1, 24)
    model(input_ids=ids, labels=ids).loss.backward()
    before = {key: layer.weight.grad.clone() for key, layer in owned_layers(model)}
    assert add_pulls_to_gradients_(model, step=2, total_steps=4) == []
    pulled = add_pulls_to_gradients_(model, step=3, total_steps=4)
    assert pulled == [key for key in before if ".mlp." in key]
    for key, layer in owned_layers(model):
        error = (layer.latent() - layer.quantized_weight()).detach()
        error = error.t() if layer.transposed else error
        torch.testing.assert_close(layer.weight.grad, before[key] + (key in pulled) * error, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="step=5 is outside"):
        add_pulls_to_gradients_(model, step=5, total_steps=4)
    with pytest.raises(ValueError, match="must be true or false"):
        CAGE(coupled=1)  # type: ignore[arg-type]


def test_cage_limits() -> None:
    w = rand(64)
    q = HalfShifted(2).project_(w.clone())
    full = CAGE(strength=10.0, silence=0.0, schedule="constant")
    moved = w.clone()
    assert full.after_step_(moved, q, step=1, total_steps=1, lr=0.1)
    assert torch.equal(moved, q)  # lr * lambda = 1
    on_grid = q.clone()
    assert full.after_step_(on_grid, q, step=1, total_steps=1, lr=0.03)
    assert torch.equal(on_grid, q)
    assert not CAGE(silence=0.9).after_step_(moved, w, step=1, total_steps=2, lr=0.1)


# PARQ ----------------------------------------------------------------------------------------------------------------


def test_parq_schedule_golden() -> None:
    found = [inverse_slope(f) for f in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([1, 0.9299, 0.5, 0.0701, 0], abs=5e-5)


@pytest.mark.parametrize("center", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("steepness", [0.01, 1.0, 10.0, 50.0])
def test_parq_schedule_is_normalised_for_any_center(center: float, steepness: float) -> None:
    def at(f: float) -> float:
        return inverse_slope(f, steepness=steepness, center=center)

    assert at(0.0) == 1.0
    assert at(1.0) == 0.0
    assert at(-3.0) == 1.0
    assert at(7.0) == 0.0
    values = [at(i / 50) for i in range(51)]
    assert all(a >= b for a, b in itertools.pairwise(values))

    def sigma(f: float) -> float:
        return 1 / (1 + math.exp(steepness * (f - center)))

    assert at(0.35) == pytest.approx((sigma(0.35) - sigma(1)) / (sigma(0) - sigma(1)), abs=1e-9)
    if steepness == 0.01:
        assert values == pytest.approx([1 - i / 50 for i in range(51)], abs=2e-3)


def test_parq_prox_golden() -> None:
    grid, p = Codebook((0.0, 1.0)), torch.tensor([0.1, 0.4, 0.6, 0.9, 1.4], dtype=torch.float64)
    for inverse, expected in {1.0: [0.1, 0.4, 0.6, 0.9, 1], 0.5: [0, 0.3, 0.7, 1, 1], 0.1: [0, 0, 1, 1, 1]}.items():
        assert prox(p, grid, inverse).tolist() == pytest.approx(expected, abs=1e-12)
    assert prox(p, grid, 0.0).tolist() == [0, 0, 1, 1, 1]


@every_grid
def test_parq_prox_properties(grid: AnyGrid) -> None:
    v = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    low, high = grid.level_edge
    torch.testing.assert_close(prox(v, grid, 1.0), v.clamp(low, high), rtol=0, atol=1e-12)
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    for inverse in (1.0, 0.6, 0.2, 0.01):
        out = prox(v, grid, inverse)
        assert (out.diff() >= -1e-12).all()
        assert out.diff().max().item() <= (v[1] - v[0]).item() / inverse + 1e-9  # continuous
        torch.testing.assert_close(prox(levels, grid, inverse), levels, rtol=0, atol=1e-12)
        boundary = (levels[1:] + levels[:-1]) / 2
        torch.testing.assert_close(prox(boundary, grid, inverse), boundary, rtol=0, atol=1e-12)
    far = (v[:, None] - (levels[1:] + levels[:-1]) / 2).abs().amin(1) > 0.05
    assert torch.equal(prox(v, grid, 1e-3)[far], grid.project_(v.clone())[far])


@pytest.mark.parametrize("kind", ["parq", "binary_relax"])
@pytest.mark.parametrize("rotation", ["none", "random_hadamard"])
def test_parq_goes_from_identity_to_the_quantizer(kind: str, rotation: str) -> None:
    scheme = Scheme.parse("W3HG64", rule="absmax", rotation=Rotation(kind=rotation, block_size=32))  # type: ignore[arg-type]
    layer = layer_with(PARQ(kind=kind, start=0.2, end=0.8), scheme).train()  # type: ignore[arg-type]
    hard = layer.qtensor().dequantize()
    errors = []
    for progress in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0):
        layer.progress = progress
        errors.append((layer.quantized_weight() - hard).abs().mean().item())
    # absmax scales are rounded to 8 bits, which may cut the largest weight of a group by 2^-9; a rotation spreads that
    layer.progress = 0.1
    atol = 2**-9 * layer.weight.abs().max().item()
    torch.testing.assert_close(layer.quantized_weight(), layer.weight, rtol=0, atol=atol)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert errors[-2:] == [0.0, 0.0]
    layer.progress = 0.8
    assert torch.equal(layer.quantized_weight(), hard)


@pytest.mark.parametrize("kind", ["parq", "binary_relax"])
def test_parq_gradients_are_those_of_the_hard_quantizer(kind: str) -> None:
    soft = layer_with(PARQ(kind=kind)).train()  # type: ignore[arg-type]
    hard = layer_with(None)
    soft.progress = 0.5
    upstream = rand(8, 128, seed=3)
    for layer in (soft, hard):
        layer.quantized_weight().backward(upstream)
    assert torch.equal(soft.weight.grad, upstream)  # the gradient at the prox, unchanged
    assert torch.equal(soft.weight.grad, hard.weight.grad)
    assert isinstance(soft.weight_scale, nn.Parameter)
    assert isinstance(hard.weight_scale, nn.Parameter)
    assert torch.equal(soft.weight_scale.grad, hard.weight_scale.grad)


def test_binary_relax_golden() -> None:
    w = torch.tensor([GOLDEN])
    scheme, scale = Scheme.parse("W2"), torch.tensor([[0.5]])
    out = driven_weight(PARQ(kind="binary_relax"), w, scheme, scale, STE(), {}, progress=0.5)  # theta = 1/2
    assert out[0].tolist() == pytest.approx([-1.15, -0.55, -0.1, 0.025, 0.06, 0.475, 0.7, 1.25], abs=1e-6)


def test_parq_golden_on_the_two_bit_grid() -> None:
    # levels -1, -.5, 0, .5; rho = 1/2: midpoint + 2 (w - midpoint), clipped to the two levels
    w = torch.tensor([GOLDEN])
    out = driven_weight(PARQ(), w, Scheme.parse("W2"), torch.tensor([[0.5]]), STE(), {}, progress=0.5)
    assert out[0].tolist() == pytest.approx([-1.0, -0.5, -0.15, 0.0, 0.0, 0.5, 0.5, 0.5], abs=1e-6)


# FPQ -----------------------------------------------------------------------------------------------------------------


def test_fpq_noise_is_uniform_and_one_cell_wide() -> None:
    w, pitch = torch.zeros(1000, 200), torch.tensor(0.3)
    noise = FPQ(probability=1.0).perturb(w, pitch, torch.Generator().manual_seed(0))
    assert noise.abs().max().item() <= 0.15
    assert noise.var().item() == pytest.approx(0.3**2 / 12, rel=0.01)
    # a quadratic loss with H = diag(1, 2, 5) rises by (s^2 / 24) tr H = .03 on average
    h = torch.tensor([1.0, 2.0, 5.0])
    sample = noise.flatten()[: 3 * 60_000].view(-1, 3)
    assert (0.5 * h * sample.square()).sum(1).mean().item() == pytest.approx(0.03, rel=0.02)


def test_fpq_is_stochastic_rounding() -> None:
    n = 100_000
    for x in (-1.1, 0.13, 0.8):
        out = driven_weight(
            FPQ(probability=1.0),
            torch.full((1, n), x),
            Scheme.parse("W2H"),
            torch.ones(1, 1),
            STE(),
            {},
            progress=0.0,
            generator=torch.Generator().manual_seed(0),
        )
        assert out.mean().item() == pytest.approx(x, abs=4 * 0.5 / math.sqrt(n))


def test_fpq_acts_with_its_probability() -> None:
    w, generator = torch.zeros(1, 2), torch.Generator().manual_seed(0)
    acted = [bool(FPQ(probability=0.3).perturb(w, torch.ones(()), generator).any()) for _ in range(2000)]
    assert sum(acted) / 2000 == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 2000))
