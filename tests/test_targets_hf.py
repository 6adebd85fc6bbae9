"""The two targets that Transformers reads: what is written is what was trained, and it loads."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from fewbits import Rule, Scheme, convert, prepare
from fewbits.checkpoint import load_model, save_prepared
from fewbits.convert import qat_layers, quantized_layers
from fewbits.export import export
from fewbits.grids import Codebook
from fewbits.io import read_json, write_json
from fewbits.manifest import changed_files, read_manifest
from fewbits.nn import QuantizedEmbedding, QuantizedLinear
from fewbits.quantizer import FewbitsConfig
from fewbits.rotations import Rotation
from fewbits.targets import TARGETS, Dequantized, folder_name, get_target
from fewbits.targets.base import model_codes
from fewbits.testing.tiny import TINY_MODELS, VOCAB_SIZE, tiny_gemma, tiny_gpt2, tiny_llama

IDS = torch.arange(48).view(2, 24) % VOCAB_SIZE
SCHEMES = {
    "binary": Scheme.parse("W1A16G32"),
    "ternary": Scheme.parse("W1.58", granularity="per_tensor"),
    "half_shifted": Scheme.parse("W2H", dtype="bf16"),
    "int3": Scheme.parse("W3A16G64", dtype="fp32"),
    "double": Scheme.parse("W2A16G32", superblock=64),
    "codebook": Scheme.parse("W2A16G32", grid=Codebook.lloyd_max(3)),
    "rotated": Scheme.parse("W4A16G32", dtype="fp16", rotation=Rotation(kind="random_hadamard", block_size=32)),
    "dynamic": Scheme.parse("W1.58A16G64", mode="dynamic", rule="absmean"),
}


def quantized(model: Any, scheme: Any = "W2A16G64") -> Any:
    """Every matrix quantized, tied heads included, with scales that no rule would give."""
    prepare(model, Rule(scheme=scheme, embeddings=True), ignore=[])
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("weight_scale"):
                value.mul_(0.7 + 0.2 * torch.rand_like(value))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    for name, build in TINY_MODELS.items():
        build().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_packed_export_has_the_trained_logits_bit_for_bit(
    plain: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = quantized(load_model(plain / name, dtype=dtype))
    expected = logits(model)
    export(model, "hf", tmp_path / "hf")
    assert list(qat_layers(model)), "exporting must leave the model prepared"

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.dtype == dtype
    layers = dict(quantized_layers(loaded))
    assert set(layers) == {layer for layer, _ in qat_layers(model)}
    assert {type(layer) for layer in layers.values()} == {QuantizedLinear, QuantizedEmbedding}
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(loaded), logits(convert(model)))

    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), expected)
    first, second = (tmp_path / part / "model.safetensors" for part in ("hf", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("key", sorted(SCHEMES))
def test_every_kind_of_scheme_survives_the_file(tmp_path: Path, key: str) -> None:
    model = quantized(tiny_gemma(), SCHEMES[key])
    export(model, "hf", tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(loaded), logits(model))
    stored = get_target("hf").read_codes(tmp_path / "hf")
    assert stored is not None
    for name, q in model_codes(model).items():
        assert stored[name].scheme == SCHEMES[key]
        assert torch.equal(stored[name].codes, q.codes)
        assert torch.equal(stored[name].scale, q.scale)


def test_schemes_may_differ_by_layer(tmp_path: Path) -> None:
    rules = [
        Rule(pattern="*mlp*", scheme="W1.58A16G32"),
        Rule(pattern="*q_proj", scheme="W3H"),
        Rule(scheme="W2A16G64"),
    ]
    model = prepare(tiny_llama(), rules)
    export(model, "hf", tmp_path / "hf")
    config = read_json(tmp_path / "hf" / "config.json")["quantization_config"]
    assert [len(group["modules"]) for group in config["groups"]] == [2, 6, 6]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), logits(model))


def test_the_packed_file_is_as_small_as_it_says(tmp_path: Path) -> None:
    model = quantized(tiny_llama(), "W2A16G32")
    export(model, "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    q_proj = {k: v for k, v in tensors.items() if k.startswith("model.layers.0.self_attn.q_proj.")}
    assert sum(v.nbytes for v in q_proj.values()) == 64 * 64 * 2 // 8 + 64 * 2 * 2  # codes, and two fp16 scales a row
    assert {k.rpartition(".")[2] for k in q_proj} == {"weight_packed", "weight_scale"}


def test_other_dtypes_devices_and_base_models(plain: Path, tmp_path: Path) -> None:
    model = quantized(load_model(plain / "llama_tied"), Scheme.parse("W2A16G64", dtype="fp32"))
    export(model, "hf", tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    codes = model_codes(model)
    for name, q in model_codes(loaded).items():
        assert torch.equal(q.scale, codes[name].scale), "casting a model must never round its scales"
        assert torch.equal(dict(quantized_layers(loaded))[name].weight, q.dequantize(torch.bfloat16))
    cast = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").to(torch.bfloat16)
    for name, q in model_codes(cast).items():
        assert torch.equal(q.scale, codes[name].scale)
        assert dict(quantized_layers(cast))[name].weight.dtype == torch.bfloat16
    base = AutoModel.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_loaded_packed_model_can_be_used_and_exported_again(plain: Path, tmp_path: Path) -> None:
    model = quantized(load_model(plain / "gpt2"))
    export(model, "hf", tmp_path / "hf")
    export(model, "dequantized", tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    loaded.tie_weights()
    assert loaded.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    for target, first in (("hf", "hf"), ("dequantized", "plain")):
        export(loaded, target, tmp_path / f"{first}2")
        one, two = (tmp_path / folder / "model.safetensors" for folder in (first, f"{first}2"))
        assert one.read_bytes() == two.read_bytes()
    assert hasattr(loaded, "hf_quantizer")
    assert loaded.config.quantization_config.quant_method == "fewbits"


def test_a_head_may_own_the_tied_codes(tmp_path: Path) -> None:
    model = prepare(tiny_llama(tie=True), Rule(pattern="lm_head", scheme="W4"), ignore=[])
    expected = logits(model)
    for target in ("hf", "dequantized:fp32"):
        folder = export(model, target, tmp_path / folder_name(target))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    tensors = load_file(tmp_path / "dequantized-fp32" / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors


# ---------------------------------------------------------------------------------------------------------- dequantized


@pytest.mark.parametrize("target", ["dequantized", "dequantized:fp16", "dequantized:fp32"])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_dequantized_weights_are_the_canonical_ones(plain: Path, tmp_path: Path, name: str, target: str) -> None:
    model = quantized(load_model(plain / name), "W3A16G64")
    kind = get_target(target)
    assert isinstance(kind, Dequantized)
    export(model, target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layers = dict(qat_layers(model))
    for layer, q in model_codes(model).items():
        stored = tensors[f"{layer}.weight"] if f"{layer}.weight" in tensors else tensors["lm_head.weight"]
        w = q.dequantize(kind.torch_dtype)
        assert torch.equal(stored, w.t() if layers[layer].transposed else w)
    assert {v.dtype for v in tensors.values()} == {kind.torch_dtype}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any(type(module).__module__.startswith("fewbits") for module in loaded.modules())
    assert loaded.dtype == kind.torch_dtype
    if target == "dequantized:fp32" and name != "gpt2":  # GPT-2's own layer multiplies in another order
        assert torch.equal(logits(loaded), logits(model))
    assert kind.read_codes(tmp_path / "out") is None


@pytest.mark.slow
def test_dequantized_needs_no_fewbits(tmp_path: Path) -> None:
    folder = export(quantized(tiny_llama(tie=True)), "dequantized", tmp_path / "out")
    assert "quantization_config" not in read_json(folder / "config.json")
    code = f"""
        import sys
        from transformers import AutoModelForCausalLM
        model, info = AutoModelForCausalLM.from_pretrained({str(folder)!r}, output_loading_info=True)
        assert not any(info[key] for key in info), info
        assert not any(name.split(".")[0] == "fewbits" for name in sys.modules)
        print(model.dtype)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "torch.bfloat16"


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = quantized(tiny_llama())
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"model\.norm\.weight has entries that are not finite in fp16"):
        export(model, "dequantized:fp16", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        Dequantized("int8")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- export()


def test_export_of_a_run_goes_to_its_place(plain: Path, tmp_path: Path) -> None:
    save_prepared(quantized(load_model(plain / "llama")), None, tmp_path / "run" / "model")
    folder = export(tmp_path / "run", "dequantized:fp16")
    assert folder == tmp_path / "run" / "export" / "dequantized-fp16"
    with pytest.raises(ValueError, match="overwrite=True"):
        export(tmp_path / "run", "dequantized:fp16")
    export(str(tmp_path / "run"), "dequantized:fp16", overwrite=True)
    with pytest.raises(ValueError, match="pass the folder"):
        export(tmp_path / "run" / "model", "hf")
    assert export(tmp_path / "run" / "model", "hf", tmp_path / "x") == tmp_path / "x"


def test_export_refuses(tmp_path: Path) -> None:
    model = quantized(tiny_llama())
    with pytest.raises(ValueError, match="unknown target 'dequantised'; did you mean dequantized"):
        export(model, "dequantised", tmp_path / "x")
    with pytest.raises(ValueError, match="a folder is needed"):
        export(model, "hf")
    with pytest.raises(ValueError, match="no quantized layer"):
        export(tiny_llama(), "hf", tmp_path / "x")
    for _, layer in qat_layers(model):
        layer.fake_quant_enabled = False
    with pytest.raises(ValueError, match="fake quantization switched off"):
        export(model, "hf", tmp_path / "x")
    model = quantized(tiny_llama())
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: weight .* non-finite"):
        export(model, "hf", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_export_asks_the_target_first(tmp_path: Path) -> None:
    class Picky(Dequantized):
        def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
            return f"no group of {scheme.scale.group_size} in {shape}"

    with pytest.raises(ValueError, match=r"cannot hold model\.embed_tokens .* no group of 64 in \(256, 64\)"):
        export(quantized(tiny_llama()), Picky(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(tiny_llama())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export(model, "hf", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    assert list(qat_layers(model))


def test_the_registry_and_the_manifest(tmp_path: Path) -> None:
    assert [name for name, target in TARGETS.items() if target.name != name] == []
    folder = export(quantized(tiny_llama()), "hf", tmp_path / "x")
    manifest = read_manifest(folder)
    assert manifest["target"] == "hf"
    assert set(manifest["files"]) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert changed_files(folder, manifest) == {}
    (folder / "config.json").write_text("{}")
    (folder / "README.md").unlink()
    (folder / "extra.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    wrong = changed_files(folder, manifest)
    assert set(wrong) == {"config.json", "README.md", "extra.safetensors"}


# ----------------------------------------------------------------------------------------------- damaged packed folders


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return export(quantized(tiny_llama(tie=True), SCHEMES["codebook"]), "hf", tmp_path / "packed")


NAME = "model.layers.0.self_attn.q_proj"


def edit_config(folder: Path, change: Any) -> None:
    config = read_json(folder / "config.json")
    change(config["quantization_config"])
    write_json(folder / "config.json", config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "format version 2"),
        (lambda c: c.update(format_version="1"), "format version '1'"),
        (lambda c: c.update(colour=1), "unknown key 'colour'"),
        (lambda c: c["groups"][0].update(colour=1), "exactly the keys scheme and modules"),
        (lambda c: c["groups"][0]["scheme"]["grid"].update(kind="nf4"), "unknown grid"),
        (lambda c: c["groups"].append(c["groups"][0]), "twice"),
        (lambda c: c["groups"][0]["modules"].update({NAME: [64]}), "two integers"),
        (lambda c: c["groups"][0]["modules"].update({NAME: [64, 128]}), r"\(64, 64\) in the model and \(64, 128\)"),
        (lambda c: c["groups"][0]["modules"].update({"model.x": [64, 64]}), "packs model.x, which this Llama"),
        (lambda c: c["tied"].update(lm_head="model.norm"), "ties lm_head to model.norm"),
        (lambda c: c["groups"][0]["modules"].pop(NAME), "lacks|missing|MISSING"),
    ],
)
def test_a_config_that_does_not_fit_is_a_clear_error(packed: Path, change: Any, message: str) -> None:
    edit_config(packed, change)
    with pytest.raises(ValueError, match=message):
        load_model(packed)


def test_weights_that_do_not_fit_are_a_clear_error(packed: Path) -> None:
    path = packed / "model.safetensors"
    tensors = load_file(path)

    def store(changed: dict[str, Tensor]) -> None:
        save_file(changed, path, metadata={"format": "pt"})

    store({k: v for k, v in tensors.items() if k != f"{NAME}.weight_packed"})
    with pytest.raises(ValueError, match=f"the weights lack {NAME}.weight_packed"):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(ValueError, match=f"{NAME}.weight_packed is missing"):
        get_target("hf").read_codes(packed)

    store({**tensors, f"{NAME}.weight_scale": tensors[f"{NAME}.weight_scale"].float()})
    with pytest.raises(ValueError, match=r"weight_scale is F32 in the file; F16 is needed"):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(ValueError, match=r"weight_scale is torch\.float32 .* torch\.float16"):
        get_target("hf").read_codes(packed)

    store({**tensors, f"{NAME}.weight_packed": torch.full_like(tensors[f"{NAME}.weight_packed"], 255)})
    with pytest.raises(ValueError, match=f"{NAME}: packed codes hold 3; .* has 3 levels"):
        get_target("hf").read_codes(packed)

    store({**tensors, f"{NAME}.weight_codebook": tensors[f"{NAME}.weight_codebook"] * 2})
    with pytest.raises(ValueError, match=f"{NAME}: the stored codebook"):
        get_target("hf").read_codes(packed)

    store({**tensors, f"{NAME}.weight_scale": -tensors[f"{NAME}.weight_scale"]})
    with pytest.raises(ValueError, match=f"{NAME}: a scale is not"):
        get_target("hf").read_codes(packed)


def test_config_round_trip_and_other_methods(packed: Path) -> None:
    data = read_json(packed / "config.json")["quantization_config"]
    config = FewbitsConfig(**data)
    assert json.loads(json.dumps(config.to_dict())) == data
    assert FewbitsConfig.from_packed(config.packed(), config.tied).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="quant_method is 'gptq'"):
        FewbitsConfig(quant_method="gptq")
    export(quantized(tiny_gpt2()), "dequantized", packed.parent / "plain")
    with pytest.raises(ValueError, match="no quantization_config of fewbits"):
        get_target("hf").read_codes(packed.parent / "plain")


def test_a_float_model_is_not_packed_on_the_fly(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=FewbitsConfig())
