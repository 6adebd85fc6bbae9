"""Whole models, one token at a time: fewbits.runtime against torch, onnxruntime-genai and llama.cpp, in one run.

    python benchmarks/runtime.py --threads 1 --output benchmarks/results/runtime_1_thread.json

Every engine decodes the same tokens at batch 1 after the same prompt, with a key-value cache. Engines take turns of a
few tokens each, so that a disturbance of the machine meets all of them; the median counts. With one thread the CPU
time of the calling thread is measured (all of these engines compute in it then), with more the wall time. The floor is
the time to read what must be read for a token, packed layers and dense output matrix, at the read bandwidth measured
in between. Weights are random and rounded to nearest: speed does not depend on them.

Load time and memory of the packed model are those of a fresh process: from the exported folder to the runtime model,
against reading the bytes of its file; and the growth of the resident memory against the packed size.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from runtime_kernels import commit, cpu_name
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import Rule, Scheme, prepare
from fewbits.convert import convert
from fewbits.corpora import embedded_model_path
from fewbits.evaluate import versions
from fewbits.export import export
from fewbits.io import write_json
from fewbits.pipeline import quiet_libraries
from fewbits.pretrained import load_model, load_tokenizer
from fewbits.runtime import Decoder, runtime_bytes, to_runtime
from fewbits.targets.genai import GenAI
from fewbits.targets.gguf import GGUF
from fewbits.targets.gguf_contents import FILE
from fewbits.targets.llamacpp import LlamaCpp

PROMPT, TURN, CONTEXT = 16, 8, 512


@dataclass
class Engine:
    """``start()`` takes the prompt in; ``push(token)`` decodes one token and returns when its logits are there."""

    name: str
    start: Callable[[], Any]
    push: Callable[[int], Any]
    times: list[float] = field(default_factory=list)


def smollm2_shape() -> Any:
    """SmolLM2-135M: rows of 576 and 1536 weights, so that llama.cpp's Q2_0 carries most layers, TQ2_0 the rest."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def wide_shape() -> Any:
    """Rows of 1024 and 2816 weights, whole blocks of llama.cpp's TQ2_0; the small vocabulary of the embedded model."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def embedded() -> Any:
    """The model inside the package: 3 layers of 256."""
    return load_model(embedded_model_path())


def rules(bits: str, name: str) -> list[Rule]:
    """Groups of 256 where rows allow it, as llama.cpp's ternary types want."""
    wide = Rule(pattern="*.down_proj", scheme=Scheme.parse(f"{bits}A16G256", rule="absmean"))
    if name == "smollm2":
        return [wide, Rule(pattern="*", scheme=Scheme.parse(f"{bits}A16G64", rule="absmean"))]
    return [Rule(pattern="*", scheme=wide.scheme)]


MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "wide, ternary": (wide_shape, "wide", "W1.58"),
    "SmolLM2-135M, 2 bits": (smollm2_shape, "smollm2", "W2"),
    "embedded, ternary": (embedded, "embedded", "W1.58"),
}


def transformers_engine(name: str, model: Any, prompt: torch.Tensor) -> Engine:
    """The forward pass of transformers with its own cache."""
    state: list[Any] = [None]

    @torch.inference_mode()
    def run(ids: torch.Tensor) -> None:
        state[0] = model(input_ids=ids[None], cache=state[0], use_cache=True, logits_to_keep=1).cache

    def start() -> None:
        state[0] = None
        run(prompt)

    return Engine(name, start, lambda token: run(torch.tensor([token])))


def decoder_engine(name: str, model: Any, prompt: torch.Tensor, threads: int) -> Engine:
    """fewbits.runtime.Decoder."""
    decoder = Decoder(model, CONTEXT, num_threads=threads)
    return Engine(name, lambda: decoder.prefill(prompt), decoder.step)


def llamacpp_engine(name: str, engine: LlamaCpp, prompt: torch.Tensor) -> Engine:
    """llama.cpp, cache in fp32."""

    def start() -> None:
        engine.clear()
        engine.extend(prompt)

    return Engine(name, start, lambda token: engine.extend([token]))


