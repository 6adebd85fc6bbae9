"""A running QAT watched on a fixed token set: deployed and latent loss every N steps, recovery and half-times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fewbits.checkpoint import load_model, load_tokenizer
from fewbits.data import TokenBlocks
from fewbits.diagnose.losses import token_loss
from fewbits.diagnose.trajectory import TRAJECTORY_FOLDER, TrajectoryWriter
from fewbits.geometry import RecoveryReport, loss_value, recovery_report
from fewbits.pipeline import load_blocks, model_source
from fewbits.recipe import Recipe
from fewbits.training.metrics import MetricsFile, read_metrics

RECOVERY_FILE = "recovery.jsonl"
"""In a run folder: deployed, latent and reference loss by step."""


class RecoveryCallback(TrainerCallback):
    r"""Records :math:`L(Q(w_k))` and :math:`L(w_k)` on a fixed token set; put it into the callbacks of a run.

    Args:
        blocks: the fixed token set; two evaluations of it per record.
        reference: loss of the full-precision model on the same set, nats.
        tol: band of the basin, nats, e.g. from :func:`~fewbits.diagnose.measure_baseline`; positive.
        interval: optimizer steps between records; start and end are always recorded.
        path: JSON lines to append to, so that a resumed run keeps its curve; None keeps it in memory.
        batch_size: token blocks per forward pass.
        trajectory: folder for sketches of the weights at each record, which a diagnosis draws into its plane; None
            keeps none. See :mod:`fewbits.diagnose.trajectory`.

    Raises:
        ValueError: for an interval below 1 or a ``tol`` that is not positive.

    Reference: arXiv:2606.09012 (its second prediction: the deployed loss recovers before the latent one).
    """

    def __init__(
        self,
        blocks: TokenBlocks,
        *,
        reference: float,
        tol: float,
        interval: int = 10,
        path: str | Path | None = None,
        batch_size: int = 8,
        trajectory: str | Path | None = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1 optimizer step")
        if not tol > 0:
            raise ValueError(f"tol={tol} nats must be positive")
        self.blocks, self.reference, self.tol = blocks, reference, tol
        self.interval, self.batch_size = interval, batch_size
        self.file = None if path is None else MetricsFile(path)
        self.trajectory = None if trajectory is None else TrajectoryWriter(trajectory)
        self.steps: list[int] = []
        self.deployed: list[float] = []
        self.latent: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the start, or take up the curve of the run that is resumed."""
        self.steps, self.deployed, self.latent = [], [], []
        if self.file is not None:
            # A run from the start has step 0; what an earlier run left in the file goes.
            self.file.resume_at(state.global_step if state.global_step > 0 else -1)
            if self.file.path.exists():
                for row in read_metrics(self.file.path):
                    self._append(row["step"], row["deployed_loss"], row["latent_loss"])
        if self.trajectory is not None:
            self.trajectory.resume_at(state.global_step if state.global_step > 0 else -1)
        self._record(state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record every ``interval`` steps."""
        if state.global_step % self.interval == 0:
            self._record(state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the end."""
        self._record(state, kwargs["model"])

    def _append(self, step: int, deployed: float, latent: float) -> None:
        self.steps.append(step)
        self.deployed.append(deployed)
        self.latent.append(latent)

    def _record(self, state: TrainerState, wrapped: nn.Module) -> None:
        step = state.global_step
        if self.steps and self.steps[-1] >= step:
            return
        model = extract_model_from_parallel(wrapped)
        deployed, latent = (
            loss_value(token_loss(model, self.blocks, batch_size=self.batch_size, latent=latent))
            for latent in (False, True)
        )
        self._append(step, deployed, latent)
        if self.file is not None and state.is_world_process_zero:
            self.file.write(step, {"deployed_loss": deployed, "latent_loss": latent, "reference_loss": self.reference})
        if self.trajectory is not None and state.is_world_process_zero:
            self.trajectory.write(step, model)

    def report(self) -> RecoveryReport:
        """Recovery time, half-times of both curves, best and last deployed loss.

        Raises:
            ValueError: before anything was recorded.
        """
        if not self.steps:
            raise ValueError("nothing is recorded yet; train with this callback first")
        return recovery_report(self.steps, self.deployed, self.latent, reference=self.reference, tol=self.tol)


def watch_run(
    recipe: Recipe, folder: str | Path, interval: int, *, num_blocks: int = 8, tol: float = 0.02
) -> RecoveryCallback:
    """The callback for a run that the recipe describes: curve and trajectory go into its folder.

    Args:
        recipe: of the run; its evaluation text is watched, its original model is the reference.
        folder: the run folder, where ``recovery.jsonl`` and ``trajectory/`` will stand.
        interval: optimizer steps between records.
        num_blocks: token blocks to watch on.
        tol: band of the basin, nats; a later diagnosis uses its own.

    Raises:
        ValueError: for an interval below 1, or from loading model and text.
    """
    source = model_source(recipe.model)
    model = load_model(source, trust_remote_code=recipe.trust_remote_code).eval()
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
    blocks = load_blocks(recipe.data, tokenizer, model, recipe.seed)[1].take(num_blocks)
    return RecoveryCallback(
        blocks,
        reference=loss_value(token_loss(model, blocks)),
        tol=tol,
        interval=interval,
        path=Path(folder) / RECOVERY_FILE,
        trajectory=Path(folder) / TRAJECTORY_FOLDER,
    )


def read_recovery(folder: str | Path, *, tol: float) -> RecoveryReport | None:
    """The recovery of a finished run from its ``recovery.jsonl``; None if it was not watched.

    Raises:
        ValueError: for a damaged file.
    """
    path = Path(folder) / RECOVERY_FILE
    rows = read_metrics(path) if path.exists() else []
    if not rows:
        return None
    try:
        curves = [[row[key] for row in rows] for key in ("step", "deployed_loss", "latent_loss")]
        return recovery_report(*curves, reference=rows[0]["reference_loss"], tol=tol)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; it is not a file of RecoveryCallback") from None
