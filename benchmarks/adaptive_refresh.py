"""What a refresh by drift or by flips saves against a fixed interval, at equal steps on the embedded model.

    python benchmarks/adaptive_refresh.py --output benchmarks/results/adaptive_refresh.json

Every arm is JacQuant's recommended preset at W2G64 with the same start, data and schedule; a fixed arm refreshes every
``interval`` steps, an adaptive one looks as often and refreshes a layer if it has moved. Costs are processor seconds of
one thread, so that other work on the machine does not count: one refresh of all layers, one look at all layers, what
the gain adds to the backward passes of one step, and a step. The predicted overhead is
``(refreshes * c_refresh + looks * c_look) / (steps * T) + c_apply / T``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from fewbits import prepare
from fewbits.checkpoint import load_model, load_tokenizer
from fewbits.convert import owned_layers
from fewbits.evaluate import evaluate, versions
from fewbits.io import write_json
from fewbits.pipeline import load_blocks, model_source, training_arguments, training_settings
from fewbits.recipe import Recipe
from fewbits.surrogates import STE, JacQuant
from fewbits.training import QATTrainer
from fewbits.training.callback import refresh_generator

ARMS: dict[str, dict[str, Any]] = {
    "fixed": {"refresh": "interval"},
    "fixed, four times as rare": {"refresh": "interval"},
    "drift": {"refresh": "drift"},
    "flips": {"refresh": "flips"},
}


class StepSeconds(TrainerCallback):
    """Processor seconds of the steps, refreshes and looks left out."""

    def __init__(self) -> None:
        self._start = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock starts."""
        self._start = time.process_time()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """It stops before any refresh."""
        self.seconds.append(time.process_time() - self._start)


def counted(surrogate_refresh: Callable[..., Any], counts: list[int]) -> Callable[..., Any]:
    """The method with a tally of its calls."""

    def refresh(*args: Any, **kwargs: Any) -> Any:
        counts[0] += 1
        return surrogate_refresh(*args, **kwargs)

    return refresh


def recipe_of(args: argparse.Namespace, name: str, seed: int) -> Recipe:
    """Of one arm."""
    interval = args.interval * (4 if "rare" in name else 1)
    surrogate = {"name": "jacquant", "interval": interval, "check_interval": args.interval, **ARMS[name]}
    fields = {
        "rules": [{"scheme": args.scheme, "surrogate": surrogate}],
        "data": {"block_size": args.block, "eval_tokens": args.eval_tokens},
        "train": {
            "max_steps": args.steps,
            "batch_size": args.batch,
            "learning_rate": args.lr,
            "warmup_steps": args.steps // 20,
            "logging_steps": args.steps,
            "telemetry_interval": args.steps,
        },
        "seed": seed,
    }
    return Recipe.model_validate(fields)


def seconds_of(action: Callable[[], Any], repeats: int = 7) -> float:
    """Median processor seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return statistics.median(times)


def costs(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Processor seconds of one refresh of, one look at, and one application of the gain to all layers."""
    prepared = prepare(copy.deepcopy(model), [rule.build() for rule in recipe.rules])
    layers = [layer for _, layer in owned_layers(prepared)]

    def each(act: Callable[[JacQuant, dict[str, torch.Tensor], Any], Any]) -> Callable[[], None]:
        def run() -> None:
            for layer in layers:
                assert isinstance(layer.surrogate, JacQuant)
                act(layer.surrogate, layer.state(), layer)

        return run

    grads = {id(layer): torch.randn(layer.latent().shape) for layer in layers}
    identity = STE()
    refresh = each(
        lambda s, state, x: s.refresh_(state, x.latent(), x.raw_scale(), x.scheme, refresh_generator(0, "x", 1))
    )
    refresh()  # a look before the first refresh answers without looking
    step = layers[0].surrogate.check_interval  # type: ignore[attr-defined]
    look = each(lambda s, state, x: s.is_due(step, state, x.latent(), x.raw_scale(), x.scheme))
    with_gain = each(lambda s, state, x: s.pullback(grads[id(x)], None, x.scheme.grid, state))
    without = each(lambda s, state, x: identity.pullback(grads[id(x)], None, x.scheme.grid, {}))
    return {
        "c_refresh": seconds_of(refresh),
        "c_look": seconds_of(look),
        "c_apply": seconds_of(with_gain) - seconds_of(without),
    }


def run_arm(args: argparse.Namespace, name: str, seed: int, model: nn.Module, data: Any) -> dict[str, Any]:
    """Train one arm; refreshes per layer, looks, seconds of a step and the score on held-out text."""
    recipe = recipe_of(args, name, seed)
    student = prepare(copy.deepcopy(model), [rule.build() for rule in recipe.rules])
    calls, counter = [0], StepSeconds()
    original = JacQuant.refresh_
    JacQuant.refresh_ = counted(original, calls)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = QATTrainer(
                student,
                training_arguments(recipe, Path(folder), quiet=True),
                teacher=copy.deepcopy(model),
                settings=training_settings(recipe),
                train_dataset=data[0],
                callbacks=[counter],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    finally:
        JacQuant.refresh_ = original  # type: ignore[method-assign]
    score = evaluate(student.eval(), data[1], teacher=model)
    layers = list(owned_layers(student))
    gains = [layer.surrogate.gain(layer.state()).mean() for _, layer in layers]  # type: ignore[attr-defined]
    return {
        "arm": name,
        "seed": seed,
        "refreshes_per_layer": calls[0] / len(layers),
        "looks": 0 if ARMS[name]["refresh"] == "interval" else args.steps // args.interval,
        "seconds_per_step": statistics.median(counter.seconds[1:]),
        "loss": score.loss,
        "kl_to_teacher": score.kl_to_teacher,
        "gain_mean": float(torch.stack(gains).mean()),
    }


def summary(rows: list[dict[str, Any]], cost: dict[str, dict[str, float]], steps: int) -> list[dict[str, Any]]:
    """One row per arm: means over seeds, standard deviation of the loss, and the shares of the time of a step."""
    result = []
    step = statistics.median(row["seconds_per_step"] for row in rows)
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        c = cost[name]
        num = statistics.mean(row["refreshes_per_layer"] for row in mine)
        losses = [row["loss"] for row in mine]
        result.append(
            {
                "arm": name,
                "refreshes_per_layer": num,
                "refresh_share": num * c["c_refresh"] / (steps * step),
                "look_share": mine[0]["looks"] * c["c_look"] / (steps * step),
                "apply_share": c["c_apply"] / step,
                "loss_mean": statistics.mean(losses),
                "loss_sd": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                "gain_mean": statistics.mean(row["gain_mean"] for row in mine),
                **c,
            }
        )
    return result


def main() -> None:
    """Run all arms and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="W2G64")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--interval", type=int, default=5, help="steps between refreshes, or looks")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = model_source("embedded")
    model = load_model(source).eval()
    first = recipe_of(args, "fixed", 0)
    data = load_blocks(first.data, load_tokenizer(source), model, 0)
    cost = {name: costs(model, recipe_of(args, name, 0)) for name in ARMS}
    rows = []
    for seed in range(args.seeds):
        for name in ARMS:
            rows.append(run_arm(args, name, seed, model, data))
            print(json.dumps(rows[-1]), flush=True)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    result = {"settings": settings, "summary": summary(rows, cost, args.steps), "rows": rows, "versions": versions()}
    write_json(args.output, result)
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
