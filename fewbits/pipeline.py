"""From a recipe to a run folder: load, prepare, train, evaluate, save. The command line only calls this.

A run folder holds ``recipe.yaml`` (every field), ``environment.json``, ``metrics.jsonl``, ``checkpoint-N/``,
``histogram.json``, ``windows.json`` if asked for, ``eval.json`` and, when it is finished, ``model/``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from fewbits.activations import calibrate_activations_
from fewbits.checkpoint import load_model, load_tokenizer, model_digest, save_prepared
from fewbits.convert import matches, owned_layers, prepare, select_layers
from fewbits.corpora import embedded_texts
from fewbits.data import TokenBlocks, pack_texts, read_texts
from fewbits.evaluate import EvalResult, evaluate
from fewbits.grids import Codebook
from fewbits.io import write_json, write_text
from fewbits.kmeans import codebook_spelling
from fewbits.loading import load_any, load_blocks, model_source, quiet_libraries
from fewbits.ptq import apply_ptq, check_options
from fewbits.ptq.calibration import to_batches
from fewbits.recipe import Recipe
from fewbits.run_folder import EVAL_FILE, RECIPE_FILE, begin_folder, check_folder, read_scores, write_scores
from fewbits.targets import get_target
from fewbits.targets.base import check_activations
from fewbits.teacher_logits import Dtype, LogitsManifest, TeacherLogits, is_teacher_logits, write_teacher_logits
from fewbits.traces import pack_traces, read_traces
from fewbits.training import QATTrainer
from fewbits.training.from_recipe import hold_out_best, training_arguments, training_settings
from fewbits.training.telemetry import weight_histogram
from fewbits.training.windows import WINDOWS_FILE, WindowsCallback

__all__ = [
    "CALIBRATION_BLOCKS",
    "EVAL_FILE",
    "RECIPE_FILE",
    "RunResult",
    "calibrate_",
    "check_target",
    "freeze_",
    "hold_out_best",
    "load_any",
    "load_blocks",
    "model_source",
    "num_quantized_weights",
    "ptq_recipe",
    "quiet_libraries",
    "read_scores",
    "run",
    "teach",
    "training_arguments",
    "training_settings",
    "write_scores",
]

CALIBRATION_BLOCKS = 64
"""Token blocks that a post-training method sees unless ``init_options`` has ``num_blocks``."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves in memory: the trained (prepared) model and its scores by stage."""

    folder: Path
    model: nn.Module
    tokenizer: Any
    scores: dict[str, EvalResult]


