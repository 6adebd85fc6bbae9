"""Does ``fewbits diagnose`` foretell what happens? Ranks, P(fail), the mixed recipe after training, the control arm.

    python benchmarks/diagnose.py --threads 1 --work diag-bench --output benchmarks/results/diagnose.json

Everything is measured on the embedded model. Sensitivities are measured on held-out text that the scores do not use
(blocks from the end of the file; scores use its beginning). Every part is kept in the work folder, so a killed run goes
on where it was. The mixed recipe has at most the size of the uniform one and gets the same training: same data, steps,
rates and seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoint import load_model, load_tokenizer
from fewbits.corpora import embedded_texts
from fewbits.data import TokenBlocks, pack_texts
from fewbits.diagnose import (
    DiagnosisSettings,
    Proposal,
    SensitivityTable,
    Stages,
    diagnose,
    find_sites,
    layer_sensitivity,
    open_run,
    propose_recipe,
    token_loss,
    watch_run,
    write_diagnosis,
)
from fewbits.evaluate import versions
from fewbits.io import write_json
from fewbits.pipeline import EVAL_FILE, model_source, read_scores, run
from fewbits.recipe import Recipe, shipped_recipes
from fewbits.scheme import Scheme

UNIFORM = "W2A16G64"


def recipe_of(args: argparse.Namespace, seed: int) -> Recipe:
    """The uniform arm: the demo's clipped STE with fewer steps."""
    changes = [
        f"seed={seed}", f"train.max_steps={args.steps}", "train.warmup_steps=5",
        f"rules=[{{scheme: {UNIFORM}, surrogate: clipped_ste}}]",
    ]  # fmt: skip
    return Recipe.parse(shipped_recipes()["demo-clipped-ste"], changes)


def mixed_recipe(uniform: Recipe, proposal: Proposal) -> Recipe:
    """The same with the rules of the proposal and the surrogate of the uniform arm."""
    surrogate = uniform.rules[0].surrogate
    rules = [rule.model_copy(update={"surrogate": surrogate}) for rule in proposal.recipe.rules]
    return uniform.model_copy(update={"rules": rules})


def train(recipe: Recipe, folder: Path, interval: int | None = None) -> dict[str, float]:
    """Held-out loss by stage of a run folder, trained if it is not there yet."""
    if not (folder / "model").exists():
        callbacks = [] if interval is None else [watch_run(recipe, folder, interval)]
        run(recipe, folder, overwrite=True, quiet=True, callbacks=callbacks)
    return {stage: score.loss for stage, score in read_scores(folder / EVAL_FILE).items()}


