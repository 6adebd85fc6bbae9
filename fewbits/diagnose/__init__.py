"""Diagnosis of real models: will rounding leave the basin, which layers suffer, did training come back.

The half of the geometry that walks models; the mathematics is in :mod:`fewbits.geometry`. Reference: arXiv:2606.09012.
"""

from __future__ import annotations

from fewbits.diagnose.after import AfterReport, Triple, after_training, triple
from fewbits.diagnose.arms import Arm, ArmsReport, measure_arm
from fewbits.diagnose.before import (
    Baseline,
    SchemeReport,
    before_training,
    measure_baseline,
    measure_scheme,
)
from fewbits.diagnose.callback import RecoveryCallback, read_recovery, watch_run
from fewbits.diagnose.control import control_recipe, train_control
from fewbits.diagnose.diagnosis import Diagnosis, diagnose, rank_correlation
from fewbits.diagnose.forecast import PitchForecast, forecast_failure
from fewbits.diagnose.layer_forecast import LayerForecast, forecast_layers
from fewbits.diagnose.layers import Proposal, SensitivityTable, layer_sensitivity, propose_recipe
from fewbits.diagnose.losses import TokenLoss, batched_gradient, batched_hessian, latent_weights, token_loss
from fewbits.diagnose.measure import Trained, open_run
from fewbits.diagnose.pages import section, write_diagnosis
from fewbits.diagnose.pitch import PitchSweep, sweep_pitch
from fewbits.diagnose.river import RiverReport, measure_river, smoothed_hessian
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.diagnose.sites import Cells, Site, find_sites, round_cells
from fewbits.diagnose.stages import Stages
from fewbits.diagnose.terrain import SpectrumReport, TerrainReport, measure_terrain
from fewbits.diagnose.trajectory import Trajectory, TrajectoryWriter, read_trajectory

__all__ = [
    "AfterReport",
    "Arm",
    "ArmsReport",
    "Baseline",
    "Cells",
    "Diagnosis",
    "DiagnosisSettings",
    "LayerForecast",
    "PitchForecast",
    "PitchSweep",
    "Proposal",
    "RecoveryCallback",
    "RiverReport",
    "SchemeReport",
    "SensitivityTable",
    "Site",
    "SpectrumReport",
    "Stages",
    "TerrainReport",
    "TokenLoss",
    "Trained",
    "Trajectory",
    "TrajectoryWriter",
    "Triple",
    "after_training",
    "batched_gradient",
    "batched_hessian",
    "before_training",
    "control_recipe",
    "diagnose",
    "find_sites",
    "forecast_failure",
    "forecast_layers",
    "latent_weights",
    "layer_sensitivity",
    "measure_arm",
    "measure_baseline",
    "measure_river",
    "measure_scheme",
    "measure_terrain",
    "open_run",
    "propose_recipe",
    "rank_correlation",
    "read_recovery",
    "read_trajectory",
    "round_cells",
    "section",
    "smoothed_hessian",
    "sweep_pitch",
    "token_loss",
    "train_control",
    "triple",
    "watch_run",
    "write_diagnosis",
]
