r"""GRPO after distillation: the third stage of Reasoning-QAT, by TRL's trainer on a finished run.

For each prompt the quantized model samples a group of answers, a verifier gives each a reward ``r``, and the answers
that beat their group become more likely, for every token ``t`` of answer ``i``:

.. math:: A_i = \frac{r_i - \operatorname{mean}(r)}{\operatorname{std}(r)}, \qquad
          \ell_{i,t} = -\min\bigl(\rho A_i, \operatorname{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A_i\bigr)
          + \beta\,\mathrm{KL}(\text{model} \,\|\, \text{start}),

with the ratio :math:`\rho` of the token's probabilities now and when it was sampled.  The passes are those of the fake
quantized model, so what is rewarded is what deploys; gradients go through surrogates as ever.  A group of equal rewards
moves nothing, which is why a strongly quantized model has to be distilled first.

Reference: Reasoning-QAT arXiv:2601.14888; GRPO arXiv:2402.03300.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.evaluate import evaluate, versions
from fewbits.io import is_occupied, write_json, write_text
from fewbits.nn import QATLayer
from fewbits.optim.build import build_optimizer
from fewbits.pipeline import EVAL_FILE, RECIPE_FILE, RunResult, freeze_, write_scores
from fewbits.recipe import Recipe
from fewbits.traces import pack_traces, read_traces
from fewbits.training.callback import QATCallback
from fewbits.training.telemetry import weight_histogram

REINFORCE_FILE = "reinforce.json"
Reward = Callable[[str, str], float]
"""``reward(completion, answer)``: a finite number, larger is better; :func:`fewbits.traces.digit_reward` is one."""


@dataclass(frozen=True, kw_only=True)
class GRPOSettings:
    r"""How the answers are sampled and learned from; rates and counts of the paper are unknown, these are ours.

    Args:
        max_steps: optimizer steps.
        batch_size: prompts per step.
        num_completions: answers per prompt, the group of :math:`A_i`.
        max_new_tokens: longest answer.
        learning_rate: of latent weights and the rest; linear to 0.
        scale_learning_rate: of learned scales; None: the same, 0: they stay.
        beta: weight of the divergence from the start, which is kept as a frozen copy; 0 keeps none.
        epsilon: clip of the ratio.
        temperature: of sampling and of the probabilities in the loss.
        holdout: share of the prompts, at the end of the file, that are scored and not trained on.
        telemetry_interval: steps between looks at the quantized layers.
        seed: of prompts and answers.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> GRPOSettings(num_completions=4).batch_size
        8
    """

    max_steps: int = 100
    batch_size: int = 8
    num_completions: int = 8
    max_new_tokens: int = 16
    learning_rate: float = 1e-5
    scale_learning_rate: float | None = None
    beta: float = 0.04
    epsilon: float = 0.2
    temperature: float = 1.0
    holdout: float = 0.1
    telemetry_interval: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"max_steps": 1, "batch_size": 1, "num_completions": 2, "max_new_tokens": 1, "telemetry_interval": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {limit}")
        for name in ("learning_rate", "temperature", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        for name in ("beta", "scale_learning_rate"):
            if not 0 <= (getattr(self, name) or 0.0) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout={self.holdout} must lie between 0 and 1, without them")


def reinforce(
    run: str | Path,
    traces: str | Path,
    folder: str | Path,
    *,
    reward: Reward,
    settings: GRPOSettings | None = None,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Train a finished run further by the rewards of its own answers, and leave a run folder like any other.

    The folder gets the recipe of the start, ``reinforce.json`` (settings; mean reward of greedy answers to held-out
    prompts, before and after), ``metrics.jsonl``, ``histogram.json``, ``eval.json`` (``start`` and ``qat``, on the
    held-out answers) and ``model/``; export, verify and report take it. One process; no resume.

    Args:
        run: folder of ``fewbits train``, after distillation.
        traces: ``.jsonl`` file of prompts and the answers that the verifier knows.
        folder: new.
        reward: the verifier.
        settings: None for the defaults.
        quiet: no progress bar and no printed logs.
        callbacks: more Trainer callbacks.

    Raises:
        ImportError: with the install line, without TRL.
        ValueError: for a folder that is taken or no run, too few traces, a quantized output head, or a reward that is
            not finite.

    Reference: arXiv:2601.14888.
    """
    try:
        import trl  # noqa: F401  (the extra is asked for before anything is read or written)
    except ImportError as error:
        raise ImportError("GRPO needs TRL: pip install 'fewbits[rl]'") from error
    settings, run, folder = settings or GRPOSettings(), Path(run), Path(folder)
    if is_occupied(folder):
        raise ValueError(f"{folder} is not empty; choose another folder")
    if not (run / RECIPE_FILE).is_file() or not (run / "model").is_dir():
        raise ValueError(f"{run} is no finished run: it needs {RECIPE_FILE} and model/")
    train, valid = _split(read_traces(traces), settings.holdout)
    recipe = Recipe.load(run / RECIPE_FILE)
    model, tokenizer = load_prepared(run / "model")
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{run} has no tokenizer with an end-of-text token, where an answer would stop")
    if isinstance(model.get_output_embeddings(), QATLayer):
        raise ValueError(
            "the output head is quantized, and TRL reads its latent weight, which does not deploy; distil a run whose "
            "rules leave lm_head (and an embedding tied to it) alone"
        )
    freeze_(model, recipe.train.freeze)
    blocks = pack_traces(valid, tokenizer, _longest(valid, tokenizer))
    scores = {"start": evaluate(model, blocks)}
    answer_with: dict[str, Any] = {"reward": reward, "max_new_tokens": settings.max_new_tokens}
    rewards = {"before": mean_reward(model, tokenizer, valid, **answer_with)}
    before = weight_histogram(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RECIPE_FILE, recipe.to_yaml())
    write_text(folder / "environment.json", json.dumps(versions(), indent=1) + "\n")
    _train(model, tokenizer, train, folder, reward, settings, quiet=quiet, callbacks=callbacks)
    model.eval()
    rewards["after"] = mean_reward(model, tokenizer, valid, **answer_with)
    scores["qat"] = evaluate(model, blocks)
    write_json(folder / "histogram.json", {"before": before, "after": weight_histogram(model)})
    write_json(folder / REINFORCE_FILE, {"settings": asdict(settings), "reward": rewards, "num_valid": len(valid)})
    write_scores(folder / EVAL_FILE, scores)
    save_prepared(model, tokenizer, folder / "model")
    return RunResult(folder, model, tokenizer, scores)


