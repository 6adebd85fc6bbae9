"""Every reader on damaged files: read, or a clear ValueError; never a crash, a hang, or memory beyond the file's size.

GGUF and single safetensors files have closer tests of their own (test_gguf_file, test_io).
"""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_common import DAMAGES, Damage, check_reader, explained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from targets_common import byte_tokenizer, scheme, trained

from fewbits.arena.cells import Cell, CellResult, read_cell, write_cell
from fewbits.arena.run import read_settings
from fewbits.arena.settings import ArenaSettings
from fewbits.arena.shared import PARTS, START_FILE, TEXT_FILE, Start, load_texts, read_start
from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.data import read_texts
from fewbits.evaluate import EvalResult
from fewbits.export import export
from fewbits.io import read_json_object, read_yaml, write_json, write_text
from fewbits.manifest import changed_files, read_manifest
from fewbits.pipeline import load_any, read_scores
from fewbits.pretrained import load_model, load_tokenizer
from fewbits.recipe import Recipe
from fewbits.runtime import to_runtime
from fewbits.targets import get_target
from fewbits.testing.tiny import tiny_llama
from fewbits.training.metrics import read_metrics
from fewbits.verify import VerifyReport
from fewbits.weight_files import read_folder

EXAMPLES = 25
TARGETS = {
    "hf": "W2A16G32",
    "dequantized": "W2A16G32",
    "compressed-tensors": "W2A16G32",
    "gptq": "W2A16G32",
    "mlx": "W2A16G32",
    "torchao": "W2A16G32",
    "bitnet": "W1.58 per tensor",
    "onnx": "W2A16G32",
    "genai": "W2A16G32",
    "gguf": "W4A16G32",
}


def quantized(text: str) -> Any:
    return trained(scheme("W1.58", "per_tensor") if "tensor" in text else scheme(text), "llama")


def write_target(name: str, folder: Path) -> None:
    export(quantized(TARGETS[name]), name, folder / "x", tokenizer=byte_tokenizer())
    for path in (folder / "x").iterdir():
        path.rename(folder / path.name)
    (folder / "x").rmdir()


def read_target(name: str, folder: Path) -> None:
    target = get_target(name)
    try:
        target.read_codes(folder)
    finally:
        target.read_tensors(folder)


def write_checkpoint(folder: Path) -> None:
    """A checkpoint in two shards, with its tokenizer."""
    model: Any = tiny_llama()
    model.save_pretrained(folder, max_shard_size="300KB")
    byte_tokenizer().save_pretrained(folder)


SCORE = EvalResult(loss=0.69, perplexity=2.0, bits_per_byte=1.0, num_tokens=10, versions={"torch": "2"})


def write_run(folder: Path) -> None:
    """The files of a run folder that commands read."""
    recipe = Recipe.parse(json.dumps({"model": "embedded", "rules": [{"scheme": "W2A16G64"}]}))
    write_text(folder / "recipe.yaml", json.dumps(recipe.model_dump(mode="json")))
    write_text(folder / "metrics.jsonl", '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n')
    write_json(folder / "eval.json", {"fp": SCORE.model_dump(), "qat": SCORE.model_dump()})
    (folder / "export" / "hf").mkdir(parents=True)
    report = VerifyReport(
        target="hf", folder="x", passed=True, num_layers=1, num_codes=2, num_tensors=3, differences=[], logits=None,
        logits_to_trained=None, notes=[], versions={},
    )  # fmt: skip
    report.save(folder / "export" / "hf")


