"""Scores: closed forms, limits, and the brute-force twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewbits.data import TokenBlocks
from fewbits.evaluate import EvalResult, evaluate
from fewbits.testing.tiny import tiny_llama


def blocks(rows: int = 5, size: int = 12) -> TokenBlocks:
    generator = np.random.default_rng(0)
    return TokenBlocks(generator.integers(0, 256, (rows, size)), bytes_per_token=2.0)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, blocks())
    assert result.perplexity == pytest.approx(256, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(8 / 2.0, rel=1e-6)
    assert result.num_tokens == 5 * 11


def test_against_the_loop_and_any_batch_size() -> None:
    model, data = tiny_llama(seed=3), blocks()
    total = 0.0
    with torch.no_grad():
        for block in data.tokens:
            ids = torch.from_numpy(block.astype(np.int64))
            probabilities = model(input_ids=ids[None]).logits[0].double().softmax(-1)
            total -= sum(math.log(probabilities[t, ids[t + 1]]) for t in range(len(ids) - 1))
    for batch_size in (1, 2, 8):
        assert evaluate(model, data, batch_size=batch_size).loss == pytest.approx(total / 55, rel=1e-6)


def test_a_model_agrees_with_itself_and_less_with_another() -> None:
    model = tiny_llama(seed=1).train()
    model.model.norm.eval()
    same = evaluate(model, blocks(), teacher=model)
    assert same.kl_to_teacher == pytest.approx(0, abs=1e-9)
    assert same.top1_agreement == 1
    assert model.training
    assert not model.model.norm.training
    other = evaluate(model, blocks(), teacher=tiny_llama(seed=2))
    assert other.kl_to_teacher is not None
    assert other.kl_to_teacher > 1e-4
    assert other.top1_agreement is not None
    assert other.top1_agreement < 0.5


def test_results_are_typed_and_carry_versions() -> None:
    result = evaluate(tiny_llama(), blocks())
    assert EvalResult.model_validate_json(result.model_dump_json()) == result
    assert {"fewbits", "torch", "transformers", "python"} <= set(result.versions)


def test_a_diverged_model_is_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        evaluate(model, blocks())
