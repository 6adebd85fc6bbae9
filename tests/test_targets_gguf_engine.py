"""llama.cpp itself, in process: the graph, the tokenizer and every type compute what was trained.

Three levels. A file of dequantized weights must agree closely, which proves graph, metadata and row order. A quantized
file differs, because llama.cpp rounds activations to int8 first; with that rounding put into our model, most single
tokens must agree as closely (in longer texts a flipped rounding spreads). And the difference must be small.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_common import (
    MODELS,
    PRE_TOKENIZERS,
    VOCAB_SIZE,
    byte_level,
    logits,
    scheme,
    sentencepiece_like,
    some_ids,
    trained,
    untrained,
    written,
)
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor

from fewbits import Rule, prepare
from fewbits.comparison import LogitsComparison, compare_logits
from fewbits.convert import qat_layers
from fewbits.corpora import embedded_model_path, embedded_texts
from fewbits.pretrained import load_model, load_tokenizer
from fewbits.targets import gguf, llamacpp
from fewbits.targets.gguf import GGUF
from fewbits.targets.gguf_contents import FILE
from fewbits.targets.gguf_file import GGUFTensor, write_gguf
from fewbits.targets.gguf_reader import read_gguf
from fewbits.targets.gguf_tokenizer import tokenizer_metadata
from fewbits.targets.llamacpp import LlamaCpp
from fewbits.testing.ggml_activations import int8_per_32, round_q8_0, round_q8_k

CONTROL = 5e-5
"""fp32 sums in another order: seen below 2e-5."""
TABLE_FLIPS = 5e-3
"""A gate on the edge of two entries of llama.cpp's GELU table takes the other one: seen 8e-4."""
WRONG = 1e-2
"""What the control must exceed for a file with a fault."""
EMULATED = 1e-5
"""Median over single tokens: seen 2e-6. In a few a number lies so near to the edge of a rounding that it flips."""
KL = 5e-3
TEXTS = (
    "the fox sees the owl.",
    "  two  spaces\tand\n\nlines \r\n",
    "don't DON'T we'll 3 12 123 1234567",
    "naïve Ünïcödé — 你好, мир! 🙂👍",
    "x=[1,2];f(x)//y  # <tool> <|bos|>a<|eos|>",
    " ",
    "a",
)


def engine_logits(path: Path, ids: Tensor) -> Tensor:
    with LlamaCpp(path / FILE) as engine:
        return torch.from_numpy(engine.logits(ids))


def median_error(folder: Path, model: Any, ours: Any) -> float:
    """Of single tokens, each from an empty cache: the median of the largest differences of a logit."""
    tokens = some_ids(15, seed=11)
    with LlamaCpp(folder / FILE) as engine:
        found = torch.from_numpy(np.stack([engine.logits([token])[0] for token in tokens.tolist()]))
    expected = torch.cat([ours(model, token[None]) for token in tokens])
    return float((found - expected).abs().amax(-1).median())


def compared(expected: Tensor, found: Tensor) -> LogitsComparison:
    return compare_logits(lambda _: expected[None], lambda _: found[None], torch.zeros(1, len(expected)).long())


@torch.no_grad()
def gelu_from_table(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """llama.cpp looks GELU up in a table of fp16 numbers."""
    x = inputs[0]
    looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, looked_up))


def with_table(model: Any, ids: Tensor) -> Tensor:
    """Logits of our model with llama.cpp's GELU, where it has one."""
    hooks = [
        module.register_forward_hook(gelu_from_table)
        for module in model.modules()
        if type(module).__name__ == "GELUTanh"
    ]
    assert bool(hooks) == model.config.model_type.startswith("gemma")
    try:
        return logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_of_dequantized_weights_computes_the_same(kind: str, tmp_path: Path) -> None:
    model, ids = trained(scheme("W2A16G64"), kind), some_ids()
    found = engine_logits(written(model, GGUF("f32"), tmp_path), ids)
    worst = float((found - with_table(model, ids)).abs().max())
    assert worst < (TABLE_FLIPS if kind.startswith("gemma") else CONTROL)
    assert median_error(tmp_path, model, with_table) < EMULATED
    assert compared(logits(model, ids), found).kl < 1e-6


