"""Recipes with quantized activations from start to end on a tiny model; SASQ trains scales and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fewbits.activations import input_quantizers, kv_schemes
from fewbits.checkpoint import load_prepared
from fewbits.export import export_verified
from fewbits.pipeline import run
from fewbits.recipe import Recipe, shipped_recipes
from fewbits.testing.tiny import tiny_llama, toy_text

NAMES = ["bitnet-a8", "lsq-plus", "n2uq", "pact", "quest-w4a4", "sasq", "w2a8", "w4a4kv4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[2])
    tiny_llama().save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(toy_text(100))
    return folder


def small(checkpoint: Path, name: str, *more: str) -> Recipe:
    data = f"{{source: text, path: {checkpoint / 'text.txt'}, block_size: 32, eval_tokens: 256}}"
    few = [f"model={checkpoint / 'model'}", f"data={data}", "train.max_steps=4", "train.batch_size=2"]
    return Recipe.parse(shipped_recipes()[name], [*few, "train.warmup_steps=0", "train.logging_steps=1", *more])


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_train_and_export_what_they_trained(name: str, checkpoint: Path, tmp_path: Path) -> None:
    result = run(small(checkpoint, name), tmp_path / "run", quiet=True)
    assert set(result.scores) == {"fp", "rtn", "qat"}
    assert len(list(input_quantizers(result.model))) == 14
    assert bool(kv_schemes(result.model)) == (name == "w4a4kv4")
    folder, report = export_verified(tmp_path / "run", "hf")
    assert report.passed
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = result.model.eval()(input_ids=ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits, expected)
        assert torch.equal(load_prepared(tmp_path / "run/model")[0](input_ids=ids).logits, expected)


def test_sasq_changes_every_activation_scale_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    """Weights, their scales, norms and embeddings are the untrained run's, bit for bit; the export is static."""
    run(small(checkpoint, "sasq", "train.max_steps=0"), tmp_path / "start", quiet=True)
    run(small(checkpoint, "sasq"), tmp_path / "end", quiet=True)
    start, end = (load_file(tmp_path / f"{n}/model/model.safetensors") for n in ("start", "end"))
    assert list(start) == list(end)
    trained = {key for key in start if ".input_quantizer." in key}
    assert len(trained) == 14
    for key in start:
        assert torch.equal(start[key], end[key]) == (key not in trained), key
    folder, _ = export_verified(tmp_path / "end", "hf")
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("input_quantizer" in name for name, _ in exported.named_parameters())
    held = {name: value for name, value in exported.named_buffers() if "input_quantizer" in name}
    assert {name.replace(".scale", ".log_scale") for name in held} == trained
    for name, value in held.items():
        assert torch.equal(value, end[name.replace(".scale", ".log_scale")].exp())


def test_inputs_that_compressed_tensors_means_too_ship_in_it(checkpoint: Path, tmp_path: Path) -> None:
    rules = "rules=[{scheme: W4A8G32, activation: {preset: compressed_tensors}}]"
    run(small(checkpoint, "w2a8", rules, "target=compressed-tensors"), tmp_path / "run", quiet=True)
    folder, report = export_verified(tmp_path / "run", "compressed-tensors")
    assert report.passed, report.to_text()
    assert report.logits is not None
    assert report.logits.bitwise_equal
    assert '"strategy": "token"' in (folder / "config.json").read_text()
    with pytest.raises(ValueError, match=r"cannot hold the quantized activations .* use rule='half_range'"):
        run(small(checkpoint, "w2a8", "target=compressed-tensors"), tmp_path / "absmax", quiet=True)


def test_other_targets_are_refused_before_training(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold the quantized activations"):
        run(small(checkpoint, "w2a8", "target=dequantized"), tmp_path / "run", quiet=True)
