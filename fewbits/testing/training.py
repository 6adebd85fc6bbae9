"""A short distillation of a tiny Llama, for tests of what a trainer has to carry: state, resume, optimizer groups."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from fewbits.convert import Rule, prepare
from fewbits.data import TokenBlocks
from fewbits.testing.tiny import tiny_llama, toy_blocks
from fewbits.training import QATSettings, QATTrainer


def tiny_trainer(folder: str | Path, rule: Rule, settings: QATSettings | None = None, **arguments: Any) -> QATTrainer:
    """A trainer on 16 blocks of 16 tokens, on the CPU, that keeps checkpoints.

    Args:
        folder: of the checkpoints.
        rule: of every linear layer but the output head.
        settings: of the quantization; None are the defaults.
        **arguments: of ``TrainingArguments``, such as ``max_steps`` (6) or ``save_steps`` (3).

    Example:
        >>> import tempfile
        >>> trainer = tiny_trainer(tempfile.gettempdir(), Rule(scheme="W2A16G32"), max_steps=2)
        >>> trainer.args.max_steps, trainer.args.save_steps
        (2, 3)
    """
    model = tiny_llama()
    teacher = copy.deepcopy(model)
    prepare(model, rule)
    options: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_strategy": "steps",
        "save_steps": 3, "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**options, **arguments})
    data = TokenBlocks(toy_blocks(16, 16).numpy().astype(np.int32), 1.0)
    return QATTrainer(model, args, teacher=teacher, settings=settings or QATSettings(), train_dataset=data)
