"""The control arm: full-precision fine-tuning with the steps, data and rate of a QAT run, then the same rounding.

If plain fine-tuning moved the model to where rounding is cheap, QAT would owe its success to the extra training and not
to the rounding that it trained through. Reference: arXiv:2606.09012 (its third prediction: the control stays fragile).
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback

from fewbits.convert import owned_layers, prepare
from fewbits.data import TokenBlocks
from fewbits.diagnose.stages import model_digest
from fewbits.io import atomic_file
from fewbits.pipeline import CALIBRATION_BLOCKS, freeze_, hold_out_best, training_arguments, training_settings
from fewbits.ptq import apply_ptq
from fewbits.recipe import ObjectiveSpec, Recipe
from fewbits.training import QATTrainer

CONTROL_FILE = "control.safetensors"


def control_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the control: the run's without what imitates rounding, and another objective only where it must.

    Drives, surrogates, codebooks and activation noise go; steps, data, seed, rates and optimizers stay.
    Distilling a model from itself has the gradient 0 before any rounding, so a control with that objective would stay
    where it is. There the control minimizes cross-entropy on the same text.

    Example:
        >>> control_recipe(Recipe()).objective == ObjectiveSpec(cross_entropy=1.0, kl=0.0)
        True
        >>> control_recipe(Recipe(objective=ObjectiveSpec(cross_entropy=0.5))).objective.kl
        1.0
    """
    still = recipe.teacher is None and recipe.objective.cross_entropy == 0
    objective = ObjectiveSpec(cross_entropy=1.0, kl=0.0) if still else recipe.objective
    rules = [rule.model_copy(update={"drive": None, "surrogate": "ste"}) for rule in recipe.rules]
    train = recipe.train.model_copy(update={"activation_noise": 0.0})
    changes = {"objective": objective, "rules": rules, "codebooks": None, "train": train}
    return recipe.model_copy(update=changes)


def rounded_start(model: nn.Module, recipe: Recipe, text: TokenBlocks) -> nn.Module:
    """A prepared copy of a plain model as the recipe's run starts: its rounding by the recipe's own method.

    Args:
        model: plain; not changed.
        recipe: of the QAT run.
        text: what the post-training method sees.
    """
    arm = copy.deepcopy(model)
    rules = [rule.build() for rule in recipe.rules]
    if recipe.init == "rtn" and not recipe.init_options:
        return prepare(arm, rules, ignore=recipe.ignore).eval()
    options = {"num_blocks": CALIBRATION_BLOCKS, "seed": recipe.seed} | recipe.init_options
    return apply_ptq(arm, rules, recipe.init, text, ignore=recipe.ignore, **options).eval()


def train_control(
    model: nn.Module, recipe: Recipe, text: TokenBlocks, folder: str | Path, *, teacher: nn.Module | None = None
) -> nn.Module:
    """Fine-tune the plain model in full precision as the QAT run was trained; the result is kept and used again.

    Same Trainer, parameter groups, rates, schedule, clipping, data order and seed; the layers are prepared with their
    fake quantization switched off, which makes the forward pass that of the plain model.

    Args:
        model: the plain model, before QAT; not changed.
        recipe: of the QAT run.
        text: its training blocks.
        folder: for checkpoints and the result; a killed training goes on from its last checkpoint.
        teacher: where the recipe's objective has one; a copy of ``model`` if None.

    Returns:
        The fine-tuned plain model, in eval mode.

    Raises:
        ValueError: for a recipe without training steps.
    """
    if recipe.train.max_steps == 0:
        raise ValueError("the run was not trained (max_steps is 0); a control with the same steps would be the model")
    folder, recipe = Path(folder), control_recipe(recipe)
    digest = _digest(model, recipe, text)
    result, path = copy.deepcopy(model), folder / CONTROL_FILE
    if _digest_of(path) == digest:
        return _filled(result, load_file(path))
    arm = prepare(copy.deepcopy(model), [rule.build() for rule in recipe.rules], ignore=recipe.ignore)
    for _, layer in owned_layers(arm):
        layer.fake_quant_enabled = False
    freeze_(arm, recipe.train.freeze)
    train_text, best = hold_out_best(recipe, text)
    steps = recipe.train.max_steps
    train = recipe.train.model_copy(update={"save_steps": max(1, steps // 4), "save_total_limit": 1})
    work = folder / f"control-{digest[:16]}"  # named by the digest: its checkpoints are of this very training
    trainer = QATTrainer(
        arm,
        training_arguments(recipe.model_copy(update={"train": train}), work, quiet=True),
        teacher=copy.deepcopy(model) if teacher is None else teacher,
        settings=training_settings(recipe),
        best_blocks=best,
        train_dataset=train_text,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoints = sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    trained = {name: value.detach().cpu().contiguous() for name, value in arm.state_dict().items()}
    # Tied weights appear under several names, which a safetensors file may not share memory for.
    kept = {name: trained[name].clone() for name in result.state_dict()}
    with atomic_file(path) as partial:
        save_file(kept, partial, metadata={"digest": digest})
    shutil.rmtree(work, ignore_errors=True)
    return _filled(result, kept)


def _filled(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    model.load_state_dict(dict(state))
    return model.eval()


def _digest(model: nn.Module, recipe: Recipe, text: TokenBlocks) -> str:
    parts: list[Any] = [model_digest(model), recipe.model_dump_json(), text.tokens.shape, text.tokens.tobytes()]
    return hashlib.sha256("\n".join(repr(part) for part in parts).encode()).hexdigest()


def _digest_of(path: Path) -> str | None:
    """The digest that a result was saved with; None where there is no whole file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to train the control again") from None
