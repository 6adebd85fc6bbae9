"""A run folder from start to end on a tiny model: files, guards, resume, targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from fewbits.checkpoint import load_prepared
from fewbits.evaluate import evaluate
from fewbits.pipeline import load_any, read_scores, run
from fewbits.recipe import Recipe
from fewbits.report import write_report
from fewbits.testing.tiny import tiny_llama, toy_text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[2])
    tiny_llama().save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(toy_text(150))
    return folder


def recipe(checkpoint: Path, *overrides: str) -> Recipe:
    text = f"""
model: {checkpoint / "model"}
rules: [{{scheme: W2A16G32, surrogate: {{name: jacquant, interval: 3}}}}]
data: {{source: text, path: {checkpoint / "text.txt"}, block_size: 32, eval_tokens: 256}}
train: {{max_steps: 6, batch_size: 2, save_steps: 3, logging_steps: 1}}
"""
    return Recipe.parse(text, list(overrides))


def test_a_run_leaves_a_complete_folder_and_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(recipe(checkpoint), folder, quiet=True)
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "eval.json", "histogram.json", "model"):
        assert (folder / name).exists(), name
    assert json.loads((folder / "model" / "config.json").read_text())["use_cache"] is True  # generation keeps its cache
    assert Recipe.load(folder / "recipe.yaml") == recipe(checkpoint)
    assert set(result.scores) == {"fp", "rtn", "qat"} == set(read_scores(folder / "eval.json"))
    assert set(json.loads((folder / "histogram.json").read_text())) == {"before", "after"}
    loaded, _ = load_prepared(folder / "model")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, result.model(input_ids=ids).logits)
    assert torch.equal(load_any(folder)[0](input_ids=ids).logits, result.model(input_ids=ids).logits)
    page = write_report(folder).read_text()
    assert "Learned gain B" in page
    assert page.count("<svg") >= 5
    with pytest.raises(ValueError, match="finished run"):
        run(recipe(checkpoint), folder, quiet=True)
    again = run(recipe(checkpoint), folder, quiet=True, overwrite=True)
    assert again.scores["qat"].loss == result.scores["qat"].loss


class Interrupt(TrainerCallback):
    """Stops a run as a user would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_resume_after_an_interrupt_is_bit_identical(checkpoint: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(recipe(checkpoint), whole, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(checkpoint), broken, quiet=True, callbacks=[Interrupt()])
    with pytest.raises(ValueError, match="unfinished run; pass resume"):
        run(recipe(checkpoint), broken, quiet=True)
    with pytest.raises(ValueError, match=r"another recipe .it differs in seed"):
        run(recipe(checkpoint, "seed=1"), broken, quiet=True, resume=True)
    run(recipe(checkpoint), broken, quiet=True, resume=True)
    for name in ("metrics.jsonl", "eval.json", "histogram.json"):
        assert (whole / name).read_text() == (broken / name).read_text()
    assert (whole / "model/model.safetensors").read_bytes() == (broken / "model/model.safetensors").read_bytes()


def test_training_on_the_teachers_own_samples(checkpoint: Path, tmp_path: Path) -> None:
    more = ["data={source: self, max_tokens: 2048, block_size: 32}", "train.save_steps=null"]
    result = run(recipe(checkpoint, *more), tmp_path / "run", quiet=True)
    assert result.scores["qat"].kl_to_teacher is not None


def test_what_is_wrong_is_said_before_training(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pattern 'nothing' matches no parameter"):
        run(recipe(checkpoint, "train.freeze=[nothing]"), tmp_path / "a", quiet=True)
    with pytest.raises(ValueError, match="chooses no layer; near names"):
        run(recipe(checkpoint, "rules.0.pattern=model.layer.0"), tmp_path / "b", quiet=True)
    with pytest.raises(ValueError, match="unknown target 'gguff'"):
        run(recipe(checkpoint, "target=gguff"), tmp_path / "c", quiet=True)
    with pytest.raises(ValueError, match="less than one block"):
        run(recipe(checkpoint, "data.block_size=100000"), tmp_path / "d", quiet=True)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not a run and is not overwritten"):
        run(recipe(checkpoint), tmp_path / "e", quiet=True, overwrite=True)


def test_frozen_parameters_stay_and_a_drive_in_a_recipe_pulls(checkpoint: Path, tmp_path: Path) -> None:
    more = ["train.freeze=['*norm*', 'model.embed_tokens.weight', lm_head.weight]", "rules.0.surrogate=clipped_ste"]
    pull = "rules.0.drive={name: winq, toward_grid: 1.0, interval: 5, noise: 0.0}"
    result = run(recipe(checkpoint, *more, pull, "train.learning_rate=1e-9"), tmp_path / "run", quiet=True)
    start = tiny_llama()
    assert torch.equal(result.model.model.embed_tokens.weight, start.model.embed_tokens.weight)  # type: ignore[union-attr]
    layer = result.model.model.layers[0].mlp.up_proj  # type: ignore[union-attr]
    distance = (layer.weight - layer.quantized_weight()).abs().max()
    assert distance < 1e-6  # the pull put every latent weight on the grid


def test_evaluate_of_a_run_matches_its_record(checkpoint: Path, tmp_path: Path) -> None:
    from fewbits.checkpoint import load_model, load_tokenizer
    from fewbits.pipeline import load_blocks

    spec = recipe(checkpoint)
    result = run(spec, tmp_path / "run", quiet=True)
    teacher = load_model(checkpoint / "model")
    _, valid = load_blocks(spec.data, load_tokenizer(checkpoint / "model"), teacher, 0)
    assert evaluate(result.model, valid, teacher=teacher) == result.scores["qat"]
