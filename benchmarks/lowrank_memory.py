"""Memory of LR-QAT against full QAT of the same model: what each part takes after a step, and the peak of the process.

    python benchmarks/lowrank_memory.py --output benchmarks/results/lowrank_memory.json

``parts`` are exact sums over tensors: the frozen base (or nothing), trained parameters, gradients, AdamW's state.
``peak_bytes`` is measured in a process of its own per arm (VmHWM on a CPU, allocated bytes on a GPU), two steps, less
the level before the model is built. Activations are checkpointed in every arm. Norms, embeddings and head are frozen.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import Rule, Scheme, prepare
from fewbits.convert import owned_layers
from fewbits.evaluate import versions
from fewbits.optim import parameter_groups

ARMS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "low_rank_int8": {"storage": "int8"},
    "low_rank_bf16": {"storage": "bf16"},
    "low_rank_fp32": {"storage": "fp32"},
}


def level(device: torch.device, *, peak: bool) -> int:
    """Bytes in use, or their maximum so far: allocated on a GPU, resident on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    field = "VmHWM" if peak else "VmRSS"
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def measure(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """One arm: build, two steps, sums and peak."""
    device = torch.device(args.device)
    before = level(device, peak=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
    )
    model: Any = LlamaForCausalLM(config).to(device)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--scheme", default="W4A16G128")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.arm, args)))
        return
    arms = {}
    for arm in ARMS:
        command = [sys.executable, __file__, "--arm", arm, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        arms[arm] = json.loads(done.stdout.splitlines()[-1])
    print(f"{'arm':16}{'bytes/weight':>14}{'of full':>10}{'peak MB':>10}{'of full':>10}")
    for arm, row in arms.items():
        share, peak = row["total"] / arms["full"]["total"], row["peak_bytes"] / arms["full"]["peak_bytes"]
        print(f"{arm:16}{row['bytes_per_weight']:14.2f}{share:10.3f}{row['peak_bytes'] / 1e6:10.0f}{peak:10.3f}")
    if args.output:
        settings = {k: str(v) for k, v in vars(args).items() if k not in ("output", "arm")}
        machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU"
        result = {"arms": arms, "settings": settings, "machine": machine, "versions": versions()}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
