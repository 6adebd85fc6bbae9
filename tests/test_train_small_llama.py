"""examples/train_small_llama.py: a text becomes a folder that runs and the arena take."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fewbits.arena import ArenaSettings
from fewbits.arena.shared import prepare_shared
from fewbits.checkpoint import load_model, load_tokenizer
from fewbits.pipeline import run
from fewbits.recipe import Recipe
from fewbits.testing.tiny import toy_text

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_small_llama.py"
SMALL = (
    "--steps 25 --batch-size 4 --block-size 32 --vocab-size 300 --hidden-size 128 --intermediate-size 128 --layers 1"
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_small_llama", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``text.txt`` and the trained ``llama/``."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text(toy_text(400))
    script.main([str(folder / "text.txt"), "-o", str(folder / "llama"), *SMALL.split()])
    return folder


def test_it_learns_and_the_folder_is_an_ordinary_checkpoint(made: Path) -> None:
    model, tokenizer = load_model(str(made / "llama")), load_tokenizer(str(made / "llama"))
    record = json.loads((made / "llama" / "training.json").read_text())
    assert record["held_out"]["loss"] < math.log(len(tokenizer)) - 1  # a uniform guess, less a nat
    assert record["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert model.config.use_cache
    for text in ("the river", "é€ \t\n", "<|not special|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("the river")["input_ids"][0] != tokenizer.bos_token_id


def test_a_run_and_an_arena_take_it(made: Path, tmp_path: Path) -> None:
    overrides = [
        f"model={made / 'llama'}", "data.source=text", f"data.path={made / 'text.txt'}", "data.block_size=32",
        "data.eval_tokens=64", "train.max_steps=2", "train.warmup_steps=1", "rules.0.scheme=W2A16G64",
    ]  # fmt: skip
    scores = run(Recipe.load("demo-clipped-ste", overrides), tmp_path / "run", quiet=True).scores
    assert scores["fp"].loss < scores["rtn"].loss
    settings = ArenaSettings(
        model=str(made / "llama"), text=str(made / "text.txt"), schemes=("W2G64",), methods=("rtn",), block_size=32,
        eval_tokens=64,
    )  # fmt: skip
    (tmp_path / "arena").mkdir()
    assert prepare_shared(settings, tmp_path / "arena").train_tokens > 0


def test_the_default_has_three_million_parameters(script: ModuleType, made: Path) -> None:
    args = script.parse(["text.txt", "-o", str(made / "none")])
    tokenizer = load_tokenizer(str(made / "llama"))
    with torch.device("meta"):
        model = script.build_model(tokenizer, args)
    missing = (args.vocab_size - len(tokenizer)) * args.hidden_size  # of the embedding, whose text here is small
    assert sum(p.numel() for p in model.parameters()) + missing == pytest.approx(2.9e6, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [("--hidden-size 200", "not a multiple of 128"), ("--vocab-size 257", "258 or more"), ("--steps 0", "1 or more")],
)
def test_bad_options_are_refused(
    script: ModuleType, tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.parse(["text.txt", "-o", str(tmp_path / "new"), *options.split()])
    assert message in capsys.readouterr().err


def test_a_taken_folder_is_refused(script: ModuleType, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse(["text.txt", "-o", str(made / "llama")])
    assert "exists already" in capsys.readouterr().err
