"""Rows of the arena that differ in gradients, grids, scales or pulls toward the grid, under the common optimizer."""

from __future__ import annotations

from typing import Any

from fewbits.arena.methods import Method
from fewbits.arena.parts import jacquant

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

_GROUPS = "one scale per group of the scheme where the paper has one per row or tensor, for equal bits"

GRADIENTS: dict[str, Method] = {
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
    "jacquant": jacquant("Learned gain per group from the exact dither sensitivity.", preset="recommended"),
    "jacquant_update": jacquant(
        "The same gain on the optimizer's step, which Adam cannot cancel.",
        note="the paper multiplies the gradient",
        preset="recommended",
        apply="update",
    ),
    "jacquant_element": jacquant("One gain per weight.", preset="recommended", granularity="element"),
    "jacquant_paper_literal": jacquant(
        "The paper as printed: tiny absolute probes, clipped before the average.", preset="paper_literal"
    ),
    "jacquant_constant_gain": jacquant(
        "Control: every group of a layer has the layer's mean gain.", preset="recommended", control="constant"
    ),
    "jacquant_shuffled_gain": jacquant(
        "Control: the gains of a layer permuted among its groups.", preset="recommended", control="shuffled"
    ),
    "jacquant_relative": jacquant(
        "The gain over its own running mean, on the optimizer's step: only its change in time acts.",
        note="ours; the paper uses the gain itself, on the gradient",
        preset="recommended",
        apply="update",
        relative="time",
    ),
    "jacquant_saturated": jacquant(
        "One gain per weight, on the optimizer's step of saturated weights only.",
        note="ours; between the identity and the clipped STE",
        preset="recommended",
        apply="update",
        granularity="element",
        where="saturated",
    ),
    "jacquant_update_layer": jacquant(
        "The gain over the layer's mean gain, on the optimizer's step: only its place acts.",
        note="ours; what jacquant_update_constant leaves out",
        preset="recommended",
        apply="update",
        relative="layer",
    ),
    "jacquant_update_constant": jacquant(
        "Control of jacquant_update: every group of a layer has the layer's mean gain.",
        preset="recommended",
        apply="update",
        control="constant",
    ),
    "jacquant_update_shuffled": jacquant(
        "Control of jacquant_update: the gains of a layer permuted among its groups.",
        preset="recommended",
        apply="update",
        control="shuffled",
    ),
    "jacquant_drift": jacquant(
        "Refreshed when the weights have moved, in place of a fixed interval.",
        note="the paper names automatic scheduling as future work",
        preset="recommended",
        refresh="drift",
    ),
    "jacquant_flips": jacquant(
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
    "dsq_learned": Method(
        summary="The same with the softness alpha of every layer learned.",
        papers=("1908.05033",),
        note="the forward pass rounds hard and alpha follows the gradient of the soft weight; LSQ scales in place of "
        "learned ends of the range",
        surrogate={"name": "dsq", "learned": True},
    ),
    "ewgs": Method(
        summary="Gradient scaled by the rounding error.",
        papers=("2104.00903",),
        note="delta is fixed at .001 where the paper follows the Hessian",
        surrogate="ewgs",
    ),
    "ewgs_hessian": Method(
        summary="Gradient scaled by the rounding error, as much as the curvature of the loss says, layer by layer.",
        papers=("2104.00903",),
        note="measured five times in a short run, each time at the cost of about 15 steps",
        surrogate={"name": "ewgs", "hessian": {}},
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
    "cage_coupled": Method(
        summary="The same pull added to the gradient, so that Adam's second moment weighs it.",
        papers=("2510.18784",),
        note=f"{_GROUPS}; after clipping and at the decoupled strength, which are our choices",
        drive={"name": "cage", "coupled": True},
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
        codebooks={"step": 0},
        by_bits={"1": {"options": {"rule": "absmean"}}},
        missing={"1.58": "a codebook of three levels takes 2 bits in a file, more than the ternary grid's 1.6"},
    ),
    "kmeans_literal": Method(
        summary="The same with the size of each block, found anew at every step, as its scale (1-Bit Wonder).",
        papers=("2602.15563",),
        note="as published but for the warm-up, which the checkpoint stands for, blocks of the scheme, and the arena's "
        "objective in place of cross-entropy",
        letter="K",
        options={"rule": "block_absmax", "mode": "dynamic"},
        codebooks={"step": 0},
        by_bits={"1": {"options": {"rule": "block_absmean"}}},
        missing={"1.58": "a codebook of three levels takes 2 bits in a file, more than the ternary grid's 1.6"},
    ),
}
