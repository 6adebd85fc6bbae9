"""Top-k teacher logits: the bound and its gap, the folder on disk, and training from it."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arena_common import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from test_training import Interrupt, arguments, blocks
from typer.testing import CliRunner

from fewbits import Rule, prepare
from fewbits.cli import app
from fewbits.data import TokenBlocks
from fewbits.objectives import Objective, TopKLogits, kl_divergence, top_k_divergence, top_k_logits
from fewbits.pipeline import run, teach
from fewbits.recipe import Recipe
from fewbits.teacher_logits import TeacherLogits, is_teacher_logits, text_digest, write_teacher_logits
from fewbits.testing.tiny import tiny_llama
from fewbits.training import QATSettings, QATTrainer
from fewbits.training.metrics import read_metrics

FLOAT32 = 2e-6
"""Ten terms of size one, summed in fp32; the loss has a factor of the squared temperature."""
ZERO = torch.zeros(1, dtype=torch.long)


# the loss


@given(seed=st.integers(0, 2**31), k=st.integers(1, 10), size=st.floats(0.1, 8.0), temperature=st.floats(0.5, 4.0))
def test_the_loss_is_short_of_the_full_one_by_the_divergence_within_the_rest(
    seed: int, k: int, size: float, temperature: float
) -> None:
    r"""KL - KL_k = tau^2 p_R KL(a || b) >= 0, exactly (float64 oracle by loops), 0 at k = vocab."""
    g = torch.Generator().manual_seed(seed)
    z, t = size * torch.randn(1, 10, generator=g), size * torch.randn(1, 10, generator=g)
    full = float(kl_divergence(z, t, ZERO, temperature=temperature))
    short = float(top_k_divergence(z, top_k_logits(t, k, temperature=temperature), ZERO, temperature=temperature))
    p, q = (t[0].double() / temperature).softmax(-1), (z[0].double() / temperature).softmax(-1)
    rest = sorted(range(10), key=lambda i: -float(t[0, i]))[k:]
    p_rest, q_rest = sum(float(p[i]) for i in rest), sum(float(q[i]) for i in rest)
    gap = sum(float(p[i]) * np.log(float(p[i]) / p_rest / (float(q[i]) / q_rest)) for i in rest)
    scale = temperature**2
    assert gap >= -1e-12
    assert short == pytest.approx(full - scale * gap, rel=1e-4, abs=1e-5 * scale)
    assert short <= full + FLOAT32 * scale
    if k == 10:
        assert short == pytest.approx(full, rel=1e-6, abs=FLOAT32 * scale)


def test_more_tokens_never_give_a_smaller_loss() -> None:
    torch.manual_seed(0)
    z, t = 3 * torch.randn(4, 20), 3 * torch.randn(4, 20)
    labels = torch.zeros(4, dtype=torch.long)
    values = [float(top_k_divergence(z, top_k_logits(t, k), labels)) for k in range(1, 21)]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(values))
    assert values[0] < values[-1]


def test_the_gradient_vanishes_at_the_teacher_and_is_finite_with_a_sure_teacher() -> None:
    t = torch.randn(3, 12)
    z = t.clone().requires_grad_()
    loss = top_k_divergence(z, top_k_logits(t, 4), torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert z.grad is not None
    assert float(z.grad.abs().max()) < 1e-6
    sure = torch.full((1, 5), -1e4)
    sure[0, 2] = 1e4
    z = torch.randn(1, 5, requires_grad=True)
    for k in (1, 3, 5):
        (grad,) = torch.autograd.grad(top_k_divergence(z, top_k_logits(sure, k), ZERO), z)
        expected = z.softmax(-1) - torch.nn.functional.one_hot(torch.tensor([2]), 5)
        torch.testing.assert_close(grad, expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_objective_shifts_and_masks_kept_logits_like_whole_ones() -> None:
    torch.manual_seed(1)
    z, t = torch.randn(2, 6, 9), torch.randn(2, 6, 9)
    labels = torch.randint(0, 9, (2, 6))
    labels[0, :4] = -100
    objective = Objective(cross_entropy=0.3, kl=0.7, temperature=2.0)
    whole, kept = objective(z, labels, t), objective(z, labels, top_k_logits(t, 9, temperature=2.0))
    torch.testing.assert_close(kept, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: top_k_logits(torch.zeros(1, 4), 5), r"k=5 is outside 1..4"),
        (lambda: top_k_logits(torch.zeros(1, 4), 2, temperature=0.0), "must be positive"),
        (lambda: top_k_divergence(torch.zeros(2, 4), top_k_logits(torch.zeros(1, 4), 2), ZERO), "positions"),
        (lambda: top_k_divergence(torch.zeros(1, 2), top_k_logits(torch.arange(4.0)[None], 2), ZERO), "vocabulary"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# the folder


def write(folder: Path, text: TokenBlocks, **more: Any) -> TeacherLogits:
    write_teacher_logits(tiny_llama(), text, folder, model_digest="m" * 64, **more)
    return TeacherLogits(folder)


def test_what_is_read_is_what_the_teacher_said(tmp_path: Path) -> None:
    text = blocks().take(21)
    cache = write(tmp_path / "logits", text, top_k=5, dtype="float32", batch_size=4, shard_bytes=4 * 16 * 44)
    m = cache.manifest
    assert (m.num_blocks, m.block_size, m.top_k, m.vocab_size, len(m.shards)) == (21, 16, 5, 256, 6)
    assert m.text_digest == text_digest(text.tokens)
    order = [17, 0, 20, 3]
    distilled = cache.attach(TokenBlocks(text.tokens[order], 1.0), vocab_size=256, temperature=1.0)
    for i, block in enumerate(order):
        item = distilled[i]
        assert torch.equal(item["input_ids"], text[block]["input_ids"])
        logits = tiny_llama()(input_ids=item["input_ids"][None]).logits[0]
        kept = top_k_logits(logits, 5)
        torch.testing.assert_close(item["teacher_log_probs"], kept.log_probs.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(item["teacher_tail"], kept.tail.detach(), rtol=1e-5, atol=1e-5)
        exact = logits.log_softmax(-1).gather(-1, item["teacher_ids"]).detach()
        torch.testing.assert_close(item["teacher_log_probs"], exact, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_cost_little(tmp_path: Path) -> None:
    text = blocks().take(8)
    z = torch.randn(16, 256)
    labels = torch.zeros(16, dtype=torch.long)
    values = {}
    for dtype in ("float32", "float16", "bfloat16"):
        cache = write(tmp_path / dtype, text, top_k=8, dtype=dtype)
        item = cache.attach(text, vocab_size=256, temperature=1.0)[3]
        kept = TopKLogits(ids=item["teacher_ids"], log_probs=item["teacher_log_probs"], tail=item["teacher_tail"])
        values[dtype] = float(top_k_divergence(z, kept, labels))
        size = sum(path.stat().st_size for path in (tmp_path / dtype).glob("*.safetensors"))
        width = 4 if dtype == "float32" else 2
        assert size - 8 * 16 * (8 * (4 + width) + width) < 1000
    assert values["float16"] == pytest.approx(values["float32"], rel=2e-3)
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=2e-2)


def test_text_the_teacher_has_not_seen_and_other_settings_are_refused(tmp_path: Path) -> None:
    text = blocks().take(6)
    cache = write(tmp_path / "logits", text.take(4), top_k=4, temperature=2.0)
    with pytest.raises(ValueError, match=r"has nothing for a block .* 4 blocks of 16 tokens"):
        cache.attach(text, vocab_size=256, temperature=2.0)
    for changes in ({"temperature": 1.0}, {"vocab_size": 255}):
        with pytest.raises(ValueError, match=f"has {next(iter(changes))}="):
            cache.attach(text.take(4), **{"vocab_size": 256, "temperature": 2.0, **changes})
    with pytest.raises(ValueError, match="has block_size=16, the run 8"):
        cache.attach(TokenBlocks(text.tokens[:, :8], 1.0), vocab_size=256, temperature=2.0)
    with pytest.raises(ValueError, match="never replaced"):
        write(tmp_path / "logits", text)
    with pytest.raises(ValueError, match=r"k=300 is outside 1..256"):
        write(tmp_path / "other", text, top_k=300)
    assert not (tmp_path / "other").exists()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "logits"
    write(folder, blocks().take(4), top_k=4)
    manifest, shard = folder / "manifest.json", folder / "shard-00000.safetensors"
    good, data = json.loads(manifest.read_text()), shard.read_bytes()
    for change, message in (
        ({"top_k": 5}, "the manifest says"),
        ({"num_blocks": 5}, "do not add up"),
        ({"more": 1}, "damaged"),
        ({"shards": [{"file": "../shard-00000.safetensors", "num_blocks": 4}]}, "damaged"),
        ({"format_version": 2}, "damaged"),
    ):
        manifest.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            TeacherLogits(folder)
    manifest.write_text(json.dumps(good))
    shard.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="missing or damaged"):
        TeacherLogits(folder)
    with pytest.raises(ValueError):
        TeacherLogits(tmp_path / "nothing")
    assert not is_teacher_logits(tmp_path / "nothing")


# training


def make_trainer(folder: Path, dataset: Any, teacher: Any = None, **more: Any) -> QATTrainer:
    model = prepare(tiny_llama(), Rule(scheme="W2A16G32", surrogate="clipped_ste"))
    callbacks = more.pop("callbacks", None)
    return QATTrainer(
        model, arguments(folder, **more), teacher=teacher, settings=QATSettings(telemetry_interval=3),
        train_dataset=dataset, callbacks=callbacks,
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_training_on_the_whole_vocabulary_is_training_with_the_teacher(tmp_path: Path) -> None:
    """k = vocab in fp32: the same batches and, up to rounding, the same losses; a smaller k starts below it."""
    cache = write(tmp_path / "all", blocks(), top_k=256, dtype="float32")
    live = make_trainer(tmp_path / "live", blocks(), teacher=copy.deepcopy(tiny_llama()), save_strategy="no")
    kept = make_trainer(tmp_path / "kept", cache.attach(blocks(), vocab_size=256, temperature=1.0), save_strategy="no")
    few = write(tmp_path / "few", blocks(), top_k=8).attach(blocks(), vocab_size=256, temperature=1.0)
    short = make_trainer(tmp_path / "short", few, save_strategy="no")
    for trainer in (live, kept, short):
        trainer.train()
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "live"), rel=2e-3)
    assert 0 < losses(tmp_path / "short")[0] < losses(tmp_path / "live")[0]


def test_resume_from_kept_logits_is_bit_identical(tmp_path: Path) -> None:
    cache = write(tmp_path / "logits", blocks(), top_k=16)
    data = cache.attach(blocks(), vocab_size=256, temperature=1.0)
    whole = make_trainer(tmp_path / "whole", data)
    whole.train()
    broken = make_trainer(tmp_path / "broken", data, callbacks=[Interrupt(6)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert (tmp_path / "broken/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_teach_then_train_through_recipe_and_command_line(tmp_path: Path) -> None:
    """The teacher saw the whole text; training holds a part of it out and finds its blocks all the same."""
    write_checkpoint(tmp_path)
    common = [
        "--data",
        str(tmp_path / "text.txt"),
        "--block-size",
        "32",
        "--top-k",
        "8",
        "-o",
        str(tmp_path / "logits"),
    ]
    result = CliRunner().invoke(app, ["teach", str(tmp_path / "model"), *common])
    assert result.exit_code == 0, result.output
    assert "blocks of 32 tokens" in result.output
    text = f"model: {tmp_path / 'model'}\nteacher: {tmp_path / 'logits'}\nrules: [{{scheme: W2G32}}]\n"
    text += f"data: {{source: text, path: {tmp_path / 'text.txt'}, block_size: 32, eval_tokens: 256}}\n"
    text += "train: {max_steps: 4, keep_best: true, keep_best_tokens: 64}"
    done = run(Recipe.parse(text), tmp_path / "run", quiet=True)
    assert done.scores["qat"].kl_to_teacher is not None
    with pytest.raises(ValueError, match=r"has temperature=1\.0, the run 2\.0"):
        run(Recipe.parse(text, ["objective.temperature=2.0"]), tmp_path / "b", quiet=True)
    with pytest.raises(ValueError, match="needs a teacher that runs"):
        run(Recipe.parse(text, ["objective.features=1.0"]), tmp_path / "c", quiet=True)
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        teach(str(tmp_path / "model"), None, tmp_path / "d", block_size=32, dtype="int8")
