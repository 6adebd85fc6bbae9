"""Rows of the arena that differ in the optimizer, the objective, or what is trained."""

from __future__ import annotations

from typing import Any

from fewbits.arena.methods import Method
from fewbits.arena.parts import MUON, MUON_NOTE, jacquant

_RECOMMENDED = {"preset": "recommended"}

_CLIPPED: dict[str, Any] = {"name": "clipped_ste", "edge": "level"}

_SGD: dict[str, Any] = {
    "train": {"optim": "sgd", "optim_options": {"momentum": 0.9}, "rest_optim": "adamw_torch"},
    "rate_factor": 30.0,
}
"""AdamW keeps what is no latent weight, at the common rate: rows then differ by the latent weights' steps alone."""

_SGD_NOTE = "momentum .9; latent weights at 30 times the common rate, scales and the rest by AdamW at the common rate"

TRAINING: dict[str, Method] = {
    "clipped_ste_sgd": Method(
        summary="Clipped STE, latent weights by SGD with momentum.", note=_SGD_NOTE, surrogate=_CLIPPED, **_SGD
    ),
    "jacquant_sgd": jacquant(
        "JacQuant's gain where no second moment cancels it: SGD with momentum.", _SGD_NOTE, more=_SGD, **_RECOMMENDED
    ),
    "clipped_ste_muon": Method(
        summary="Clipped STE, latent weights by Muon.",
        papers=("2502.16982",),
        note=MUON_NOTE,
        surrogate=_CLIPPED,
        **MUON,
    ),
    "jacquant_muon": jacquant("JacQuant's gain before Muon.", MUON_NOTE, more=MUON, **_RECOMMENDED),
    "lion": Method(
        summary="Clipped STE, every parameter by Lion (signs of the momentum).",
        papers=("2302.06675",),
        note="at .3 of the common rate; the paper advises a third to a tenth",
        surrogate=_CLIPPED,
        train={"optim": "lion"},
        rate_factor=0.3,
    ),
    "schedule_free": Method(
        summary="Clipped STE, every parameter by schedule-free AdamW; what ships is its average.",
        papers=("2405.15682",),
        note="a constant rate after the warm-up, in place of the cosine",
        surrogate=_CLIPPED,
        train={"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
    ),
    "ema": Method(
        summary="Clipped STE; what ships is a running mean of latent weights and scales.",
        note="decay .99; a usual trick, of no paper in particular",
        surrogate=_CLIPPED,
        train={"ema_decay": 0.99},
    ),
    "fpq": Method(
        summary="Clipped STE with distillation of standardized hidden states and noise of one activation step.",
        papers=("2503.11159",),
        note="for language models by us: a notional 8-bit step per token, means in place of sums",
        surrogate=_CLIPPED,
        objective={"kl": 1.0, "features": 1.0},
        train={"activation_noise": 0.1},
    ),
    "consistency": Method(
        summary="Clipped STE, and agreement of two noisy views with a slow copy of itself.",
        papers=("2402.13497",),
        note="views are token dropout; weight, decay and clean main loss are ours",
        surrogate=_CLIPPED,
        objective={"kl": 1.0, "consistency": 1.0},
    ),
    "sqakd": Method(
        summary="EWGS, no labels, distillation at temperature 4.",
        papers=("2309.11220", "2104.00903"),
        note="EWGS' delta is fixed at .001 where the paper follows the Hessian; mean over tokens",
        surrogate="ewgs",
        objective={"kl": 1.0, "temperature": 4.0},
    ),
    "lr_qat": Method(
        summary="LR-QAT: factors of rank 32 inside the round, over a frozen int8 base; clipped STE.",
        papers=("2406.06385",),
        note="factors at twice the common rate; scales from the smallest squared error, at the same rate",
        surrogate=_CLIPPED,
        parametrization={"name": "low_rank", "rank": 32, "alpha": 1.0, "storage": "int8"},
        rate_factor=2.0,
    ),
    "zeroqat": Method(
        summary="ZeroQAT: forward passes only, one antithetic pair of perturbations per step.",
        papers=("2509.00031",),
        note="the plain grid in place of an asymmetric one with learned clips; SGD at 1/600 of the common rate",
        train={
            "gradient": {"name": "zeroth_order", "num_directions": 1, "epsilon": 0.001},
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "rest_learning_rate": 0.0,
        },
        rate_factor=1 / 600,
    ),
}
