"""The command on a tiny checkpoint, and a training watched by the callback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from fewbits.cli import app
from fewbits.convert import Rule, prepare
from fewbits.data import TokenBlocks
from fewbits.diagnose import (
    RecoveryCallback,
    token_loss,
)
from fewbits.diagnose.arms import CONTROL, PTQ, QAT
from fewbits.diagnose.river import SMOOTHED
from fewbits.evaluate import evaluate
from fewbits.geometry import loss_value
from fewbits.io import read_json
from fewbits.pipeline import run
from fewbits.recipe import Recipe
from fewbits.testing.tiny import tiny_llama, toy_blocks, toy_text
from fewbits.training.metrics import read_metrics


@pytest.fixture(scope="module")
def blocks() -> TokenBlocks:
    return TokenBlocks(toy_blocks(6, 16).numpy(), 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny byte-level checkpoint that knows its text a little, and the text."""
    root = tmp_path_factory.mktemp("diagnose")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[2]).save_pretrained(root / "model")
    torch.manual_seed(0)
    model = tiny_llama()
    ids = torch.tensor(PreTrainedTokenizerFast(tokenizer_object=tokenizer)(toy_text(40))["input_ids"])[: 40 * 32]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids.view(40, 32), labels=ids.view(40, 32)).loss.backward()
        optimizer.step()
    model.save_pretrained(root / "model")
    (root / "text.txt").write_text(toy_text(60))
    return root


def test_end_to_end_with_a_run_and_its_recovery(folder: Path, tmp_path: Path) -> None:
    """Diagnose, train what it proposes for a step under the callback, and diagnose the run."""
    common = [str(folder / "model"), "--data", str(folder / "text.txt"), "--blocks", "4", "--block-size", "32"]
    quick = ["--random", "1", "--probes", "2", "--monte-carlo", "1", "--lanczos", "2", "--normals", "1"]
    cli = CliRunner()
    first = cli.invoke(
        app, ["diagnose", *common, *quick, "--schemes", "W4,W2,W1", "--budget", "2.5", "-o", str(tmp_path / "a")]
    )
    assert first.exit_code == 0, first.output
    assert "kappa_rand" in first.output
    recipe = Recipe.load(
        tmp_path / "a" / "proposed-recipe.yaml",
        [
            "train.max_steps=3",
            "train.batch_size=2",
            "data.block_size=32",
            "data.eval_tokens=64",
            "train.logging_steps=1",
        ],
    )
    blocks = TokenBlocks(toy_blocks(2, 32).numpy(), 1.0)
    watch = RecoveryCallback(blocks, reference=0.0, tol=100.0, interval=2, path=tmp_path / "recovery.jsonl")
    result = run(recipe, tmp_path / "run", quiet=True, callbacks=[watch])
    assert watch.steps == [0, 2, 3]
    assert watch.deployed[-1] == evaluate(result.model, blocks).loss
    assert watch.latent[-1] == loss_value(token_loss(result.model, blocks, latent=True))
    assert watch.report().recovery_step == 0
    assert watch.report().last_deployed == watch.deployed[-1]
    lines = [yaml.safe_load(line) for line in (tmp_path / "recovery.jsonl").read_text().splitlines()]
    assert [(r["step"], r["deployed_loss"]) for r in lines] == list(zip(watch.steps, watch.deployed, strict=True))
    bad = cli.invoke(app, ["diagnose", *common, "--schemes", "W9", "-o", str(tmp_path / "c")])
    assert bad.exit_code == 1
    assert "W9" in bad.output


def test_the_callback_takes_up_a_resumed_curve(blocks: TokenBlocks, tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    model = prepare(tiny_llama(), Rule(scheme="W2"))
    args, control = TrainingArguments(output_dir=str(tmp_path), report_to=[]), TrainerControl()

    def watch() -> RecoveryCallback:
        return RecoveryCallback(blocks, reference=1.0, tol=0.1, interval=1, path=tmp_path / "r.jsonl")

    first = watch()
    first.on_train_begin(args, TrainerState(global_step=0), control, model=model)
    for step in (1, 2, 3):
        first.on_step_end(args, TrainerState(global_step=step), control, model=model)
    again = watch()
    again.on_train_begin(args, TrainerState(global_step=2), control, model=model)
    assert again.steps == [0, 1, 2]
    fresh = watch()
    fresh.on_train_begin(args, TrainerState(global_step=0), control, model=model)
    assert fresh.steps == [0]
    with pytest.raises(ValueError, match="nothing is recorded"):
        watch().report()
    with pytest.raises(ValueError, match="interval=0"):
        RecoveryCallback(blocks, reference=1.0, tol=0.1, interval=0)


@pytest.mark.slow
def test_a_watched_run_is_diagnosed_with_its_control_in_its_own_report(folder: Path, tmp_path: Path) -> None:
    """train --watch, diagnose --run --control: the path is in the plane, the arms are compared, the report has it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": str(folder / "model"),
                "rules": [{"scheme": "W2"}],
                "data": {"source": "text", "path": str(folder / "text.txt"), "block_size": 32, "eval_tokens": 64},
                "train": {"max_steps": 3, "batch_size": 2, "warmup_steps": 0},
            }
        )
    )
    cli, where = CliRunner(), tmp_path / "run"
    trained = cli.invoke(app, ["train", str(recipe), "-o", str(where), "--quiet", "--watch", "2"])
    assert trained.exit_code == 0, trained.output
    steps = [row["step"] for row in read_metrics(where / "recovery.jsonl")]
    assert steps == [0, 2, 3]
    command = ["diagnose", str(folder / "model"), "--data", str(folder / "text.txt"), "--blocks", "2", "--block-size",
               "32", "--random", "1", "--probes", "2", "--monte-carlo", "1", "--lanczos", "2", "--normals", "1",
               "--slice-points", "3", "--schemes", "W2", "--run", str(where), "--control"]  # fmt: skip
    first = cli.invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "came back" in first.output or "did not come back" in first.output
    assert "fine-tuning" in first.output
    data = read_json(where / "diagnosis" / "diagnosis.json")
    assert data["after"]["path_steps"] == steps
    assert len(data["after"]["path_deployed"]) == len(data["after"]["path_latent"]) == 3
    assert data["after"]["path_latent"][0]["x"] == pytest.approx(0.0, abs=1e-4)  # the training starts at fp
    assert data["recovery"]["last_deployed"] == read_metrics(where / "recovery.jsonl")[-1]["deployed_loss"]
    assert list(data["arms"]["arms"]) == [PTQ, CONTROL, QAT]
    assert data["arms"]["arms"][PTQ]["loss_deployed"] == data["after"]["loss_ptq"]
    assert set(data["river"]["tangents"]) == {SMOOTHED, QAT, "full-precision fine-tuning"}
    for name in ("plane", "lines", "arms", "spectrum", "river", "layers", "layer-forecast", "pitch"):
        assert (where / "diagnosis" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (where / "diagnosis" / f"{name}.svg").read_text().startswith("<svg")
    report = (where / "report.html").read_text()
    assert "<h2>Geometry</h2>" in report
    assert "Will rounding break this model?" in report
    bad = cli.invoke(app, ["diagnose", str(folder / "model"), "--control"])
    assert bad.exit_code == 1
    assert "--run" in bad.output
