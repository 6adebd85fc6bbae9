"""Training: QATTrainer on transformers.Trainer, the callback for other trainers, telemetry."""

from fewbits.training.callback import QATCallback
from fewbits.training.trainer import QATSettings, QATTrainer, TrainingDiverged

__all__ = ["QATCallback", "QATSettings", "QATTrainer", "TrainingDiverged"]
