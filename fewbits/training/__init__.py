"""Training: QATTrainer on transformers.Trainer, the callback for other trainers, telemetry."""

from fewbits.training.averaging import EMACallback, WeightEMA
from fewbits.training.best import KeepBest
from fewbits.training.callback import QATCallback
from fewbits.training.codebooks import CodebookCallback
from fewbits.training.curvature import CurvatureRefresh
from fewbits.training.trainer import QATSettings, QATTrainer, TrainingDiverged

__all__ = [
    "CodebookCallback",
    "CurvatureRefresh",
    "EMACallback",
    "KeepBest",
    "QATCallback",
    "QATSettings",
    "QATTrainer",
    "TrainingDiverged",
    "WeightEMA",
]
