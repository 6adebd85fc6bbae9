"""Rows of the arena that differ in where training starts, those without training, and the controls."""

from __future__ import annotations

from typing import Any

from fewbits.arena.methods import Method
from fewbits.arena.parts import MUON, MUON_NOTE

_SEQ_MSE: dict[str, Any] = {
    "letter": "H",
    "surrogate": {"name": "clipped_ste", "edge": "bin"},
    "by_bits": {"1": {"letter": ""}, "1.58": {"letter": ""}},
}
"""SEQ's grid with scales that start at the smallest squared error."""

_ROTATED: dict[str, Any] = {**_SEQ_MSE, "options": {"rotation": {"kind": "hadamard"}}}

STARTS: dict[str, Method] = {
    "rotated_seq": Method(
        summary="Block Hadamard, SEQ's grid, learned scales from the smallest squared error, clipped STE.",
        note="ours: QuEST's rotation with learned scales",
        **_ROTATED,
    ),
    "seq_from_gptq": Method(
        summary="SEQ's grid (the plain one at 1 bit and ternary) from the start that GPTQ gives, clipped STE.",
        papers=("2210.17323",),
        init="gptq",
        **_SEQ_MSE,
    ),
    "seq_from_signround": Method(
        summary="SEQ's grid (the plain one at 1 bit and ternary) from the start that SignRound gives, clipped STE.",
        papers=("2309.05516",),
        note="at a tenth of the common rate; the start sees its calibration text many times, processor time counts it",
        init="signround",
        rate_factor=0.1,
        **_SEQ_MSE,
    ),
    "combined": Method(
        summary="What led: SEQ's grid, SignRound's start (rounding at 1 bit), feature distillation, schedule-free.",
        papers=("2309.05516", "2503.11159", "2405.15682"),
        note="ours; no rotation, so that engines hold the result; at a tenth of the common rate, but not at 1 bit",
        letter="H",
        surrogate={"name": "clipped_ste", "edge": "bin"},
        objective={"kl": 1.0, "features": 1.0},
        train={"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "activation_noise": 0.1},
        init="signround",
        rate_factor=0.1,
        by_bits={"1": {"letter": "", "init": "rtn", "rate_factor": 1.0}, "1.58": {"letter": ""}},
    ),
    "rotated_seq_muon": Method(
        summary="rotated_seq, latent weights by Muon.",
        note=f"ours; {MUON_NOTE}",
        **MUON,
        **_ROTATED,
    ),
    "clipped_ste_from_gptq": Method(
        summary="Clipped STE from the start that GPTQ gives.",
        papers=("2210.17323", "2601.14888"),
        surrogate={"name": "clipped_ste", "edge": "level"},
        init="gptq",
    ),
    "rtn": Method(summary="Rounding to nearest with the scales of least squared error, no training.", stage="ptq"),
    "gptq": Method(summary="GPTQ, no training.", papers=("2210.17323",), stage="ptq", init="gptq"),
    "awq": Method(
        summary="AWQ, no training.",
        papers=("2306.00978",),
        stage="ptq",
        init="awq",
    ),
    "hqq": Method(
        summary="HQQ, no training and no data.",
        note="scales only, our grids have no zero point",
        stage="ptq",
        init="hqq",
    ),
    "adaround": Method(summary="AdaRound, no training.", papers=("2004.10568",), stage="ptq", init="adaround"),
    "lapq": Method(summary="LAPQ, no training.", papers=("1911.07190",), stage="ptq", init="lapq"),
    "signround": Method(
        summary="SignRound, no training after it.",
        papers=("2309.05516",),
        note="sees its calibration text many times",
        stage="ptq",
        init="signround",
    ),
    "block_ap": Method(
        summary="Block-AP and its training of all scales (EfficientQAT), no training after it.",
        papers=("2407.11062",),
        note="sees its calibration text many times",
        stage="ptq",
        init="block_ap",
    ),
    "kmeans_ptq": Method(
        summary="A codebook and scales for each matrix, fitted in turn on calibration data, no training.",
        papers=("2602.15563",),
        note="ours; the paper fits levels once, without data",
        letter="K",
        stage="ptq",
        init="kmeans",
        missing={"1.58": "a codebook of three levels takes 2 bits in a file, more than the ternary grid's 1.6"},
    ),
    "rotated_signround": Method(
        summary="SignRound on rotated_seq's grid, no training after it.",
        papers=("2309.05516",),
        note="ours; sees its calibration text many times",
        stage="ptq",
        init="signround",
        **_ROTATED,
    ),
    "fp_finetune_then_ptq": Method(
        summary="Control: as many tokens in full precision on cross-entropy, then rounding to nearest.",
        note="distillation from itself would be no training at all",
        objective={"cross_entropy": 1.0, "kl": 0.0},
        stage="fp_then_ptq",
    ),
    "fp_finetune_then_gptq": Method(
        summary="Control: as many tokens in full precision on cross-entropy, then GPTQ.",
        note="distillation from itself would be no training at all",
        papers=("2210.17323",),
        objective={"cross_entropy": 1.0, "kl": 0.0},
        stage="fp_then_ptq",
        init="gptq",
    ),
}
