"""SmolLM2-135M at 2 and 1.58 bits: the same greedy text from fewbits.runtime, llama.cpp and onnxruntime, or why not.

    python benchmarks/smollm2_engines.py --output benchmarks/results/smollm2_engines.json

Every linear layer is quantized and trained for a few steps, so that the logits are those of a language model, if a
poor one. The model is written as GGUF (the types are chosen by fewbits) and as ONNX with ``MatMulNBits``; each engine
continues some prompts greedily. Engines that round activations to int8 can take another token than the fp32 reference
where two logits are close. At the first such token, on the same prefix, this measures: the reference's lead of its
token over the engine's; how far the engine's logits are from the reference's; and how far they are from our model with
the engine's own rounding put in. A control without any rounding (llama.cpp on fp32 weights) must give the same text.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fewbits import Rule, Scheme, prepare
from fewbits.convert import convert, qat_layers
from fewbits.evaluate import versions
from fewbits.export import export
from fewbits.io import write_json
from fewbits.pipeline import quiet_libraries
from fewbits.pretrained import load_model, load_tokenizer
from fewbits.runtime import describe, to_runtime
from fewbits.smollm2 import smollm2_path
from fewbits.targets.gguf import GGUF
from fewbits.targets.gguf_contents import FILE
from fewbits.targets.llamacpp import LlamaCpp
from fewbits.targets.onnx import ONNX
from fewbits.targets.onnx_graph import with_accuracy
from fewbits.testing.ggml_activations import engine_rounding

Logits = NDArray[np.float32]
TOPICS = ("assert", "break")
PROMPTS = ('The "assert" statement', "Once upon a time there was a small dog who")
REFERENCE = "fewbits fp32"
CONTROLS = ("fewbits fake-quantized", "llama.cpp F32", "onnxruntime fp32 activations")
"""Engines whose arithmetic differs from the reference's by the order of sums only."""


@dataclass
class Engine:
    """``start(prompt)`` and ``push(token)`` give the logits of the next token."""

    start: Callable[[list[int]], Logits]
    push: Callable[[int], Logits]


def lesson(tokenizer: Any, length: int = 96) -> torch.Tensor:
    """The beginnings of two entries of Python's language reference, ``(2, length)``."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return torch.tensor([tokenizer(topics[name])["input_ids"][:length] for name in TOPICS])


def train(model: nn.Module, bits: str, tokenizer: Any, *, steps: int) -> list[float]:
    """A short quantization-aware training that learns two texts by heart; the loss of every step.

    Rounding to nearest leaves a model that repeats one token; learning by heart is the cheapest way to one whose
    logits say something, with wide margins on these texts and narrow ones elsewhere.
    """
    prepare(model, [
        Rule(pattern="*.down_proj", scheme=Scheme.parse(f"{bits}A16G256")),  # 1536 weights a row: TQ2_0
        Rule(pattern="*", scheme=Scheme.parse(f"{bits}A16G64")),  # 576 a row: Q2_0
    ])  # fmt: skip
    ids = lesson(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 5) * (1 - step / steps)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def torch_engine(model: Any) -> Engine:
    """Any transformers model, with its key-value cache."""
    cache: list[Any] = [None]

    @torch.inference_mode()
    def run(ids: list[int]) -> Logits:
        output = model(input_ids=torch.tensor([ids]), cache=cache[0], use_cache=True)
        cache[0] = output.past_key_values
        return output.logits[0, -1].numpy()

    def start(prompt: list[int]) -> Logits:
        cache[0] = None
        return run(prompt)

    return Engine(start, lambda token: run([token]))


def llamacpp_engine(engine: LlamaCpp) -> Engine:
    """llama.cpp with its cache, keys and values in fp32."""

    def start(prompt: list[int]) -> Logits:
        engine.clear()
        return engine.extend(prompt).copy()

    return Engine(start, lambda token: engine.extend([token]).copy())


@contextmanager
def onnx_engine(folder: Path, accuracy_level: int) -> Iterator[Engine]:
    """The graph has no cache: the whole sequence is computed for each token."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with with_accuracy(folder, accuracy_level) as path:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids: list[int] = []

    def run() -> Logits:
        return session.run(["logits"], {"input_ids": np.array([ids], dtype=np.int64)})[0][0, -1]

    def start(prompt: list[int]) -> Logits:
        ids[:] = prompt
        return run()

    def push(token: int) -> Logits:
        ids.append(token)
        return run()

    yield Engine(start, push)


def greedy(engine: Engine, prompt: list[int], num_tokens: int) -> list[int]:
    """Exactly so many tokens; the end-of-text token is one like any other."""
    tokens: list[int] = []
    logits = engine.start(prompt)
    while len(tokens) < num_tokens:
        tokens.append(int(logits.argmax()))
        logits = engine.push(tokens[-1])
    return tokens


@contextmanager
def rounded_like(model: nn.Module, types: dict[str, str]) -> Iterator[None]:
    """Our fake-quantized model with llama.cpp's rounding of the activations of every layer."""

    def hook(name: str) -> Callable[..., Any]:
        return lambda _, inputs: (engine_rounding(inputs[0], types[name]), *inputs[1:])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in qat_layers(model)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def top_two(logits: Logits) -> dict[str, Any]:
    """The two likeliest tokens and the distance of their logits."""
    second, first = np.argsort(logits)[-2:].tolist()
    return {"tokens": [first, second], "margin": float(logits[first] - logits[second])}


