"""GRPO on a distilled run: verifiable rewards rise, the reference is the start, what deploys is what was rewarded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from arena_common import write_checkpoint

from fewbits import Rule, prepare
from fewbits.checkpoint import load_prepared, load_tokenizer, save_prepared
from fewbits.convert import owned_layers
from fewbits.export import export
from fewbits.pipeline import read_scores, run
from fewbits.recipe import Recipe
from fewbits.reinforce import GRPOSettings, mean_reward, reinforce
from fewbits.report import write_report
from fewbits.testing.tiny import tiny_llama
from fewbits.traces import addition_traces, digit_reward, read_traces, write_traces
from fewbits.verify import verify

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "reasoning_qat.py"

# TRL 1.16 still says gradient_checkpointing, which transformers 5.24 renames; the messages are these two and no other.
trl_warns = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def with_trl(test: Any) -> Any:
    for mark in trl_warns:
        test = mark(test)
    return test


def ones(completion: str, answer: str) -> float:
    """A reward that a model can raise within a few steps: how often it writes the digit 1."""
    del answer
    return completion.count("1") / 4


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``t.jsonl`` and the run ``kd/`` of a tiny model that has learned what an answer looks like."""
    folder = tmp_path_factory.mktemp("rl")
    torch.manual_seed(0)
    write_checkpoint(folder)
    write_traces(folder / "t.jsonl", addition_traces(80))
    overrides = [
        f"model={folder / 'model'}", f"data.path={folder / 't.jsonl'}", "data.block_size=12", "init=rtn",
        "rules.0.scheme=W2A16G32", "rules.0.surrogate={name: jacquant, interval: 3}", "train.max_steps=40",
        "train.warmup_steps=1", "train.learning_rate=0.003", "train.batch_size=16", "objective.cross_entropy=1",
        "objective.kl=0",
    ]  # fmt: skip
    run(Recipe.load("reasoning_qat", overrides), folder / "kd", quiet=True)
    return folder


