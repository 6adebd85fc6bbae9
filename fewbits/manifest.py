"""``fewbits_export.json``: which target wrote an export, and the SHA-256 of each of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbits.io import EXPORT_FILE, read_json_object, sha256, write_json

FORMAT_VERSION = 1
VERIFY_FILE = "verify.json"
"""The verdict lies in the export that it is about, and is no part of it."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".npz", ".index.json")


def write_manifest(folder: Path, target: str, version: str) -> None:
    """Describe a finished export; call it last."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (EXPORT_FILE, VERIFY_FILE))
    digests = {p.relative_to(folder).as_posix(): sha256(p) for p in files}
    data = {"format_version": FORMAT_VERSION, "target": target, "fewbits": version, "files": digests}
    write_json(folder / EXPORT_FILE, data)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The description of an export.

    Raises:
        ValueError: for a folder that is no export, a damaged or a newer description.
    """
    if not folder.is_dir():
        raise ValueError(f"the export folder {folder} does not exist")
    path = folder / EXPORT_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is no export of fewbits: it has no {EXPORT_FILE}")
    data = read_json_object(path)
    version = data.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}; this fewbits reads 1 to {FORMAT_VERSION}; upgrade it")
    if not isinstance(data.get("target"), str) or not isinstance(data.get("files"), dict):
        raise ValueError(f"{path} is damaged: it needs the keys target and files")
    for name in data["files"]:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or max(map(len, parts)) > 200:
            raise ValueError(f"{path} lists the file {name!r}; only names inside the folder are allowed")
    return data


def changed_files(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Files that are not what the export wrote, with what is wrong; weight files that it did not write count too."""
    listed: dict[str, str] = manifest["files"]
    wrong = {}
    for name, digest in listed.items():
        path = folder / name
        if not path.is_file():
            wrong[name] = "is missing"
        elif sha256(path) != digest:
            wrong[name] = "differs from what was written (SHA-256)"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in listed and name.endswith(_WEIGHTS):
            wrong[name] = "is a weight file that the export did not write"
    return wrong
