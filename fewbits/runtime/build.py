"""Compile the C kernels with the system's compiler, once, into a user cache; load them by ctypes.

The cache's file name is a hash of the sources, the compiler's version and the flags, so that a change of any of them
compiles anew and nothing stale is ever loaded. ``FEWBITS_CACHE`` names another cache folder, ``CC`` another compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-ffp-contract=off")
"""No ``-march``: the vector kernels name their instruction sets themselves and are chosen at run time."""
COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 900
_SOURCES = ("kernels.c", "pool.c", "portable.c", "lanes.c", "avx2.c", "avx512.c", "decode.c")


class Layer(ctypes.Structure):
    """The C struct ``fb_layer``; pointers are addresses of tensors that the caller keeps alive."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "multipliers", "levels", "first", "lane")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "stride", "group", "num_groups", "scale_cols")),
        ("per_super", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("scale_rows", "scale_kind", "bits", "twice_zero")),
        ("half_step", ctypes.c_float),
        ("variant", ctypes.c_int32),
    )


class Block(ctypes.Structure):
    """The C struct ``fb_block``: pointers to seven layers, their biases, four norms, keys and values."""

    _fields_ = (
        ("layer", ctypes.c_void_p * 7),
        ("bias", ctypes.c_void_p * 7),
        ("norm", ctypes.c_void_p * 4),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("int8", ctypes.c_int32 * 7),
    )


class Stack(ctypes.Structure):
    """The C struct ``fb_stack``: the blocks of a model and its sizes."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_blocks", "hidden", "inner", "heads", "kv_heads", "head_dim")),
        ("max_length", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why and what to do."""


def cache_dir() -> Path:
    """Folder of compiled kernels: ``FEWBITS_CACHE``, or ``fewbits`` in the user's cache folder."""
    if own := os.environ.get("FEWBITS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"


def find_compiler() -> list[str]:
    """The C compiler as an argument list: ``CC``, else the first of cc, gcc and clang on the path.

    Raises:
        BuildError: if there is none.
    """
    if own := os.environ.get("CC"):
        command = shlex.split(own)
        if shutil.which(command[0]) is None:
            raise BuildError(f"CC={own!r} is not an executable; unset it or name a C compiler")
        return command
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise BuildError(
        f"no C compiler found (tried CC, {', '.join(COMPILERS)}); install gcc or clang, "
        "or pip install ziglang and set CC='python -m ziglang cc'"
    )


def build_kernels(directory: Path | None = None) -> Path:
    """Compile the kernels unless the cache holds them already.

    Args:
        directory: cache folder; :func:`cache_dir` if None.

    Returns:
        Path of the shared library. It is written to a temporary name and renamed, so that processes that start
        together cannot see half a file.

    Raises:
        BuildError: without a compiler, on a compiler error (its message is included), or if the folder cannot be
            written.
    """
    compiler = find_compiler()
    source = Path(__file__).parent
    version = _run([*compiler, "--version"])
    key = hashlib.sha256()
    texts = [(source / name).read_text() for name in _SOURCES]
    for part in (version, " ".join(compiler), *FLAGS, platform.machine(), *texts):
        key.update(part.encode() + b"\0")
    directory = cache_dir() if directory is None else directory
    target = directory / f"kernels-{key.hexdigest()[:24]}.so"
    if target.is_file():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(suffix=".tmp", prefix="kernels-", dir=directory)
    except OSError as error:
        raise BuildError(f"cannot write the kernel cache {directory}: {error}; set FEWBITS_CACHE") from None
    os.close(handle)
    try:
        _run([*compiler, *FLAGS, str(source / _SOURCES[0]), "-lm", "-o", temporary])
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def open_kernels(path: Path) -> ctypes.CDLL:
    """Load a compiled library and declare its functions.

    Raises:
        BuildError: for a file that is no such library.
    """
    try:
        library = ctypes.CDLL(str(path))
        sizes = [int(getattr(library, name)()) for name in ("fb_abi", "fb_block_abi", "fb_stack_abi")]
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} is not a kernel library: {error}; delete it") from None
    if sizes != [ctypes.sizeof(kind) for kind in (Layer, Block, Stack)]:
        raise BuildError(f"{path} has structures of {sizes} bytes, not those of this version; delete it")
    layer, pointer, integer, count = ctypes.POINTER(Layer), ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.fb_supports.argtypes = [integer]
    library.fb_linear.argtypes = [layer, pointer, pointer, count, integer, integer]
    library.fb_padded_width.argtypes = [layer]
    library.fb_padded_width.restype = count
    library.fb_permute.argtypes = [layer, pointer, pointer, count]
    library.fb_tile.argtypes = [layer, count, count, pointer, integer]
    library.fb_decode.argtypes = [ctypes.POINTER(Stack), pointer, pointer, pointer, count, integer]
    library.fb_lookup.argtypes = [layer, pointer, count, pointer, integer]
    for name in ("fb_permute", "fb_tile", "fb_lookup"):
        getattr(library, name).restype = None
    return library


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The kernels, compiled on first use; None (after one warning that says why) where that is not possible."""
    try:
        return open_kernels(build_kernels())
    except BuildError as error:
        warnings.warn(
            f"fewbits.runtime runs its slow torch path, which unpacks every weight at every step: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