def all_of(*readers: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Every reader on the same folder; one that raises does not keep the next from reading."""

    def read(folder: Path) -> None:
        for reader in readers:
            try:
                reader(folder)
            except (ValueError, FileNotFoundError) as error:
                explained(error)

    return read


def read_reports(folder: Path) -> None:
    for path in folder.glob("export/*/verify.json"):
        VerifyReport(**read_json_object(path))


def write_prepared(folder: Path) -> None:
    save_prepared(quantized("W2A16G32"), byte_tokenizer(), folder / "x")
    for path in (folder / "x").iterdir():
        path.rename(folder / path.name)
    (folder / "x").rmdir()


CELL = Cell(scheme="W2G64", method="ste", learning_rate=6e-4, seed=1)


def write_arena(folder: Path) -> None:
    write_json(folder / "arena.json", ArenaSettings(schemes=("W2G64",), methods=("rtn",)).model_dump())
    result = CellResult(
        scheme=CELL.scheme, method=CELL.method, learning_rate=CELL.learning_rate, seed=CELL.seed, fingerprint="f",
        tuning=SCORE, report=SCORE, num_steps=1, num_tokens=2, batches_digest="d", bits_per_weight=2.25,
        seconds_per_step=0.1, cpu_seconds=1.0, peak_memory=None, device="cpu", threads=1, versions={},
    )  # fmt: skip
    write_cell(folder, result)
    blocks = {part: torch.arange(16, dtype=torch.int32).view(2, 8) for part in PARTS}
    save_file(blocks, folder / TEXT_FILE, metadata=dict.fromkeys(PARTS, "1.5"))
    start = Start(text_digest="t", model_digest="m", train_tokens=16, tuning=SCORE, report=SCORE)
    write_json(folder / START_FILE, start.model_dump())


def read_arena(folder: Path) -> None:
    found = read_cell(folder, CELL)
    assert found is None or found.cell == CELL
    load_texts(folder, read_start(folder))


def write_texts(folder: Path) -> None:
    write_text(folder / "a.txt", "some text\n")
    write_text(folder / "b.md", "naïve text 🙂\n")


def read_packed(folder: Path) -> None:
    """The way into the runtime: what is read must run."""
    model = load_model(folder)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_runtime(model)(input_ids=torch.arange(3)[None])


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    **{name: (functools.partial(write_target, name), functools.partial(read_target, name)) for name in TARGETS},
    "checkpoint": (write_checkpoint, all_of(read_folder, load_model, load_tokenizer)),
    "prepared model": (write_prepared, load_prepared),
    "packed model": (functools.partial(write_target, "hf"), read_packed),
    "manifest": (
        functools.partial(write_target, "dequantized"),
        lambda folder: changed_files(folder, read_manifest(folder)),
    ),
    "run": (
        write_run,
        all_of(
            lambda folder: Recipe.load(folder / "recipe.yaml"),
            lambda folder: read_metrics(folder / "metrics.jsonl"),
            lambda folder: read_scores(folder / "eval.json"),
            lambda folder: read_yaml(folder / "recipe.yaml"),
            read_reports,
            load_any,
        ),
    ),
    "arena": (write_arena, all_of(read_settings, read_arena)),
    "texts": (write_texts, read_texts),
}
"""By name: write a whole folder; read it, or raise."""
SLOW = ("onnx", "genai")  # to write one takes the exporter seconds
every_reader = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in READERS]
)


@pytest.fixture(scope="module")
def samples() -> Iterator[Callable[[str], Path]]:
    """A whole folder of each kind, written once, at the first use."""
    with tempfile.TemporaryDirectory() as top:

        def sample(kind: str) -> Path:
            folder = Path(top) / kind
            if not folder.exists():
                folder.mkdir()
                READERS[kind][0](folder)
            return folder

        yield sample


@every_reader
def test_a_whole_folder_is_read(kind: str, samples: Any) -> None:
    if kind == "arena":  # its digests are made up
        with pytest.raises(ValueError, match="another text"):
            read_arena(samples(kind))
        assert read_cell(samples(kind), CELL) is not None
        return
    READERS[kind][1](samples(kind))


@every_reader
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(DAMAGES, min_size=1, max_size=2))
def test_damaged_folders_raise_value_errors_or_are_read(
    kind: str, samples: Any, tmp_path: Path, damages: list[Damage]
) -> None:
    check_reader(samples(kind), tmp_path / "damaged", damages, READERS[kind][1])


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "..", "a\0b", "x" * 300, ""])
def test_paths_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    """In a shard index and in the manifest of an export; the file that they point at exists."""
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    write_json(inside / "model.safetensors.index.json", {"weight_map": {"w": name}})
    with pytest.raises(ValueError, match="only plain file names"):
        read_folder(inside)
    write_json(inside / "fewbits_export.json", {"format_version": 1, "target": "hf", "files": {name: "0"}})
    with pytest.raises(ValueError, match="only names inside the folder"):
        read_manifest(inside)


def test_absurd_numbers_of_layers_are_refused_before_they_are_built(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, "num_hidden_layers": 2**40})
    with pytest.raises(ValueError, match=r"asks for 1099511627776 layers; the weights hold \d+ tensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"a": ' * 50_000])
def test_values_nested_too_deeply_are_value_errors(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json_object(tmp_path / "x.json")
    if "1" not in text:
        with pytest.raises(ValueError, match="not valid YAML"):
            read_yaml(tmp_path / "x.json")
