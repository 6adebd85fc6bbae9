"""llama.cpp itself, in this process, through the ``xllamacpp`` wheel: all logits, not only the likeliest few.

The wheel's own interface is a server that gives log-probabilities of generated tokens. The C functions below it are
exported, so they are called directly here. Their parameter structures change between versions; each field that is
touched is first checked to hold its documented default, and a build with another layout is refused, never guessed at.

A bad file can make the C code end the process. Files of :mod:`fewbits.targets.gguf` do not; each is read by fewbits'
own strict reader first.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.targets.ggml import INSTALL, ggml_library
from fewbits.targets.gguf_reader import read_gguf

_KV_FP32 = 0
_ERROR_LEVEL = 4
_LOG = deque[str](maxlen=5)
_LOG_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_FLASH_OFF = 0


class _ContextParams(ctypes.Structure):
    """The leading fields of ``llama_context_params``; what follows is carried along untouched.

    Structures of this size are passed in memory, so room beyond the true end does no harm.
    """

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, ctypes.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, ctypes.c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, ctypes.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor")),
        *((name, ctypes.c_float) for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, ctypes.c_int32) for name in ("type_k", "type_v")),
        ("rest", ctypes.c_uint8 * 256),
    )


_DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
             "n_outputs_max_per_seq": 1, "ctx_type": 0, "rope_scaling_type": -1, "pooling_type": -1,
             "attention_type": -1, "flash_attn_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0,
             "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
             "yarn_orig_ctx": 0, "defrag_thold": -1.0, "type_k": 1, "type_v": 1}  # fmt: skip
"""From llama.cpp's source; by these the layout is recognized."""


