"""GGUF files: codes, scales and all other tensors come back bit for bit, and Transformers computes the same logits."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_common import LLAMA3_ROPE, byte_level, gemma3, llama, logits, scheme, some_ids, trained, untrained, written
from transformers import AutoModelForCausalLM

from fewbits import Rule, Scheme, convert, prepare
from fewbits.export import export, export_verified
from fewbits.grids import Codebook, HalfShifted
from fewbits.qtensor import QTensor
from fewbits.rotations import Rotation
from fewbits.targets import get_target
from fewbits.targets.gguf import GGUF, TENSORS_FILE, TYPES
from fewbits.targets.gguf_contents import FILE, LAYERS_KEY
from fewbits.targets.gguf_file import GGUFTensor, write_gguf
from fewbits.targets.gguf_layer import pack_layer, unpack_layer
from fewbits.targets.gguf_model import ARCHITECTURES, architecture, gguf_name, rope_factors
from fewbits.targets.gguf_reader import read_gguf
from fewbits.testing.tiny import tiny_gpt2
from fewbits.verify import verify

INTEGER_CODEBOOK = Codebook((-7.0, -2.0, 2.0, 7.0))
GRIDS = ("W1", "W1.58", "W2", "W3", "W4", "W5", "W8", "W2H", "W3H", "W4H", "codebook")
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "group 32": ("A16G32", {}),
    "group 64": ("A16G64", {}),
    "group 128": ("A16G128", {}),
    "group 256": ("A16G256", {}),
    "channel": ("", {}),
    "tensor": ("", {"granularity": "per_tensor"}),
    "group 32 in superblocks": ("A16G32", {"superblock": 256}),
    "group 64 in superblocks": ("A16G64", {"superblock": 256}),
    "group 64, fp16 scales": ("A16G64", {"dtype": "fp16"}),
    "group 256, fp16 scales": ("A16G256", {"dtype": "fp16"}),
    "group 64, bf16 scales": ("A16G64", {"dtype": "bf16"}),
}
HOLDS = {
    ("W1", "group 64"): "q2_0 q4_0 q4_1 q5_0 q8_0",
    ("W1", "group 128"): "q2_0 q1_0 q4_0 q4_1 q5_0 q8_0",
    ("W1.58", "group 256"): "tq2_0 tq1_0 q2_0 q2_k q3_k q4_0 q4_1 q5_0 q8_0",
    ("W2", "group 32"): "q4_0 q4_1 q5_0 q8_0",
    ("W2", "group 64"): "q2_0 q4_0 q4_1 q5_0 q8_0",
    ("W2", "channel"): "tq2_0 q2_0 q2_k q3_k q4_0 q4_1 q5_0 q8_0",
    ("W2", "group 32 in superblocks"): "q2_k q3_k",
    ("W2H", "group 64"): "q4_0 q4_1 q5_0 q8_0",
    ("W2H", "group 256"): "q2_k q3_k q4_0 q4_1 q5_0 q8_0",
    ("W2H", "group 64 in superblocks"): "q2_k q3_k",
    ("W3", "group 256, fp16 scales"): "q3_k q4_0 q4_1 q5_0 q8_0",
    ("W4H", "channel"): "q5_0 q8_0",
    ("W8", "group 32"): "q8_0",
    ("codebook", "group 64"): "q4_0 q4_1 q5_0 q8_0",
}
"""Some rows of the map, written down by hand; the rest is held to be what is written and read back."""


def scheme_of(grid: str, layout: str) -> Scheme:
    suffix, options = LAYOUTS[layout]
    if grid == "codebook":
        return scheme(f"W2{suffix}", **options, grid=INTEGER_CODEBOOK)
    return scheme(f"{grid}{suffix}", **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_group_and_type_comes_back_or_is_refused(grid: str, layout: str, tmp_path: Path) -> None:
    what = scheme_of(grid, layout)
    model = trained(what)
    held = []
    for kind in (None, *TYPES):
        target = GGUF(kind)
        reason = target.holds(what, (256, 256))
        if reason is None:
            written(model, target, tmp_path / target.name)
            held.append(kind)
        else:
            assert kind is None or kind.upper() in reason
            with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj \(W"):
                target.write(model, byte_level(), tmp_path)
    assert "f32" in held
    assert (None in held) == (len(held) > 1)
    if (grid, layout) in HOLDS:
        assert [kind for kind in held if kind not in (None, "f32")] == HOLDS[grid, layout].split()


@pytest.mark.parametrize(
    ("text", "kind"),
    [("W2HA16G256", "q2_k"), ("W3A16G256", "q3_k"), ("W2A16G64", "q4_0"), ("W1.58A16G256", "tq1_0"),
     ("W1.58A16G256", "tq2_0"), ("W2A16G256", "tq2_0"), ("W2HA16G64", "f32"), ("W3HA16G32", "q4_1"),
     ("W4HA16G32", "q5_0"), ("W8A16G32", "q8_0")],
)  # fmt: skip
def test_transformers_reads_the_file_to_the_same_logits(text: str, kind: str, tmp_path: Path) -> None:
    model, target = trained(scheme(text)), GGUF(kind)
    written(model, target, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=torch.float32).eval()
    ids = some_ids()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("kind", ["llama tied", "llama small heads", "qwen2", "qwen3", "gemma3"])
def test_transformers_reads_every_architecture_that_it_knows(kind: str, tmp_path: Path) -> None:
    model, target = trained(scheme("W2A16G32"), kind), GGUF("q4_0")
    written(model, target, tmp_path)
    loaded = target.load(tmp_path, model)
    ids = some_ids()
    assert loaded is not None
    assert torch.equal(logits(loaded, ids), logits(target.reference(model), ids))


@pytest.mark.parametrize("kind", ["llama biases", "llama3 rope", "linear rope", "qwen3 small heads", "gemma"])
def test_what_transformers_would_read_wrongly_is_left_to_the_engine(kind: str, tmp_path: Path) -> None:
    model, target = trained(scheme("W2A16G32"), kind), GGUF("q4_0")
    assert target.load(written(model, target, tmp_path), model) is None


def test_types_that_transformers_does_not_know_are_left_to_the_engine(tmp_path: Path) -> None:
    model, target = trained(scheme("W2A16G64")), GGUF("q2_0")
    assert target.load(written(model, target, tmp_path), model) is None


def test_automatic_types_and_their_reasons_are_kept(tmp_path: Path) -> None:
    rules = [
        Rule(pattern="*.q_proj", scheme=scheme("W1.58A16G256")),
        Rule(pattern="*.k_proj", scheme=scheme("W1A16G128")),
        Rule(pattern="*.v_proj", scheme=scheme("W2HA16G64")),
        Rule(pattern="*.mlp.*", scheme=scheme("W2HA16G64", superblock=256)),
    ]
    model = prepare(untrained("llama one layer"), rules)
    rows = {row["tensor"]: row for row in json.loads((written(model, GGUF(), tmp_path) / TENSORS_FILE).read_text())}
    kinds = {name: row["type"] for name, row in rows.items()}
    assert kinds == {
        "blk.0.attn_q.weight": "TQ2_0", "blk.0.attn_k.weight": "Q1_0", "blk.0.attn_v.weight": "Q4_0",
        "blk.0.ffn_gate.weight": "Q2_K", "blk.0.ffn_up.weight": "Q2_K", "blk.0.ffn_down.weight": "Q2_K",
    }  # fmt: skip
    assert rows["blk.0.attn_q.weight"]["layer"] == "model.layers.0.self_attn.q_proj"
    assert "fastest 2-bit type" in rows["blk.0.attn_q.weight"]["reason"]
    assert read_gguf(tmp_path / FILE).tensors["blk.0.attn_output.weight"].gguf_type == "F32"  # not quantized


def test_a_converted_model_gives_the_same_file(tmp_path: Path) -> None:
    what = scheme("W2A16G64")
    prepared = train_copy(what)
    written(prepared, GGUF(), tmp_path / "a")
    written(convert(prepared), GGUF(), tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def train_copy(what: Scheme, kind: str = "llama one layer", dtype: torch.dtype = torch.float32) -> Any:
    trained.cache_clear()
    return trained(what, kind, dtype)


@pytest.mark.parametrize("kind", ["llama", "llama tied"])
def test_quantized_embeddings(kind: str, tmp_path: Path) -> None:
    model: Any = prepare(untrained(kind), Rule(scheme=scheme("W4A16G32"), embeddings=True), ignore=[])
    target = GGUF("q4_0")
    file = read_gguf(written(model, target, tmp_path) / FILE)
    assert file.tensors["token_embd.weight"].gguf_type == "Q4_0"
    assert ("output.weight" in file.tensors) == (kind == "llama")
    loaded = target.load(tmp_path, model)
    assert torch.equal(logits(loaded, some_ids()), logits(model, some_ids()))


def test_only_the_tied_head_chosen_still_names_the_embedding(tmp_path: Path) -> None:
    model: Any = prepare(untrained("llama tied"), Rule(pattern="lm_head", scheme=scheme("W4A16G32")), ignore=[])
    written(model, GGUF(), tmp_path)
    kinds = {name: info.gguf_type for name, info in read_gguf(tmp_path / FILE).tensors.items()}
    assert kinds["token_embd.weight"] == "Q4_0"
    assert "output.weight" not in kinds


def test_matrices_that_were_not_quantized_take_the_smallest_exact_type(tmp_path: Path) -> None:
    model = prepare(untrained("llama one layer"), Rule(pattern="*.mlp.*", scheme=scheme("W2A16G64")))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.bfloat16())
        model.model.layers[0].self_attn.q_proj.weight.copy_(model.model.layers[0].self_attn.q_proj.weight.half())
        model.model.norm.weight.fill_(1.0)  # llama.cpp wants fp32 there, however round the numbers
    kinds = {n: info.gguf_type for n, info in read_gguf(written(model, GGUF(), tmp_path) / FILE).tensors.items()}
    assert kinds["token_embd.weight"] == "BF16"
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["output.weight"] == kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_bf16_model_is_compared_in_fp32(tmp_path: Path) -> None:
    model, target = trained(scheme("W3A16G32"), "llama one layer", torch.bfloat16), GGUF("q4_0")
    written(model, target, tmp_path)
    kinds = {info.gguf_type for n, info in read_gguf(tmp_path / FILE).tensors.items() if n.endswith("embd.weight")}
    assert kinds == {"BF16"}
    assert torch.equal(logits(target.load(tmp_path, model), some_ids()), logits(target.reference(model), some_ids()))


def test_llama3_factors_are_those_of_transformers() -> None:
    model = llama(rope_parameters=LLAMA3_ROPE)
    plain = llama().model.rotary_emb.inv_freq
    factors = rope_factors(model.config)
    assert factors is not None
    torch.testing.assert_close(torch.from_numpy(factors), plain / model.model.rotary_emb.inv_freq, rtol=3e-7, atol=0)


def test_export_and_verify(tmp_path: Path) -> None:
    model = trained(scheme("W2A16G64"))
    folder, report = export_verified(model, "gguf:q4_0", tmp_path / "q4_0", tokenizer=byte_level())
    assert report.passed
    assert report.num_layers == 7
    assert report.logits is not None
    assert report.logits.bitwise_equal
    _, report = export_verified(model, get_target("gguf"), tmp_path / "auto", tokenizer=byte_level())
    assert report.passed
    assert [v.level for v in report.engines] == ["weights", "float", "int8"]
    file = read_gguf(folder / FILE)
    raw = bytearray((folder / FILE).read_bytes())
    raw[file.tensors["blk.0.ffn_up.weight"].offset + 7] ^= 1
    (folder / FILE).write_bytes(raw)
    report = verify(model, folder)
    assert not report.passed
    assert any(row.where == "model.layers.0.mlp.up_proj" and row.num_different == 1 for row in report.differences)


def test_what_cannot_be_exact_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = trained(scheme("W2HA16G64"))
    with pytest.raises(ValueError, match=r"cannot hold model\.layers\.0.*group_size=64 is not a multiple of 256"):
        export(model, "gguf:q2_k", tmp_path / "x", tokenizer=byte_level())
    with pytest.raises(ValueError, match="needs the tokenizer"):
        export(model, "gguf", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "what", "reason"),
    [
        ("q4_0", scheme("W2A16G32", dtype="fp32"), "scales of dtype 'fp32' do not meet"),
        ("q4_1", scheme("W3HA16G32", dtype="fp16"), "use scale dtype portable"),
        ("q2_0", scheme("W2A16G64", rotation=Rotation(kind="hadamard", block_size=64)), "no engine undoes"),
        ("q2_0", scheme("W2A16G32"), "group_size=32 is not a multiple of 64"),
        ("tq1_0", scheme("W2A16G256"), "do not fit"),
        (None, scheme("W2A16G64", grid=Codebook.lloyd_max(4)), "integer codebooks only"),
        (None, scheme("W2A16G32").with_scale(granularity="per_channel", group_size=None), "not a multiple"),
    ],
)
def test_the_failing_condition_is_named(kind: str | None, what: Scheme, reason: str) -> None:
    found = GGUF(kind).holds(what, (8, 250 if reason == "not a multiple" else 256))
    assert found is not None
    assert reason in found


def test_f32_holds_what_no_type_holds(tmp_path: Path) -> None:
    what = scheme("W2A16G64", grid=Codebook.lloyd_max(4), rotation=Rotation(kind="hadamard", block_size=64))
    model = trained(what)
    assert GGUF().holds(what, (256, 256)) is not None
    target = GGUF("f32")
    written(model, target, tmp_path)
    assert torch.equal(logits(target.load(tmp_path, model), some_ids()), logits(model, some_ids()))


def test_super_scales_that_the_file_does_not_determine_are_refused() -> None:
    what = scheme("W2HA16G64", superblock=256)
    codes = torch.zeros(2, 256, dtype=torch.int8)
    super_scale, multipliers = torch.full((2, 1), 0.25), torch.tensor([[1, 2, 3, 4], [15, 1, 1, 1]], dtype=torch.uint8)
    q = QTensor(codes, super_scale * multipliers, what, super_scale, multipliers)
    with pytest.raises(ValueError, match="largest multiplier"):
        pack_layer(q, "Q2_K")
    tiny = torch.full((2, 1), 2.0**-14)  # an all-zero group: the super scale is at its floor
    q = QTensor(codes, tiny * multipliers, what, tiny, multipliers)
    back = unpack_layer(pack_layer(q, "Q2_K"), what, "Q2_K")
    assert torch.equal(back.multipliers, multipliers)  # type: ignore[arg-type]
    assert torch.equal(back.super_scale, tiny)  # type: ignore[arg-type]


def test_fp16_scales_near_the_floor_are_refused_when_they_are_packed() -> None:
    what = Scheme.parse("W2HA16G64", dtype="fp16")
    assert GGUF("q4_0").holds(what, (8, 64)) is None
    scale = torch.tensor([[2.0**-14 * (1 + 2**-10)]])
    with pytest.raises(ValueError, match="not a finite fp16 number"):
        pack_layer(QTensor(torch.zeros(1, 64, dtype=torch.int8), scale, what), "Q4_0")
    assert isinstance(what.grid, HalfShifted)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_gpt2().config, "model types llama, qwen2, qwen3, gemma, gemma3_text, not 'gpt2'"),
        (llama(hidden_act="gelu").config, "hidden_act='gelu'"),
        (gemma3(final_logit_softcapping=30.0).config, "final_logit_softcapping=30.0"),
        (gemma3(query_pre_attn_scalar=128).config, "query_pre_attn_scalar=128.*only 256"),
        (gemma3(layer_types=["full_attention"] * 7).config, "layer_types"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture(config)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
         "yarn with beta_fast=16.0"),
    ],
)  # fmt: skip
def test_rotary_embeddings_that_llama_cpp_does_not_compute_are_refused(
    rope: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = prepare(llama(rope_parameters={"rope_theta": 1e4} | rope), Rule(scheme=scheme("W2A16G64")))
    with pytest.raises(ValueError, match=message):
        GGUF().write(model, byte_level(), tmp_path)


def test_unknown_types_are_named() -> None:
    with pytest.raises(ValueError, match="GGUF type 'q6_k' is no target"):
        GGUF("q6_k")
    assert get_target("gguf:tq2_0") == GGUF("tq2_0")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid export, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("small")
    GGUF().write(prepare(untrained("llama one layer"), Rule(scheme=scheme("W2A16G64"))), byte_level(), folder)
    return folder


def rewritten(small: Path, folder: Path, change: Any) -> Path:
    """A copy whose metadata and tensors went through ``change``."""
    file = read_gguf(small / FILE)
    tensors = {n: GGUFTensor(name=n, shape=i.shape, gguf_type=i.gguf_type, data=file.read(n))
               for n, i in file.tensors.items()}  # fmt: skip
    metadata = dict(file.metadata)
    change(metadata, tensors)
    write_gguf(folder / FILE, metadata, tensors.values())
    return folder


def damage_layers(**changes: Any) -> Any:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        data = json.loads(metadata[LAYERS_KEY])
        data.update(changes)
        metadata[LAYERS_KEY] = json.dumps(data)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.pop(LAYERS_KEY), "missing or damaged"),
        (lambda m, t: m.update({LAYERS_KEY: "[" * 100_000}), "missing or damaged"),
        (lambda m, t: m.update({LAYERS_KEY: np.uint32(1)}), "missing or damaged"),
        (damage_layers(schemes=[]), "missing or damaged"),
        (damage_layers(format_version=2), "format version 2"),
        (damage_layers(layers={"a": ["blk.0.attn_q.weight", 0], "b": ["blk.0.attn_q.weight", 0]}), "twice"),
        (damage_layers(layers={"a": ["blk.9.attn_q.weight", 0]}), "which the file does not have"),
        (damage_layers(layers={"a": ["output_norm.weight", 0]}), "stores weights, not codes|in_features|group_size"),
        (lambda m, t: m.update({"general.architecture": "mamba"}), "architecture 'mamba'"),
        (lambda m, t: m.pop("llama.attention.head_count"), "head_count is None"),
        (lambda m, t: m.update({"llama.attention.head_count": np.uint32(2)}), "256 rows; its heads have 128"),
        (lambda m, t: t.pop("blk.0.attn_q.weight"), "which the file does not have"),
    ],
)
def test_foreign_and_damaged_files_are_clear_errors(change: Any, message: str, small: Path, tmp_path: Path) -> None:
    rewritten(small, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        GGUF().read_codes(tmp_path)


def test_rows_that_disagree_with_a_per_tensor_scheme_are_refused() -> None:
    one, each = scheme("W1.58", granularity="per_tensor"), scheme("W1.58")
    codes = torch.ones(2, 256, dtype=torch.int8)
    data = pack_layer(QTensor(codes, torch.tensor([[0.5], [0.25]]), each), "TQ2_0")
    with pytest.raises(ValueError, match="scales of a per_tensor scheme differ"):
        unpack_layer(data, one, "TQ2_0")


def test_a_missing_file_and_a_tensor_of_no_parameter(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        GGUF().read_codes(tmp_path)

    def change(metadata: Any, tensors: dict[str, GGUFTensor]) -> None:
        norm = tensors.pop("output_norm.weight")
        tensors["x"] = GGUFTensor(name="x.weight", shape=norm.shape, gguf_type="F32", data=norm.data)

    with pytest.raises(ValueError, match="belongs to no parameter of llama"):
        GGUF().read_tensors(rewritten(small, tmp_path, change))


def test_no_damage_to_the_bytes_makes_anything_but_a_value_error(small: Path, tmp_path: Path) -> None:
    raw = (small / FILE).read_bytes()
    header = min(info.offset for info in read_gguf(small / FILE).tensors.values())
    shutil.copy(small / TENSORS_FILE, tmp_path)
    dice = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(raw)
        for _ in range(dice.choice([1, 1, 4, 64])):
            damaged[dice.randrange(dice.choice([64, header, len(raw)]))] = dice.randrange(256)
        if dice.random() < 0.2:
            del damaged[dice.randrange(len(damaged)) :]
        (tmp_path / FILE).write_bytes(damaged)
        try:
            GGUF().read_codes(tmp_path)
            GGUF().read_tensors(tmp_path)
        except ValueError:
            refused += 1
    assert refused > 40


def test_every_architecture_has_distinct_names() -> None:
    for found in ARCHITECTURES.values():
        assert len(set(found.block.values())) == len(found.block)


def test_a_graph_without_an_output_matrix_takes_none() -> None:
    assert gguf_name(ARCHITECTURES["gemma3_text"], "lm_head.weight") == "output.weight"
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        with pytest.raises(ValueError, match="gemma has no place for"):
            gguf_name(ARCHITECTURES["gemma"], name)
