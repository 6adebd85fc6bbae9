"""Walking models: what reaches a layer, block by block, and prepared models that hold a method's codes exactly."""

from __future__ import annotations

import copy
import typing
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.convert import Rule, convert, owned_layers, prepare, qat_layers
from fewbits.export import export_verified
from fewbits.inspection import inspect_model
from fewbits.pipeline import load_any, ptq_recipe, read_scores, run
from fewbits.ptq import METHODS, apply_ptq, check_options, gptq, hessian_of, rtn
from fewbits.ptq.calibration import run_model, to_batches
from fewbits.ptq.capture import find_blocks, walk
from fewbits.recipe import InitMethod, Recipe
from fewbits.report import write_report
from fewbits.scheme import Scheme
from fewbits.testing.tiny import TINY_MODELS, tiny_llama, toy_blocks, toy_text

RULE = Rule(scheme=Scheme.parse("W2A16G32"))
every_model = pytest.mark.parametrize("kind", list(TINY_MODELS))


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, _ in owned_layers(prepare(copy.deepcopy(model), RULE))]


def input_of(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What reaches a layer, by a hook on a plain forward pass."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            run_model(model, batch)
    handle.remove()
    return torch.cat(seen)


@every_model
def test_the_walk_sees_what_a_plain_forward_pass_sees(kind: str) -> None:
    model, blocks = TINY_MODELS[kind](), toy_blocks(5)
    names = linear_names(model)
    assert len(find_blocks(model, names)) == 2
    seen = []
    for stage in walk(model, names, blocks.split(2), need_targets=True):
        seen += stage.layers
        groups = stage.groups()
        assert sorted(name for group in groups for name in group.names) == sorted(stage.layers)
        found = stage.hessians(stage.layers)
        for name in stage.layers:
            expected = hessian_of(input_of(model, name, list(blocks.split(2))))
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
        assert stage.targets is not None
        for i in range(stage.num_batches):
            with torch.no_grad():
                assert torch.equal(stage.forward(i), stage.targets[i])
    assert seen == names


def test_groups_share_an_input_and_know_its_norm() -> None:
    model = tiny_llama()
    stage = next(iter(walk(model, linear_names(model), [toy_blocks(2)])))
    leaves = [tuple(name.rpartition(".")[2] for name in group.names) for group in stage.groups()]
    assert leaves == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    norms = [group.norm for group in stage.groups()]
    first = "model.layers.0."
    assert norms == [f"{first}input_layernorm", None, f"{first}post_attention_layernorm", None]


@pytest.mark.parametrize("quantized_prefix", [True, False])
def test_a_block_sees_the_blocks_before_it_quantized_or_not(quantized_prefix: bool) -> None:
    model, blocks = tiny_llama(), toy_blocks(4)
    original = copy.deepcopy(model)
    names = linear_names(model)
    stages = walk(model, names, blocks.split(2), quantized_prefix=quantized_prefix, need_targets=True)
    first = next(stages)
    for name in first.layers:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.data = torch.zeros_like(weight)
    second = next(stages)
    probe = second.layers[0]
    source = model if quantized_prefix else original
    expected = hessian_of(input_of(source, probe, list(blocks.split(2))))
    torch.testing.assert_close(second.hessians([probe])[probe], expected, rtol=1e-5, atol=1e-6)
    assert second.targets is not None
    kept = list(second.targets)
    seen: list[Tensor] = []
    handle = original.get_submodule("model.layers.1").register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        for batch in blocks.split(2):
            run_model(original, batch)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(kept, seen, strict=True))


@every_model
def test_rtn_is_prepare(kind: str) -> None:
    rules = [Rule(pattern="*.1.*", scheme=Scheme.parse("W1.58G32"), surrogate="jacquant"), RULE]
    ours = apply_ptq(TINY_MODELS[kind](), rules, "rtn")
    theirs = prepare(TINY_MODELS[kind](), rules)
    assert {k: v.tolist() for k, v in ours.state_dict().items()} == {
        k: v.tolist() for k, v in theirs.state_dict().items()
    }
    assert [(n, type(x), x.surrogate) for n, x in qat_layers(ours)] == [
        (n, type(x), x.surrogate) for n, x in qat_layers(theirs)
    ]


