"""What a recipe says to the trainer: arguments, settings, and the text that chooses the best iterate."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from fewbits.data import TokenBlocks
from fewbits.optim.build import OWN_NAMES
from fewbits.optim.zeroth_order import gradient_from_dict
from fewbits.recipe import Recipe
from fewbits.training.trainer import QATSettings


def training_arguments(recipe: Recipe, folder: Path, *, quiet: bool = False) -> TrainingArguments:
    """The Trainer's arguments of a recipe."""
    t = recipe.train
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=t.max_steps,
        per_device_train_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=t.learning_rate,
        weight_decay=t.weight_decay,
        lr_scheduler_type=t.lr_scheduler_type,
        warmup_steps=t.warmup_steps,
        max_grad_norm=t.max_grad_norm,
        optim="adamw_torch" if t.optim in OWN_NAMES else t.optim,  # training_settings has the name itself
        save_strategy="no" if t.save_steps is None else "steps",
        save_steps=t.save_steps or 500,
        save_total_limit=t.save_total_limit,
        logging_steps=t.logging_steps,
        activation_checkpointing=t.activation_checkpointing,
        bf16=t.bf16,
        seed=recipe.seed,
        data_seed=recipe.seed,
        report_to=[] if quiet else ["tensorboard"],
        disable_tqdm=quiet,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def training_settings(recipe: Recipe) -> QATSettings:
    """The trainer's settings of a recipe."""
    t = recipe.train
    vr = t.variance_reduction
    return QATSettings(
        objective=recipe.objective.build(),
        scale_learning_rate=t.scale_learning_rate,
        rest_learning_rate=t.rest_learning_rate,
        telemetry_interval=t.telemetry_interval,
        optim=t.optim,
        rest_optim=t.rest_optim,
        optim_options=t.optim_options,
        ema_decay=t.ema_decay,
        activation_noise=t.activation_noise,
        activation_noise_bits=t.activation_noise_bits,
        keep_best_interval=t.keep_best_interval,
        codebooks=None if recipe.codebooks is None else recipe.codebooks.build(recipe.seed),
        calibration=t.telemetry_calibration,
        variance_reduction=None if vr is None else vr.build(recipe.seed),
        num_reference_batches=16 if vr is None else vr.num_reference_batches,
        zeroth_order=gradient_from_dict(t.gradient),
    )


def hold_out_best(recipe: Recipe, train: TokenBlocks) -> tuple[TokenBlocks, TokenBlocks | None]:
    """``(train, best)``: with ``keep_best``, the last blocks of the training text choose the iterate that ships.

    Raises:
        ValueError: if nothing would be left to train on.
    """
    if not recipe.train.keep_best:
        return train, None
    return train.split(max(1, recipe.train.keep_best_tokens // train.block_size) / len(train))
