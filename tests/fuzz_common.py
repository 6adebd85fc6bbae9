"""Damage for files of every kind, and what a reader may do with it: read, or raise a clear ValueError."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ROOM = 2**29
"""Address space that a reader of a file of some kilobytes may take beyond what the process has, in bytes."""
SECONDS = 20
"""A reader takes milliseconds; on a machine that is busy with other things a few seconds."""
DEEP = 100_000
HUGE = 2**62

ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 7, 255, 2**31, HUGE, -(2**70), 0.5, float("nan"), float("inf"), 1e308, "", "x", "..",
    "../outside.safetensors", "/etc/hostname", "a/b", "\0", "F32", "fp64", "W2A16G64", "model", "\ud800", [], [0],
    [-1, 2], [HUGE, HUGE], [[]], {}, {"x": 1}, "9" * 400,
]  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """One change to one file of a folder; numbers are taken modulo what is there."""

    kind: str
    file: int
    at: int
    number: int
    raw: bytes


DAMAGES = st.builds(
    Damage,
    kind=st.sampled_from(
        ["bytes", "cut", "insert", "field", "drop field", "double field", "tensor", "delete", "folder"]
    ),
    file=st.integers(0, 1000),
    at=st.integers(0, 10**6),
    number=st.integers(0, 10**6),
    raw=st.binary(min_size=1, max_size=9)
    | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f" * 8, b"[" * DEEP, b"\xff\xfe"]),
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside JSON data, the whole included."""
    yield path
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from places(value, (*path, key))


def changed(data: Any, path: tuple[Any, ...], value: Any, *, drop: bool = False) -> Any:
    """The data with the value at a path replaced or left out."""
    if not path:
        return value
    inner = dict(data) if isinstance(data, dict) else list(data)
    if drop and len(path) == 1:
        del inner[path[0]]
    else:
        inner[path[0]] = changed(data[path[0]], path[1:], value, drop=drop)
    return inner


def damage_json(text: str, damage: Damage) -> str:
    """Another value in one place, a place left out, or a key twice."""
    data = json.loads(text)
    found = list(places(data))
    path = found[damage.at % len(found)]
    if damage.kind == "double field" and text.startswith("{") and len(text) > 2:
        odd = json.dumps(ODD_VALUES[damage.number % len(ODD_VALUES)])
        first = next(iter(data), "x")
        return "{" + json.dumps(first) + ": " + odd + ", " + text[1:]
    value = ODD_VALUES[damage.number % len(ODD_VALUES)]
    return json.dumps(changed(data, path, value, drop=damage.kind == "drop field" and bool(path)))


def damage_safetensors(raw: bytes, damage: Damage) -> bytes:
    """A header that is damaged as JSON is, or a tensor with odd numbers (NaN, infinity, all bits)."""
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if damage.kind == "tensor":
        names = sorted(set(header) - {"__metadata__"})
        begin, end = header[names[damage.at % len(names)]]["data_offsets"]
        patterns = [b"\xff", b"\x00\x00\xc0\x7f", b"\x00\x7e", b"\xc0\x7f", b"\x00\x00\x80\x7f", b"\0", b"\x01\x80"]
        pattern = patterns[damage.number % len(patterns)]
        filled = (pattern * (end - begin))[: end - begin]
        return raw[: 8 + length] + body[:begin] + filled + body[end:]
    text = damage_json(json.dumps(header), damage).encode()
    return struct.pack("<Q", len(text)) + text + body


def apply(folder: Path, damage: Damage) -> None:
    """Change one file below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return
    path = files[damage.file % len(files)]
    raw = path.read_bytes()
    if damage.kind == "delete":
        path.unlink()
    elif damage.kind == "folder":
        path.unlink()
        path.mkdir()
    elif damage.kind == "cut":
        path.write_bytes(raw[: damage.at % (len(raw) + 1)])
    elif damage.kind == "insert":
        at = damage.at % (len(raw) + 1)
        path.write_bytes(raw[:at] + damage.raw + raw[at:])
    elif damage.kind == "bytes":
        at = damage.at % max(1, len(raw))
        path.write_bytes(raw[:at] + damage.raw[:9] + raw[at + len(damage.raw[:9]) :])
    else:
        try:
            if path.suffix == ".safetensors":
                path.write_bytes(damage_safetensors(raw, damage))
            elif path.suffix in (".json", ".yaml"):
                path.write_text(damage_json(raw.decode(), damage), encoding="utf-8", errors="surrogatepass")
            elif path.suffix == ".jsonl":
                first, rest = raw.decode().split("\n", 1)
                path.write_text(damage_json(first, damage) + "\n" + rest, encoding="utf-8", errors="surrogatepass")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return  # an earlier damage has left nothing to find the way in


@contextmanager
def bounded() -> Iterator[None]:
    """Address space for the files and no more: an allocation beyond it fails in the reader, which is then seen."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def explained(error: Exception) -> None:
    """An error says something."""
    assert str(error).strip(), repr(error)


def check_reader(sample: Path, work: Path, damages: list[Damage], read: Callable[[Path], Any]) -> None:
    """Read a damaged copy of a folder.

    Anything but a result, a ValueError or a missing file fails the test with the exception itself. A message may not be
    empty.
    """
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(sample, work)
    for damage in damages:
        apply(work, damage)
    start = time.monotonic()
    with bounded():
        try:
            read(work)
        except (ValueError, FileNotFoundError) as error:
            explained(error)
    assert time.monotonic() - start < SECONDS
