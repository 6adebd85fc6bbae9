"""The methods that the arena compares; each is a combination of parts, written as data.

Unless a row says otherwise it has the scheme's plain grid, learned scales that start at the smallest squared error,
all layers and parameters trained, and the arena's objective: rows then differ in one part only.
"""

from __future__ import annotations

from typing import Any

from fewbits.arena.methods import Method

_ONLY_1_AND_TERNARY = "BitNet has a sign and a ternary grid only"
_SEQ: dict[str, Any] = {
    "letter": "H",
    "options": {"rule": "absmax_cover"},
    "surrogate": {"name": "clipped_ste", "edge": "bin"},
    "by_bits": {
        "1": {"letter": "", "options": {"rule": "absmean"}, "surrogate": {"name": "clipped_ste", "edge": "level"}},
        "1.58": {"letter": ""},
        **{
            bits: {"letter": "", "options": {"rule": "absmax_qmax"}, "surrogate": {"name": "clipped_ste"}}
            for bits in ("3", "4")
        },
    },
}
"""ParetoQ's choice by bit-width: sign from the mean, SEQ from the largest weight, LSQ at 3 and 4 bits."""
_QUEST: dict[str, Any] = {
    "letter": "H",
    "options": {"rule": "rms", "mode": "dynamic", "rotation": {"kind": "hadamard"}},
    "surrogate": {"name": "clipped_ste", "edge": "bin"},
    "by_bits": {
        "1": {"letter": "", "surrogate": {"name": "clipped_ste", "edge": 1.3}},
        "1.58": {"letter": ""},
    },
}
_SEQ_MSE: dict[str, Any] = {
    "letter": "H",
    "surrogate": {"name": "clipped_ste", "edge": "bin"},
    "by_bits": {"1": {"letter": ""}, "1.58": {"letter": ""}},
}
"""SEQ's grid with scales that start at the smallest squared error."""
_ROTATED: dict[str, Any] = {**_SEQ_MSE, "options": {"rotation": {"kind": "hadamard"}}}
_GROUPS = "one scale per group of the scheme where the paper has one per row or tensor, for equal bits"


def _jacquant(summary: str, note: str = "", more: dict[str, Any] | None = None, **options: Any) -> Method:
    surrogate = {"name": "jacquant", **options}
    return Method(summary=summary, papers=("2605.25469",), note=note, surrogate=surrogate, **(more or {}))


_RECOMMENDED = {"preset": "recommended"}


_CLIPPED: dict[str, Any] = {"name": "clipped_ste", "edge": "level"}
_SGD: dict[str, Any] = {
    "train": {"optim": "sgd", "optim_options": {"momentum": 0.9}, "rest_optim": "adamw_torch"},
    "rate_factor": 30.0,
}
"""AdamW keeps what is no latent weight, at the common rate: rows then differ by the latent weights' steps alone."""
_SGD_NOTE = "momentum .9; latent weights at 30 times the common rate, scales and the rest by AdamW at the common rate"
_MUON: dict[str, Any] = {"train": {"optim": "muon"}}
_MUON_NOTE = "steps scaled to the size of AdamW's, which moves scales and the rest, all at the common rate"


