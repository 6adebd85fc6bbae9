"""The tokenizer inside a GGUF file: vocabulary, merges, special tokens and chat template as llama.cpp reads them.

Two kinds are written, each only where llama.cpp cuts text as the original does. ``gpt2``: byte-level BPE, with the name
of a pre-tokenizer that llama.cpp knows by heart. ``llama``: SentencePiece's BPE, where llama.cpp has no list of merges
but takes, of all neighbours whose union is a token, the one with the highest score; the rank of a merge becomes the
score of its result, and lists for which this is not the same are refused.
"""

from __future__ import annotations

import json
import re
from itertools import product
from typing import Any

import numpy as np

from fewbits.targets.gguf_file import MetaValue
from fewbits.targets.gguf_types import F32

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's token types."""

_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}": "qwen2", _WORDS % r"\p{N}{1,3}": "llama-bpe"}
_IGNORE_MERGES = ("llama-bpe",)
"""Pre-tokenizers for which llama.cpp takes a word that is a token as it is, without merging."""


def tokenizer_metadata(tokenizer: Any, vocab_size: int) -> dict[str, MetaValue]:
    """``tokenizer.*`` of a fast Transformers tokenizer.

    Args:
        tokenizer: with a ``backend_tokenizer`` of the tokenizers library.
        vocab_size: rows of the embedding; missing tokens at the end are filled up as unused.

    Raises:
        ValueError: for a tokenizer that llama.cpp cannot follow, naming the part.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer; GGUF needs the content of a tokenizer.json")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model.get("type") != "BPE" or any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError(f"the tokenizer model is {model.get('type')!r}; GGUF export knows BPE without affixes")
    tokens, types = _vocabulary(data, model["vocab"], vocab_size, tokenizer.unk_token_id)
    keys: dict[str, MetaValue] = {"tokens": tokens, "token_type": np.array(types, dtype=np.int32)}
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    merges = [(str(a), str(b)) for a, b in pairs]
    if model.get("byte_fallback"):
        keys |= {"model": "llama", "add_space_prefix": _adds_space(data)}
        keys["scores"] = _scores(tokens, types, merges)
    else:
        keys |= {"model": "gpt2", "pre": _pre_tokenizer(data), "merges": [" ".join(m) for m in merges]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (keys | _special(tokenizer)).items()}
    return metadata | _chat_templates(tokenizer.chat_template)


def _vocabulary(
    data: dict[str, Any], vocab: dict[str, int], size: int, unknown: int | None
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    byte_fallback = bool(data["model"].get("byte_fallback"))
    added = {token["id"]: token for token in data["added_tokens"]}
    for text, i in vocab.items() | {(token["content"], i) for i, token in added.items()}:
        if not 0 <= i < size:
            raise ValueError(f"token {text!r} has the number {i}, but the model has {size} tokens")
        if i in added and text != added[i]["content"]:
            raise ValueError(f"token {i} is {text!r} in the vocabulary and {added[i]['content']!r} in added_tokens")
        tokens[i] = text
        if i == unknown and byte_fallback:  # byte-level vocabularies name another special token here
            types[i] = UNKNOWN
        elif i in added:
            types[i] = CONTROL if added[i]["special"] else USER_DEFINED
        else:
            types[i] = BYTE if byte_fallback and _BYTE_TOKEN.fullmatch(text) else NORMAL
    if len(set(tokens)) != size:
        raise ValueError(f"token {next(t for t in tokens if tokens.count(t) > 1)!r} occurs twice in the vocabulary")
    return tokens, types


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list of steps."""
    if part is None:
        return []
    return [step for inner in part[key] for step in _steps(inner, key)] if part["type"] == "Sequence" else [part]