def check_target(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a recipe whose result its target could not hold without loss, before any training.

    Raises:
        ValueError: naming target, layer and reason.
    """
    target = get_target(recipe.target)
    chosen = select_layers(model, [r.build() for r in recipe.rules], recipe.ignore)
    rules = {name: rule for name, (rule, _) in chosen.items()}
    inputs, kv = ({name: getattr(rule, key) for name, rule in rules.items()} for key in ("activation", "kv_cache"))
    check_activations(target, inputs, kv)
    for name, (rule, module) in chosen.items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.shape
        shape = (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)
        scheme = rule.scheme
        if isinstance(scheme.grid, Codebook) and (recipe.init == "kmeans" or recipe.codebooks is not None):
            scheme = replace(scheme, grid=Codebook.lloyd_max(len(scheme.grid.levels)))  # fitted ones are as irregular
        if reason := target.holds(scheme, shape):
            raise ValueError(f"target {recipe.target!r} cannot hold {name} ({scheme.name}) without loss: {reason}")


def freeze_(model: nn.Module, patterns: Sequence[str]) -> None:
    """Fix the parameters whose names match.

    Raises:
        ValueError: for a pattern that matches no parameter.
    """
    for pattern in patterns:
        hit = [p for name, p in model.named_parameters() if matches(pattern, name)]
        if not hit:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise ValueError(f"train.freeze pattern {pattern!r} matches no parameter; names look like {some}")
        for p in hit:
            p.requires_grad_(False)


def _teacher_logits(recipe: Recipe) -> TeacherLogits | None:
    """The teacher on disk that the recipe names, if it names one; checked before anything else is loaded."""
    if recipe.teacher is None or not is_teacher_logits(recipe.teacher):
        return None
    if recipe.objective.features:
        raise ValueError(f"objective.features needs a teacher that runs; {recipe.teacher} has logits only")
    return TeacherLogits(recipe.teacher)


def teach(
    model: str,
    data: Path | None,
    folder: Path,
    *,
    block_size: int,
    max_tokens: int | None = None,
    **options: Any,
) -> LogitsManifest:
    """Keep a teacher's top-k logits on a text, for recipes with ``teacher: FOLDER``.

    Args:
        model: as in a recipe.
        data: text file or folder; None for the embedded text.
        folder: new.
        block_size: as in the recipe's ``data``.
        max_tokens: as in the recipe's ``data``.
        **options: of :func:`fewbits.teacher_logits.write_teacher_logits`.

    Raises:
        ValueError: for text that is missing or too short, unknown dtypes, or a folder that is taken.
    """
    if options.get("dtype", "float16") not in get_args(Dtype):
        raise ValueError(f"dtype={options['dtype']!r} is unknown; use one of {', '.join(get_args(Dtype))}")
    source = model_source(model)
    teacher, tokenizer = load_model(source), load_tokenizer(source)
    if data is not None and data.suffix == ".jsonl":
        blocks: TokenBlocks = pack_traces(read_traces(data), tokenizer, block_size)
    else:
        texts = embedded_texts("train") if data is None else read_texts(data)
        blocks = pack_texts(texts, tokenizer, block_size, max_tokens=max_tokens)
    return write_teacher_logits(teacher, blocks, folder, model_digest=model_digest(teacher), **options)


def run(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Train as the recipe says and leave a finished run folder.

    Args:
        recipe: what to do.
        folder: the run folder; a finished run in it is never overwritten silently.
        resume: go on from the last checkpoint of an unfinished run of the same recipe.
        overwrite: delete an earlier run in the folder first.
        quiet: no progress bar and no TensorBoard files.
        callbacks: more Trainer callbacks.

    Returns:
        :class:`RunResult` with scores ``fp`` (the original), ``rtn`` (rounded, untrained), the recipe's ``init`` where
        that is another method, and ``qat`` unless ``max_steps`` is 0.

    Raises:
        ValueError: for whatever is wrong with recipe, model, data or folder, before training starts.
        TrainingDiverged: if the loss becomes NaN or infinite; checkpoints are kept.
    """
    folder = Path(folder)
    check_options(recipe.init, recipe.init_options)
    checkpoint = check_folder(recipe, folder, resume=resume, overwrite=overwrite)
    source = model_source(recipe.model)
    model = load_model(source, trust_remote_code=recipe.trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
    check_target(model, recipe)
    cache = _teacher_logits(recipe)
    if recipe.teacher is None or cache is not None:
        teacher = copy.deepcopy(model)
    else:
        teacher = load_model(model_source(recipe.teacher), trust_remote_code=recipe.trust_remote_code)
    train, valid = load_blocks(recipe.data, tokenizer, teacher, recipe.seed)
    with begin_folder(recipe, folder, overwrite=overwrite):
        scores = _start(recipe, folder, model, teacher, train, valid)
        freeze_(model, recipe.train.freeze)
        if recipe.train.max_steps == 0:
            save_prepared(model, tokenizer, folder / "model")
            return RunResult(folder, model, tokenizer, scores)
        train, best = hold_out_best(recipe, train)
        watch = None if recipe.train.window_interval is None else WindowsCallback(recipe.train.window_interval)
        blocks: Any = train
        if cache is not None:
            vocab = int(model.get_output_embeddings().weight.shape[0])
            blocks = cache.attach(train, vocab_size=vocab, temperature=recipe.objective.temperature)
        use_cache = model.config.use_cache
        trainer = QATTrainer(
            model,
            training_arguments(recipe, folder, quiet=quiet),
            teacher=None if cache is not None else teacher,
            settings=training_settings(recipe),
            best_blocks=best,
            train_dataset=blocks,
            callbacks=[*callbacks, *([] if watch is None else [watch])],
        )
        if quiet:
            trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    model.config.use_cache = use_cache  # the Trainer turns it off, and generation from the saved model would be slow
    if watch is not None:
        write_json(folder / WINDOWS_FILE, watch.to_dict())
    model.eval()
    before = json.loads((folder / "histogram.json").read_text())
    write_text(folder / "histogram.json", json.dumps({**before, "after": weight_histogram(model)}))
    scores["qat"] = evaluate(model, valid, teacher=teacher)
    write_scores(folder / EVAL_FILE, scores)
    save_prepared(model, tokenizer, folder / "model")
    return RunResult(folder, model, tokenizer, scores)


def _start(
    recipe: Recipe, folder: Path, model: nn.Module, teacher: nn.Module, train: TokenBlocks, valid: TokenBlocks
) -> dict[str, EvalResult]:
    """Prepare the model, in place; scores and histogram of the start, or those that an interrupted run has left."""
    rules = [r.build() for r in recipe.rules]
    known = (folder / EVAL_FILE).exists() and (folder / "histogram.json").exists()
    scores = read_scores(folder / EVAL_FILE) if known else {"fp": evaluate(teacher, valid, teacher=teacher)}
    if plain := recipe.init == "rtn" and not recipe.init_options:
        prepare(model, rules, ignore=recipe.ignore)
    else:
        if not known:
            rounded = prepare(copy.deepcopy(model), rules, ignore=recipe.ignore)
            calibrate_(rounded, recipe, train)
            scores["rtn"] = evaluate(rounded, valid, teacher=teacher)
            del rounded
        options = {"num_blocks": CALIBRATION_BLOCKS, "seed": recipe.seed} | recipe.init_options
        apply_ptq(model, rules, recipe.init, train, ignore=recipe.ignore, **options)
    calibrate_(model, recipe, train)
    if not known:
        scores[recipe.init if plain or recipe.init != "rtn" else "start"] = evaluate(model, valid, teacher=teacher)
        write_text(folder / "histogram.json", json.dumps({"before": weight_histogram(model)}))
        write_scores(folder / EVAL_FILE, scores)
    return scores


def calibrate_(model: nn.Module, recipe: Recipe, train: TokenBlocks) -> None:
    """Set the static activation scales from as many blocks as a post-training method sees; nothing without such."""
    num_blocks = int(recipe.init_options.get("num_blocks", CALIBRATION_BLOCKS))
    calibrate_activations_(model, to_batches(train, recipe.train.batch_size, num_blocks, torch.device("cpu")))


def ptq_recipe(
    model: str,
    method: str,
    scheme: str,
    *,
    text: str | Path | None = None,
    target: str = "hf",
    options: Sequence[str] = (),
) -> Recipe:
    """The recipe that quantizes after training and stops there.

    Args:
        model: as in a recipe.
        method: a method of :mod:`fewbits.ptq`.
        scheme: of every linear layer but the output head; for ``kmeans`` the grid of ``W2A16G64`` is a codebook of as
            many bits, which :func:`fewbits.kmeans.codebook_spelling` writes ``W2KA16G64``.
        text: file or folder to calibrate on, whose last part is held out to score; None for the embedded text.
        target: the engine format that must hold the result.
        options: ``key=value`` pairs of the method, such as ``damping=0.05`` or ``num_blocks=128``.

    Raises:
        ValueError: as :meth:`Recipe.parse`.

    Example:
        >>> ptq_recipe("embedded", "gptq", "W2A16G64", options=["damping=0.05"]).init_options
        {'damping': 0.05}
    """
    check_options(method, {})
    scheme = codebook_spelling(scheme) if method == "kmeans" else scheme
    data = {"source": "embedded"} if text is None else {"source": "text", "path": str(text)}
    fields: dict[str, Any] = {"model": model, "target": target, "rules": [{"scheme": scheme}], "data": data}
    fields |= {"init": method, "train": {"max_steps": 0}}
    return Recipe.parse(json.dumps(fields), [f"init_options.{option}" for option in options])


def num_quantized_weights(model: nn.Module) -> int:
    """Weights that training quantizes."""
    return sum(layer.weight.numel() for _, layer in owned_layers(model))
