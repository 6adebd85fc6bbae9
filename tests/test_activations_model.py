"""Quantized activations in models: every architecture saved, loaded, exported and generated from bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from fewbits.activations import (
    ActivationScheme,
    InputQuantizer,
    calibrate_activations_,
    input_quantizers,
    kv_schemes,
)
from fewbits.activations.kv_cache import attention_modules, quantize_kv_
from fewbits.activations.module import INPUT, KV
from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.convert import Rule, convert, prepare
from fewbits.export import export, export_verified
from fewbits.inspection import inspect_model
from fewbits.optim.groups import parameter_groups
from fewbits.ptq import apply_ptq
from fewbits.quantizer import FewbitsConfig
from fewbits.runtime import to_runtime
from fewbits.runtime.decoder import refusal
from fewbits.targets import TARGETS
from fewbits.testing.tiny import TINY_MODELS, tiny_llama, toy_blocks
from fewbits.training.telemetry import weight_histogram

LEARNED: list[dict[str, Any]] = [
    {"num_bits": 8, "preset": "sasq"},
    {"num_bits": 4, "preset": "lsq_plus"},
    {"num_bits": 4, "preset": "n2uq"},
    {"num_bits": 4, "preset": "pact"},
]


def ready(model: PreTrainedModel, rule: Rule, x: torch.Tensor, **options: Any) -> PreTrainedModel:
    """Prepared and calibrated."""
    prepare(model, rule, **options)
    calibrate_activations_(model, [x])
    return model


def rule(scheme: Any = "W4", **fields: Any) -> Rule:
    return Rule(scheme=scheme, **fields)


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_saved_loaded_exported_converted_and_generated_bit_for_bit(name: str, tmp_path: Path) -> None:
    """One dynamic and one static scheme by architecture; keys and values at 4 bits."""
    x = toy_blocks(2, 16)
    for i, activation in enumerate(["A8", LEARNED[sorted(TINY_MODELS).index(name) % len(LEARNED)]]):
        model = ready(TINY_MODELS[name](), rule("W4KV4", activation=activation), x)
        with torch.no_grad():
            expected = model(x).logits
            save_prepared(model, None, tmp_path / f"prepared{i}")
            again, _ = load_prepared(tmp_path / f"prepared{i}")
            assert torch.equal(again(x).logits, expected)
            folder, report = export_verified(model, "hf", tmp_path / f"hf{i}")
            assert report.passed
            packed = AutoModelForCausalLM.from_pretrained(folder)
            assert torch.equal(packed(x).logits, expected)
            packed.save_pretrained(tmp_path / f"again{i}")
            assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / f"again{i}")(x).logits, expected)
            convert(model)
            assert torch.equal(model(x).logits, expected)
        assert not [n for n, p in model.named_parameters() if INPUT in n]
        ids: Any = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        cached, whole = (model.generate(x[:1, :5], use_cache=use, **ids) for use in (True, False))
        assert torch.equal(cached, whole)


def test_a16_is_off_bit_for_bit() -> None:
    x = toy_blocks(2, 16)
    plain = prepare(tiny_llama(), rule("W2G32"))
    for other in (rule("W2A16G32"), rule("W2A16KV16G32"), rule("W2G32", activation="A16", kv_cache=None)):
        model = prepare(tiny_llama(), other)
        assert other.activation is None
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert torch.equal(model(x).logits, plain(x).logits)
        assert model.config._attn_implementation == plain.config._attn_implementation


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_wrapper_alone_changes_nothing(attention: str) -> None:
    """Same masks, same kernels: with the quantizers passing through, logits are equal bit for bit."""
    x, model = toy_blocks(2, 16), tiny_llama()
    model.set_attn_implementation(attention)
    expected = model(x).logits
    quantize_kv_(model, dict.fromkeys(attention_modules(model), ActivationScheme(num_bits=4)))
    assert model.config._attn_implementation == f"fewbits_kv_{attention}"
    assert not torch.equal(model(x).logits, expected)
    for module in model.modules():
        if isinstance(module, InputQuantizer):
            module.enabled = False
    assert torch.equal(model(x).logits, expected)


def test_keys_are_quantized_after_the_rotary_embedding_per_head_and_token() -> None:
    """What the quantizer sees is what attention uses, of shape (.., heads, tokens, dim)."""
    model, x = prepare(tiny_llama(), rule("W4KV4")), toy_blocks(2, 16)
    seen: list[tuple[int, ...]] = []
    for name in kv_schemes(model):
        quantizer = model.get_submodule(f"{name}.{KV}")
        quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    model(x, use_cache=False)
    assert seen == [(2, 2, 16, 16)] * 4


def test_rules_of_one_attention_must_agree_and_reach_one() -> None:
    with pytest.raises(ValueError, match=r"disagree on kv_cache inside model\.layers\.0\.self_attn"):
        prepare(tiny_llama(), [rule("W4KV4", pattern="*.k_proj"), rule("W4")])
    with pytest.raises(ValueError, match="reaches no attention module"):
        prepare(tiny_llama(), rule("W4KV4", pattern="*.mlp.*"))
    with pytest.raises(ValueError, match="per head and token"):
        prepare(tiny_llama(), rule("W4", kv_cache=LEARNED[0]))
    model = prepare(tiny_llama(), [rule("W2A8", pattern="*.mlp.*"), rule("W4A4KV4")])
    schemes = {row.name: row.scheme for row in inspect_model(model).layers}
    assert schemes["model.layers.0.mlp.up_proj"] == "W2A8"
    assert schemes["model.layers.0.self_attn.q_proj"] == "W4A4KV4"
    model = tiny_llama()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        prepare(model, rule("W4KV4"))


def test_the_histograms_of_a_report_are_headed_by_the_bits_of_the_inputs_too() -> None:
    model = prepare(tiny_llama(), [rule("W2A8", pattern="*.mlp.*"), rule("W4")])
    assert sorted(weight_histogram(model)) == ["W2A8", "W4A16"]


def test_static_scales_are_used_only_after_calibration(tmp_path: Path) -> None:
    x = toy_blocks(3, 16)
    model = prepare(tiny_llama(), rule(activation=LEARNED[0]))
    for use in (lambda: model(x), lambda: convert(model), lambda: save_prepared(model, None, tmp_path / "a")):
        with pytest.raises(ValueError, match="has no value yet"):
            use()
    assert calibrate_activations_(model, [x]) == 14
    model(x)
    fixed = prepare(tiny_llama(), rule(activation={"num_bits": 4, "preset": "dorefa"}))
    fixed(x)  # has a start of its own
    assert calibrate_activations_(fixed, [x]) == 0


def test_calibration_is_the_mean_over_samples_with_quantized_weights() -> None:
    """By hand from the inputs that the layers saw: each sequence's absmax / 127, averaged; batches do not matter."""
    x = toy_blocks(6, 16)
    model = prepare(tiny_llama(), rule("W2G32", activation=LEARNED[0]))
    seen: dict[str, list[torch.Tensor]] = {}
    plain = prepare(tiny_llama(), rule("W2G32"))
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, v, n=name: seen.setdefault(n, []).append(v[0].detach()))
    plain(x)
    calibrate_activations_(model, [x])
    for name, quantizer in input_quantizers(model):
        scale = quantizer.static_scale()
        assert scale is not None
        expected = torch.cat(seen[name]).flatten(1).abs().amax(1).mean() / 127
        torch.testing.assert_close(scale.detach(), expected, rtol=1e-5, atol=0)
    first = [q.static_scale() for _, q in input_quantizers(model)]
    calibrate_activations_(model, list(x.split(2)))
    for a, (_, b) in zip(first, input_quantizers(model), strict=True):
        torch.testing.assert_close(a, b.static_scale(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="no calibration data"):
        calibrate_activations_(model, [])


@pytest.mark.parametrize(("num_bits", "step"), [(2, 1.0484), (3, 0.6018), (4, 0.3386)])
def test_the_mse_rule_finds_the_best_step_of_a_gaussian(num_bits: int, step: float) -> None:
    """To one mark of the line search, 5 % apart (Int(2) to Int(4) of the specification's section 0.2)."""
    layer = nn.Sequential(nn.Linear(256, 4))
    prepare(layer, rule(activation={"num_bits": num_bits, "preset": "lsq"}))
    calibrate_activations_(layer, [torch.randn(400, 256)])
    scale = dict(input_quantizers(layer))["0"].static_scale()
    assert scale is not None
    assert float(scale.detach()) == pytest.approx(step, rel=0.05)


def test_an_offset_is_calibrated_to_the_mean_range() -> None:
    layer = prepare(nn.Sequential(nn.Linear(8, 4)), rule(activation=LEARNED[1]))
    x = torch.rand(50, 8) + 2
    calibrate_activations_(layer, [x])
    quantizer = dict(input_quantizers(layer))["0"]
    out = quantizer(x).detach()
    least, most = float(x.amin(1).mean()), float(x.amax(1).mean())
    assert float(out.min()) == pytest.approx(least, abs=1e-5)
    assert float(out.max()) == pytest.approx(most, abs=1e-5)


def test_static_numbers_stay_fp32_when_the_model_changes_its_dtype() -> None:
    layer = prepare(nn.Sequential(nn.Linear(8, 4)), rule(activation=LEARNED[1]))
    calibrate_activations_(layer, [torch.randn(5, 8)])
    quantizer = dict(input_quantizers(layer))["0"]
    before = {k: v.detach().clone() for k, v in quantizer.stored().items()}
    layer.to(torch.bfloat16)
    assert layer[0].weight.dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in quantizer.stored().items())
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"hf"}))
def test_other_targets_refuse_with_the_reason(target: str, tmp_path: Path) -> None:
    for scheme in ("W4A8", "W4KV4"):
        model = prepare(tiny_llama(), rule(Rule(scheme=scheme).scheme, **_parts(scheme)))
        with pytest.raises(ValueError, match=r"cannot hold"):
            export(model, target, tmp_path / "out")
    model = prepare(tiny_llama(), rule("W4A8"))
    with pytest.raises(ValueError, match=r"quantized activations of model\.layers\.0"):
        export(model, "dequantized:fp32" if "dequantized:fp32" in TARGETS else "dequantized", tmp_path / "out")