def _pre_tokenizer(data: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a byte-level BPE cuts text into words before merging."""
    normalizers = _steps(data["normalizer"], "normalizers")
    steps = _steps(data["pre_tokenizer"], "pretokenizers")
    *before, last = steps or [{"type": None}]
    name = None
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if not before and last["use_regex"]:
            name = "gpt-2"
        elif [s["type"] for s in before] == ["Digits"] and before[0]["individual_digits"] and last["use_regex"]:
            name = "smollm"
        elif [s["type"] for s in before] == ["Split"] and not last["use_regex"]:
            split = before[0]
            if split["behavior"] == "Isolated" and not split["invert"]:
                name = _SPLITS.get(split["pattern"].get("Regex"))
    # NFC (Qwen) is left out by llama.cpp: text that is not composed is cut otherwise there
    if name is None or any(step["type"] != "NFC" for step in normalizers):
        raise ValueError(
            f"llama.cpp has no pre-tokenizer like this one: {json.dumps(data['pre_tokenizer'])[:300]}, normalizer "
            f"{json.dumps(data['normalizer'])[:100]}; known are those of GPT-2, SmolLM, Qwen2 and Llama 3"
        )
    if bool(data["model"].get("ignore_merges")) != (name in _IGNORE_MERGES):
        raise ValueError(f"ignore_merges={data['model'].get('ignore_merges')} is not what llama.cpp does for {name}")
    return name


def _adds_space(data: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before the text; refuses what llama.cpp does not do."""
    steps = _steps(data["normalizer"], "normalizers") + _steps(data["pre_tokenizer"], "pretokenizers")
    prefix = replaced = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            replaced = True
        elif kind == "Metaspace" and step["replacement"] == _SPACE:
            prefix, replaced = prefix or step["prepend_scheme"] != "never", True
        elif not (kind == "Split" and replaced and step["pattern"] == {"String": " "}):  # no space is left to split at
            raise ValueError(f"llama.cpp's SentencePiece tokenizer has no step like {json.dumps(step)[:200]}")
    if not replaced:
        raise ValueError(
            f"the tokenizer does not write spaces as {_SPACE}, as llama.cpp's SentencePiece tokenizer does"
        )
    return prefix


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> F32:
    """Minus the rank of the first merge that makes a token, where merging by score is merging by rank."""
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    known = set(merges)
    for text in normal:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in normal and pair[1] in normal and pair not in known:
                raise ValueError(f"llama.cpp would merge {pair[0]!r} and {pair[1]!r}, which this tokenizer does not")
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        if left + right in normal:
            ranks.setdefault(left + right, []).append(rank)
    scores = {text: -float(found[0]) for text, found in ranks.items()}
    first = last = ""
    for text in ranks:  # in the order of their first merges; last: of all so far the one whose merges end last
        if last and ranks[text][0] < ranks[last][-1]:
            # SentencePiece gives Llama's runs of spaces one score; only their merges may be mixed up
            if len(set(text + last)) > 1:
                raise ValueError(
                    f"merges for {text!r} and {last!r} are mixed, so no scores give their order in llama.cpp"
                )
            scores[text] = scores[first]
        else:
            first = text
        last = max(last, text, key=lambda t: ranks[t][-1] if t else -1)
    return np.array([scores.get(text, 0.0) for text in tokens], dtype=np.float32)


def _special(tokenizer: Any) -> dict[str, MetaValue]:
    """Special tokens, and which of them are put around a text: found by encoding one."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos_token; llama.cpp would take a token of its own choice for it")
    ids = {
        # llama.cpp has default numbers for these two, right for other vocabularies only
        "bos_token_id": eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos_token_id": eos,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    given: dict[str, MetaValue] = {key: np.uint32(value) for key, value in ids.items() if value is not None}
    full, bare = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    for add_bos, add_eos in product((False, True), repeat=2):
        if full == [ids["bos_token_id"]] * add_bos + bare + [eos] * add_eos:
            return given | {"add_bos_token": add_bos, "add_eos_token": add_eos}
    raise ValueError(f"the tokenizer makes {full} of 'a'; llama.cpp puts nothing but bos before and eos after a text")


def _chat_templates(template: Any) -> dict[str, MetaValue]:
    if template is None:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {name: text for name, text in dict(template).items() if name != "default"}
    keys: dict[str, MetaValue] = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = list(named)
    return keys | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})
