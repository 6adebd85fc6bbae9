"""The recorded path: sketches of the weights, projected on a plane when training is over, against exact projections."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from fewbits.convert import Rule, owned_layers, prepare
from fewbits.data import TokenBlocks
from fewbits.diagnose import TrajectoryWriter, after_training, read_trajectory, token_loss, triple
from fewbits.diagnose.after import LINES
from fewbits.diagnose.trajectory import weights_of
from fewbits.geometry import CountSketch, loss_value, placed, plane_through
from fewbits.testing.tiny import tiny_gpt2, tiny_llama, toy_blocks

BLOCKS = TokenBlocks(toy_blocks(2, 16).numpy(), 1.0)
SIZE = 1 << 14


def walk_(model: torch.nn.Module, seed: int) -> None:
    """Move every parameter by a tenth of its spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.std(correction=0) * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize(
    "build", [tiny_llama, lambda: tiny_llama(tie=True), tiny_gpt2], ids=["llama", "tied llama", "gpt2"]
)
def test_the_weights_are_those_of_the_triple(build) -> None:  # type: ignore[no-untyped-def]
    fp = build()
    trained = prepare(copy.deepcopy(fp), Rule(scheme="W2", embeddings=fp.config.tie_word_embeddings), ignore=[])
    walk_(trained, 0)
    points = triple(fp, trained)
    names = [name for name, _ in fp.named_parameters()]
    for deployed, point in ((False, points.latent), (True, points.deployed)):
        found = weights_of(trained, deployed=deployed)
        assert sorted(found) == sorted(names)
        assert all(torch.equal(found[name], value) for name, value in zip(names, point, strict=True))
    assert {n: p.data_ptr() for n, p in weights_of(fp, deployed=True).items()} == {
        n: p.data_ptr() for n, p in fp.named_parameters()
    }


def test_projections_of_sketches_are_close_to_exact_ones(tmp_path: Path) -> None:
    fp = tiny_llama()
    trained = prepare(copy.deepcopy(fp), Rule(scheme="W2"))
    writer = TrajectoryWriter(tmp_path / "t", CountSketch(size=SIZE))
    exact = []
    for step in (0, 3, 10):
        writer.write(step, trained)
        exact.append(triple(fp, trained))
        walk_(trained, step)
    trajectory = read_trajectory(tmp_path / "t")
    assert trajectory is not None
    assert trajectory.steps == (0, 3, 10)
    points = exact[-1]
    plane = plane_through(points.params, points.ptq, points.deployed)
    names = [name for name, _ in fp.named_parameters()]
    bound = 5 * trajectory.sketch.relative_error
    for deployed in (False, True):
        for got, at in zip(trajectory.project(plane, names, deployed=deployed), exact, strict=True):
            want = plane.project(at.deployed if deployed else at.latent)
            length = math.sqrt(want.x**2 + want.y**2 + want.residual**2)
            assert abs(got.x - want.x) <= bound * length + 1e-5
            assert abs(got.y - want.y) <= bound * length + 1e-5
            assert abs(got.residual - want.residual) <= 2 * bound * length + 1e-5
    with pytest.raises(ValueError, match="other parameters"):
        trajectory.project(plane, names[1:], deployed=True)

    found = after_training(token_loss(fp, BLOCKS), trained, tol=0.02, num_points=2, trajectory=trajectory)
    assert found.path_steps == (0, 3, 10)
    assert len(found.path_latent) == len(found.path_deployed) == 3
    xs = [p.x for p in (*found.path_latent, *found.path_deployed)]
    assert found.slice.xs[0] <= min(xs)
    assert max(xs) <= found.slice.xs[-1]


def test_lines_between_models_end_at_the_models() -> None:
    fp = tiny_llama()
    trained = prepare(copy.deepcopy(fp), Rule(scheme="W2"))
    walk_(trained, 1)
    loss = token_loss(fp, BLOCKS)
    points = triple(fp, trained)
    found = after_training(loss, trained, tol=0.02, num_points=2)
    assert (found.path_steps, found.path_latent, found.path_deployed) == ((), (), ())
    assert set(found.profiles) == set(LINES)
    for name, ends in LINES.items():
        line = dict(zip(found.profiles[name].ts, found.profiles[name].losses, strict=True))
        for t, end in enumerate(ends):
            with placed(points.params, getattr(points, end)):
                assert line[float(t)] == pytest.approx(loss_value(loss), abs=1e-5)


def test_resuming_drops_later_points_and_damage_is_named(tmp_path: Path) -> None:
    assert read_trajectory(tmp_path) is None
    model = prepare(tiny_llama(), Rule(scheme="W2"))
    writer = TrajectoryWriter(tmp_path, CountSketch(size=64))
    for step in (0, 5, 10):
        writer.write(step, model)
    writer.resume_at(5)
    found = read_trajectory(tmp_path)
    assert found is not None
    assert found.steps == (0, 5)
    TrajectoryWriter(tmp_path, CountSketch(size=64, seed=1)).write(7, model)
    with pytest.raises(ValueError, match="mixes"):
        read_trajectory(tmp_path)
    writer.resume_at(5)
    path = tmp_path / "step-00000005.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        read_trajectory(tmp_path)
    path.rename(tmp_path / "step-x.safetensors")
    with pytest.raises(ValueError, match="step-NUMBER"):
        read_trajectory(tmp_path)


def test_the_state_of_the_model_is_not_touched(tmp_path: Path) -> None:
    model = prepare(tiny_llama(), Rule(scheme="W2"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    TrajectoryWriter(tmp_path, CountSketch(size=16)).write(0, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(layer.fake_quant_enabled for _, layer in owned_layers(model))