def _parts(scheme: str) -> dict[str, Any]:
    made = Rule(scheme=scheme)
    return {"activation": made.activation, "kv_cache": made.kv_cache}


def test_the_runtime_quantizes_inputs_as_the_converted_model_does() -> None:
    x = toy_blocks(1, 12)
    model = convert(ready(tiny_llama(), rule("W4A8G32"), x))
    expected = model(x).logits
    with torch.inference_mode():
        assert torch.equal(to_runtime(model, kernel="torch")(x).logits.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=2e-3)  # a code may flip by rounding
    assert "quantized as they were in training" in str(refusal(model))


def test_ptq_starts_a_model_with_quantized_activations() -> None:
    """The method sees full-precision activations; codes are those of a model without activation quantization."""
    x = toy_blocks(4, 32)
    plain = apply_ptq(tiny_llama(), rule("W3G32"), "gptq", x)
    model = apply_ptq(tiny_llama(), rule("W3KV4G32", activation=LEARNED[0]), "gptq", x)
    calibrate_activations_(model, [x])
    for a, b in zip(plain.modules(), (m for m in model.modules() if not isinstance(m, InputQuantizer)), strict=True):
        if hasattr(a, "qtensor"):
            assert torch.equal(a.qtensor().codes, b.qtensor().codes)
    assert len(kv_schemes(model)) == 2


