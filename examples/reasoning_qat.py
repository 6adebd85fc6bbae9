r"""Reasoning-QAT on sums, all three stages: GPTQ, distillation on answers, GRPO (``pip install 'fewbits[rl]'``).

    python examples/reasoning_qat.py -o reasoning
    fewbits export reasoning/rl --target hf

Sums of two numbers below 100 are a task whose answers a program verifies, so rewards cost nothing. The teacher has to
know how to add before anything can be kept: the embedded model cannot, so it is first taught in full precision
(``reasoning/teacher``). Folders: ``traces.jsonl``, ``teacher/``, ``kd/`` (a run), ``rl/`` (a run).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from fewbits.checkpoint import load_model, load_tokenizer
from fewbits.io import atomic_folder, is_occupied
from fewbits.pipeline import model_source, run
from fewbits.recipe import Recipe
from fewbits.reinforce import REINFORCE_FILE, GRPOSettings, mean_reward, reinforce
from fewbits.traces import addition_traces, digit_reward, pack_traces, write_traces

ROW = 32
"""Tokens of a row; a sum has at most 9 characters."""


def teach_sums(model: str, pairs: list[tuple[str, str]], folder: Path, args: argparse.Namespace) -> None:
    """The full-precision teacher: cross-entropy on answers."""
    source = model_source(model)
    teacher, tokenizer = load_model(source), load_tokenizer(source)
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=args.teacher_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.teacher_steps // 20),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=max(1, args.teacher_steps // 5),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        )
        blocks = pack_traces(pairs, tokenizer, ROW)
        Trainer(teacher, arguments, train_dataset=blocks, data_collator=default_data_collator).train()
    teacher.to("cpu").eval().config.use_cache = True
    with atomic_folder(folder) as partial:
        teacher.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder of everything")
    parser.add_argument("--model", default="embedded", help="embedded, smollm2 or a checkpoint (default %(default)s)")
    parser.add_argument("--scheme", default="W3A16G128", help="of the linear layers (default %(default)s)")
    parser.add_argument("--num-traces", type=int, default=4000, help="of the 10000 sums (default %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=1500, help="in full precision (default %(default)s)")
    parser.add_argument("--kd-steps", type=int, default=300, help="of distillation (default %(default)s)")
    parser.add_argument("--rl-steps", type=int, default=100, help="of GRPO (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="traces per step before GRPO (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the teacher; distillation has a third")
    parser.add_argument("--rl-learning-rate", type=float, default=3e-5, help="of GRPO (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="per step of GRPO, 8 answers each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args(argv)
    if is_occupied(args.output):
        parser.error(f"{args.output} exists already; give a new folder")
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    """All stages; mean rewards of greedy answers to held-out sums, by stage."""
    args = parse(argv)
    pairs = addition_traces(args.num_traces, seed=args.seed)
    settings = GRPOSettings(
        max_steps=args.rl_steps,
        batch_size=args.prompts,
        max_new_tokens=6,
        learning_rate=args.rl_learning_rate,
        seed=args.seed,
    )
    num_train = len(pairs) - max(1, round(len(pairs) * settings.holdout))
    traces = write_traces(args.output / "traces.jsonl", pairs)
    teach_sums(args.model, pairs[:num_train], args.output / "teacher", args)
    recipe = Recipe.load(
        "reasoning_qat",
        [
            f"model={args.output / 'teacher'}", f"data.path={traces}", f"data.block_size={ROW}",
            f"data.holdout={settings.holdout}", f"rules.0.scheme={args.scheme}", f"train.max_steps={args.kd_steps}",
            f"train.batch_size={args.batch_size}", f"train.learning_rate={args.learning_rate / 3}", f"seed={args.seed}",
        ],
    )  # fmt: skip
    run(recipe, args.output / "kd", quiet=True)
    result = reinforce(
        args.output / "kd", traces, args.output / "rl", reward=digit_reward, settings=settings, quiet=True
    )
    teacher = load_model(str(args.output / "teacher"))
    full = mean_reward(teacher, result.tokenizer, pairs[num_train:], reward=digit_reward, max_new_tokens=6)
    reward = json.loads((args.output / "rl" / REINFORCE_FILE).read_text(encoding="utf-8"))["reward"]
    rewards = {"teacher": full, "distilled": reward["before"], "reinforced": reward["after"]}
    print("mean reward on held-out sums: " + ", ".join(f"{k} {v:.3f}" for k, v in rewards.items()))
    return rewards


if __name__ == "__main__":
    main()
