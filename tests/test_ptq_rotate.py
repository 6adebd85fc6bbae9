"""Rotations of the residual stream: orthonormal, exact in float64, refused where they are no invariance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.convert import Rule, prepare
from fewbits.ptq import apply_ptq, rotate_, rotation_matrix
from fewbits.ptq.calibration import run_model
from fewbits.ptq.rotate import is_rms_norm
from fewbits.testing.tiny import TINY_MODELS, tiny_llama, toy_blocks

EXACT = 1e-10
"""Of the logits in float64, in units of the largest one."""


class Float64RMSNorm(nn.Module):
    """An RMS norm that does not round to fp32 as those of Transformers do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 throughout, with random biases and an embedding whose mean is not 0."""
    model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Float64RMSNorm(module.weight.numel()))  # type: ignore[arg-type]
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.05
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return model


def odd_llama(hidden: int = 48, *, tie: bool = False) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("size", [1, 2, 7, 12, 64, 72])
def test_the_matrix_is_orthonormal_and_seeded(size: int) -> None:
    q = rotation_matrix(size, seed=3)
    torch.testing.assert_close(q.t() @ q, torch.eye(size).double(), atol=1e-13, rtol=0)
    assert torch.equal(q, rotation_matrix(size, seed=3))
    if size > 2:
        assert not torch.equal(q, rotation_matrix(size, seed=4))


def test_a_power_of_two_is_the_randomised_hadamard() -> None:
    q = rotation_matrix(64)
    assert torch.equal(q.abs(), torch.full((64, 64), 1 / 8).double())
    spread = torch.eye(72).double() @ rotation_matrix(72)
    assert spread.abs().max() < 0.4  # 1 / sqrt(8) times an entry of a 9 x 9 rotation
    assert spread.abs().min() > 1e-5  # every channel reaches every other


@pytest.mark.parametrize(
    "build",
    [tiny_llama, lambda: tiny_llama(tie=True), TINY_MODELS["qwen3"], odd_llama, lambda: odd_llama(36, tie=True)],
    ids=["llama", "llama_tied", "qwen3", "biases", "width36"],
)
def test_logits_do_not_change_in_float64(build: type[PreTrainedModel]) -> None:
    model = exact(build())
    blocks = toy_blocks(3)
    with torch.no_grad():
        before = run_model(model, blocks)
        weights = {name: p.clone() for name, p in model.named_parameters()}
        rotate_(model, seed=1)
        after = run_model(model, blocks)
    assert (after - before).abs().max() < EXACT * before.abs().max()
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2 and name in weights]
    assert not [name for name in matrices if torch.equal(weights[name], model.get_parameter(name))]
    gains = [m.weight for n, m in model.named_modules() if n.endswith(("layernorm", "model.norm"))]
    assert all(torch.equal(g, torch.ones_like(g)) for g in gains)


def test_gemma_adds_one_to_its_gains() -> None:
    model = TINY_MODELS["gemma"](dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(std=0.3)
        before = run_model(model, toy_blocks(2))
        after = run_model(rotate_(model), toy_blocks(2))
    assert (after - before).abs().max() < 1e-5 * before.abs().max()  # its norms compute in fp32
    assert model.model.norm.weight.abs().max() == 0


def neox() -> PreTrainedModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=256, tie_word_embeddings=True, **shape)).eval()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (TINY_MODELS["gpt2"], "no residual stream was found in GPT2LMHeadModel"),
        (neox, "LayerNorm does not commute"),
        (TINY_MODELS["gemma3"], "would change its logits by"),
    ],
    ids=["gpt2", "neox", "gemma3"],
)
def test_other_models_are_refused_and_left_as_they_were(build: type[PreTrainedModel], message: str) -> None:
    model = build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "ln_" in name:
                p += torch.linspace(-0.3, 0.3, p.numel())
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        rotate_(model)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_plain_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="only Transformers models can be rotated, not Linear"):
        rotate_(nn.Linear(4, 4))


def test_layer_norm_is_no_rms_norm() -> None:
    assert not is_rms_norm(nn.LayerNorm(32))
    assert not is_rms_norm(nn.LayerNorm(32, bias=False))
    assert is_rms_norm(nn.RMSNorm(32))


def test_a_rotated_model_is_quantized_saved_and_loaded(tmp_path: Path) -> None:
    blocks, rule = toy_blocks(8), Rule(scheme="W2A16G32")
    model = apply_ptq(tiny_llama(tie=True), rule, "gptq", blocks, rotate=True, seed=5)
    by_hand = apply_ptq(rotate_(tiny_llama(tie=True), seed=5), rule, "gptq", blocks)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in by_hand.state_dict().items()
    }
    save_prepared(model, None, tmp_path / "model")
    loaded, _ = load_prepared(tmp_path / "model")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(run_model(loaded, blocks), run_model(model, blocks))


def test_large_single_weights_no_longer_hurt_rounding() -> None:
    blocks, teacher = toy_blocks(8), tiny_llama()
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if "proj" in name:
                p *= torch.where(torch.rand(p.shape) < 0.02, 12.0, 1.0)
    rule = Rule(scheme="W3A16")

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((run_model(model, blocks) - run_model(teacher, blocks)).square().mean())

    def copy() -> PreTrainedModel:
        model = tiny_llama()
        model.load_state_dict(teacher.state_dict())
        return model

    assert error(apply_ptq(copy(), rule, "rtn", rotate=True)) < 0.8 * error(prepare(copy(), rule))
