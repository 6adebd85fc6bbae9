"""Cost of a QAT step against a full-precision step of the same model, as ratios within one run.

    python benchmarks/step_time.py --hidden 512 --layers 4 --tokens 2048 --output benchmarks/results/step_time.json

Arms are interleaved (one step of each, then again), and the median of the repeats counts. ``refresh`` is the cost of
one JacQuant refresh; its share of a step is that divided by the interval. State is what a surrogate keeps per weight.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import Rule, Scheme, prepare
from fewbits.convert import owned_layers
from fewbits.evaluate import versions
from fewbits.surrogates import STE, ClippedSTE, JacQuant, StableQAT
from fewbits.training.callback import refresh_generator

ARMS: dict[str, Any] = {
    "fp": None,
    "ste": STE(),
    "clipped_ste": ClippedSTE(),
    "stableqat": StableQAT(),
    "jacquant": JacQuant(),
}


def build(args: argparse.Namespace, device: torch.device) -> Any:
    """A random Llama of the shape that the flags ask for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate or 3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=args.block,
    )
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return LlamaForCausalLM(config).to(device, dtype)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def one_step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, device: torch.device) -> float:
    """Seconds of forward, backward and optimizer step."""
    synchronize(device)
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize(device)
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All arms in one process."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    base = build(args, device)
    ids = torch.randint(0, args.vocab, (args.tokens // args.block, args.block), device=device)
    models, optimizers = {}, {}
    for name, surrogate in ARMS.items():
        models[name] = copy.deepcopy(base)
        if surrogate is not None:
            prepare(models[name], Rule(scheme=Scheme.parse(args.scheme, rule="gaussian"), surrogate=surrogate))
        optimizers[name] = torch.optim.AdamW(models[name].parameters(), lr=1e-4)
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for repeat in range(args.repeats + 1):
        for name in ARMS:
            seconds = one_step(models[name], optimizers[name], ids, device)
            if repeat:  # the first round warms up
                times[name].append(seconds)
    layers = list(owned_layers(models["jacquant"]))
    refreshes = []
    for step in range(3):
        synchronize(device)
        start = time.perf_counter()
        for name, layer in layers:
            generator = refresh_generator(0, name, step)
            layer.surrogate.refresh_(layer.state(), layer.latent(), layer.raw_scale(), layer.scheme, generator)
        synchronize(device)
        refreshes.append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    weights = sum(layer.weight.numel() for _, layer in layers)
    state = sum(t.numel() for _, layer in layers for t in layer.state().values())
    return {
        "median_seconds": median,
        "ratio_to_fp": {
            name: statistics.median(a / b for a, b in zip(t, times["fp"], strict=True)) for name, t in times.items()
        },
        "jacquant_to_clipped_ste": statistics.median(
            a / b for a, b in zip(times["jacquant"], times["clipped_ste"], strict=True)
        ),
        "refresh_seconds": statistics.median(refreshes),
        "refresh_share_of_a_step": statistics.median(refreshes) / 100 / median["clipped_ste"],
        "quantized_weights": weights,
        "state_per_weight": state / weights,
    }


def peak_memory(arm: str, argv: list[str]) -> int:
    """Peak resident bytes (CPU, Linux) or allocated bytes (GPU) of two steps of one arm, in its own process."""
    command = [sys.executable, __file__, "--memory-of", arm, *argv]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory_of(args: argparse.Namespace) -> int:
    """Body of the process that :func:`peak_memory` starts."""
    device = torch.device(args.device)
    model = build(args, device)
    surrogate = ARMS[args.memory_of]
    if surrogate is not None:
        prepare(model, Rule(scheme=Scheme.parse(args.scheme, rule="gaussian"), surrogate=surrogate))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, args.vocab, (args.tokens // args.block, args.block), device=device)
    for _ in range(2):
        one_step(model, optimizer, ids, device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # not ru_maxrss: a child starts with its parent's; VmHWM is that of this program alone
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--scheme", default="W2A16G128")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=list(ARMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory_of(args))
        return
    result = measure(args)
    result["peak_bytes"] = {arm: peak_memory(arm, sys.argv[1:]) for arm in ARMS}
    result["settings"] = {k: str(v) for k, v in vars(args).items() if k not in ("output", "memory_of")}
    result["versions"] = versions()
    result["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if args.device.startswith("cuda"):
        result["machine"] = torch.cuda.get_device_name()
    print(f"{'arm':14}{'ms':>10}{'ratio to fp':>14}{'peak MB':>10}")
    for arm in ARMS:
        peak = result["peak_bytes"][arm] / 1e6
        print(f"{arm:14}{result['median_seconds'][arm] * 1e3:10.1f}{result['ratio_to_fp'][arm]:14.3f}{peak:10.0f}")
    ratio, state = result["jacquant_to_clipped_ste"], result["state_per_weight"]
    print(f"jacquant / clipped_ste {ratio:.4f}; state per weight {state:.5f}")
    refresh, share = result["refresh_seconds"] * 1e3, result["refresh_share_of_a_step"]
    print(f"refresh {refresh:.1f} ms, every 100 steps: {share:.2%} of a step")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