METHODS: dict[str, Method] = {
    "ste": Method(summary="Identity straight-through estimator.", papers=("1308.3432",)),
    "clipped_ste": Method(
        summary="Straight through within the outermost levels, the mean-field derivative.",
        surrogate={"name": "clipped_ste", "edge": "level"},
    ),
    "clipped_ste_bin": Method(
        summary="Straight through within the outermost cells: the mask of SEQ, and QuEST's trust mask.",
        papers=("2502.02631", "2502.05003"),
        surrogate={"name": "clipped_ste", "edge": "bin"},
    ),
    "lsq": Method(
        summary="Learned step size from its own start, twice the mean size over the root of the largest level.",
        papers=("1902.08153",),
        note=_GROUPS,
        options={"rule": "absmean"},
        surrogate={"name": "clipped_ste", "edge": "level"},
    ),
    "paretoq": Method(
        summary="SEQ (sign at 1 bit), started at the largest weight, clipped STE.",
        papers=("2502.02631",),
        note=f"{_GROUPS}; the arena's objective in place of cross-entropy",
        **_SEQ,
    ),
    "paretoq_ce": Method(
        summary="ParetoQ's recipe with its own objective, cross-entropy on the text.",
        papers=("2502.02631",),
        note=_GROUPS,
        objective={"cross_entropy": 1.0, "kl": 0.0},
        **_SEQ,
    ),
    "stableqat": Method(
        summary="Rotated-Fourier surrogate on LSQ scales.",
        papers=("2601.19320",),
        note=_GROUPS,
        options={"rule": "absmean"},
        surrogate={"name": "stableqat", "normalize": False},
    ),
    "stableqat_normalized": Method(
        summary="The same surrogate divided by its mean over a cell, from the smallest squared error.",
        papers=("2601.19320",),
        note="the division is ours: it separates the shape of the gain from a smaller learning rate",
        surrogate={"name": "stableqat", "normalize": True},
    ),
    "jacquant": _jacquant("Learned gain per group from the exact dither sensitivity.", preset="recommended"),
    "jacquant_update": _jacquant(
        "The same gain on the optimizer's step, which Adam cannot cancel.",
        note="the paper multiplies the gradient",
        preset="recommended",
        apply="update",
    ),
    "jacquant_element": _jacquant("One gain per weight.", preset="recommended", granularity="element"),
    "jacquant_paper_literal": _jacquant(
        "The paper as printed: tiny absolute probes, clipped before the average.", preset="paper_literal"
    ),
    "jacquant_constant_gain": _jacquant(
        "Control: every group of a layer has the layer's mean gain.", preset="recommended", control="constant"
    ),
    "jacquant_shuffled_gain": _jacquant(
        "Control: the gains of a layer permuted among its groups.", preset="recommended", control="shuffled"
    ),
    "jacquant_relative": _jacquant(
        "The gain over its own running mean, on the optimizer's step: only its change in time acts.",
        note="ours; the paper uses the gain itself, on the gradient",
        preset="recommended",
        apply="update",
        relative="time",
    ),
    "jacquant_saturated": _jacquant(
        "One gain per weight, on the optimizer's step of saturated weights only.",
        note="ours; between the identity and the clipped STE",
        preset="recommended",
        apply="update",
        granularity="element",
        where="saturated",
    ),
    "jacquant_update_layer": _jacquant(
        "The gain over the layer's mean gain, on the optimizer's step: only its place acts.",
        note="ours; what jacquant_update_constant leaves out",
        preset="recommended",
        apply="update",
        relative="layer",
    ),
    "jacquant_update_constant": _jacquant(
        "Control of jacquant_update: every group of a layer has the layer's mean gain.",
        preset="recommended",
        apply="update",
        control="constant",
    ),
    "jacquant_update_shuffled": _jacquant(
        "Control of jacquant_update: the gains of a layer permuted among its groups.",
        preset="recommended",
        apply="update",
        control="shuffled",
    ),
    "jacquant_drift": _jacquant(
        "Refreshed when the weights have moved, in place of a fixed interval.",
        note="the paper names automatic scheduling as future work",
        preset="recommended",
        refresh="drift",
    ),
    "jacquant_flips": _jacquant(
        "Refreshed when enough codes have changed, in place of a fixed interval.",
        note="the paper names automatic scheduling as future work",
        preset="recommended",
        refresh="flips",
    ),
    "seq_mse": Method(
        summary="SEQ's grid from the smallest squared error, clipped STE.",
        letter="H",
        surrogate={"name": "clipped_ste", "edge": "bin"},
        missing=dict.fromkeys(("1", "1.58"), "the grid is the plain one, the row is clipped_ste_bin"),
    ),
    "jacquant_seq": Method(
        summary="JacQuant on SEQ's grid, from the smallest squared error.",
        papers=("2605.25469",),
        letter="H",
        surrogate={"name": "jacquant", "preset": "recommended"},
        missing=dict.fromkeys(("1", "1.58"), "the grid is the plain one, the row is jacquant"),
    ),
    "dsq": Method(
        summary="Differentiable soft quantization: a tanh per cell.",
        papers=("1908.05033",),
        note="alpha is fixed at .2 where the paper learns it",
        surrogate="dsq",
    ),
    "ewgs": Method(
        summary="Gradient scaled by the rounding error.",
        papers=("2104.00903",),
        note="delta is fixed at .001 where the paper follows the Hessian",
        surrogate="ewgs",
    ),
    "rotation_trick": Method(
        summary="Gradient turned as the weights are turned into their levels.",
        papers=("2410.06424",),
        note="made for vector quantization; here on groups of 128 weights",
        surrogate="rotation_trick",
    ),
    "quest": Method(
        summary="Block Hadamard, closed-form RMS scales at every step, trust mask (clip at 1.3 at 1 bit).",
        papers=("2502.05003",),
        note=_GROUPS,
        **_QUEST,
    ),
    "winq": Method(
        summary="ParetoQ with weight noise and four pulls toward the grid.",
        papers=("2605.17471",),
        note=f"{_GROUPS}; no noise on scales, as in the paper's formula; three pulls, since a last one changes nothing",
        drive="winq",
        **_SEQ,
    ),
    "cage": Method(
        summary="QuEST with a small pull toward the grid in the last fifth of the run.",
        papers=("2510.18784",),
        note=_GROUPS,
        drive="cage",
        **_QUEST,
    ),
    "parq": Method(
        summary="Forward weights harden along the run by a proximal map.",
        papers=("2503.15748",),
        note="learned scales from the smallest squared error in place of its own level finders",
        drive="parq",
    ),
    "binary_relax": Method(
        summary="Forward weights go from latent to quantized along the run by a weighted mean.",
        papers=("1801.06313",),
        note="PARQ's schedule of the weight",
        drive={"name": "parq", "kind": "binary_relax"},
    ),
    "dorefa": Method(
        summary="The tanh of the weight on a symmetric grid as wide as its largest entry, identity STE.",
        papers=("1606.06160",),
        note=f"{_GROUPS}; weights only, not stretched to [-1, 1], which a trained language model cannot take; "
        "sign times the mean size at 1 bit, as in the paper",
        letter="H",
        options={"rule": "absmax", "mode": "dynamic"},
        parametrization={"name": "tanh", "normalize": False},
        by_bits={"1": {"letter": "", "options": {"rule": "absmean"}, "parametrization": None}},
        missing={"1.58": "DoReFa has even numbers of levels only"},
    ),
    "bitnet": Method(
        summary="Scales that are the mean size at every step, identity STE.",
        papers=("2402.17764",),
        note=f"{_GROUPS}; weights only; signs are not centred at 1 bit",
        options={"rule": "absmean", "mode": "dynamic"},
        missing=dict.fromkeys(("2", "3", "4", "5", "6", "7", "8"), _ONLY_1_AND_TERNARY),
    ),
    "kmeans": Method(
        summary="A codebook per layer by k-means before the first step, identity STE (1-Bit Wonder).",
        papers=("2602.15563",),
        note="fitted to the checkpoint, no warm-up in full precision; block scales are learned from there",
        letter="K",
        options={"rule": "absmax"},
        fit_codebooks=True,
        by_bits={"1": {"options": {"rule": "absmean"}}},
        missing={"1.58": "a codebook of three levels takes 2 bits in a file, more than the ternary grid's 1.6"},
    ),
    "clipped_ste_sgd": Method(
        summary="Clipped STE, latent weights by SGD with momentum.", note=_SGD_NOTE, surrogate=_CLIPPED, **_SGD
    ),
    "jacquant_sgd": _jacquant(
        "JacQuant's gain where no second moment cancels it: SGD with momentum.", _SGD_NOTE, more=_SGD, **_RECOMMENDED
    ),
    "clipped_ste_muon": Method(
        summary="Clipped STE, latent weights by Muon.",
        papers=("2502.16982",),
        note=_MUON_NOTE,
        surrogate=_CLIPPED,
        **_MUON,
    ),
    "jacquant_muon": _jacquant("JacQuant's gain before Muon.", _MUON_NOTE, more=_MUON, **_RECOMMENDED),
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
        note="the start sees its own calibration text many times; processor time counts it",
        init="signround",
        **_SEQ_MSE,
    ),
    "rotated_seq_muon": Method(
        summary="rotated_seq, latent weights by Muon.",
        note=f"ours; {_MUON_NOTE}",
        **_MUON,
        **_ROTATED,
    ),
    "rotated_seq_from_signround": Method(
        summary="rotated_seq from the start that SignRound gives.",
        papers=("2309.05516",),
        note="ours; the start sees its own calibration text many times; processor time counts it",
        init="signround",
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
"""Every method by the name that ``--methods`` takes, in the order of the report."""