def _split(pairs: list[tuple[str, str]], holdout: float) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    num_valid = max(1, round(len(pairs) * holdout))
    if num_valid >= len(pairs):
        raise ValueError(f"{len(pairs)} traces are too few to hold out {holdout:.0%}; give more of them")
    return pairs[:-num_valid], pairs[-num_valid:]


def _longest(pairs: list[tuple[str, str]], tokenizer: Any) -> int:
    """Tokens of the longest example with its end."""
    parts = ([len(ids) for ids in _ids(tokenizer, list(texts))] for texts in zip(*pairs, strict=True))
    return 1 + max(a + b for a, b in zip(*parts, strict=True))


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids as :func:`fewbits.traces.pack_traces` has them: without special tokens of the tokenizer's own."""
    ids: list[list[int]] = tokenizer(text=texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _train(
    model: Any,
    tokenizer: Any,
    pairs: list[tuple[str, str]],
    folder: Path,
    reward: Reward,
    settings: GRPOSettings,
    *,
    quiet: bool,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """TRL's trainer, in place; what TRL patches on the model, its configs and the tokenizer is put back."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    class Trainer(GRPOTrainer):
        """Prompts without special tokens, as in the distillation."""

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return _ids(self.processing_class, prompts), None, {}

    def rewards(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [_finite(reward(c, a), c) for c, a in zip(completions, answer, strict=True)]

    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size * settings.num_completions,
        num_generations=settings.num_completions,
        max_completion_length=settings.max_new_tokens,
        learning_rate=settings.learning_rate,
        beta=0.0,  # else TRL loads the reference from the model's folder, as full precision latent weights
        epsilon=settings.epsilon,
        temperature=settings.temperature,
        generation_kwargs={"use_cache": True},  # a trained model's own config says no
        loss_type="grpo",
        scale_rewards="group",
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=quiet,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )
    if args.world_size > 1:
        raise ValueError(f"world_size={args.world_size}: GRPO runs in one process here; start it without a launcher")
    reference = copy.deepcopy(model).eval().requires_grad_(False) if settings.beta > 0 else None
    forward, padding = model.__dict__.get("forward"), tokenizer.pad_token
    configs = [(c, c.pad_token_id) for c in (model.config, model.generation_config)]
    use_cache, tags = model.config.use_cache, model.model_tags
    try:
        trainer = Trainer(
            model=model,
            reward_funcs=rewards,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": p, "answer": a} for p, a in pairs]),
            processing_class=tokenizer,
            callbacks=[
                QATCallback(folder / "metrics.jsonl", telemetry_interval=settings.telemetry_interval),
                *callbacks,
            ],
            optimizers=(
                build_optimizer("adamw_torch", model, args, scale_learning_rate=settings.scale_learning_rate),
                None,
            ),
        )
        if reference is not None:
            add_fused_lm_head(reference, temperature=settings.temperature)
            trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
            trainer.beta = settings.beta
        if quiet:
            trainer.remove_callback(PrinterCallback)
        trainer.train()
    finally:
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward
        for config, value in configs:
            config.pad_token_id = value
        model.config.use_cache, model.model_tags = use_cache, tags
        tokenizer.pad_token = padding


def _finite(value: float, completion: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"the reward of {completion!r} is {value}; it must be finite")
    return float(value)


@torch.no_grad()
def mean_reward(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    reward: Reward,
    max_new_tokens: int,
    batch_size: int = 32,
) -> float:
    """Mean reward of greedy answers, deterministic; prompts are padded on the left.

    Args:
        model: prepared, converted or plain causal LM, in evaluation mode.
        tokenizer: its tokenizer, with an end token.
        pairs: prompts and answers, at least one.
        reward: the verifier.
        max_new_tokens: longest answer.
        batch_size: prompts per pass.

    Raises:
        ValueError: for no prompt, or a reward that is not finite.
    """
    if not pairs:
        raise ValueError("there is no prompt to answer")
    end, total = tokenizer.eos_token_id, 0.0
    lm: Any = model
    for first in range(0, len(pairs), batch_size):
        some = pairs[first : first + batch_size]
        rows = _ids(tokenizer, [prompt for prompt, _ in some])
        width = max(map(len, rows))
        ids = torch.tensor([[end] * (width - len(row)) + row for row in rows], device=lm.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
        out = lm.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True,
            pad_token_id=end, eos_token_id=end,
        )  # fmt: skip
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        total += sum(_finite(reward(text, answer), text) for text, (_, answer) in zip(texts, some, strict=True))
    return total / len(pairs)
