"""Loading checkpoints (the accidents refused), and prepared models to folders and back, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import fewbits.nn
from fewbits import Rule, Scheme, prepare
from fewbits.checkpoint import (
    find_prepared,
    is_prepared_folder,
    load_model,
    load_prepared,
    load_tokenizer,
    save_prepared,
)
from fewbits.convert import owned_layers, qat_layers
from fewbits.drives import CAGE
from fewbits.grids import Codebook
from fewbits.io import read_json, write_json
from fewbits.pretrained import local_folder
from fewbits.surrogates import ClippedSTE, JacQuant
from fewbits.testing.tiny import TINY_MODELS, VOCAB_SIZE, tiny_gemma3, tiny_llama

IDS = torch.arange(48).view(2, 24) % VOCAB_SIZE
RULES = (
    Rule(pattern="*down_proj", scheme=Scheme.parse("W1.58A16G32", mode="dynamic", rule="absmean")),
    Rule(pattern="*mlp*", scheme="W3H", surrogate=ClippedSTE(), drive=CAGE(strength=2.0)),
    Rule(scheme="W2A16G64", surrogate=JacQuant(group_size=32), embeddings=True),
)
"""Three schemes, three scale modes' worth of state, and the embedding (which tied heads follow)."""


def byte_tokenizer(size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    vocab = {f"t{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0")


def prepared(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A prepared model that looks trained: scales and states are not what the rules would give."""
    rules = RULES if "gpt2" not in name else (RULES[2],)
    model = prepare(TINY_MODELS[name](dtype=dtype), rules)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if "weight_scale" in key or "weight_state" in key:
                value.mul_(0.7 + 0.2 * torch.rand_like(value))
    return model


def reload(folder: Path) -> Any:
    return load_prepared(folder)[0]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "llama"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


# ---------------------------------------------------------------------------------------------------- plain checkpoints


def test_load_model_gives_the_saved_model(plain: Path) -> None:
    assert torch.equal(logits(load_model(plain)), logits(tiny_llama()))
    assert load_model(str(plain), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(plain)("t5 t7")["input_ids"] == [5, 7]


def test_paths_and_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_folder("org/model-1.5b") is None
    for path in ("./none", "/none/at/all", "a/b/c", tmp_path / "none"):
        with pytest.raises(ValueError, match="does not exist"):
            local_folder(path)
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        local_folder("file.bin")


def test_what_the_hub_says_becomes_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("org/none is not a valid model identifier")

    monkeypatch.setattr("fewbits.pretrained.AutoModelForCausalLM.from_pretrained", refuse)
    with pytest.raises(ValueError, match="cannot load org/none: org/none is not a valid"):
        load_model("org/none")


def test_folders_that_are_no_model(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "none")
    weights = copy / "model.safetensors"
    torch.save(load_file(weights), copy / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="pickle only"):
        load_model(copy)
    (copy / "pytorch_model.bin").rename(weights)
    with pytest.raises(ValueError, match="is a PyTorch pickle"):
        load_model(copy)
    weights.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(copy)


def test_an_unknown_architecture_is_a_value_error(copy: Path) -> None:
    write_json(copy / "config.json", {"model_type": "no_such_model"})
    with pytest.raises(ValueError, match=r"cannot load .*no_such_model"):
        load_model(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(ValueError, match="truncated"):
        load_model(copy)


def test_a_missing_tensor_is_an_error_not_a_random_weight(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* model\.norm\.weight"):
        load_model(copy)


def test_a_vocabulary_that_does_not_fit_is_an_error(copy: Path) -> None:
    config = read_json(copy / "config.json")
    write_json(copy / "config.json", {**config, "vocab_size": 300})
    with pytest.raises(ValueError, match=r"has shape \(256, 64\) .* vocab_size is 300\) needs \(300, 64\)"):
        load_model(copy)
    write_json(copy / "config.json", {**config, "vocab_size": 100})
    with pytest.raises(ValueError, match="knows token 255, but the model has only 100"):
        load_tokenizer(copy)


def test_tokenizers_that_cannot_be_read(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(copy)


def test_a_sharded_model_loads_and_a_lost_shard_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "m", max_shard_size="100KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_model(tmp_path / "m")), logits(tiny_llama()))
    next((tmp_path / "m").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_model(tmp_path / "m")


# ------------------------------------------------------------------------------------------------------ prepared models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_a_prepared_model_comes_back_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = prepared(name, dtype)
    save_prepared(model, None, tmp_path / "one")
    first = reload(tmp_path / "one")
    before, after = model.state_dict(), first.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype, key
        assert torch.equal(value, after[key]), key
    for (a, layer), (b, again) in zip(qat_layers(model), qat_layers(first), strict=True):
        assert (a, type(layer), layer.scheme, layer.surrogate) == (b, type(again), again.scheme, again.surrogate)
        assert layer.drive == again.drive
        assert (layer.owner is layer) == (again.owner is again)
    assert sorted(n for n, _ in model.named_parameters()) == sorted(n for n, _ in first.named_parameters())
    if dtype == torch.float32:  # .to(bfloat16) also rounds the rotary table, which no file holds
        assert torch.equal(logits(model), logits(first))
    save_prepared(first, None, tmp_path / "two")
    assert torch.equal(logits(first), logits(reload(tmp_path / "two")))
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_loading_runs_no_scale_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_prepared(prepared(), byte_tokenizer(), tmp_path / "m")

    def rule(*_: Any) -> Tensor:
        raise AssertionError("a learned scale was calibrated again")

    monkeypatch.setattr(fewbits.nn, "initial_scale", rule)
    _, tokenizer = load_prepared(tmp_path / "m")
    assert tokenizer("t5 t7")["input_ids"] == [5, 7]


def test_a_run_folder_leads_to_its_model(tmp_path: Path) -> None:
    save_prepared(prepared(), None, tmp_path / "run" / "model")
    assert find_prepared(tmp_path / "run") == find_prepared(tmp_path / "run" / "model") == tmp_path / "run" / "model"
    (tmp_path / "recipe.yaml").write_text("name: x")
    with pytest.raises(ValueError, match="not finished"):
        find_prepared(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match="neither a run folder nor"):
        find_prepared(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        find_prepared(tmp_path / "none")


def test_a_folder_without_tokenizer_gives_none(tmp_path: Path) -> None:
    save_prepared(prepared(), None, tmp_path / "m")
    assert is_prepared_folder(tmp_path / "m")
    assert not is_prepared_folder(tmp_path)
    assert load_prepared(tmp_path / "m")[1] is None


def test_a_head_that_owns_the_tied_weight_comes_back(tmp_path: Path) -> None:
    model = prepare(tiny_llama(tie=True), Rule(pattern="lm_head", scheme="W2"), ignore=[])
    assert [name for name, _ in owned_layers(model)] == ["lm_head"]
    save_prepared(model, None, tmp_path / "m")
    again = reload(tmp_path / "m")
    assert [name for name, _ in owned_layers(again)] == ["lm_head"]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(again))


def test_a_codebook_and_double_quantized_scales_come_back(tmp_path: Path) -> None:
    scheme = Scheme.parse("W2A16G32", grid=Codebook.lloyd_max(4), superblock=64)
    model = prepare(tiny_llama(), Rule(scheme=scheme))
    save_prepared(model, None, tmp_path / "m")
    assert torch.equal(logits(model), logits(reload(tmp_path / "m")))


def test_mixed_dtypes_come_back(tmp_path: Path) -> None:
    model = prepared("llama", torch.bfloat16)
    model.model.norm.to(torch.float32).weight.data += 1e-4
    save_prepared(model, None, tmp_path / "m")
    again = reload(tmp_path / "m")
    assert again.model.norm.weight.dtype == torch.float32
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)


def test_disabled_fake_quantization_is_remembered(tmp_path: Path) -> None:
    model = prepared()
    for _, layer in qat_layers(model):
        layer.fake_quant_enabled = False
    save_prepared(model, None, tmp_path / "m")
    assert torch.equal(logits(model), logits(reload(tmp_path / "m")))


def test_training_a_loaded_model_does_not_write_through_to_the_file(tmp_path: Path) -> None:
    save_prepared(prepared(), None, tmp_path / "m")
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    model = reload(tmp_path / "m")
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value.mul_(2)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == data


def test_saving_refuses_what_it_should(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prepared layer"):
        save_prepared(tiny_llama(), None, tmp_path / "m")
    save_prepared(prepared(), None, tmp_path / "m")
    with pytest.raises(ValueError, match="overwrite=True"):
        save_prepared(prepared(), None, tmp_path / "m")
    save_prepared(prepared("gemma"), None, tmp_path / "m", overwrite=True)
    assert reload(tmp_path / "m").config.model_type == "gemma"


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_prepared(prepared(), None, tmp_path / "m")
    before = logits(reload(tmp_path / "m"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model = prepared("gemma")
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device; nothing was changed"):
        save_prepared(model, None, tmp_path / "m", overwrite=True)
    assert torch.equal(logits(reload(tmp_path / "m")), before)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def edit(folder: Path, change: Any) -> None:
    data = read_json(folder / "fewbits_qat.json")
    change(data)
    (folder / "fewbits_qat.json").write_text(json.dumps(data))


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format version 2"),
        (lambda d: d.pop("format_version"), "format version None"),
        (lambda d: d.update(colour=1), "unknown key 'colour'"),
        (lambda d: d.update(layers={}), "describes no layer"),
        (lambda d: d["layers"][NAME].update(colour=1), "unknown key 'colour'"),
        (lambda d: d["layers"][NAME].pop("scheme"), "needs the keys"),
        (lambda d: d["layers"][NAME]["scheme"]["grid"].update(kind="nf4"), "unknown grid 'nf4'"),
        (lambda d: d["layers"][NAME].update(surrogate={"name": "magic"}), "unknown surrogate"),
        (lambda d: d["layers"][NAME]["scheme"]["scale"].update(group_size=32), "has shape"),
        (lambda d: d["layers"][NAME]["surrogate"].update(group_size=64), "has shape"),
        (lambda d: d["layers"][NAME].update(surrogate={"name": "ste"}), "belongs to no layer"),
        (lambda d: d["layers"].pop(NAME), "which the model does not have"),
        (lambda d: d["layers"].update({"model.nowhere": d["layers"].pop(NAME)}), "which the model does not have"),
        (lambda d: d["layers"].update({"model.norm": d["layers"][NAME]}), "no layer model.norm to quantize"),
        (lambda d: d["layers"][NAME].update(tied_to="model.embed_tokens"), "should share the weight"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    save_prepared(prepared(), None, tmp_path / "m")
    edit(tmp_path / "m", change)
    with pytest.raises(ValueError, match=message):
        reload(tmp_path / "m")


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_prepared(prepared(), None, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != f"{NAME}.weight_scale"}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{NAME}.weight_scale is missing"):
        reload(tmp_path / "m")
    save_file({**tensors, "model.extra": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.extra, which the model does not have"):
        reload(tmp_path / "m")
    with pytest.raises(ValueError, match="holds no prepared model"):
        reload(tmp_path)


def test_the_scaled_embedding_of_gemma3_keeps_its_factor(tmp_path: Path) -> None:
    model = prepare(tiny_gemma3(), Rule(pattern="*embed_tokens", scheme="W4", embeddings=True))
    save_prepared(model, None, tmp_path / "m")
    assert reload(tmp_path / "m").model.embed_tokens.embed_scale == 8.0