def genai_engine(name: str, folder: Path, prompt: torch.Tensor) -> Engine:
    """onnxruntime-genai; its number of threads stands in the folder's configuration."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    state: list[Any] = [None]

    def start() -> None:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=CONTEXT, do_sample=False)
        state[0] = og.Generator(model, parameters)
        state[0].append_tokens(prompt[None].int().numpy())

    return Engine(name, start, lambda token: state[0].append_tokens([[token]]))


def set_genai_threads(folder: Path, threads: int) -> None:
    """Threads of the session, without spinning."""
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    options = config["model"]["decoder"]["session_options"]
    options["intra_op_num_threads"] = threads
    options["session.force_spinning_stop"] = "1"
    write_json(file, config)


def engines(name: str, folder: Path, threads: int, stack: ExitStack) -> tuple[list[Engine], dict[str, Any]]:
    """All engines of one model, and the facts of its files."""
    make, kind, bits = MODELS[name]
    torch.manual_seed(0)
    model = make()
    tokenizer = load_tokenizer(embedded_model_path())
    if kind == "smollm2":
        from fewbits.smollm2 import smollm2_path

        tokenizer = load_tokenizer(smollm2_path())
    prompt = torch.arange(5, 5 + PROMPT)
    found = [transformers_engine("torch fp32", copy.deepcopy(model), prompt)]
    found.append(transformers_engine("torch bf16", copy.deepcopy(model).to(torch.bfloat16), prompt))
    prepare(model, rules(bits, kind))
    for target in [GGUF(), *([GGUF("tq1_0")] if kind != "smollm2" else []), GGUF("f32")]:
        path = export(model, target, folder / target.name.replace(":", "-"), tokenizer=tokenizer)
        types = "+".join(sorted({t for t, _ in target.choices(model).values()}))
        engine = stack.enter_context(LlamaCpp(path / FILE, num_threads=threads, context_length=CONTEXT))
        found.append(llamacpp_engine(f"llama.cpp {types}", engine, prompt))
    try:
        path = export(model, GenAI(), folder / "genai", tokenizer=tokenizer)
        set_genai_threads(path, threads)
        found.append(genai_engine("onnxruntime-genai 2 bits, int8", path, prompt))
    except (ImportError, ValueError) as error:
        print(f"{name}: no row of onnxruntime-genai: {error}", flush=True)
    convert(model)
    export(model, "hf", folder / "hf")
    exact = to_runtime(copy.deepcopy(model), num_threads=threads)
    rounded = to_runtime(copy.deepcopy(model), num_threads=threads, activations="int8")
    found.append(transformers_engine("fewbits fp32, loop of transformers", exact, prompt))
    found.append(decoder_engine("fewbits fp32", exact, prompt, threads))
    found.append(decoder_engine("fewbits int8", rounded, prompt, threads))
    head = exact.lm_head.weight
    facts = {
        "packed_bytes": runtime_bytes(exact),
        "dense_bytes": sum(p.numel() * p.element_size() for p in exact.parameters()),
        "head_bytes": head.numel() * head.element_size(),
    }
    del model
    gc.collect()
    return found, facts


def measure(found: list[Engine], rounds: int, threads: int) -> float:
    """Decode in turns; returns the read bandwidth in bytes per second."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    buffer, reads = torch.ones(2**26), []
    for engine in found:
        engine.start()
        for token in range(TURN):
            engine.push(20 + token)
        engine.start()
    for r in range(rounds):
        for engine in found:
            for t in range(TURN):
                start = clock()
                engine.push(20 + (r * TURN + t) % 1000)
                engine.times.append(clock() - start)
        start = clock()
        buffer.sum()
        reads.append(clock() - start)
    return buffer.numel() * 4 / statistics.median(reads)