@pytest.mark.parametrize(
    ("kind", "part", "replacement"),
    [
        ("llama", "row_order", lambda *_: None),
        ("llama3 rope", "rope_factors", lambda _: None),
        ("gemma", "is_shifted", lambda *_: False),
        ("linear rope", "model_metadata", None),
        ("qwen3 yarn", "model_metadata", None),
    ],
)
def test_the_control_sees_a_wrong_file(
    kind: str, part: str, replacement: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, original = trained(scheme("W2A16G64"), kind), some_ids(), getattr(gguf, part)

    def without_scaling(*arguments: Any) -> dict[str, Any]:
        return {key: value for key, value in original(*arguments).items() if "scaling" not in key}

    monkeypatch.setattr(gguf, part, replacement or without_scaling)
    GGUF("f32").write(model, byte_level(), tmp_path)
    assert float((engine_logits(tmp_path, ids) - logits(model, ids)).abs().max()) > WRONG


def q8_0(layer: Any, x: Tensor) -> Tensor:
    """Flat types."""
    return torch.nn.functional.linear(round_q8_0(x), layer.quantized_weight(), layer.bias)


def q8_1(layer: Any, x: Tensor) -> Tensor:
    """Q4_1: as :func:`q8_0`, but the minimum of a block of weights meets the sum of the activations, kept in fp16."""
    codes, d = int8_per_32(x)
    sums = (codes.sum(-1) * d[..., 0]).half().float() - codes.sum(-1) * d[..., 0].half().float()
    minimum = layer.qtensor().scale * layer.scheme.grid.levels[0]
    return q8_0(layer, x) + sums @ minimum.T


def q8_k(layer: Any, x: Tensor) -> Tensor:
    """K-quants and ternary types."""
    return torch.nn.functional.linear(round_q8_k(x), layer.quantized_weight(), layer.bias)


@torch.no_grad()
def emulated(model: Any, ids: Tensor, multiply: Any) -> Tensor:
    """Logits of our model with llama.cpp's rounding of activations."""
    hooks = [layer.register_forward_hook(lambda m, x, _: multiply(m, x[0])) for _, layer in qat_layers(model)]
    try:
        return logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()


TYPES = [
    ("W1A16G128", "q1_0", q8_0),
    ("W1.58A16G256", "tq1_0", q8_k),
    ("W1.58A16G256", "tq2_0", q8_k),
    ("W2A16G256", "tq2_0", q8_k),  # uses the code 2, which ggml's own quantizer never makes
    ("W2A16G64", "q2_0", q8_0),
    ("W1.58A16G64", "q2_0", q8_0),
    ("W1A16G64", "q2_0", q8_0),
    ("W2HA16G256", "q2_k", q8_k),
    ("W3A16G256", "q3_k", q8_k),
    ("W4A16G32", "q4_0", q8_0),
    ("W3HA16G32", "q4_1", q8_1),
    ("W4HA16G32", "q5_0", q8_0),
    ("W8A16G32", "q8_0", q8_0),
]


@pytest.mark.parametrize(("text", "kind", "multiply"), TYPES, ids=[f"{t}-{k}" for t, k, _ in TYPES])
def test_every_type_differs_by_the_rounding_of_activations_only(
    text: str, kind: str, multiply: Any, tmp_path: Path
) -> None:
    model, ids = trained(scheme(text), "llama"), some_ids()
    found = engine_logits(written(model, GGUF(kind), tmp_path), ids)
    result = compared(logits(model, ids), found)
    assert 0 < result.kl < KL
    assert result.top1_agreement > 0.9
    assert median_error(tmp_path, model, functools.partial(emulated, multiply=multiply)) < EMULATED


def test_super_blocks_and_mixed_types(tmp_path: Path) -> None:
    rules = [
        Rule(pattern="*.q_proj", scheme=scheme("W2HA16G64", superblock=256)),
        Rule(pattern="*.k_proj", scheme=scheme("W1.58", granularity="per_tensor")),
        Rule(pattern="*", scheme=scheme("W2A16G64")),
    ]
    model, ids = prepare(untrained("llama"), rules), some_ids()
    found = engine_logits(written(model, GGUF(), tmp_path), ids)
    result = compared(logits(model, ids), found)
    assert result.kl < KL
    assert result.top1_agreement > 0.9


def test_a_quantized_tied_embedding_runs(tmp_path: Path) -> None:
    model: Any = prepare(untrained("llama tied"), Rule(scheme=scheme("W4A16G32"), embeddings=True), ignore=[])
    found = engine_logits(written(model, GGUF(), tmp_path), some_ids())
    assert compared(logits(model, some_ids()), found).kl < KL


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_tokenizers_cut_text_alike(pre: str, tmp_path: Path) -> None:
    tokenizer = byte_level(pre, add_bos=pre == "llama-bpe")
    model = prepare(untrained("llama one layer"), Rule(scheme=scheme("W2A16G64")))
    GGUF().write(model, tokenizer, tmp_path)
    metadata = read_gguf(tmp_path / FILE).metadata
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.add_bos_token"] is (pre == "llama-bpe")
    assert metadata["tokenizer.ggml.token_type"][:2].tolist() == [3, 3]  # type: ignore[index]
    check_tokenizer(tokenizer, tmp_path)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_cut_text_alike(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(prefix=prefix)
    model = prepare(untrained("llama one layer"), Rule(scheme=scheme("W2A16G64")))
    GGUF().write(model, tokenizer, tmp_path)
    metadata = read_gguf(tmp_path / FILE).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.token_type"][:4].tolist() == [3, 3, 2, 6]  # type: ignore[index]
    check_tokenizer(tokenizer, tmp_path)


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    with LlamaCpp(folder / FILE) as engine:
        assert engine.vocab_size == VOCAB_SIZE
        for text in TEXTS:
            plain = text.split(" <|bos|>")[0]  # a word that starts after a special token is marked differently
            for special in (False, True):
                ids = tokenizer(plain, add_special_tokens=special)["input_ids"]
                assert engine.tokenize(plain, add_special=special) == ids, plain
            if tokenizer.backend_tokenizer.model.byte_fallback is not True:
                assert engine.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
                assert engine.detokenize(engine.tokenize(text)) == text


def test_chat_templates(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert tokenizer_metadata(byte_level(template=template), VOCAB_SIZE)["tokenizer.chat_template"] == template
    several = byte_level(template="x")
    several.chat_template = {"default": "a", "tool_use": "b"}
    metadata = tokenizer_metadata(several, VOCAB_SIZE)
    several.chat_template = "x"
    assert metadata["tokenizer.chat_template"] == "a"
    assert metadata["tokenizer.chat_template.tool_use"] == "b"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]


def test_a_byte_level_vocabulary_names_a_special_token_as_unknown() -> None:
    named = changed(byte_level())
    named.unk_token = "<|eos|>"
    metadata: Any = tokenizer_metadata(named, VOCAB_SIZE)
    assert metadata["tokenizer.ggml.unknown_token_id"] == 1
    assert metadata["tokenizer.ggml.token_type"][1] == 3


def test_tokens_beyond_the_tokenizer_are_unused_and_distinct() -> None:
    metadata = tokenizer_metadata(byte_level(), VOCAB_SIZE + 9)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, np.ndarray)
    assert len(set(tokens)) == VOCAB_SIZE + 9
    assert (types[-9:] == 5).all()
    assert types[byte_level().get_vocab()["<tool>"]] == 4


def changed(tokenizer: Any, **changes: Any) -> Any:
    """A fresh tokenizer with parts of its backend replaced."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    fresh = type(tokenizer)(tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    for name, value in changes.items():
        setattr(fresh.backend_tokenizer, name, value)
    return fresh


def test_tokenizers_that_llama_cpp_does_not_follow_are_refused() -> None:
    plain = byte_level()
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for bad in (spaced, pre_tokenizers.Whitespace(), pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), spaced])):
        with pytest.raises(ValueError, match="no pre-tokenizer like this one"):
            tokenizer_metadata(changed(plain, pre_tokenizer=bad), VOCAB_SIZE)
    with pytest.raises(ValueError, match="no pre-tokenizer like this one"):
        tokenizer_metadata(changed(plain, normalizer=normalizers.Lowercase()), VOCAB_SIZE)
    assert tokenizer_metadata(changed(plain, normalizer=normalizers.NFC()), VOCAB_SIZE)["tokenizer.ggml.pre"] == "gpt-2"
    with pytest.raises(ValueError, match=f"the model has {VOCAB_SIZE - 40} tokens"):
        tokenizer_metadata(plain, VOCAB_SIZE - 40)
    with pytest.raises(ValueError, match="has no eos_token"):
        tokenizer_metadata(type(plain)(tokenizer_object=plain.backend_tokenizer), VOCAB_SIZE)
    with pytest.raises(ValueError, match="no step like"):
        tokenizer_metadata(
            changed(sentencepiece_like(prefix=True), pre_tokenizer=pre_tokenizers.Whitespace()), VOCAB_SIZE
        )
    with pytest.raises(ValueError, match="is no fast tokenizer"):
        tokenizer_metadata(object(), VOCAB_SIZE)


def test_merges_that_no_score_orders_are_refused() -> None:
    def with_model(change: Any) -> Any:
        tokenizer = sentencepiece_like(prefix=True)
        data = json.loads(tokenizer.backend_tokenizer.to_str())
        change(data["model"])
        backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(data))
        return type(tokenizer)(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    def drop(model: Any) -> None:
        model["merges"] = model["merges"][1:]

    def mix(model: Any) -> None:
        model["vocab"] |= {"aa": VOCAB_SIZE - 3, "aaa": VOCAB_SIZE - 2, "aaaa": VOCAB_SIZE - 1}
        pairs = [["aa", "a"], ["aaa", "a"], ["a", "a"], ["a", "aa"], ["aa", "aa"], ["a", "aaa"]]
        model["merges"] = [*model["merges"], *pairs]

    def mix_others(model: Any) -> None:
        mix(model)
        model["vocab"] |= {"▁▁": VOCAB_SIZE - 4}
        model["merges"].insert(-2, ["▁", "▁"])

    with pytest.raises(ValueError, match=r"llama\.cpp would merge"):
        tokenizer_metadata(with_model(drop), VOCAB_SIZE)
    scores: Any = tokenizer_metadata(with_model(mix), VOCAB_SIZE)["tokenizer.ggml.scores"]
    assert len(set(scores[-3:])) == 1  # as of Llama's runs of spaces: any order of their merges, one score
    assert (scores[259:-3] != scores[-1]).all()
    with pytest.raises(ValueError, match=r"merges for '▁▁' and 'a+' are mixed"):
        tokenizer_metadata(with_model(mix_others), VOCAB_SIZE)


def test_the_engine_refuses_what_would_end_the_process(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUX" + bytes(60))
    with pytest.raises(ValueError, match="not a GGUF file"):
        LlamaCpp(tmp_path / "x.gguf")
    one = GGUFTensor(name="a", shape=(2,), gguf_type="F32", data=np.zeros(8, dtype=np.uint8))
    write_gguf(tmp_path / "y.gguf", {"general.architecture": "llama"}, [one])
    with pytest.raises(ValueError, match="has no vocabulary"):
        LlamaCpp(tmp_path / "y.gguf")
    write_gguf(tmp_path / "z.gguf", {"general.architecture": "none", "tokenizer.ggml.model": "gpt2"}, [one])
    with pytest.raises(ValueError, match=r"does not load .*unknown model architecture"):
        LlamaCpp(tmp_path / "z.gguf")


def test_a_build_with_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llamacpp._DEFAULTS, "n_batch", 4096)
    with pytest.raises(ImportError, match="another llama_context_params"):
        llamacpp._library.__wrapped__()


def test_tokens_out_of_range_never_reach_c(tmp_path: Path) -> None:
    written(trained(scheme("W2A16G64")), GGUF(), tmp_path)
    with LlamaCpp(tmp_path / FILE, context_length=32) as engine:
        for bad in ([], [VOCAB_SIZE], [-1], [2] * 33):
            with pytest.raises(ValueError, match="1 to 32 tokens below 320"):
                engine.logits(bad)
        alone = engine.logits([5])
        np.testing.assert_allclose(engine.logits([5, 6])[:1], alone, atol=CONTROL)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "kind", "multiply"), TYPES, ids=[f"{t}-{k}" for t, k, _ in TYPES])
def test_the_embedded_model(text: str, kind: str, multiply: Any, tmp_path: Path) -> None:
    """A model that has learned something: milder than random ones in KL, and its likeliest tokens agree."""
    source = embedded_model_path()
    model, tokenizer = load_model(source), load_tokenizer(source)
    prepare(model, Rule(scheme=scheme(text, rule="mse"))).eval()
    ids = torch.tensor(tokenizer(" ".join(embedded_texts("valid"))[:4000])["input_ids"][:256])
    found = engine_logits(written(model, GGUF(kind), tmp_path, tokenizer), ids)
    result = compared(logits(model, ids), found)
    assert result.kl < 2e-3
    assert result.top1_agreement > 0.95
    model.lm_head.register_forward_pre_hook(lambda _, x: (x[0].bfloat16().float(),))  # as its matrix is in bf16
    assert median_error(tmp_path, model, functools.partial(emulated, multiply=multiply)) < EMULATED


@pytest.mark.slow
def test_greedy_text_of_the_embedded_model(tmp_path: Path) -> None:
    source = embedded_model_path()
    model, tokenizer = load_model(source), load_tokenizer(source)
    prepare(model, Rule(scheme="W4A16G32")).eval()
    prompt = torch.tensor([tokenizer("Return a list of")["input_ids"]])
    ours = model.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0)[0]
    with LlamaCpp(written(model, GGUF("f32"), tmp_path, tokenizer) / FILE) as engine:
        assert engine.greedy(prompt[0], 64) == ours[prompt.shape[1] :].tolist()
        assert (
            engine.tokenize("\n".join(embedded_texts("valid"))[:20_000])
            == (tokenizer("\n".join(embedded_texts("valid"))[:20_000])["input_ids"])
        )


def test_a_sequence_built_piece_by_piece_has_the_same_logits(tmp_path: Path) -> None:
    written(trained(scheme("W2A16G64"), "llama"), GGUF("f32"), tmp_path)
    ids = some_ids(12).reshape(-1).tolist()
    with LlamaCpp(tmp_path / FILE, context_length=16) as engine:
        whole = engine.logits(ids)
        assert engine.num_cached == 12
        engine.clear()
        last = [engine.extend(part) for part in (ids[:5], ids[5:6], ids[6:])]
        np.testing.assert_allclose(np.stack(last), whole[[4, 5, 11]], rtol=0, atol=CONTROL)
        with pytest.raises(ValueError, match="1 to 4 tokens"):
            engine.extend(ids[:5])
