r"""What an integer zero point per group would buy: weights rounded to nearest, on grids with and without one.

The asymmetric quantizer with clips (OmniQuant's form, in ZeroQAT) of a group is

.. math:: s = (\gamma \max w - \beta \min w)/(2^b - 1), \quad z = \operatorname{round}(-\beta \min w / s), \quad
          \hat w = s\,(\operatorname{clamp}(\operatorname{round}(w/s) + z,\, 0,\, 2^b - 1) - z).

Its clips are searched here per group for the least squared error, which no training is needed for. Beside it stand the
integer grid, the half-shifted grid, and the integer grid turned around (levels negated) where that is better: one bit
a group instead of b. Reported: signal to quantization noise of all decoder weights, and the perplexity.

    python benchmarks/asymmetric_zero.py --model embedded
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbits import Scheme, quantize
from fewbits.evaluate import evaluate
from fewbits.loading import load_any, load_blocks
from fewbits.recipe import DataSpec
from fewbits.scales import stored_scale

CLIPS = tuple(0.3 + 0.05 * i for i in range(15))


def symmetric(w: Tensor, text: str) -> Tensor:
    """The library's own rounding, scales by line search."""
    return quantize(w, Scheme.parse(text)).dequantize()


def turned(w: Tensor, text: str) -> Tensor:
    """The integer grid or its mirror image, per group."""
    return better(w, symmetric(w, text), -symmetric(-w, text), Scheme.parse(text))


def asymmetric(w: Tensor, text: str) -> Tensor:
    """An integer zero point per group: clips by search, and the symmetric grid itself as a candidate."""
    scheme = Scheme.parse(text)
    view, top = scheme.scale.view(w.shape), 2**scheme.grid.num_bits - 1
    x = view.split(w)
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    best = symmetric(w, text)
    for gamma in CLIPS:
        for beta in CLIPS:
            scale = stored_scale((gamma * high - beta * low).clamp_min(1e-9) / top, scheme.scale)[..., None]
            zero = (-beta * low[..., None] / scale).round().clamp(0, top)
            found = ((x / scale).round() + zero).clamp(0, top).sub(zero).mul(scale)
            best = better(w, best, view.merge(found), scheme)
    return best


def better(w: Tensor, a: Tensor, b: Tensor, scheme: Scheme) -> Tensor:
    """Group by group, whichever of two is nearer to w."""
    view = scheme.scale.view(w.shape)
    errors = [view.split(q - w).square().sum(-1, keepdim=True) for q in (a, b)]
    return view.merge(torch.where(errors[1] < errors[0], view.split(b), view.split(a)))


def measure(name: str, bits: int, group: int) -> dict[str, dict[str, float]]:
    """Noise and perplexity by kind of grid."""
    text, half = f"W{bits}A16G{group}", f"W{bits}HA16G{group}"
    kinds = {"int": (symmetric, text), "int or turned": (turned, text), "half-shifted": (symmetric, half)}
    kinds["integer zero"] = (asymmetric, text)
    found = {}
    for kind, (rounded, grid) in kinds.items():
        model, tokenizer = load_any(name)
        signal = noise = 0.0
        with torch.no_grad():
            for module_name, module in model.named_modules():
                if isinstance(module, nn.Linear) and module_name != "lm_head":
                    w = module.weight.float()
                    q = rounded(w, grid)
                    signal, noise = signal + float(w.square().sum()), noise + float((w - q).square().sum())
                    module.weight.copy_(q)
        data = DataSpec(source="embedded", block_size=256)
        score = evaluate(model, load_blocks(data, tokenizer, model, 0)[1])
        db = 10 * float(torch.tensor(signal / noise).log10())
        found[kind] = {"sqnr_db": round(db, 3), "perplexity": round(score.perplexity, 3)}
    return found


def main() -> None:
    """Print, and keep if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = {f"W{bits}G{args.group}": measure(args.model, bits, args.group) for bits in (2, 3, 4)}
    text = json.dumps({"model": args.model, "rows": rows}, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