def compare(
    ours: list[int], theirs: list[int], prompt: list[int], reference: Engine, engine: Engine, emulated: Engine | None
) -> dict[str, Any]:
    """Equal, or the first token that differs and both engines' logits of that position."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if same is None:
        return {"equal": True}
    prefix = prompt + ours[:same]
    a, b = reference.start(prefix), engine.start(prefix)
    result: dict[str, Any] = {
        "equal": False,
        "first_difference": same,
        "tokens": [ours[same], theirs[same]],
        "our_top_two": top_two(a),
        "engine_top_two": top_two(b),
        "lead": float(a[ours[same]] - a[theirs[same]]),
        "moved": float((a - b)[ours[same]] - (a - b)[theirs[same]]),
        "rms_logit_difference": float(np.sqrt(np.mean((a - b) ** 2))),
        "max_logit_difference": float(np.abs(a - b).max()),
    }
    if emulated is not None:
        c = emulated.start(prefix)
        result["emulated"] = {
            "token": int(c.argmax()),
            "margin": top_two(c)["margin"],
            "rms_logit_difference": float(np.sqrt(np.mean((c - b) ** 2))),
            "max_logit_difference": float(np.abs(c - b).max()),
        }
    return result


def run_bits(bits: str, folder: Path, *, steps: int, num_tokens: int) -> dict[str, Any]:
    """Train, export, decode and compare at one bit width."""
    source = smollm2_path()
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source)
    losses = train(model, bits, tokenizer, steps=steps)
    print(
        f"{bits}: trained {steps} steps, loss {losses[0]:.2f} to {sum(losses[-5:]) / len(losses[-5:]):.2f}", flush=True
    )
    gguf, control, onnx = GGUF(), GGUF("f32"), ONNX()
    targets = (gguf, control, onnx)
    paths = [export(model, t, folder / t.name.replace(":", "-"), tokenizer=tokenizer) for t in targets]
    types = {name: kind for name, (kind, _) in gguf.choices(model).items()}
    runtimes = {
        REFERENCE: to_runtime(convert(load_copy(model))),
        "fewbits int8": to_runtime(convert(load_copy(model)), activations="int8"),
    }
    print(describe(runtimes[REFERENCE]), flush=True)
    with ExitStack() as stack:
        engines = {name: torch_engine(m) for name, m in runtimes.items()}
        engines["fewbits fake-quantized"] = torch_engine(model)
        for name, path in (
            ("llama.cpp F32", paths[1]),
            ("llama.cpp " + "+".join(sorted(set(types.values()))), paths[0]),
        ):
            engines[name] = llamacpp_engine(stack.enter_context(LlamaCpp(path / FILE, context_length=256)))
        for name, level in (("fp32 activations", 0), ("int8 activations", 4)):
            engines[f"onnxruntime {name}"] = stack.enter_context(onnx_engine(paths[2], level))
        rows: dict[str, Any] = {name: {"prompts": []} for name in engines}
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            texts = {}
            for name, engine in engines.items():
                start = time.perf_counter()
                texts[name] = greedy(engine, ids, num_tokens)
                rows[name].setdefault("seconds", []).append(round(time.perf_counter() - start, 2))
            ours = texts[REFERENCE]
            print(f"  {prompt!r} -> {tokenizer.decode(ours)!r}", flush=True)
            for name, engine in engines.items():
                emulate = name.startswith("llama.cpp") and "F32" not in name
                with rounded_like(model, types) if emulate else ExitStack():
                    own = torch_engine(model) if emulate else None
                    row = compare(ours, texts[name], ids, engines[REFERENCE], engine, own)
                rows[name]["prompts"].append({"prompt": prompt, "text": tokenizer.decode(texts[name]), **row})
                print(f"    {name}: {summary(row)}", flush=True)
    return {
        "bits": bits,
        "steps": steps,
        "losses": [losses[0], losses[-1]],
        "num_tokens": num_tokens,
        "types": types,
        "file_bytes": {t.name: folder_bytes(path) for t, path in zip(targets, paths, strict=True)},
        "engines": rows,
    }


def folder_bytes(folder: Path) -> int:
    """Of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def load_copy(model: Any) -> Any:
    """An independent copy of a prepared model."""
    import copy

    return copy.deepcopy(model)


def summary(row: dict[str, Any]) -> str:
    """One line."""
    if row["equal"]:
        return "the same text"
    text = (
        f"token {row['first_difference']} differs: the reference leads by {row['lead']:.3g}, the engine's logits are "
        f"{row['rms_logit_difference']:.2g} (rms) and {row['max_logit_difference']:.2g} (max) away"
    )
    if "emulated" in row:
        text += f"; with its rounding put into our model {row['emulated']['rms_logit_difference']:.2g} (rms)"
    return text


def check(result: dict[str, Any]) -> list[str]:
    """What must hold and does not: controls equal, every difference explained by the engine's arithmetic."""
    faults = []
    for name, found in result["engines"].items():
        for row in found["prompts"]:
            where = f"{result['bits']}, {name}, {row['prompt']!r}"
            if row["equal"]:
                continue
            if name in CONTROLS:
                faults.append(f"{where}: a control differs: {summary(row)}")
            elif row["our_top_two"]["margin"] > 2 * row["max_logit_difference"]:
                faults.append(f"{where}: the lead is larger than what the logits differ by: {summary(row)}")
            elif set(row["tokens"]) != set(row["our_top_two"]["tokens"]):
                faults.append(f"{where}: the engine took neither of the two likeliest tokens")
    return faults


def main() -> None:
    """Parse, run, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", default=["W2", "W1.58"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    for bits in args.bits:
        with tempfile.TemporaryDirectory() as folder:
            results.append(run_bits(bits, Path(folder), steps=args.steps, num_tokens=args.tokens))
    if args.output:
        write_json(args.output, {"versions": versions(), "results": results})
    if faults := [fault for result in results for fault in check(result)]:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