CHILD = """
import gc, json, os, sys, time
from pathlib import Path
import torch
import fewbits.pipeline
from fewbits.pretrained import load_model
from fewbits.runtime import Decoder, runtime_bytes, to_runtime

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS", "VmHWM")}

torch.set_num_threads(1)
fewbits.pipeline.quiet_libraries()
small, folder = sys.argv[1:]
Decoder(to_runtime(load_model(small)), 8).prefill(torch.arange(4))  # imports and kernels are no part of a model
gc.collect()
file = Path(folder) / "model.safetensors"
reads, loads = [], []
for _ in range(5):
    start = time.process_time()
    data = file.read_bytes()
    reads.append(time.process_time() - start)
    del data
before = resident()
start = time.process_time()
model = to_runtime(load_model(folder))
loads.append(time.process_time() - start)
gc.collect()
after = resident()
for _ in range(4):
    start = time.process_time()
    again = to_runtime(load_model(folder))
    loads.append(time.process_time() - start)
    del again
print(json.dumps({"before": before, "after": after, "read_seconds": sorted(reads)[2], "load_seconds": sorted(loads)[2],
                  "file_bytes": file.stat().st_size, "packed_bytes": runtime_bytes(model)}))
"""


def loading(folder: Path, small: Path) -> dict[str, Any]:
    """Load time and memory in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(small), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(found: list[Engine], facts: dict[str, Any], bandwidth: float) -> tuple[list[str], list[dict[str, Any]]]:
    """Markdown and plain data."""
    floor = (facts["packed_bytes"] + facts["head_bytes"]) / bandwidth
    reference = next(e for e in found if e.name.startswith("llama.cpp") and "F32" not in e.name)
    base = statistics.median(reference.times)
    lines = [
        f"| engine | ms a token | tokens a second | against {reference.name} |", "|---|--:|--:|--:|",
    ]  # fmt: skip
    data = []
    for engine in found:
        seconds, quartiles = statistics.median(engine.times), statistics.quantiles(engine.times, n=4)
        lines.append(f"| {engine.name} | {seconds * 1e3:.2f} | {1 / seconds:.0f} | {base / seconds:.2f} |")
        data.append({"name": engine.name, "median_seconds": seconds, "quartiles_seconds": [quartiles[0], quartiles[2]],
                     "minimum_seconds": min(engine.times), "tokens": len(engine.times)})  # fmt: skip
    lines.append(f"| bandwidth floor of the packed model | {floor * 1e3:.2f} | {1 / floor:.0f} | {base / floor:.2f} |")
    return lines, data


def each_model(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure model after model."""
    with tempfile.TemporaryDirectory() as top:
        small = Path(top) / "small"
        export(convert(prepare(embedded(), rules("W2", "embedded"))), "hf", small)
        for index, name in enumerate(args.models):
            with ExitStack() as stack:
                folder = Path(top) / str(index)
                folder.mkdir()
                found, facts = engines(name, folder, args.threads, stack)
                load = os.getloadavg()[0]
                bandwidth = measure(found, args.rounds, args.threads)
                lines, data = table(found, facts, bandwidth)
                facts |= {"loading": loading(folder / "hf", small), "load_before": load, "bandwidth": bandwidth}
                print(f"\n{name}, {args.threads} thread(s), read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
                print("\n".join(lines) + "\n" + loading_line(facts), flush=True)
                yield {"model": name, "engines": data, **facts}


def loading_line(facts: dict[str, Any]) -> str:
    """Memory and load time, as text."""
    found = facts["loading"]
    held, ideal = found["after"]["VmRSS"] - found["before"]["VmRSS"], facts["packed_bytes"] + facts["dense_bytes"]
    return (
        f"\npacked {facts['packed_bytes'] / 1e6:.1f} MB, dense {facts['dense_bytes'] / 1e6:.1f} MB, together "
        f"{ideal / 1e6:.1f} MB; resident memory grew by {held / 1e6:.1f} MB ({held / ideal:.3f} of it); loading "
        f"{found['load_seconds'] * 1e3:.0f} ms, reading the file's {found['file_bytes'] / 1e6:.1f} MB "
        f"{found['read_seconds'] * 1e3:.0f} ms ({found['load_seconds'] / found['read_seconds']:.1f} times)"
    )


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    results = list(each_model(args))
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        write_json(args.output, {"commit": commit(), "cpu": cpu_name(), "versions": versions(), "settings": settings,
                                 "results": results})  # fmt: skip


if __name__ == "__main__":
    main()
