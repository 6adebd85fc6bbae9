"""Peak memory of a zeroth-order step against inference and against backpropagation, each in a process of its own.

    python benchmarks/zeroth_order_memory.py --output benchmarks/results/zeroth_order_memory.json

Peaks are VmHWM on a CPU (allocated bytes on a GPU) over two steps, less the level before the model is built; the arms
run the same prepared model on the same tokens. The aim of the zeroth order: at most 1.1 of inference.
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
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import Rule, Scheme, prepare
from fewbits.evaluate import versions
from fewbits.optim import parameter_groups
from fewbits.optim.zeroth_order import ZerothOrder, build_zeroth_order

ARMS = ("inference", "zeroth_order", "backprop_sgd", "backprop_adamw")


def level(device: torch.device, *, peak: bool) -> int:
    """Bytes in use, or their maximum so far: allocated on a GPU, resident on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    field = "VmHWM" if peak else "VmRSS"
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def measure(arm: str, args: argparse.Namespace) -> int:
    """Peak bytes of one arm."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--scheme", default="W2A16G128")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(measure(args.arm, args))
        return
    peaks = {}
    for arm in ARMS:
        command = [sys.executable, __file__, "--arm", arm, *sys.argv[1:]]
        peaks[arm] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    ratios = {arm: peak / peaks["inference"] for arm, peak in peaks.items()}
    print(f"{'arm':16}{'peak MB':>10}{'of inference':>14}")
    for arm, peak in peaks.items():
        print(f"{arm:16}{peak / 1e6:10.0f}{ratios[arm]:14.3f}")
    if args.output:
        settings = {k: str(v) for k, v in vars(args).items() if k not in ("output", "arm")}
        machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU"
        result = {"peak_bytes": peaks, "ratio": ratios, "settings": settings, "machine": machine}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**result, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
