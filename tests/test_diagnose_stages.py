"""Long runs in stages: nothing is computed twice, nothing is taken from another model, a kill loses one stage."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.data import TokenBlocks
from fewbits.diagnose import Diagnosis, DiagnosisSettings, Stages
from fewbits.diagnose import diagnose as diagnose_all
from fewbits.diagnose.stages import model_digest, tensor_digest
from fewbits.geometry import Crossing
from fewbits.io import read_json
from fewbits.testing.tiny import tiny_llama, toy_blocks

QUICK = DiagnosisSettings(
    num_random=1, num_bisections=0, num_probes=2, num_monte_carlo=1, profile_points=2, curvature_blocks=1,
    num_lanczos_steps=2, num_normals=1,
)  # fmt: skip
BLOCKS = TokenBlocks(toy_blocks(2, 16).numpy(), 1.0)


def diagnose(model: torch.nn.Module, blocks: TokenBlocks, schemes: list[str], **options: Any) -> Diagnosis:
    """Four layers are enough here."""
    return diagnose_all(model, blocks, schemes, ignore=["lm_head", "*mlp*", "*v_proj", "*o_proj"], **options)


def marks(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "stages").iterdir()}


def test_the_same_call_computes_nothing_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    whole = diagnose(tiny_llama(), BLOCKS, ["W2"], settings=QUICK, budget=3.0)

    def kill(name: str, done: int, total: int) -> None:
        if name == "layer-003":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(tiny_llama(), BLOCKS, ["W2"], settings=QUICK, budget=3.0, folder=tmp_path, watch=kill)
    first = marks(tmp_path)
    assert set(first) == {
        "baseline.json",
        "scheme-00.json",
        *(f"layer-{i:03d}.json" for i in range(3)),
    }
    found = diagnose(
        tiny_llama(), BLOCKS, ["W2"], settings=QUICK, budget=3.0, folder=tmp_path,
        watch=lambda *entry: seen.append(entry),
    )  # fmt: skip
    second = marks(tmp_path)
    assert first.items() <= second.items()
    assert found == whole
    assert seen[-1] == ("", len(second), len(second))
    assert [done for _, done, _ in seen] == list(range(len(second) + 1))
    again = diagnose(tiny_llama(), BLOCKS, ["W2"], settings=QUICK, budget=3.0, folder=tmp_path)
    assert again == whole
    assert marks(tmp_path) == second


def test_other_weights_or_settings_are_computed_again(tmp_path: Path) -> None:
    model = tiny_llama()
    diagnose(model, BLOCKS, ["W2"], settings=QUICK, folder=tmp_path)
    before = marks(tmp_path)
    finer = dataclasses.replace(QUICK, num_lanczos_steps=3)
    diagnose(model, BLOCKS, ["W2"], settings=finer, folder=tmp_path)
    changed = {name for name, mark in marks(tmp_path).items() if mark != before[name]}
    assert changed == {"spectrum-00-probe-000.json", "spectrum-01-probe-000.json", "river.json"}
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    found = diagnose(model, BLOCKS, ["W2"], settings=QUICK, folder=tmp_path)
    assert found == diagnose(model, BLOCKS, ["W2"], settings=QUICK)
    assert all(mark != before[name] for name, mark in marks(tmp_path).items())


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"digest": 1}', '{"digest": "x", "result": 3}'])
def test_a_damaged_stage_is_made_again(tmp_path: Path, damage: str) -> None:
    one = Crossing(t=math.inf, below=1 / 3, above=math.inf, num_evaluations=3)
    path = tmp_path / "a.json"
    assert Stages(tmp_path, {}).run("a", Crossing, lambda: one) == one
    digest = read_json(path)["digest"]
    assert Stages(tmp_path, {}).run("a", Crossing, lambda: pytest.fail("computed again")) == one  # bit for bit, inf too
    path.write_text(damage.replace("x", digest))
    other = Crossing(t=1.0, below=1.0, above=1.0, num_evaluations=1)
    stages = Stages(tmp_path, {})
    assert stages.run("a", Crossing, lambda: other) == other
    assert stages.reused == 0
    assert read_json(path)["digest"] == digest


def test_inputs_are_part_of_the_answer(tmp_path: Path) -> None:
    values = iter(range(10))

    def ask(common: str, **inputs: float) -> int:
        return Stages(tmp_path, {"model": common}).run("a", int, lambda: next(values), **inputs)

    assert [ask("a", tol=0.1), ask("a", tol=0.1), ask("a", tol=0.2), ask("b", tol=0.2), ask("b", tol=0.2)] == [
        0,
        0,
        1,
        2,
        2,
    ]


def test_digests_see_every_bit() -> None:
    w = torch.zeros(3, dtype=torch.bfloat16)
    digests = {tensor_digest({"w": w}), tensor_digest({"v": w}), tensor_digest({"w": w.float()})}
    w[1] = -0.0
    assert len(digests | {tensor_digest({"w": w}), tensor_digest({"w": torch.tensor(0.0)})}) == 5
    assert model_digest(tiny_llama()) == model_digest(tiny_llama())
