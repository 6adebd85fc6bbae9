"""Peak memory of a zeroth-order step against inference and against backpropagation, each in a process of its own.

    python benchmarks/zeroth_order_memory.py --output benchmarks/results/zeroth_order_memory.json

Peaks are VmHWM on a CPU (allocated bytes on a GPU) over two steps, less the level before the model is built; the arms
run the same prepared model on the same tokens. The system's allocator moves a peak by a tenth from process to process,
so arms are repeated and medians compared. The aim of the zeroth order: at most 1.1 of inference.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from memory_arms import level, llama, parser, run_arms, write
from torch import Tensor

from fewbits import Rule, Scheme, prepare
from fewbits.optim import parameter_groups
from fewbits.optim.zeroth_order import ZerothOrder, build_zeroth_order

ARMS = ("inference", "zeroth_order", "backprop_sgd", "backprop_adamw")


def measure(arm: str, args: argparse.Namespace) -> int:
    """Peak bytes of one arm."""
    device = torch.device(args.device)
    before = level(device, peak=False)
    model = llama(args)
    prepare(model, Rule(scheme=Scheme.parse(args.scheme, rule="gaussian")))
    ids = torch.randint(0, args.vocab, (args.batch, args.block), device=device)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    groups = parameter_groups(model, learning_rate=1e-6, scale_learning_rate=1e-6, rest_learning_rate=1e-6)
    zeroth = build_zeroth_order(model, groups, ZerothOrder()) if arm == "zeroth_order" else None
    cls = torch.optim.AdamW if arm == "backprop_adamw" else torch.optim.SGD
    optimizer = cls(groups) if arm.startswith("backprop") else None
    for _ in range(2):
        if zeroth is not None:
            zeroth.accumulate(loss)
            zeroth.step()
        elif optimizer is not None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        else:
            with torch.no_grad():
                loss()
    return level(device, peak=True) - before


def main() -> None:
    """Parse, measure every arm in its own process, print, write."""
    options = parser(__doc__, ARMS, batch=4, scheme="W2A16G128")
    options.add_argument("--repeats", type=int, default=5, help="processes per arm; their median counts")
    args = options.parse_args()
    if args.arm:
        print(measure(args.arm, args))
        return
    rounds = [run_arms(__file__, ARMS) for _ in range(args.repeats)]  # arms in turns
    peaks = {arm: [found[arm] for found in rounds] for arm in ARMS}
    middle = {arm: statistics.median(found) for arm, found in peaks.items()}
    ratios = {arm: peak / middle["inference"] for arm, peak in middle.items()}
    print(f"{'arm':16}{'peak MB':>10}{'lowest':>10}{'highest':>10}{'of inference':>14}")
    for arm, found in peaks.items():
        mega = [x / 1e6 for x in (middle[arm], min(found), max(found))]
        print(f"{arm:16}{mega[0]:10.0f}{mega[1]:10.0f}{mega[2]:10.0f}{ratios[arm]:14.3f}")
    write(args, {"peak_bytes": peaks, "ratio": ratios})


if __name__ == "__main__":
    main()