def paired(a: list[float], b: list[float]) -> dict[str, float]:
    """Mean of ``a - b`` over the seeds and its standard error; ``t`` is their ratio."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    mean = statistics.mean(gaps)
    return {"mean": mean, "standard_error": error, "t": mean / error if error else math.nan}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All parts, in order of cost."""
    source = model_source("embedded")
    model, tokenizer = load_model(source).eval(), load_tokenizer(source)
    text = pack_texts(embedded_texts("valid"), tokenizer, 256)
    unseen = TokenBlocks(text.tokens[::-1].copy(), text.bytes_per_token)
    named = {name: Scheme.parse(name) for name in args.schemes}

    # the mixed recipe, from sensitivities on more tokens than the rest of the diagnosis sees
    loss = token_loss(model, unseen.take(args.sensitivity_blocks))
    sites = find_sites(model, list(named.values()))
    stages = Stages(args.work / "proposal", {"versions": versions(), "arguments": [args.schemes, UNIFORM]})
    table = stages.run(
        "table", SensitivityTable, lambda: layer_sensitivity(loss, sites, named), blocks=args.sensitivity_blocks
    )
    budget = sum(site.size_in_bits(named[UNIFORM]) for site in sites) / sum(site.weight.numel() for site in sites)
    uniform = recipe_of(args, 0)
    proposal = propose_recipe(loss, sites, named, table, budget=budget, base=uniform)

    losses: dict[str, list[dict[str, float]]] = {"uniform": [], "mixed": []}
    for seed in range(args.seeds):
        recipe = recipe_of(args, seed)
        losses["uniform"].append(train(recipe, args.work / f"uniform-{seed}", args.watch if seed == 0 else None))
        losses["mixed"].append(train(mixed_recipe(recipe, proposal), args.work / f"mixed-{seed}"))

    found = diagnose(
        model,
        unseen.take(args.blocks),
        args.schemes,
        settings=DiagnosisSettings(
            num_random=args.random,
            num_probes=args.probes,
            num_monte_carlo=args.draws,
            num_lanczos_steps=args.lanczos,
            num_normals=min(8, args.lanczos // 2),
            curvature_blocks=args.curvature_blocks,
            slice_points=9,
        ),
        trained=open_run(args.work / "uniform-0", model, tokenizer, control=True),
        model_name="embedded",
        data_name="embedded, held out, from the end",
        folder=args.work / "diagnosis",
        say=print,
    )
    write_diagnosis(found, args.work / "diagnosis")
    trained = {arm: [row["qat"] for row in rows] for arm, rows in losses.items()}
    return {
        "budget_bits_per_weight": budget,
        "mixed": {
            "bits_per_weight": proposal.bits_per_weight,
            "choices": proposal.allocation.choices,
            "rise_before_training": proposal.measured_rise,
            "uniform_rise_before_training": proposal.uniform_rise,
            "predicted_rise": proposal.allocation.loss,
        },
        "held_out_loss": losses,
        "mixed_minus_uniform": paired(trained["mixed"], trained["uniform"]),
        "mixed_minus_uniform_before_training": losses["mixed"][0]["rtn"] - losses["uniform"][0]["rtn"],
        "diagnosis": found.to_dict(),
    }


def show(result: dict[str, Any]) -> None:
    """The verdicts, in the order of the issue."""
    found = result["diagnosis"]
    print("rank correlation over schemes:", found["rank_agreement"])
    print("over layers, kappa_rand:", found["layer_forecast"]["rank_agreement"])
    print("over layers, error norms:", found["layer_forecast"]["rank_agreement_norms"])
    for row in found["pitch"]["rows"]:
        print("pitch {factor}: P {probability:.2f}, with slope {probability_with_slope:.2f}, drawn {monte_carlo:.2f}, "
              "mean rise {mean_rise:.4f} +- {sd_rise:.4f}".format(**row))  # fmt: skip
    for arm, rows in result["held_out_loss"].items():
        print(arm, [{k: round(v, 4) for k, v in row.items()} for row in rows])
    gap = result["mixed_minus_uniform"]
    before = result["mixed_minus_uniform_before_training"]
    print(
        f"mixed - uniform after training {gap['mean']:+.4f} +- {gap['standard_error']:.4f} nats; before {before:+.4f}"
    )
    print(found["arms"]["verdict"])


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    schemes = ["W4A16G64", "W3A16G64", UNIFORM, "W1.58A16G64", "W1A16G64"]
    parser.add_argument("--schemes", nargs="+", default=schemes)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=4, help="token blocks of the diagnosis")
    parser.add_argument("--sensitivity-blocks", type=int, default=32, help="token blocks of the mixed recipe")
    parser.add_argument("--random", type=int, default=2, help="random directions per scheme and arm")
    parser.add_argument("--probes", type=int, default=4, help="probes of every trace")
    parser.add_argument("--lanczos", type=int, default=16, help="Hessian products per Lanczos run")
    parser.add_argument("--curvature-blocks", type=int, default=2, help="token blocks of spectra and river")
    parser.add_argument("--draws", type=int, default=16, help="Monte Carlo draws")
    parser.add_argument("--watch", type=int, default=5, help="steps between points of the recorded path")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("diag-bench"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.process_time()
    result = measure(args)
    result["cpu_seconds_of_this_call"] = time.process_time() - start
    result["settings"] = {k: str(v) for k, v in vars(args).items() if k not in ("work", "output")}
    result["versions"] = versions()
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    result["commit"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    show(result)
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
