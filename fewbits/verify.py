"""Proof that an export is the trained model: the file is read back and compared, and its engine is asked.

Four things must agree without a tolerance: the SHA-256 of every file with what was written; codes and scales of every
layer with the codes of the trained model; every other tensor (norms, biases, embeddings) with its own; and, where
Transformers is the engine, its logits on a fixed set of tokens with those of the trained model in the same dtype.

Then the engine that the file is for is asked what it makes of it (:mod:`fewbits.engines`), where it is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fewbits.checkpoint import find_prepared, load_prepared
from fewbits.comparison import (
    Difference,
    Logits,
    LogitsComparison,
    compare_logits,
    evaluating,
    fixed_tokens,
    tensor_difference,
)
from fewbits.engines import EngineVerdict, ask_engines
from fewbits.evaluate import versions
from fewbits.io import read_json_object, write_json
from fewbits.manifest import VERIFY_FILE, changed_files, read_manifest
from fewbits.qtensor import QTensor
from fewbits.targets import Target, get_target
from fewbits.targets.base import model_codes

_MAX_ROWS = 20
ROW_HEADER = ("target", "level", "codes equal", "max |diff|", "KL", "top-1", "verdict")
"""Of a table with one row for each target: level of the first difference, or the last one that was asked."""


class VerifyReport(BaseModel):
    """The verdict on one export.

    Attributes:
        target: that wrote it.
        folder: where it lies.
        passed: whether nothing differs.
        num_layers: quantized layers compared by their codes (0 for a target without codes).
        num_codes: codes compared.
        num_tensors: other tensors compared.
        differences: everything that differs.
        logits: the reloaded file against the trained model in the file's dtype; None if it could not be loaded.
        logits_to_trained: the reloaded file against the trained model in its own dtype, for information.
        engines: what the engines say, in the order of the levels; empty if none is installed or was asked.
        notes: what a reader should know besides.
        versions: of fewbits and what it stands on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    folder: str
    passed: bool
    num_layers: int
    num_codes: int
    num_tensors: int
    differences: list[Difference]
    logits: LogitsComparison | None
    logits_to_trained: LogitsComparison | None
    engines: list[EngineVerdict] = []
    notes: list[str]
    versions: dict[str, str]

    def save(self, folder: str | Path) -> None:
        """Write ``verify.json`` into an export."""
        write_json(Path(folder) / VERIFY_FILE, self.model_dump())

    @property
    def row(self) -> list[str]:
        """The cells of :data:`ROW_HEADER`: numbers are the engine's at the last level that it was asked at."""
        asked = [verdict for verdict in self.engines if verdict.logits is not None]
        last = asked[-1].logits if asked else self.logits
        different = sum(row.num_different or 1 for row in self.differences if row.level == "weights")
        level = next((row.level for row in self.differences), self.engines[-1].level if self.engines else "weights")
        codes = f"{self.num_codes}" if self.num_codes else "-"
        cells = ["-"] * 3 if last is None else [
            f"{last.max_abs_diff:.2g}", f"{last.kl:.2g}", f"{last.top1_agreement:.4f}"
        ]  # fmt: skip
        return [self.target, level, codes if not different else "no", *cells, "equal" if self.passed else "NOT EQUAL"]

    def to_text(self) -> str:
        """A table for people."""
        lines = [f"{self.target} in {self.folder}: {'equal' if self.passed else 'NOT EQUAL'}"]
        lines.append(
            f"  {self.num_codes} codes of {self.num_layers} layers and {self.num_tensors} other tensors compared"
        )
        for title, found in (("logits", self.logits), ("logits to the trained model", self.logits_to_trained)):
            if found is not None:
                equal = "bitwise equal" if found.bitwise_equal else f"max |difference| {found.max_abs_diff:.3g}"
                rest = f"KL {found.kl:.3g}, top-1 agreement {found.top1_agreement:.4f}, {found.num_tokens} tokens"
                lines.append(f"  {title}: {equal}, {rest}")
        for verdict in self.engines:
            lines.append(f"  {verdict.engine} ({verdict.level}): {_measured(verdict)}")
        for row in self.differences[:_MAX_ROWS]:
            count = "" if row.num_different is None else f" ({row.num_different} of {row.num_total})"
            lines.append(f"  ! {row.where}: {row.what}{count}")
        if len(self.differences) > _MAX_ROWS:
            lines.append(f"  ! and {len(self.differences) - _MAX_ROWS} more differences, all in {VERIFY_FILE}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def verify(
    reference: nn.Module | str | Path,
    folder: str | Path,
    *,
    token_ids: Tensor | None = None,
    save: bool = True,
    engines: bool = True,
) -> VerifyReport:
    """Reload an export and compare it with the trained model.

    Args:
        reference: the trained (prepared or converted) model, its folder, or the run folder.
        folder: the export.
        token_ids: int ``(sequences, length)`` to compare logits on; None draws a fixed set.
        save: write the report to ``verify.json`` in the export.
        engines: ask the engines that are installed, once everything else is equal.

    Returns:
        The report; ``passed`` is False for any difference, a damaged file and the export of another model included.

    Raises:
        ValueError: if ``folder`` is no export, ``reference`` no trained model, or ``token_ids`` no tokens of it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    target = get_target(manifest["target"])
    model: Any = reference if isinstance(reference, nn.Module) else load_prepared(find_prepared(reference))[0]
    ids = fixed_tokens(model.config) if token_ids is None else _checked(token_ids, model.config)
    differences = [Difference(where=name, what=what) for name, what in changed_files(folder, manifest).items()]
    with evaluating(model):
        codes = model_codes(model)
        rows, num_layers = _compare_codes(target, folder, codes)
        more, num_tensors = _compare_tensors(target, folder, model)
        last, notes, logits, to_trained = _compare_logits(target, folder, model, ids)
        differences += rows + more + last
        verdicts: list[EngineVerdict] = []
        if engines and not differences:
            verdicts, rows, more_notes = _ask(target, folder, model, codes, ids)
            differences, notes = differences + rows, notes + more_notes
            if logits is None and not verdicts and not notes:
                notes.append(f"no engine of {target.name!r} can be installed beside fewbits; logits were not compared")
        elif engines:
            notes.append("engines are asked only about files without differences")
    report = VerifyReport(
        target=target.name,
        folder=str(folder),
        passed=not differences,
        num_layers=num_layers,
        num_codes=sum(codes[name].codes.numel() for name in codes) if num_layers else 0,
        num_tensors=num_tensors,
        differences=differences,
        logits=logits,
        logits_to_trained=to_trained,
        engines=verdicts,
        notes=notes,
        versions=versions(),
    )
    if save:
        report.save(folder)
    return report


def _checked(ids: Tensor, config: Any) -> Tensor:
    vocab_size = config.get_text_config().vocab_size
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(f"token_ids is {ids.dtype} {tuple(ids.shape)}; integers (sequences, length) are needed")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ValueError(f"token_ids run from {int(ids.min())} to {int(ids.max())}; the model has {vocab_size} tokens")
    return ids


def _compare_codes(target: Target, folder: Path, codes: dict[str, QTensor]) -> tuple[list[Difference], int]:
    try:
        stored = target.read_codes(folder)
    except ValueError as error:
        return [Difference(where="codes", what=f"cannot be read: {error}")], 0
    if stored is None:
        return [], 0
    rows = []
    for name in sorted(codes.keys() | stored.keys()):
        if name not in stored or name not in codes:
            missing = "missing in the file" if name in codes else "only in the file"
            rows.append(Difference(where=name, what=f"quantized layer {missing}"))
            continue
        a, b = stored[name], codes[name]
        if a.scheme != b.scheme:
            what = f"scheme {a.scheme.to_json()} in the file, {b.scheme.to_json()} in the model"
            rows.append(Difference(where=name, what=what))
            continue
        parts = [
            tensor_difference(name, "codes", a.codes, b.codes),
            tensor_difference(name, "scales", a.scale, b.scale),
            tensor_difference(name, "super scales", a.super_scale, b.super_scale),
            tensor_difference(name, "scale multipliers", a.multipliers, b.multipliers),
        ]
        rows += [row for row in parts if row is not None]
    return rows, len(stored)


def _compare_tensors(target: Target, folder: Path, model: Any) -> tuple[list[Difference], int]:
    try:
        stored = target.read_tensors(folder)
    except ValueError as error:
        return [Difference(where="tensors", what=f"cannot be read: {error}")], 0
    expected = target.expected_tensors(model)
    names = sorted(stored.keys() | expected.keys())
    rows = [tensor_difference(name, "values", stored.get(name), expected.get(name)) for name in names]
    return [row for row in rows if row is not None], len(stored)


def _compare_logits(
    target: Target, folder: Path, model: Any, ids: Tensor
) -> tuple[list[Difference], list[str], LogitsComparison | None, LogitsComparison | None]:
    try:
        loaded: Any = target.load(folder, model)
    except ImportError as error:  # the file may be right; only the engine to ask is not here
        return [], [f"logits were not compared: {error}"], None, None
    except Exception as error:  # a damaged folder can make any library raise anything, and the verdict is the same
        return [Difference(where="loading", what=f"the export does not load: {str(error)[:400]}")], [], None, None
    if loaded is None:
        return [], [], None, None
    device = next(model.parameters()).device
    loaded, ids = loaded.to(device).eval(), ids.to(device)
    truth = target.reference(model)
    try:
        rows, notes, expected = _with_fresh_buffers(truth, loaded)
        logits = compare_logits(expected, _forward(loaded), ids)
        same = truth is model and not notes
        trained = logits if same else compare_logits(_forward(model), _forward(loaded), ids)
    except (RuntimeError, IndexError, ValueError) as error:
        return [Difference(where="logits", what=f"the export does not run: {str(error)[:400]}")], [], None, None
    if not logits.finite:
        rows.append(Difference(where="logits", what="not all are finite"))
    if not logits.bitwise_equal:
        rows.append(Difference(where="logits", what=f"differ by up to {logits.max_abs_diff:.3g}, KL {logits.kl:.3g}"))
    return rows, notes, logits, trained


def _ask(
    target: Target, folder: Path, model: Any, codes: dict[str, QTensor], ids: Tensor
) -> tuple[list[EngineVerdict], list[Difference], list[str]]:
    truth = target.reference(model)
    ids = ids.to(next(model.parameters()).device)
    return ask_engines(target, folder, model, codes, ids, truth, _forward(truth))


def _measured(verdict: EngineVerdict) -> str:
    found, verb = verdict.logits, "ok" if verdict.passed else "NOT OK"
    if found is None:
        weights = (
            "" if verdict.num_total is None else f"{verdict.num_different} of {verdict.num_total} weights differ, "
        )
        return f"{weights}{verb} ({verdict.limit})"
    text = f"max |difference| {found.max_abs_diff:.3g} of logits up to {found.max_abs_logit:.3g}, KL {found.kl:.3g}, "
    text += f"top-1 agreement {found.top1_agreement:.4f}, {verb} ({verdict.limit})"
    if verdict.control is not None:
        text += f"; our model with activations so rounded: KL {verdict.control.kl:.3g}"
    return text


def record(run_folder: str | Path, report: VerifyReport) -> None:
    """Put a report into ``verify.json`` of a run, which has one entry for each target."""
    path = Path(run_folder) / VERIFY_FILE
    targets = read_json_object(path).get("targets", {}) if path.is_file() else {}
    write_json(path, {"targets": targets | {report.target: report.model_dump()}})


def _forward(model: Any, buffers: dict[str, Tensor] | None = None) -> Logits:
    def run(ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        output: Any = torch.func.functional_call(model, buffers, (), inputs) if buffers else model(**inputs)
        return output.logits

    return run


def _with_fresh_buffers(truth: nn.Module, loaded: nn.Module) -> tuple[list[Difference], list[str], Logits]:
    """The reference, with the rotary tables (and the like) that loading computes afresh.

    No file holds these buffers. ``model.to(torch.bfloat16)`` rounds them, ``from_pretrained`` does not: that difference
    says nothing about the export, so it is noted and taken out of the comparison. Any other one is a difference.
    """
    stored = loaded.state_dict().keys()
    own = dict(truth.named_buffers())
    rows, cast = [], {}
    for name, value in loaded.named_buffers():
        if name in stored or name not in own or (own[name].dtype == value.dtype and torch.equal(own[name], value)):
            continue
        roundings = (value.to(dtype).to(own[name].dtype) for dtype in (own[name].dtype, torch.bfloat16, torch.float16))
        if any(torch.equal(own[name], rounded) for rounded in roundings):
            cast[name] = value
        else:
            rows.append(Difference(where=name, what="is computed from another config.json than the trained model's"))
    if not cast:
        return rows, [], _forward(truth)
    note = (
        f"the trained model was cast with .to(), which rounded its {', '.join(sorted(cast))}; no file holds them, and "
        "the logits were compared with the ones that loading makes"
    )
    return rows, [note], _forward(truth, cast)