@every_model
def test_the_prepared_model_holds_the_codes(kind: str, tmp_path: Path) -> None:
    model, blocks = TINY_MODELS[kind](), toy_blocks(8)
    original = copy.deepcopy(model)
    model.train()
    apply_ptq(model, RULE, "gptq", blocks, batch_size=4)
    assert all(module.training for module in model.modules())
    model.eval()
    # the first layer of each block, solved by hand from what a plain forward pass shows
    name = next(n for n, _ in qat_layers(model))
    layer, plain = model.get_submodule(name), original.get_submodule(name)
    weight = plain.weight
    assert isinstance(weight, Tensor)
    w = weight.t() if type(plain).__name__ == "Conv1D" else weight
    by_hand = gptq(w, RULE.scheme, inputs=input_of(original, name, [blocks]))
    assert (layer.qtensor().codes != by_hand.qtensor.codes).float().mean() < 2e-3  # sums in another order
    save_prepared(model, None, tmp_path / "model")
    loaded, _ = load_prepared(tmp_path / "model")
    with torch.no_grad():
        before = run_model(model, blocks[:2])
        assert torch.equal(run_model(loaded, blocks[:2]), before)
        assert torch.equal(run_model(convert(model), blocks[:2]), before)


def test_gptq_beats_rtn_on_the_outputs_of_a_model() -> None:
    blocks, held_out = toy_blocks(16), toy_blocks(8, seed=9)
    teacher = tiny_llama()

    def error(method: str, **options: bool) -> float:
        model = apply_ptq(tiny_llama(), RULE, method, blocks, **options)
        with torch.no_grad():
            return float((run_model(model, held_out) - run_model(teacher, held_out)).square().mean())

    plain = error("rtn")
    assert error("gptq") < 0.8 * plain
    assert error("gptq", quantized_prefix=False, sequential=False) < 0.8 * plain


def test_tied_weights_and_embeddings_are_rounded_to_nearest() -> None:
    rules = [Rule(pattern="*embed_tokens", scheme=Scheme.parse("W4G32"), embeddings=True), RULE]
    model = apply_ptq(TINY_MODELS["llama_tied"](), rules, "gptq", toy_blocks(4))
    layers = dict(qat_layers(model))
    assert layers["lm_head"].owner is layers["model.embed_tokens"]
    expected = rtn(tiny_llama(tie=True).model.embed_tokens.weight, rules[0].scheme)  # type: ignore[union-attr]
    assert torch.equal(layers["lm_head"].qtensor().codes, expected.qtensor.codes)


def test_an_untied_head_has_its_own_stage() -> None:
    model = tiny_llama()
    original = copy.deepcopy(model)
    blocks = toy_blocks(4)
    apply_ptq(model, Rule(pattern="lm_head", scheme=RULE.scheme), "gptq", blocks, ignore=[])
    by_hand = gptq(original.lm_head.weight, RULE.scheme, inputs=input_of(original, "lm_head", [blocks]))
    assert torch.equal(model.lm_head.qtensor().codes, by_hand.qtensor.codes)


