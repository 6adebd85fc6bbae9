"""Code-preserving windows and the calibration of the gain, against direct computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from fewbits.convert import Rule, owned_layers, prepare
from fewbits.data import TokenBlocks
from fewbits.objectives import Objective
from fewbits.rotations import Rotation
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, JacQuant
from fewbits.testing.tiny import tiny_llama, toy_text
from fewbits.training import QATSettings, QATTrainer
from fewbits.training.callback import QATCallback
from fewbits.training.metrics import read_metrics
from fewbits.training.windows import CodeWindows, WindowsCallback, calibration


def one_layer(scheme: Scheme | str = "W2", surrogate: Any = None, width: int = 64, rows: int = 3) -> Any:
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    rule = Rule(scheme=scheme, surrogate=surrogate or STE())
    return prepare(nn.Sequential(nn.Linear(width, rows, bias=False)), rule)


def set_codes(model: Any, codes: Tensor) -> None:
    """Weights right on the levels of an Int grid."""
    with torch.no_grad():
        model[0].weight.copy_(codes.float() * model[0].qtensor().scale)
    assert torch.equal(model[0].qtensor().codes.long(), codes)


# windows ------------------------------------------------------------------------------------------------------------


def test_windows_of_a_random_history_equal_a_loop_over_weights() -> None:
    model, num_steps, rows, width = one_layer(), 40, 3, 64
    history = [torch.randint(-2, 2, (rows, width))]
    for t in range(1, num_steps + 1):
        flip = torch.rand(rows, width) < (0.0 if t % 7 in (2, 3) else 0.1)
        history.append(torch.where(flip, torch.randint(-2, 2, (rows, width)), history[-1]))
    set_codes(model, history[0])
    windows = CodeWindows()
    windows.start(model)
    for t in range(1, num_steps + 1):
        set_codes(model, history[t])
        windows.look(model, step=t)
    found = windows.summary()["0"]

    flips, lengths, returns, never = np.zeros((4, 4), int), [], 0, 0
    for r in range(rows):
        for c in range(width):
            track = [int(codes[r, c]) for codes in history]
            times = [t for t in range(1, num_steps + 1) if track[t] != track[t - 1]]
            never += not times
            lengths += [b - a for a, b in zip(times, times[1:], strict=False)]  # noqa: RUF007
            for i, t in enumerate(times):
                flips[track[t - 1] + 2, track[t] + 2] += 1
                returns += i > 0 and track[t] == track[times[i - 1] - 1]
    total = flips.sum()
    changes = [t for t in range(1, num_steps + 1) if not torch.equal(history[t], history[t - 1])]
    layer = [b - a for a, b in zip([0, *changes], changes, strict=False)]
    assert found["flips"] == flips.tolist()
    assert found["num_steps"] == num_steps
    assert found["flip_rate"] == pytest.approx(total / (num_steps * rows * width))
    assert found["mean_window"] == pytest.approx(1 / found["flip_rate"])
    counts = np.bincount([int(np.log2(n)) for n in lengths])
    assert found["window_counts"] == counts.tolist()
    assert found["never_flipped"] == pytest.approx(never / (rows * width))
    assert found["return_share"] == pytest.approx(returns / total)
    assert found["jump_share"] == pytest.approx(
        sum(flips[a, b] for a in range(4) for b in range(4) if abs(a - b) > 1) / total
    )
    assert found["outer_share"] == pytest.approx(1 - (flips[1, 2] + flips[2, 1]) / total)
    assert found["layer_window_mean"] == pytest.approx(np.mean(layer))
    assert found["layer_window_max"] == max(layer)
    assert max(layer) >= 3
    assert 0 < never < rows * width


def test_a_window_is_one_of_codes_not_of_dequantized_weights() -> None:
    """With dynamic scales the deployed weight moves while every code stays."""
    model = one_layer(Scheme.parse("W2", rule="absmax", mode="dynamic", dtype="fp32"))
    windows = CodeWindows()
    windows.start(model, step=5)
    before = model[0].quantized_weight().detach()
    with torch.no_grad():
        model[0].weight.mul_(1.25)
    windows.look(model, step=9)
    assert not torch.equal(model[0].quantized_weight(), before)
    found = windows.summary()["0"]
    assert (found["flip_rate"], found["mean_window"], found["layer_window_max"]) == (0.0, float("inf"), 4)
    assert (found["never_flipped"], found["window_counts"], found["num_steps"]) == (1.0, [], 4)


def test_wrong_looks_are_refused() -> None:
    model = one_layer()
    windows = CodeWindows()
    windows.start(model, step=3)
    with pytest.raises(ValueError, match="step=3 must be larger than 3"):
        windows.look(model, step=3)
    with pytest.raises(ValueError, match="was not there at the start"):
        windows.look(nn.ModuleDict({"other": model[0]}), step=4)
    with pytest.raises(ValueError, match="interval=0"):
        WindowsCallback(0)


# calibration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_calibration_equals_a_loop_over_groups(width: int, rotation: Any) -> None:
    """Also for a ragged last group; in the coordinates of the quantizer, at the present scale."""
    rotation_of = Rotation(kind=rotation, block_size=4) if rotation != "none" else Rotation()
    model = one_layer(Scheme.parse("W2", rotation=rotation_of), JacQuant(group_size=32), width)
    layer = model[0]
    layer.state()["gain"].uniform_(0.2, 1)
    old = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight[:2].add_(0.05 * torch.randn(2, width))
        layer.weight_scale.mul_(1.1)
    found = calibration(layer, old)
    s = layer.qtensor().scale.double()
    x0, x1 = (rotation_of.apply(w.float()).double() for w in (old, layer.weight.detach()))
    q0, q1 = ((x / s).round().clamp(-2, 1) * s for x in (x0, x1))
    cal, identity, best, slopes, gains = [], [], [], [], []
    for r in range(2):
        for g, start in enumerate(range(0, width, 32)):
            part = slice(start, min(start + 32, width))
            dw, dq = x1[r, part] - x0[r, part], q1[r, part] - q0[r, part]
            b, slope = layer.state()["gain"][r, g].item(), (dq @ dw / (dw @ dw)).item()
            for values, gain in ((cal, b), (identity, 1.0), (best, slope)):
                values.append(((dq - gain * dw).square().sum() / (dw @ dw)).item())
            slopes.append(slope)
            gains.append(b)
    expected = {
        "moved_share": 2 / 3,
        "cal": np.mean(cal),
        "cal_identity": np.mean(identity),
        "cal_best": np.mean(best),
        "slope_mean": np.mean(slopes),
        "slope_std": np.std(slopes),
        "slope_gain_corr": np.corrcoef(slopes, gains)[0, 1],
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert found["cal_best"] < min(found["cal"], found["cal_identity"])


@pytest.mark.parametrize(("sigma", "residual"), [(1 / 50, 39.0), (1 / 10, 7.0)])
def test_no_gain_predicts_small_moves_of_a_hard_quantizer(sigma: float, residual: float) -> None:
    """papers.md 6: the relative residual at the best gain is about .798 D / sigma - 1 (its table: 39 and 7.0)."""
    model = one_layer(Scheme.parse("W4", rule="absmax", dtype="fp32"), width=8192, rows=16)
    layer = model[0]
    with torch.no_grad():
        layer.weight_scale.fill_(1.0)
        layer.weight.uniform_(-6, 6)
        old = layer.weight.detach().clone()
        layer.weight.add_(sigma * torch.randn_like(layer.weight))
    found = calibration(layer, old)
    assert found["slope_mean"] == pytest.approx(1.0, abs=0.1)
    assert found["cal_identity"] == pytest.approx(residual, rel=0.05)
    assert found["cal_identity"] == pytest.approx((2 / np.pi) ** 0.5 / sigma - 1, rel=0.05)


def test_large_moves_are_predicted_by_the_share_inside() -> None:
    """Moves of ten steps inside a fine grid follow the latent weight; of saturated weights nothing follows."""
    layer = one_layer("W8", JacQuant(group_size=32), width=64)[0]
    with torch.no_grad():
        layer.weight_scale.fill_(1.0)
        layer.weight[:, :32].uniform_(-60, 60)
        layer.weight[:, 32:] = 1000.0
        old = layer.weight.detach().clone()
        layer.weight.add_(10 * torch.randn_like(layer.weight))
        layer.state()["gain"].copy_(torch.tensor([1.0, 0.0]))
    found = calibration(layer, old)
    assert found["cal"] < 2e-3
    assert found["cal_identity"] == pytest.approx(0.5, abs=0.01)
    assert found["slope_gain_corr"] > 0.999


# in training --------------------------------------------------------------------------------------------------------


def trainer(folder: Path, *, calibrate: bool, max_steps: int = 6, callbacks: Any = None) -> QATTrainer:
    data = np.frombuffer(toy_text(30).encode(), dtype=np.uint8)
    train = TokenBlocks(data[: len(data) // 16 * 16].reshape(-1, 16).astype(np.int32), 1.0)
    model = prepare(tiny_llama(), Rule(scheme="W2A16G32", surrogate=JacQuant(interval=3, group_size=32, beta=0.5)))
    args = TrainingArguments(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=4, learning_rate=3e-3, use_cpu=True,
        save_strategy="steps", save_steps=3, logging_steps=1, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, lr_scheduler_type="constant",
    )  # fmt: skip
    settings = QATSettings(objective=Objective(cross_entropy=1.0, kl=0.0))
    made = QATTrainer(model, args, settings=settings, train_dataset=train, callbacks=callbacks)
    made.qat_callback.telemetry.calibration = calibrate
    return made


def test_calibration_is_telemetry_that_changes_nothing_and_survives_a_resume(tmp_path: Path) -> None:
    on = trainer(tmp_path / "on", calibrate=True)
    start = {name: layer.latent().detach().clone() for name, layer in owned_layers(on.model)}
    on.train()
    off = trainer(tmp_path / "off", calibrate=False)
    watch = WindowsCallback()
    off.add_callback(watch)
    off.train()
    state_on, state_off = on.model.state_dict(), off.model.state_dict()
    assert all(torch.equal(state_on[k], state_off[k]) for k in state_on)
    rows = [r for r in read_metrics(tmp_path / "on/metrics.jsonl") if "layers" in r]
    assert [r["step"] for r in rows] == [3, 6]
    assert all("qat/cal" in r and "qat/slope_mean" in r for r in rows)
    assert not any("qat/cal" in r for r in read_metrics(tmp_path / "off/metrics.jsonl"))

    early = trainer(tmp_path / "early", calibrate=False, max_steps=3)
    gains = {name: torch.ones_like(layer.state()["gain"]) for name, layer in owned_layers(early.model)}
    early.train()
    for name, layer in owned_layers(early.model):
        layer.state()["gain"].copy_(gains[name])  # the gain that was in use, not the refreshed one
        assert rows[0]["layers"][name]["cal"] == pytest.approx(calibration(layer, start[name])["cal"])

    resumed = trainer(tmp_path / "on", calibrate=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "on/checkpoint-3"))
    assert [r for r in read_metrics(tmp_path / "on/metrics.jsonl") if "layers" in r] == rows

    summary = watch.windows.summary()
    flips = {r["step"]: r["layers"] for r in rows}
    for name in start:
        assert summary[name]["num_steps"] == 6
        seen = sum(flips[step][name]["flip_rate"] for step in (3, 6))  # flips there and back go unseen
        assert 0 < seen <= 6 * summary[name]["flip_rate"] + 1e-6


def test_the_callback_takes_the_option() -> None:
    assert QATCallback(calibration=True).telemetry.calibration
    assert not QATCallback().telemetry.calibration
