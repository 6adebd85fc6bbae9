"""The command line, end to end on a tiny run, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import fewbits
from fewbits.cli import app
from fewbits.ptq import METHODS as PTQ_METHODS
from fewbits.testing.tiny import tiny_llama, toy_text


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model, made by the command itself."""
    folder = tmp_path_factory.mktemp("cli")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[2]).save_pretrained(folder / "model")
    tiny_llama().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(toy_text(100))
    (folder / "r.yaml").write_text(
        f"model: {folder / 'model'}\nrules: [{{scheme: W2A16G32, surrogate: {{name: jacquant, interval: 2}}}}]\n"
        f"data: {{source: text, path: {folder / 'text.txt'}, block_size: 32, eval_tokens: 128}}\n"
        "train: {max_steps: 4, batch_size: 2, logging_steps: 1}\n"
    )
    result = call("train", folder / "r.yaml", "-o", folder / "run", "--quiet", "train.max_steps=3")
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output
    return folder


def test_export_verify_and_report(finished: Path) -> None:
    run = finished / "run"
    for target in ("hf", "dequantized"):
        result = call("export", run, "--target", target)
        assert result.exit_code == 0, result.output
        assert (run / "export" / target / "verify.json").exists()
    result = call("verify", run)
    assert result.exit_code == 0
    for cell in ("codes equal", "max |diff|", "top-1", "verdict", "weights", "dequantized"):
        assert cell in result.output, result.output
    assert set(json.loads((run / "verify.json").read_text())["targets"]) == {"hf", "dequantized"}
    assert call("verify", run, "--no-engines").exit_code == 0
    assert "already" in call("export", run, "--target", "hf").output
    assert call("export", run, "--overwrite").exit_code == 0
    page = Path(call("report", run).output.strip()).read_text()
    assert "Export hf" in page


def test_one_flipped_bit_fails_with_status_one(finished: Path) -> None:
    folder = finished / "run" / "export" / "hf-damaged"
    assert call("export", finished / "run", "--target", "hf", "-o", folder).exit_code == 0
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    result = call("verify", finished / "run", folder)
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_eval_inspect_and_generate(finished: Path) -> None:
    result = call(
        "eval", finished / "run", "--text", finished / "text.txt", "--block-size", 32, "--teacher", finished / "model"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["kl_to_teacher"] > 0
    assert "W2A16G32" in call("inspect", finished / "run").output
    assert "W1.58A16G64" in call("inspect", finished / "model", "--scheme", "W1.58A16G64").output
    text = call("generate", finished / "run", "--prompt", "the fox", "--max-new-tokens", 5)
    assert text.exit_code == 0, text.output
    assert text.output.startswith("the fox")
    assert "no chat template" in call("chat", finished / "run").output


def test_the_map_of_grids_and_targets() -> None:
    result = call("targets", "hf", "gguf:q2_0", "--markdown")
    assert result.exit_code == 0, result.output
    assert "gguf:q2_0" in result.output
    assert "lossless" in call("targets", "hf").output
    assert "unknown target 'gguff'" in call("targets", "gguff").output


def test_recipes_are_listed_and_printed() -> None:
    assert "demo-jacquant" in call("recipes").output
    assert "rules:" in call("recipes", "demo-jacquant").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing.yaml"], "neither a file nor a shipped recipe"),
        (["train", "demo-jacquant", "train.max_step=3"], "unknown key; did you mean max_steps"),
        (["train", "demo-jacquant", "model=/nowhere/at/all"], "nowhere"),
        (["export", "nowhere"], "nowhere"),
        (["export", "."], "holds no recipe.yaml; it is not a run folder"),
        (["verify", "nowhere"], "the folder nowhere does not exist"),
        (["verify", "."], "is neither a run folder nor a prepared model"),
        (["inspect", "embeded"], "did you mean embedded?"),
        (["ptq", "embedded", "--method", "gptqq"], "unknown PTQ method 'gptqq'; did you mean gptq?"),
        (["ptq", "embedded", "damping=abc"], "option damping='abc' of 'gptq' must be a number, such as 0.01"),
        (["train", "W2A8G64", "init_options.num_blocks=2.5"], "must be a whole number, such as 64"),
        (
            ["train", "W2G64", "train.lr_scheduler_type=cosin"],
            "'cosin' is unknown; did you mean cosine",
        ),
        (["train", "W2G64", "model=embeded"], "did you mean embedded?"),
        (["train", "W2G64", "init=rtn", "rules.0.pattern=nope"], "rule 'nope' chooses no layer"),
        (
            ["train", "W2G64", "init=rtn", "train.freeze=[nope]", "data.eval_tokens=2", "data.block_size=2"],
            "matches no parameter",
        ),
        (["train", "W2G64", "-o", "some.txt"], "some.txt is a file, and some.txt is to be a folder"),
        (["arena", "--schemes", "W2A8"], "error: scheme 'W2A8' is not of the form"),
        (["arena", "--budget", "tokens=abc"], "error: budget 'tokens=abc' is not of the form"),
        (["arena", "--methods", "qest"], "did you mean quest?"),
        (["arena", "--learning-rates", "x"], "learning rates 'x' are not numbers separated by commas, e.g. 2e-4,6e-4"),
        (["arena", "--model", "/nowhere", "--methods", "rtn", "--schemes", "W2"], "the folder /nowhere does not exist"),
        (["arena", "-o", "some.txt", "--methods", "rtn"], "some.txt is a file, and some.txt is to be a folder"),
        (["generate", "embedded", "--prompt", "x", "--top-p", "2"], "error: top_p=2.0 is outside (0, 1]"),
        (["report", "nowhere"], "not a run folder"),
        (["inspect", "embedded", "--scheme", "W9"], "not of the form"),
        (["demo", "--model", "gpt5"], "unknown; use 'embedded' or 'smollm2'"),
        (["recipes", "demo-jackquant"], "did you mean demo-jacquant"),
    ],
)
def test_errors_are_one_line_with_status_one(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some.txt").write_text("mine")
    result = call(*arguments)
    assert result.exit_code == 1
    left = [path for path in tmp_path.rglob("*") if path.is_file() or path.name != "runs"]
    assert left == [tmp_path / "some.txt"], "nothing is left behind, so that the mended command starts afresh"
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_failed_overwrite_keeps_the_earlier_run(finished: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*") if path.is_file()}
    result = call("train", finished / "r.yaml", "-o", finished / "run", "--overwrite", "model=/nowhere")
    assert result.exit_code == 1
    assert {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*") if path.is_file()} == files


def test_version() -> None:
    assert call("--version").output.strip() == f"fewbits {fewbits.__version__}"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--debug", "report", str(tmp_path)])
    assert isinstance(result.exception, ValueError)


def test_help_of_ptq_names_every_method() -> None:
    text = call("ptq", "--help").output
    assert set(PTQ_METHODS) <= set(re.findall(r"\w+", text))


def test_help_of_every_command_shows_an_example() -> None:
    names = [c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands]
    assert len(names) >= 8
    for name in names:
        result = call(name.removesuffix("_command"), "--help")
        assert result.exit_code == 0
        assert "xample" in result.output
        assert "error" not in result.output