class Fork(nn.Module):
    """Blocks that do not follow each other: the walk must take the whole for one stage."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.never = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) + self.blocks[1](x)


def test_a_model_whose_blocks_do_not_chain_is_one_stage() -> None:
    model, x = Fork(), torch.randn(64, 32)
    stages = list(walk(model, ["blocks.0", "blocks.1", "never"], [x]))
    assert [stage.name for stage in stages] == [""]
    assert [group.names for group in stages[0].groups()] == [("blocks.0", "blocks.1"), ("never",)]
    before = copy.deepcopy(model)
    apply_ptq(model, Rule(scheme=Scheme.parse("W2")), "gptq", x)
    expected = gptq(before.blocks[1].weight, Scheme.parse("W2"), inputs=x)
    assert torch.equal(model.blocks[1].qtensor().codes, expected.qtensor.codes)
    assert torch.equal(model.never.qtensor().codes, rtn(before.never.weight, Scheme.parse("W2")).qtensor.codes)


def test_calibration_data_of_every_kind() -> None:
    cpu = torch.device("cpu")
    blocks = toy_blocks(9)
    for data in (blocks, list(blocks), [{"input_ids": row} for row in blocks]):
        batches = to_batches(data, 4, None, cpu)
        assert [len(batch) for batch in batches] == [4, 4, 1]
        assert torch.equal(torch.cat(batches), blocks)
    assert torch.equal(torch.cat(to_batches(blocks, 2, 3, cpu)), blocks[[0, 4, 8]])
    assert torch.equal(torch.cat(to_batches(blocks, 2, 99, cpu)), blocks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "gtpq"}, "unknown PTQ method 'gtpq'; did you mean gptq. use one of rtn, gptq"),
        ({"dampening": 1}, "'gptq' has no option 'dampening'; did you mean damping. it takes damping"),
        ({"blocks": None}, "'gptq' needs calibration data"),
        ({"blocks": torch.empty(0, 4)}, "no calibration data"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"rules": []}, "no rules"),
        ({"rules": Rule(pattern="*.q_prj", scheme=RULE.scheme)}, "chooses no layer; near names: .*q_proj"),
        ({"rules": Rule(scheme=Scheme.parse("W2G128"))}, "group_size=128 is larger"),
        ({"rules": Rule(scheme=Scheme.parse("W2", mode="dynamic"))}, "dynamic scales"),
        ({"damping": -1.0}, r"model.layers.0.self_attn.q_proj: damping=-1.0"),
    ],
)
def test_what_is_refused(call: dict[str, typing.Any], message: str) -> None:
    arguments = {"rules": RULE, "method": "gptq", "blocks": toy_blocks(2), **call}
    with pytest.raises(ValueError, match=message):
        apply_ptq(tiny_llama(), arguments.pop("rules"), arguments.pop("method"), arguments.pop("blocks"), **arguments)


def test_recipes_know_every_method() -> None:
    assert set(typing.get_args(InitMethod)) == set(METHODS)
    check_options("gptq", {"num_blocks": 3, "act_order": True})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tiny_llama().save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[2]).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(toy_text(300))
    return folder


def test_a_run_without_training_leaves_a_folder_that_every_command_takes(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = ptq_recipe(
        str(checkpoint / "model"), "gptq", "W2A16G32", text=checkpoint / "text.txt", options=["num_blocks=8"]
    )
    result = run(recipe, folder, quiet=True)
    assert list(result.scores) == ["fp", "rtn", "gptq"] == list(read_scores(folder / "eval.json"))
    assert Recipe.load(folder / "recipe.yaml") == recipe
    where, report = export_verified(folder, recipe.target)
    assert report.passed
    assert where == folder / "export" / "hf"
    assert len(inspect_model(load_any(folder)[0]).layers) == 14
    assert "Scores" in write_report(folder).read_text()
    with pytest.raises(ValueError, match="has no option 'dampening'"):
        run(recipe.model_copy(update={"init_options": {"dampening": 1}}), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_training_starts_from_the_codes_of_the_method(checkpoint: Path, tmp_path: Path) -> None:
    start = ptq_recipe(str(checkpoint / "model"), "gptq", "W2A16G32", text=checkpoint / "text.txt")
    train = Recipe.parse(start.to_yaml(), ["train.max_steps=1", "train.learning_rate=1e-12", "train.batch_size=2"])
    before = run(start, tmp_path / "ptq", quiet=True)
    after = run(train, tmp_path / "qat", quiet=True)
    assert list(after.scores) == ["fp", "rtn", "gptq", "qat"]
    assert after.scores["gptq"] == before.scores["gptq"]
    ours, theirs = dict(qat_layers(after.model)), dict(qat_layers(before.model))
    assert all(torch.equal(ours[n].qtensor().codes, theirs[n].qtensor().codes) for n in theirs)