class _ModelParams(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


@_LOG_TYPE
def _keep_errors(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR_LEVEL:
        _LOG.append(text.decode(errors="replace").strip())


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ggml_library()
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, ...]] = {
        "llama_backend_init": (None,),
        "llama_log_set": (None, _LOG_TYPE, pointer),
        "llama_model_default_params": (_ModelParams,),
        "llama_context_default_params": (_ContextParams,),
        "llama_model_load_from_file": (pointer, ctypes.c_char_p, _ModelParams),
        "llama_init_from_model": (pointer, pointer, _ContextParams),
        "llama_model_free": (None, pointer),
        "llama_free": (None, pointer),
        "llama_model_get_vocab": (pointer, pointer),
        "llama_vocab_n_tokens": (number, pointer),
        "llama_get_memory": (pointer, pointer),
        "llama_memory_clear": (None, pointer, ctypes.c_bool),
        "llama_batch_init": (_Batch, number, number, number),
        "llama_batch_free": (None, _Batch),
        "llama_decode": (number, pointer, _Batch),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), pointer, number),
        "llama_tokenize": (number, pointer, ctypes.c_char_p, number, pointer, number, ctypes.c_bool, ctypes.c_bool),
        "llama_detokenize": (number, pointer, pointer, number, ctypes.c_char_p, number, ctypes.c_bool, ctypes.c_bool),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise ImportError(f"this build of llama.cpp does not export {name}; install the tested one: {INSTALL}")
        function.restype, function.argtypes = result, arguments
    params = library.llama_context_default_params()
    if any(getattr(params, name) != value for name, value in _DEFAULTS.items()):
        raise ImportError(
            f"this build of llama.cpp has another llama_context_params; install the tested one: {INSTALL}"
        )
    library.llama_log_set(_keep_errors, None)
    library.llama_backend_init()
    return library


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU, with fp32 keys and values and plain attention.

    Use it as a context manager, or call :meth:`close`.

    Args:
        path: the file.
        num_threads: of llama.cpp.
        context_length: longest sequence; None takes 512.

    Raises:
        ImportError: without a fitting ``xllamacpp`` wheel, with the install line.
        ValueError: for a file that fewbits or llama.cpp refuses.
    """

    def __init__(self, path: Path | str, *, num_threads: int = 1, context_length: int = 512) -> None:
        self._model = self._context = None
        self.path = Path(path)
        if read_gguf(path).metadata.get("tokenizer.ggml.model") in (None, "no_vocab"):
            raise ValueError(f"{path} has no vocabulary; llama.cpp would end this process on it")
        self._library = _library()
        _LOG.clear()
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}: {'; '.join(_LOG)}")
        params = self._library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.context_length = context_length
        params.n_outputs_max_per_seq = 0
        params.n_threads = params.n_threads_batch = num_threads
        params.type_k = params.type_v = _KV_FP32
        params.flash_attn_type = _FLASH_OFF
        self._context = self._library.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise ValueError(f"llama.cpp does not run {path}: {'; '.join(_LOG)}")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._library.llama_vocab_n_tokens(self._vocab))
        self.num_cached = 0

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the C side."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._model = self._context = None

    def logits(self, token_ids: Any) -> NDArray[np.float32]:
        """Logits at every position of one sequence, each call from an empty cache.

        Args:
            token_ids: integers ``(length,)``.

        Returns:
            fp32 ``(length, vocab_size)``.

        Raises:
            ValueError: for tokens out of range, or too many of them.
        """
        self.clear()
        return self._decode(token_ids, every=True)

    def clear(self) -> None:
        """Forget the sequence that :meth:`extend` has built."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self.num_cached = 0

    def extend(self, token_ids: Any) -> NDArray[np.float32]:
        """Append tokens to the sequence in the cache; logits after the last one, fp32 ``(vocab_size,)``.

        Raises:
            ValueError: for tokens out of range, or a sequence longer than ``context_length``.
        """
        return self._decode(token_ids, every=False)[0]

    def _decode(self, token_ids: Any, *, every: bool) -> NDArray[np.float32]:
        ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
        room = self.context_length - self.num_cached
        if not 1 <= ids.size <= room or ids.min() < 0 or ids.max() >= self.vocab_size:
            limit = f"1 to {room} tokens below {self.vocab_size} are needed"
            raise ValueError(f"{ids.size} tokens from {ids.min(initial=0)} to {ids.max(initial=0)}; {limit}")
        library, last = self._library, ids.size - 1
        batch = library.llama_batch_init(ids.size, 0, 1)
        try:
            batch.n_tokens = ids.size
            for i, token in enumerate(ids.tolist()):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.num_cached + i, 1
                batch.logits[i] = int(every or i == last)
                batch.seq_id[i][0] = 0
            if status := library.llama_decode(self._context, batch):
                raise ValueError(f"llama_decode fails with status {status}: {'; '.join(_LOG)}")
            self.num_cached += ids.size
            rows = [library.llama_get_logits_ith(self._context, i) for i in (range(ids.size) if every else [last])]
            return np.stack([np.ctypeslib.as_array(row, shape=(self.vocab_size,)) for row in rows])
        finally:
            library.llama_batch_free(batch)

    def greedy(self, token_ids: Any, num_tokens: int) -> list[int]:
        """The next tokens by the largest logit, the whole sequence computed anew for each."""
        ids = [int(i) for i in np.asarray(token_ids).reshape(-1)]
        start = len(ids)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[start:]

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Text to tokens by llama.cpp's own tokenizer."""
        raw = text.encode()
        buffer = np.empty(len(raw) + 16, dtype=np.int32)
        count = self._library.llama_tokenize(
            self._vocab, raw, len(raw), buffer.ctypes.data, buffer.size, add_special, parse_special
        )
        if count < 0:
            raise ValueError(f"llama_tokenize needs room for {-count} tokens of {len(raw)} bytes")
        return buffer[:count].tolist()

    def detokenize(self, token_ids: Any, *, special: bool = True) -> str:
        """Tokens to text by llama.cpp's own tokenizer."""
        ids = np.asarray(token_ids, dtype=np.int32).reshape(-1)
        buffer = ctypes.create_string_buffer(64 * (ids.size + 1))
        count = self._library.llama_detokenize(
            self._vocab, ids.ctypes.data, ids.size, buffer, len(buffer), False, special
        )
        if count < 0:
            raise ValueError(f"llama_detokenize needs {-count} bytes for {ids.size} tokens")
        return buffer.raw[:count].decode(errors="replace")
