"""Post-training quantization: baselines, and starting points of training.

Every layer method has the signature ``method(w, scheme, *, hessian=None, inputs=None, **options) -> PTQResult`` and is
pure tensors; :func:`apply_ptq` walks a model with it and leaves a prepared one.
"""

from __future__ import annotations

from fewbits.ptq._base import PTQResult, hessian_of, output_error
from fewbits.ptq.adaround import adaround
from fewbits.ptq.apply import METHODS, apply_ptq, check_options, options_of
from fewbits.ptq.awq import ScaleSearch, awq, scale_factors, search_scale
from fewbits.ptq.block_ap import block_ap
from fewbits.ptq.clip import clip_scale
from fewbits.ptq.gptq import gptq
from fewbits.ptq.hqq import hqq, shrink
from fewbits.ptq.kmeans import kmeans
from fewbits.ptq.lapq import LapqTrace, lapq, lp_scale, powell, quadratic_vertex, search_scales
from fewbits.ptq.rotate import rotation_matrix
from fewbits.ptq.rtn import rtn
from fewbits.ptq.signround import signround
from fewbits.ptq.stream import rotate_

__all__ = [
    "METHODS",
    "LapqTrace",
    "PTQResult",
    "ScaleSearch",
    "adaround",
    "apply_ptq",
    "awq",
    "block_ap",
    "check_options",
    "clip_scale",
    "gptq",
    "hessian_of",
    "hqq",
    "kmeans",
    "lapq",
    "lp_scale",
    "options_of",
    "output_error",
    "powell",
    "quadratic_vertex",
    "rotate_",
    "rotation_matrix",
    "rtn",
    "scale_factors",
    "search_scale",
    "search_scales",
    "shrink",
    "signround",
]
