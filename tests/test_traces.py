"""Prompt masking: labels on answers alone, and losses and gradients that do not see prompt or padding."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from arena_common import write_checkpoint
from test_training import arguments

from fewbits import Rule, prepare
from fewbits.checkpoint import load_tokenizer
from fewbits.evaluate import evaluate
from fewbits.objectives import Objective
from fewbits.pipeline import run, teach
from fewbits.recipe import Recipe
from fewbits.testing.tiny import tiny_llama
from fewbits.traces import TraceBlocks, pack_traces, read_traces
from fewbits.training import QATSettings, QATTrainer

PAIRS = [("12+34=", "46"), ("7+8=", "15"), ("90+9=", "99")]


def test_labels_are_the_answer_and_its_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_checkpoint(tmp_path) / "model"))
    blocks = pack_traces(PAIRS, tokenizer, 12)
    for i, (prompt, answer) in enumerate(PAIRS):
        row, end = blocks[i], tokenizer.eos_token_id
        assert row["input_ids"][: len(prompt)].tolist() == tokenizer(prompt)["input_ids"]
        kept = row["labels"] != -100
        assert row["labels"][kept].tolist() == [*tokenizer(answer)["input_ids"], end]
        assert torch.equal(row["labels"][kept], row["input_ids"][kept])
        assert kept.nonzero()[0].item() == len(prompt)
    assert blocks.bytes_per_token == pytest.approx(6 / 9)


@pytest.mark.parametrize("objective", [Objective(), Objective(cross_entropy=1.0, kl=0.0)], ids=["kl", "ce"])
def test_losses_see_neither_prompt_targets_nor_padding(tmp_path: Path, objective: Objective) -> None:
    """Longer rows (more padding) and a row without labels change nothing; the loss is that of the answers by hand."""
    tokenizer = load_tokenizer(str(write_checkpoint(tmp_path) / "model"))
    teacher = tiny_llama(seed=1)
    model = tiny_llama()
    values = []
    for length in (12, 20):
        blocks = pack_traces(PAIRS, tokenizer, length)
        ids, labels = (torch.stack([blocks[i][key] for i in range(3)]) for key in ("input_ids", "labels"))
        logits, taught = model(input_ids=ids).logits, teacher(input_ids=ids).logits
        values.append(objective(logits, labels, taught).item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    total, count = 0.0, 0
    for prompt, answer in PAIRS:
        ids = [*tokenizer(prompt)["input_ids"], *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        log_q = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        log_p = teacher(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        for t in range(len(prompt) - 1, len(ids) - 1):
            kl = float((log_p[t].exp() * (log_p[t] - log_q[t])).sum())
            total += kl if objective.kl else -float(log_q[t, ids[t + 1]])
            count += 1
    assert values[0] == pytest.approx(total / count, rel=1e-5)


def test_a_trainer_learns_answers_from_traces(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_checkpoint(tmp_path) / "model"))
    model = tiny_llama()
    teacher = copy.deepcopy(model)
    prepare(model, Rule(scheme="W2A16G32", surrogate="clipped_ste"))
    blocks = pack_traces(PAIRS * 8, tokenizer, 12)
    trainer = QATTrainer(
        model,
        arguments(tmp_path / "out", max_steps=30, learning_rate=3e-3, save_strategy="no"),
        teacher=teacher,
        settings=QATSettings(objective=Objective(cross_entropy=1.0, kl=0.0)),
        train_dataset=blocks,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    losses = [float(value) for value in losses]
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_on_traces_scores_answers_only_with_a_live_or_a_kept_teacher(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(40)))
    small = [
        f"model={tmp_path / 'model'}", f"data.path={path}", "data.block_size=12", "rules.0.scheme=W2A16G32",
        "train.max_steps=3", "train.warmup_steps=1", "init=rtn",
    ]  # fmt: skip
    recipe = Recipe.load("reasoning_qat", small)
    result = run(recipe, tmp_path / "a", quiet=True)
    assert isinstance(pack_traces(read_traces(path), result.tokenizer, 12).split(0.1)[1], TraceBlocks)
    assert result.scores["qat"].num_tokens == 4 * 3  # 36 to 39: two digits and the end
    model = tiny_llama()
    score = evaluate(model, pack_traces(PAIRS, result.tokenizer, 12))
    logits, labels = zip(*_answers(model, result.tokenizer), strict=True)
    by_hand = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
    assert score.loss == pytest.approx(by_hand.item(), rel=1e-5)
    teach(str(tmp_path / "model"), path, tmp_path / "logits", block_size=12, top_k=16)
    kept = Recipe.load("reasoning_qat", [*small, f"teacher={tmp_path / 'logits'}"])
    assert run(kept, tmp_path / "b", quiet=True).scores["qat"].num_tokens == 12


def _answers(model: Any, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for prompt, answer in PAIRS:
        ids = [*tokenizer(prompt)["input_ids"], *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        yield logits[len(prompt) - 1 : -1], torch.tensor(ids[len(prompt) :])


@pytest.mark.parametrize(
    ("lines", "message"),
    [("", "holds no trace"), ("{", "line 1, is not JSON"), ('{"prompt": "a"}', "needs the texts prompt and answer")],
)
def test_bad_files_are_refused(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_traces(path)
    with pytest.raises(ValueError, match="do not exist"):
        read_traces(tmp_path / "none.jsonl")
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in PAIRS) + "\n")
    assert read_traces(path) == PAIRS


def test_bad_examples_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_checkpoint(tmp_path) / "model"))
    with pytest.raises(ValueError, match="trace 0 has 9 tokens, a row 8"):
        pack_traces(PAIRS, tokenizer, 8)
    with pytest.raises(ValueError, match="empty prompt"):
        pack_traces([("", "1")], tokenizer, 8)
