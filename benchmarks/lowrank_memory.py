"""Memory of LR-QAT against full QAT of the same model: what each part takes after a step, and the peak of the process.

    python benchmarks/lowrank_memory.py --output benchmarks/results/lowrank_memory.json

``parts`` are exact sums over tensors: the frozen base (or nothing), trained parameters, gradients, AdamW's state.
``peak_bytes`` is measured in a process of its own per arm (VmHWM on a CPU, allocated bytes on a GPU), two steps, less
the level before the model is built. Activations are checkpointed in every arm. Norms, embeddings and head are frozen.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from memory_arms import level, llama, parser, run_arms, write

from fewbits import Rule, Scheme, prepare
from fewbits.convert import owned_layers
from fewbits.optim import parameter_groups

ARMS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "low_rank_int8": {"storage": "int8"},
    "low_rank_bf16": {"storage": "bf16"},
    "low_rank_fp32": {"storage": "fp32"},
}


def measure(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """One arm: build, two steps, sums and peak."""
    device = torch.device(args.device)
    before = level(device, peak=False)
    model = llama(args)
    options = ARMS[arm]
    how = None if options is None else {"name": "low_rank", "rank": args.rank, **options}
    prepare(model, Rule(scheme=Scheme.parse(args.scheme, rule="gaussian"), parametrization=how))
    model.train().activation_checkpointing_enable()
    groups = parameter_groups(model, learning_rate=1e-4, scale_learning_rate=1e-5, rest_learning_rate=0)
    trained = [p for group in groups for p in group["params"]]
    kept = {id(p) for p in trained}
    for p in model.parameters():
        p.requires_grad_(id(p) in kept)
    optimizer = torch.optim.AdamW(groups)
    ids = torch.randint(0, args.vocab, (args.batch, args.block), device=device)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values() if t.ndim]
    layers = [layer for _, layer in owned_layers(model)]
    parts = {
        "base": sum(x.weight.nbytes for x in layers if x.parametrization is not None),
        "trained": sum(p.nbytes for p in trained),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "optimizer": sum(t.nbytes for t in state),
    }
    weights = sum(x.weight.numel() for x in layers)
    total = sum(parts.values())
    peak = level(device, peak=True) - before
    return {"parts": parts, "total": total, "bytes_per_weight": total / weights, "peak_bytes": peak}


def main() -> None:
    """Parse, measure every arm in its own process, print, write."""
    options = parser(__doc__, ARMS, batch=1, scheme="W4A16G128")
    options.add_argument("--rank", type=int, default=32)
    args = options.parse_args()
    if args.arm:
        print(json.dumps(measure(args.arm, args)))
        return
    arms = run_arms(__file__, ARMS)
    print(f"{'arm':16}{'bytes/weight':>14}{'of full':>10}{'peak MB':>10}{'of full':>10}")
    for arm, row in arms.items():
        share, peak = row["total"] / arms["full"]["total"], row["peak_bytes"] / arms["full"]["peak_bytes"]
        print(f"{arm:16}{row['bytes_per_weight']:14.2f}{share:10.3f}{row['peak_bytes'] / 1e6:10.0f}{peak:10.3f}")
    write(args, {"arms": arms})


if __name__ == "__main__":
    main()
