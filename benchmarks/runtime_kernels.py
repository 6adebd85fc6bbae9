"""One linear layer from packed memory against torch and onnxruntime: time, memory, error, in one run.

    python benchmarks/runtime_kernels.py --threads 1 --output benchmarks/results/runtime_kernels.json

Every case owns so many copies of its weight that more than 100 MB pass between two uses of one copy (from memory, not
from the cache, as in a model), and cases are interleaved: a few calls of each, then again. The median counts. With one
thread the CPU time of the calling thread is measured, which other processes disturb less; with more, wall time. The
floor is the time to read the packed bytes at the read bandwidth measured in between (sum of a 256 MB tensor).
Errors are relative to the product in float64 with the case's own weight (norm over norm).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from fewbits.evaluate import versions
from fewbits.grids import Codebook
from fewbits.nn import QuantizedLinear
from fewbits.qtensor import QTensor
from fewbits.runtime.packed import Activations, KernelName, PackedWeight
from fewbits.scheme import Scheme

CYCLE_BYTES = 110e6
CALLS = 4  # of one case before the next one's turn

OURS = [
    ("1 bit", "W1", "binary"),
    ("1.58 bit", "W1.58", "ternary in 2 bits"),
    ("2 bit", "W2", "int"),
    ("2 bit half-shifted", "W2H", "SEQ, QuEST"),
    ("2 bit codebook", "W2K", "4 free levels"),
    ("3 bit", "W3", "int"),
    ("3 bit codebook", "W3K", "8 free levels"),
    ("4 bit", "W4", "int"),
    ("4 bit codebook", "W4K", "16 free levels"),
]


@dataclass
class Case:
    """One row of the table: ``calls[i]()`` computes with copy i and returns ``(tokens, rows)``."""

    name: str
    activations: str
    calls: list[Callable[[], Any]]
    num_bytes: int
    exact: torch.Tensor
    times: list[float] = field(default_factory=list)
    error: float = 0.0


def more(num_bytes: float) -> int:
    """Further copies of a weight, so that together they are more than any cache holds."""
    return max(1, int(CYCLE_BYTES // num_bytes))


def random_layer(scheme: Scheme, rows: int, width: int) -> QuantizedLinear:
    """Random codes and scales; the weights have a deviation of about 0.02."""
    generator = torch.Generator().manual_seed(0)
    grid = scheme.grid
    codes = torch.randint(0, len(grid.levels), (rows, width), generator=generator) + grid.qmin
    raw = torch.rand(scheme.scale.view((rows, width)).scale_shape, generator=generator) + 0.5
    scale = (0.02 * raw).to(torch.bfloat16).float()
    layer = QuantizedLinear(scheme, (rows, width), torch.float32)
    layer.load_qtensor_(QTensor(codes.to(grid.code_dtype), scale, scheme))
    return layer


def our_cases(args: argparse.Namespace, x: torch.Tensor, kernel: KernelName) -> list[Case]:
    """fp32 and int8 activations of every grid."""
    cases = []
    for name, text, _ in OURS:
        scheme = Scheme.parse(f"{text}G{args.group}", mode="frozen")
        layer = random_layer(scheme, args.rows, args.width)
        exact = x.double() @ layer.weight.double().t()
        for activations in get_args(Activations):
            if activations == "int8" and isinstance(scheme.grid, Codebook):
                continue
            copies = [PackedWeight(layer, activations=activations, kernel=kernel)]
            num_bytes = copies[0].num_bytes
            copies += [PackedWeight(layer, activations=activations, kernel=kernel) for _ in range(more(num_bytes))]
            calls = [lambda p=p: p.linear(x, args.threads) for p in copies]
            cases.append(Case(f"fewbits {copies[0].kernel}, {name}", activations, calls, num_bytes, exact))
    return cases


def torch_cases(args: argparse.Namespace, x: torch.Tensor) -> list[Case]:
    """``F.linear`` on dense weights; bf16 activations with bf16 weights."""
    layer = random_layer(Scheme.parse(f"W2G{args.group}", mode="frozen"), args.rows, args.width)
    exact = x.double() @ layer.weight.double().t()
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        w = layer.weight.to(dtype)
        num_bytes = w.numel() * w.element_size()
        weights = [w.clone() for _ in range(1 + more(num_bytes))]
        calls = [lambda w=w: torch.nn.functional.linear(x.to(w.dtype), w) for w in weights]
        name = str(dtype).removeprefix("torch.")
        cases.append(Case(f"torch {name}", name, calls, num_bytes, exact))
    return cases


def onnxruntime_cases(args: argparse.Namespace, x: torch.Tensor) -> list[Case]:
    """2-bit ``MatMulNBits`` with int8 activations, plain and with the table look-up kernel."""
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        print("onnxruntime or onnx is not installed (pip install 'fewbits[onnx]'): its rows are left out")
        return []
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    scheme = Scheme.parse(f"W2G{args.group}", mode="frozen")
    layer, groups = random_layer(scheme, args.rows, args.width), args.width // args.group
    exact, feed = x.double() @ layer.weight.double().t(), {"x": x.numpy()}
    num_bytes = layer.weight_packed.numel() + 4 * args.rows * groups

    def session(lut: bool) -> Any:
        blocks = layer.weight_packed.view(args.rows, groups, args.group // 4).numpy()
        scales = layer.weight_scale.float().view(-1).numpy()
        node = helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=args.width, N=args.rows, bits=2,
            block_size=args.group, accuracy_level=4,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(x), args.width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), args.rows])],
            [numpy_helper.from_array(blocks, "b"), numpy_helper.from_array(scales, "s")],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        options.log_severity_level = 3
        # the threads of dozens of sessions must not spin while another case is timed
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if lut:
            options.add_session_config_entry("mlas.use_lut_gemm", "1")
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    cases = []
    for name, lut in (("onnxruntime 2 bit", False), ("onnxruntime 2 bit, look-up table", True)):
        sessions = [session(lut) for _ in range(1 + more(num_bytes))]
        calls = [lambda s=s: s.run(None, feed)[0] for s in sessions]
        cases.append(Case(name, "int8", calls, num_bytes, exact))
    return cases


def measure(cases: list[Case], rounds: int, threads: int) -> float:
    """Fill in the times of all cases, interleaved; returns the read bandwidth in bytes per second."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    buffer = torch.ones(2**26)
    reads = []
    for case in cases:
        y = torch.as_tensor(case.calls[0]())
        case.error = float((y.double() - case.exact).norm() / case.exact.norm())
    for r in range(rounds):
        for case in cases:
            for c in range(CALLS):
                call = case.calls[(r * CALLS + c) % len(case.calls)]
                start = clock()
                call()
                case.times.append(clock() - start)
        start = clock()
        buffer.sum()
        reads.append(clock() - start)
    return buffer.numel() * 4 / statistics.median(reads)


