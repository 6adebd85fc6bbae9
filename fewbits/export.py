"""A trained model leaves: written whole, for a target that holds it without loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from fewbits.checkpoint import find_prepared, load_prepared
from fewbits.evaluate import versions
from fewbits.io import EXPORT_FILE, atomic_folder, is_occupied
from fewbits.manifest import write_manifest
from fewbits.targets import Target, folder_name, get_target
from fewbits.targets.base import activations_of, check_activations, schemes
from fewbits.verify import VerifyReport, verify


def export(
    model_or_run_folder: nn.Module | str | Path,
    target: str | Target,
    folder: str | Path | None = None,
    *,
    tokenizer: Any | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a trained model for a target, whole or not at all.

    Args:
        model_or_run_folder: a prepared or converted Transformers model (left as it is), its folder, or a run folder.
        target: a target or its name: ``hf`` (packed codes), ``dequantized`` (plain bfloat16), ...
        folder: where to; ``RUN/export/TARGET`` for a run, with ``:`` in the target's name replaced by ``-``.
        tokenizer: written beside the model; a run has its own.
        overwrite: replace an earlier export there.

    Returns:
        The folder.

    Raises:
        ValueError: for an unknown target, a model that is not trained for it, a layer that it cannot hold without loss,
            or a taken folder.
        OSError: if the disk is full; nothing is left behind.
    """
    model, tokenizer, target, folder = _resolve(model_or_run_folder, target, folder, tokenizer)
    with atomic_folder(folder, overwrite=overwrite) as partial:
        _write(model, tokenizer, target, partial)
    return folder


def export_verified(
    model_or_run_folder: nn.Module | str | Path,
    target: str | Target,
    folder: str | Path | None = None,
    *,
    tokenizer: Any | None = None,
    overwrite: bool = False,
) -> tuple[Path, VerifyReport]:
    """:func:`export`, then :func:`~fewbits.verify.verify` before the folder gets its name.

    Returns:
        Folder and report. An export that is not equal never takes the place of ``folder``: it lies beside it, with
        ``.rejected`` after its name.

    Raises:
        ValueError: as :func:`export`.
        OSError: as :func:`export`.
    """
    model, tokenizer, target, folder = _resolve(model_or_run_folder, target, folder, tokenizer)
    with atomic_folder(folder, overwrite=overwrite) as partial:
        _write(model, tokenizer, target, partial)
        report = verify(model, partial, save=False)
        if not report.passed:
            folder = folder.with_name(f"{folder.name}.rejected")
            if is_occupied(folder) and not (folder / EXPORT_FILE).is_file():
                raise ValueError(f"the export is not equal, and {folder} is taken, so it cannot be kept for a look")
        report = report.model_copy(update={"folder": str(folder)})
        report.save(partial)
        if not report.passed:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    return folder, report


def _resolve(
    source: nn.Module | str | Path, target: str | Target, folder: str | Path | None, tokenizer: Any | None
) -> tuple[Any, Any | None, Target, Path]:
    target = get_target(target) if isinstance(target, str) else target
    if isinstance(source, nn.Module):
        if folder is None:
            raise ValueError("a folder is needed to export a model from memory")
        return source, tokenizer, target, Path(folder)
    path = find_prepared(source)
    if folder is None:
        if path == Path(source):
            raise ValueError(f"{source} is a model, not a run; pass the folder to export it to")
        folder = Path(source) / "export" / folder_name(target.name)
    model, own = load_prepared(path)
    return model, own if tokenizer is None else tokenizer, target, Path(folder)


def _write(model: Any, tokenizer: Any | None, target: Target, folder: Path) -> None:
    for name, (scheme, shape) in schemes(model).items():
        if reason := target.holds(scheme, shape):
            raise ValueError(f"target {target.name!r} cannot hold {name} ({scheme.name}) without loss: {reason}")
    check_activations(target, *activations_of(model))
    target.write(model, tokenizer, folder)
    write_manifest(folder, target.name, versions()["fewbits"])
