"""Files are written whole or not at all; what is read is checked first."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbits.io import (
    EXPORT_FILE,
    atomic_file,
    atomic_folder,
    begun,
    check_place,
    is_occupied,
    read_json,
    read_json_object,
    read_yaml,
    sha256,
    write_json,
    write_text,
    write_yaml,
)
from fewbits.weight_files import check_safetensors, read_folder, read_safetensors, safetensors_header, weight_files


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fail() -> None:
        with atomic_file(tmp_path / "a.txt") as partial:
            partial.write_text("half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_and_yaml_round_trip(tmp_path: Path) -> None:
    data = {"b": [1, 2.5, None, True], "a": "ä"}
    write_json(tmp_path / "deep" / "x.json", data)
    write_yaml(tmp_path / "x.yaml", data)
    assert read_json(tmp_path / "deep" / "x.json") == data
    assert read_yaml(tmp_path / "x.yaml") == data
    assert list(read_yaml(tmp_path / "x.yaml")) == ["b", "a"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"loss": float("nan"), "all": [float("inf"), 1.0]})
    assert read_json(tmp_path / "x.json") == {"loss": "nan", "all": ["inf", 1.0]}


@pytest.mark.parametrize("text", ['{"a": 1', "", "\x00"])
def test_a_truncated_json_is_a_value_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")


def test_bad_text_files(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: [1")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    write_json(tmp_path / "list.json", [1])
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_yaml(tmp_path / "latin")
    with pytest.raises(ValueError, match="does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="an object is needed"):
        read_json_object(tmp_path / "list.json")


def make_folder(folder: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_folder(folder, overwrite=overwrite) as partial:
        (partial / "data.txt").write_text(text)
        write_json(partial / EXPORT_FILE, {})


def test_a_finished_folder_is_replaced_only_on_demand(tmp_path: Path) -> None:
    make_folder(tmp_path / "out", "one")
    with pytest.raises(ValueError, match="overwrite=True"):
        make_folder(tmp_path / "out", "two")
    assert (tmp_path / "out" / "data.txt").read_text() == "one"
    make_folder(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / "data.txt").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(ValueError, match="not written by fewbits"):
        make_folder(tmp_path / "thesis", "two", overwrite=True)
    assert names(tmp_path / "thesis") == ["chapter.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not written by fewbits"):
        make_folder(tmp_path / "file", "two", overwrite=True)


def test_a_block_may_put_its_folder_elsewhere(tmp_path: Path) -> None:
    make_folder(tmp_path / "out", "one")
    with atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "data.txt").write_text("two")
        partial.rename(tmp_path / "out.rejected")
    assert names(tmp_path) == ["out", "out.rejected"]
    assert (tmp_path / "out" / "data.txt").read_text() == "one"


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert not is_occupied(tmp_path / "out")
    make_folder(tmp_path / "out", "one")
    assert is_occupied(tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    make_folder(tmp_path / "out", "one")

    def fail() -> None:
        with atomic_folder(tmp_path / "out", overwrite=True) as partial:
            (partial / "data.txt").write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    if isinstance(error, OSError):
        assert "No space left on device; nothing was changed there" in str(caught.value)
        assert caught.value.errno == 28  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "data.txt").read_text() == "one"
    assert names(tmp_path) == ["out"]


def test_a_write_that_the_system_refuses_is_an_os_error_and_nothing_is_left(tmp_path: Path) -> None:
    """A file size limit stands for a full disk: the write itself fails, inside safetensors."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    def write() -> None:
        with atomic_folder(tmp_path / "out") as partial:
            save_file({"x": torch.zeros(100_000)}, partial / "model.safetensors")

    try:
        with pytest.raises(OSError, match=r"cannot write .*out: .* nothing was changed there"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, example B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(300.0), "b": torch.ones(3, 2, dtype=torch.bfloat16)}, path)
    return path


def test_header_and_tensors(weights: Path) -> None:
    assert safetensors_header(weights) == {"a": ("F32", (300,)), "b": ("BF16", (3, 2))}
    assert torch.equal(read_safetensors(weights)["a"], torch.arange(300.0))


def test_every_truncation_is_refused(weights: Path) -> None:
    data = weights.read_bytes()
    for size in [0, 1, 7, 8, 9, 10, 40, 100, len(data) // 2, len(data) - 1]:
        weights.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            check_safetensors(weights)
    weights.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="promises"):
        check_safetensors(weights)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"\x80\x02}q\x00." + bytes(100), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
        (b"\n<!doctype html><html>not found</html>", "web page"),
        (b"hello world, this is a text", "not a safetensors file"),
        ((12).to_bytes(8, "little") + b"{not a header" + bytes(8), "header is not valid"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_safetensors(tmp_path / "model.safetensors")


def test_a_damaged_header_is_refused_by_the_library_too(weights: Path) -> None:
    data = weights.read_bytes().replace(b'"F32"', b'"F99"')
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        read_safetensors(weights)


def sharded(folder: Path) -> dict[str, object]:
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    return {"metadata": {}, "weight_map": weight_map}


def test_shards_are_merged(tmp_path: Path) -> None:
    write_json(tmp_path / "model.safetensors.index.json", sharded(tmp_path))
    assert len(weight_files(tmp_path)) == 2
    assert {k: v.tolist() for k, v in read_folder(tmp_path).items()} == {"a": [0, 0], "b": [1, 1]}


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "a\\b", "..", "", 3])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    index = sharded(tmp_path)
    index["weight_map"]["a"] = name  # type: ignore[index]
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match="only plain file names"):
        weight_files(tmp_path)


def test_incomplete_shards_are_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    write_json(path, {**index, "weight_map": {**index["weight_map"], "c": "model-00001-of-00002.safetensors"}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="lacks the tensor c"):
        weight_files(tmp_path)
    write_json(path, {"metadata": {}})
    with pytest.raises(ValueError, match="no weight_map"):
        weight_files(tmp_path)
    write_json(path, index)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="a second time"):
        read_folder(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        weight_files(tmp_path)
    path.write_text(json.dumps(index)[:20])
    with pytest.raises(ValueError, match="not valid JSON"):
        weight_files(tmp_path)


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        weight_files(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no weights"):
        weight_files(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle only \(pytorch_model\.bin\).*use_safetensors=False"):
        weight_files(tmp_path)


def begin(folder: Path, files: list[str], error: BaseException) -> None:
    with begun(folder, "marker"):
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("1")
        raise error


def test_a_folder_that_fails_to_begin_is_as_it_was(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    (old / "mine").write_text("1")
    for folder in (new, old):
        with pytest.raises(ValueError, match="wrong"):
            begin(folder, ["marker", "deep/file"], ValueError("wrong"))
    assert not new.exists()
    assert names(old) == ["mine"]


def test_what_was_begun_earlier_or_interrupted_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, ["marker"], KeyboardInterrupt())
    with pytest.raises(ValueError, match="wrong"):
        begin(tmp_path, ["more"], ValueError("wrong"))
    assert names(tmp_path) == ["marker", "more"]


def test_places_that_cannot_be_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("1")
    check_place(tmp_path / "a" / "b")
    assert names(tmp_path) == ["file"]
    for path in (file, file / "below" / "it"):
        with pytest.raises(ValueError, match=r"is a file, and .* is to be a folder; choose another"):
            check_place(path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"cannot be written: no permission in .*; choose another folder"):
        check_place(tmp_path / "a" / "b")