def cpu_name() -> str:
    """Model name from /proc/cpuinfo, empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{named.get('model name', '')} (family {named.get('cpu family', '?')}, model {named.get('model', '?')})"


def commit() -> str:
    """Commit of the sources, with ``+`` where files of the package have changed since."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "fewbits/runtime") else "")


def table(cases: list[Case], bandwidth: float) -> tuple[str, list[dict[str, Any]]]:
    """Markdown and plain data, in the order of the cases."""
    base = statistics.median(cases[0].times)
    lines = [
        "| layer | activations | MB | ms | floor ms | times the floor | against torch fp32 | relative error |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    data = []
    for case in cases:
        seconds, floor = statistics.median(case.times), case.num_bytes / bandwidth
        cells = [case.name, case.activations, f"{case.num_bytes / 1e6:.1f}", f"{seconds * 1e3:.3f}"]
        cells += [f"{floor * 1e3:.3f}", f"{seconds / floor:.1f}", f"{base / seconds:.1f}x", f"{case.error:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
        quartiles = statistics.quantiles(case.times, n=4)
        data.append(
            {
                "name": case.name, "activations": case.activations, "bytes": case.num_bytes, "median_seconds": seconds,
                "quartiles_seconds": [quartiles[0], quartiles[2]], "minimum_seconds": min(case.times),
                "floor_seconds": floor, "relative_error": case.error, "calls": len(case.times),
            }
        )  # fmt: skip
    return "\n".join(lines), data


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kernels", nargs="+", default=["auto", "avx2"], help="auto, avx512, avx2, portable")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(args.batch, args.width, generator=torch.Generator().manual_seed(1))
    cases = torch_cases(args, x) + onnxruntime_cases(args, x)
    for kernel in args.kernels:
        cases += our_cases(args, x, kernel)
    load = os.getloadavg()[0]
    with torch.inference_mode():
        bandwidth = measure(cases, args.rounds, args.threads)
    markdown, data = table(cases, bandwidth)
    heading = (
        f"{args.rows} x {args.width}, groups of {args.group}, batch {args.batch}, {args.threads} thread(s); "
        f"{cpu_name()}; read bandwidth {bandwidth / 1e9:.1f} GB/s; commit {commit()}"
    )
    print(heading, markdown, sep="\n\n")
    if args.output:
        result = {
            "commit": commit(), "cpu": cpu_name(), "versions": versions(), "load_before": load,
            "bandwidth_bytes_per_second": bandwidth, "cases": data,
            "settings": {k: v for k, v in vars(args).items() if k != "output"},
        }  # fmt: skip
        args.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, args.output)


if __name__ == "__main__":
    main()