def test_parameter_groups_have_activations_at_the_scales_rate_with_their_decay() -> None:
    x = toy_blocks(1, 12)
    model = ready(tiny_llama(), rule("W4", pattern="*.mlp.*", activation={"num_bits": 4, "preset": "pact"}), x)
    groups = parameter_groups(
        model, learning_rate=1e-3, scale_learning_rate=1e-4, rest_learning_rate=0.0, weight_decay=0.1
    )
    found = {group["name"]: group for group in groups}
    assert set(found) == {"latent", "scale", "activation_decay_0.0001"}
    mine = found["activation_decay_0.0001"]
    assert (mine["lr"], mine["weight_decay"], len(mine["params"])) == (1e-4, 1e-4, 6)


def test_the_packed_config_refuses_what_it_cannot_be() -> None:
    scheme = ActivationScheme(num_bits=8).to_dict()
    with pytest.raises(ValueError, match="input of up_proj, which is not packed"):
        FewbitsConfig(activations=[{"scheme": scheme, "modules": ["up_proj"]}])
    assert "activations" not in FewbitsConfig().to_dict()


def test_the_base_model_of_an_export_has_them_too(tmp_path: Path) -> None:
    x = toy_blocks(1, 12)
    model = ready(tiny_llama(), rule("W4KV4", activation=LEARNED[0]), x)
    export(model, "hf", tmp_path / "hf")
    base = AutoModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(base(x).last_hidden_state, model.model(x).last_hidden_state)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    x = toy_blocks(1, 12)
    model = ready(tiny_llama(), rule(activation=LEARNED[0]), x)
    save_prepared(model, None, tmp_path / "prepared")
    export(model, "hf", tmp_path / "hf")
    for folder, key in (("prepared", "log_scale"), ("hf", "scale")):
        path = tmp_path / folder / "model.safetensors"
        tensors = load_file(path)
        whole = dict(tensors)
        del tensors[f"model.layers.0.mlp.up_proj.{INPUT}.{key}"]
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ValueError, match=key):
            load_prepared(tmp_path / folder) if folder == "prepared" else AutoModelForCausalLM.from_pretrained(
                tmp_path / folder
            )
        save_file({**whole, f"model.layers.0.mlp.up_proj.{INPUT}.extra": torch.ones(2)}, path, {"format": "pt"})
        if folder == "prepared":
            with pytest.raises(ValueError, match="extra"):
                load_prepared(tmp_path / folder)
