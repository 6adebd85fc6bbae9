"""llama.cpp's own C functions as an outside oracle, reached by ctypes in the ``xllamacpp`` wheel.

Nothing here depends on our packers: what ggml says about our bytes is the reference at weight level.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INSTALL = "pip install 'fewbits[llamacpp]'  (or: pip install xllamacpp)"

_DEQUANTIZE = {
    "F16": "ggml_fp16_to_fp32_row",
    "BF16": "ggml_bf16_to_fp32_row",
    **{n: f"dequantize_row_{n.lower()}" for n in ("Q1_0", "TQ1_0", "TQ2_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q8_0")},
    "Q2_K": "dequantize_row_q2_K",
    "Q3_K": "dequantize_row_q3_K",
}
_TYPE_IDS = {"F16": 1, "BF16": 30, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11}
_TYPE_IDS |= {"TQ1_0": 34, "TQ2_0": 35, "Q1_0": 41, "Q2_0": 42}
"""From ggml.h, written down here a second time on purpose: the oracle must not read our table."""


@functools.lru_cache(maxsize=1)
def ggml_library() -> ctypes.CDLL:
    """The shared library of the wheel.

    Raises:
        ImportError: with the install line, if the wheel is missing or holds no library.
    """
    spec = importlib.util.find_spec("xllamacpp")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(p for folder in folders for p in folder.glob("xllamacpp*") if p.suffix in (".so", ".pyd", ".dylib"))
    if not found:
        raise ImportError(f"the xllamacpp wheel, which carries llama.cpp's C functions, is not installed: {INSTALL}")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_type_name.argtypes, library.ggml_type_name.restype = [ctypes.c_int], ctypes.c_char_p
    library.ggml_blck_size.argtypes, library.ggml_blck_size.restype = [ctypes.c_int], ctypes.c_int64
    library.ggml_type_size.argtypes, library.ggml_type_size.restype = [ctypes.c_int], ctypes.c_size_t
    return library


def ggml_type_facts(type_id: int) -> tuple[str, int, int]:
    """Name, values per block and bytes per block of a type, as ggml knows them; C crashes on an unknown number.

    Example:
        >>> ggml_type_facts(2)
        ('q4_0', 32, 18)
    """
    library = ggml_library()
    name = library.ggml_type_name(type_id).decode()
    return name, int(library.ggml_blck_size(type_id)), int(library.ggml_type_size(type_id))


def ggml_dequantize(type_name: str, data: NDArray[Any] | bytes, num_values: int) -> NDArray[np.float32]:
    """The values that llama.cpp's C code reads from packed bytes.

    Args:
        type_name: as ggml spells it, for example ``"Q2_0"``.
        data: the bytes of whole blocks.
        num_values: how many values they hold.

    Returns:
        fp32 ``(num_values,)``.

    Raises:
        ImportError: if the wheel is missing, with the install line.
        ValueError: for a type that this build of ggml does not know, or bytes that do not match ``num_values``, beyond
            which C would read.

    Example:
        >>> ggml_dequantize("Q8_0", bytes([0, 60]) + bytes(range(32)), 32)[:4].tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    if type_name not in _DEQUANTIZE:
        raise ValueError(f"ggml_dequantize knows {', '.join(_DEQUANTIZE)}, not {type_name!r}")
    function = getattr(ggml_library(), _DEQUANTIZE[type_name], None)
    if function is None:
        raise ValueError(f"this build of ggml does not know {type_name}; install a newer xllamacpp: {INSTALL}")
    raw = np.frombuffer(bytes(data) if not isinstance(data, bytes) else data, dtype=np.uint8).copy()
    _, block, size = ggml_type_facts(_TYPE_IDS[type_name])
    if num_values % block or raw.size != num_values // block * size:
        raise ValueError(
            f"{raw.size} bytes of {type_name} do not hold {num_values} values: {size} bytes hold {block} of them"
        )
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    values = np.empty(num_values, dtype=np.float32)
    function(raw.ctypes.data, values.ctypes.data, num_values)
    return values


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def ggml_gguf_tensors(path: Path) -> dict[str, tuple[int, int, int]]:
    """Name -> (type id, absolute offset, bytes) of a GGUF file, as llama.cpp's own C reader sees it.

    For valid files only: the C reader is an oracle, not a guard.

    Raises:
        ImportError: if the wheel is missing, with the install line.
        ValueError: if the C reader refuses the file.
    """
    library = ggml_library()
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    library.gguf_init_from_file.restype = ctypes.c_void_p
    handle = library.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if not handle:
        raise ValueError(f"llama.cpp refuses {path}; its log says why")
    context = ctypes.c_void_p(handle)
    library.gguf_get_n_tensors.restype = ctypes.c_int64
    library.gguf_get_tensor_name.restype = ctypes.c_char_p
    for name in ("gguf_get_tensor_offset", "gguf_get_tensor_size", "gguf_get_data_offset"):
        getattr(library, name).restype = ctypes.c_size_t
    start = library.gguf_get_data_offset(context)
    found: dict[str, tuple[int, int, int]] = {}
    for i in map(ctypes.c_int64, range(library.gguf_get_n_tensors(context))):
        name = library.gguf_get_tensor_name(context, i).decode()
        place = start + library.gguf_get_tensor_offset(context, i)
        found[name] = (library.gguf_get_tensor_type(context, i), place, library.gguf_get_tensor_size(context, i))
    library.gguf_free(context)
    return found