@pytest.mark.slow
@with_trl
def test_rewards_rise_and_what_deploys_is_what_was_rewarded(distilled: Path, tmp_path: Path) -> None:
    settings = GRPOSettings(
        max_steps=12, batch_size=4, max_new_tokens=4, learning_rate=2e-3, telemetry_interval=1, beta=0.01
    )
    folder = tmp_path / "rl"
    result = reinforce(distilled / "kd", distilled / "t.jsonl", folder, reward=ones, settings=settings, quiet=True)
    reward = json.loads((folder / "reinforce.json").read_text())["reward"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logs = [row for row in rows if "reward" in row]
    assert len(logs) == 12
    assert logs[0]["kl"] == 0.0  # the reference is the quantized start, not its latent weights
    assert logs[-1]["kl"] > 1e-3
    assert logs[0]["frac_reward_zero_std"] < 1
    assert sum(row["reward"] for row in logs[-3:]) > 2 * sum(row["reward"] for row in logs[:3])
    assert reward["after"] > reward["before"]

    start, _ = load_prepared(distilled / "kd" / "model")
    before, after = dict(owned_layers(start)), dict(owned_layers(result.model))
    for name, layer in after.items():
        assert not torch.equal(layer.weight, before[name].weight), name
        state, old = layer.state(), before[name].state()
        assert any(not torch.equal(state[key], old[key]) for key in state), f"{name}: no gain was refreshed"

    again, tokenizer = load_prepared(folder / "model")
    ids = torch.tensor([tokenizer("12+34=")["input_ids"]])
    assert torch.equal(again(input_ids=ids).logits, result.model(input_ids=ids).logits)
    assert "forward" not in result.model.__dict__
    for key in ("use_cache", "pad_token_id"):
        assert getattr(result.model.config, key) == getattr(start.config, key)
    assert tokenizer.pad_token is None
    assert set(read_scores(folder / "eval.json")) == {"start", "qat"}
    export(folder, "hf", tmp_path / "export")
    assert verify(folder, tmp_path / "export", engines=False).passed
    assert write_report(folder).is_file()


@pytest.mark.slow
@with_trl
def test_the_example_runs_all_stages(distilled: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("reasoning_qat", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = "--scheme W3A16G32 --num-traces 60 --teacher-steps 20 --kd-steps 3 --rl-steps 2 --prompts 2"
    rewards = module.main(["-o", str(tmp_path / "all"), "--model", str(distilled / "model"), *options.split()])
    assert list(rewards) == ["teacher", "distilled", "reinforced"]
    assert all(0 <= value <= 1 for value in rewards.values())
    assert (tmp_path / "all" / "rl" / "model").is_dir()


def test_greedy_rewards_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Prompts of different lengths, padded together or alone; by hand with the argmax of whole passes."""
    tokenizer = load_tokenizer(str(write_checkpoint(tmp_path) / "model"))
    model = tiny_llama()
    pairs = [("1+1=", "2"), ("12+34=", "46"), ("7+90=", "97")]
    seen: list[str] = []

    def record(completion: str, answer: str) -> float:
        seen.append(completion)
        return float(len(answer))

    means = [
        mean_reward(model, tokenizer, pairs, reward=record, max_new_tokens=4, batch_size=size) for size in (1, 2, 3)
    ]
    assert means == [pytest.approx(5 / 3)] * 3
    assert seen[:3] == seen[3:6] == seen[6:]
    for (prompt, _), text in zip(pairs, seen[:3], strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(4):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        assert text == tokenizer.decode(ids[-4:], skip_special_tokens=True)
    with pytest.raises(ValueError, match="no prompt"):
        mean_reward(model, tokenizer, [], reward=record, max_new_tokens=4)
    with pytest.raises(ValueError, match="is nan; it must be finite"):
        mean_reward(model, tokenizer, pairs, reward=lambda c, a: float("nan"), max_new_tokens=1)


def test_sums_are_right_seeded_and_different(tmp_path: Path) -> None:
    pairs = addition_traces(500)
    assert len({prompt for prompt, _ in pairs}) == 500
    for prompt, answer in pairs:
        a, b = prompt.removesuffix("=").split("+")
        assert int(a) + int(b) == int(answer)
        assert max(len(a), len(b)) <= 2
    assert addition_traces(500) == pairs != addition_traces(500, seed=1)
    assert len({prompt for prompt, _ in addition_traces(100, num_digits=1)}) == 100
    assert read_traces(write_traces(tmp_path / "t.jsonl", pairs)) == pairs
    for wrong in (0, 101):
        with pytest.raises(ValueError, match=f"num_traces={wrong}: there are 100 sums"):
            addition_traces(wrong, num_digits=1)


def test_the_reward_is_one_for_the_answer_alone() -> None:
    values = {c: digit_reward(c, "46") for c in ("46", "4", "46 ", "45", "64", "", "46 and so on")}
    assert values["46"] == 1.0
    assert all(0 <= value < 1 for text, value in values.items() if text != "46")
    assert values["46 "] == pytest.approx(2 / 3)
    assert values["4"] == values["45"] == 0.5
    assert values["64"] == values[""] == 0.0
    with pytest.raises(ValueError, match="empty"):
        digit_reward("1", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_completions": 1}, "num_completions=1 must be at least 2"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"beta": -1.0}, "beta=-1.0 must be finite"),
        ({"holdout": 1.0}, "holdout=1.0 must lie between"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOSettings(**change)


def test_without_trl_the_install_line_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'fewbits\[rl\]'"):
        reinforce(tmp_path, tmp_path, tmp_path / "out", reward=digit_reward)


def test_what_is_wrong_is_said_before_training(tmp_path: Path) -> None:
    traces = write_traces(tmp_path / "t.jsonl", addition_traces(20))
    with pytest.raises(ValueError, match="is no finished run"):
        reinforce(tmp_path / "none", traces, tmp_path / "out", reward=digit_reward)
    with pytest.raises(ValueError, match="is not empty"):
        reinforce(tmp_path, traces, tmp_path, reward=digit_reward)
    tokenizer = load_tokenizer(str(write_checkpoint(tmp_path) / "model"))
    head = prepare(tiny_llama(), Rule(scheme="W4A16G32"), ignore=[])
    save_prepared(head, tokenizer, tmp_path / "kd" / "model")
    (tmp_path / "kd" / "recipe.yaml").write_text(Recipe.load("reasoning_qat").to_yaml())
    with pytest.raises(ValueError, match="the output head is quantized"):
        reinforce(tmp_path / "kd", traces, tmp_path / "out", reward=digit_reward)
    one = write_traces(tmp_path / "one.jsonl", addition_traces(1))
    with pytest.raises(ValueError, match="1 traces are too few"):
        reinforce(tmp_path / "kd", one, tmp_path / "out", reward=digit_reward)
    assert not (tmp_path / "out").exists()
