"""What the memory benchmarks share: one process per arm, its peak above the level before, one model shape, one file."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.evaluate import versions


def level(device: torch.device, *, peak: bool) -> int:
    """Bytes in use, or their maximum so far: allocated on a GPU, resident on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    field = "VmHWM" if peak else "VmRSS"
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def parser(doc: str | None, arms: Iterable[str], *, batch: int, scheme: str) -> argparse.ArgumentParser:
    """Options of the model's shape; ``--arm`` is for the processes of :func:`run_arms`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 1024, "layers": 6, "vocab": 512, "batch": batch, "block": 128}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--scheme", default=scheme)
    made.add_argument("--device", default="cpu")
    made.add_argument("--output", type=Path)
    made.add_argument("--arm", choices=list(arms), help=argparse.SUPPRESS)
    return made


def llama(args: argparse.Namespace) -> Any:
    """The seeded model of these options, heads of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
    )
    return LlamaForCausalLM(config).to(args.device)


def run_arms(script: str, arms: Iterable[str]) -> dict[str, Any]:
    """What each arm prints in its last line, as JSON, each run in a process of its own with the same options."""
    found = {}
    for arm in arms:
        command = [sys.executable, script, "--arm", arm, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[arm] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The result with settings, machine and versions, if ``--output`` asks for it."""
    if args.output is None:
        return
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("output", "arm")}
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU"
    result = {**result, "settings": settings, "machine": machine, "versions": versions()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
