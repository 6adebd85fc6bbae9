"""Diagnosis of real models: will rounding leave the basin, which layers suffer, did training come back.

The half of the geometry that walks models; the mathematics is in :mod:`fewbits.geometry`. Reference: arXiv:2606.09012.
"""

from __future__ import annotations

from fewbits.diagnose.after import AfterReport, Triple, after_training, triple
from fewbits.diagnose.before import (
    Baseline,
    SchemeReport,
    before_training,
    measure_baseline,
    measure_scheme,
)
from fewbits.diagnose.callback import RecoveryCallback
from fewbits.diagnose.diagnosis import Diagnosis, diagnose, rank_correlation
from fewbits.diagnose.forecast import PitchForecast, forecast_failure
from fewbits.diagnose.layers import Proposal, SensitivityTable, layer_sensitivity, propose_recipe
from fewbits.diagnose.losses import TokenLoss, batched_gradient, batched_hessian, latent_weights, token_loss
from fewbits.diagnose.pages import section, write_diagnosis
from fewbits.diagnose.settings import DiagnosisSettings
from fewbits.diagnose.sites import Cells, Site, find_sites, round_cells

__all__ = [
    "AfterReport",
    "Baseline",
    "Cells",
    "Diagnosis",
    "DiagnosisSettings",
    "PitchForecast",
    "Proposal",
    "RecoveryCallback",
    "SchemeReport",
    "SensitivityTable",
    "Site",
    "TokenLoss",
    "Triple",
    "after_training",
    "batched_gradient",
    "batched_hessian",
    "before_training",
    "diagnose",
    "find_sites",
    "forecast_failure",
    "latent_weights",
    "layer_sensitivity",
    "measure_baseline",
    "measure_scheme",
    "propose_recipe",
    "rank_correlation",
    "round_cells",
    "section",
    "token_loss",
    "triple",
    "write_diagnosis",
]
