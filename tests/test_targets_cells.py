"""Every grid and group that a target holds is trained, exported, read back and compared with zero tolerance.

The cells come from the code that prints ``fewbits targets``, so that none can be forgotten. One model is trained with
every scheme of the map in a layer of its own: block i has grid i, and its seven layers have the seven kinds of groups.
Each target is given that model once; a layer whose scheme it does not hold is replaced by a copy of one that it does.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gguf_common import VOCAB_SIZE, byte_level
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import Rule, prepare
from fewbits.convert import qat_layers, replace_module_
from fewbits.export import export
from fewbits.qtensor import QTensor
from fewbits.targets import TARGETS, get_target
from fewbits.targets.engine import EngineCheck
from fewbits.targets.matrix import GRIDS, GROUPS, Held, held, target_matrix
from fewbits.testing.tiny import toy_blocks

WIDE = "G256"
"""The layer whose rows are 512 long, so that they have two such groups."""
LEAVES = dict(
    zip(
        [*(group for group in GROUPS if group != WIDE), WIDE],
        [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))],
        strict=True,
    )
)
SHAPES = {
    group: {"mlp.down_proj": (256, 512), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256)}.get(leaf, (256, 256))
    for group, leaf in LEAVES.items()
}


def layer_name(grid: str, group: str) -> str:
    return f"model.layers.{list(GRIDS).index(grid)}.{LEAVES[group]}"


@functools.lru_cache(maxsize=1)
def trained() -> Any:
    """All schemes of the map in one model, after a few steps that move codes and scales."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=len(GRIDS),
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    rules = [
        Rule(pattern=layer_name(grid, group), scheme=scheme.with_scale(rule="gaussian", **parts))
        for grid, scheme in GRIDS.items()
        for group, parts in GROUPS.items()
    ]
    model: Any = prepare(LlamaForCausalLM(config), rules)
    before = {name: layer.qtensor() for name, layer in qat_layers(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(2):
        ids = toy_blocks(2, 16, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in qat_layers(model):
        q = layer.qtensor()
        assert not torch.equal(q.scale, before[name].scale), f"{name}: training moved no scale"
        if len(q.scheme.grid.levels) > 2:
            assert not torch.equal(q.codes, before[name].codes), f"{name}: training moved no code"
    return model.eval()


class Export(NamedTuple):
    model: Any
    codes: dict[str, QTensor] | None
    tensors: dict[str, Tensor]
    expected: dict[str, Tensor]
    engine: dict[str, Tensor]


def exported(name: str, parent: Path) -> Export:
    """The model with the layers that a target holds, and all that it reads back, also through the engine's own eyes."""
    target, model = get_target(name), copy.deepcopy(trained())
    cells = held(target, SHAPES)
    keep = {layer_name(cell.grid, cell.group) for cell in cells}
    stand_ins = {shape: next((layer_name(c.grid, c.group) for c in cells if SHAPES[c.group] == shape), None)
                 for shape in SHAPES.values()}  # fmt: skip
    for grid in GRIDS:
        for group in GROUPS:
            if (place := layer_name(grid, group)) not in keep:
                stand_in = stand_ins[SHAPES[group]]
                module: Any = model.get_submodule(place)
                if stand_in is not None:
                    module = copy.deepcopy(model.get_submodule(stand_in))
                else:
                    module = torch.nn.Linear(*SHAPES[group][::-1], bias=False)
                replace_module_(model, place, module)
    folder = export(model, target, parent / name.replace(":", "-"), tokenizer=byte_level())
    codes, tensors = target.read_codes(folder), target.read_tensors(folder)
    checks: list[EngineCheck] = [check for check in target.engine_checks(folder) if check.weights is not None]
    engine = {layer: weight for check in checks if check.weights is not None for layer, weight in check.weights()}
    return Export(model, codes, tensors, target.expected_tensors(model), engine)


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_target_holds_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    found = exported(name, tmp_path)
    cells = held(get_target(name), SHAPES)
    wrong = {f"{cell.grid} {cell.group}": fault for cell in cells for fault in faults(cell, found)}
    assert cells
    assert not wrong
    assert found.tensors.keys() == found.expected.keys()
    assert all(torch.equal(found.tensors[key], value) for key, value in found.expected.items())
    if name.startswith(("gguf", "mlx")) and found.codes is not None:
        assert found.engine.keys() == found.codes.keys(), "the engine's own dequantizer was asked too"


def faults(cell: Held, found: Export) -> Iterator[str]:
    """What is not as it was trained."""
    name = layer_name(cell.grid, cell.group)
    layer: Any = found.model.get_submodule(name)
    q, weight = layer.qtensor(), layer.quantized_weight().detach()
    if q.scheme.with_scale(rule=cell.scheme.scale.rule) != cell.scheme:
        yield "another scheme was trained"
    if not torch.equal(q.dequantize(), weight):
        yield "codes are not what training computes with"
    if name in found.engine and not torch.equal(found.engine[name], weight):
        yield "the engine decodes another weight"
    if found.codes is None:
        stored = found.tensors[f"{name}.weight"]
        exact = cell.judgement.verdict == "lossless"  # else one cast, as the condition says
        if not (torch.equal(stored.float(), weight) if exact else torch.equal(stored, weight.to(stored.dtype))):
            yield "another weight is stored"
        return
    again = found.codes[name]
    same = [
        again.scheme == q.scheme,
        torch.equal(again.codes, q.codes),
        torch.equal(again.scale, q.scale),
        (again.multipliers is None) == (q.multipliers is None),
        again.multipliers is None or torch.equal(again.multipliers, q.multipliers),
        again.super_scale is None or torch.equal(again.super_scale, q.super_scale),
        torch.equal(again.dequantize(), weight),
    ]
    if not all(same):
        yield f"scheme, codes, scales, parts, multipliers, super scales, weight are equal: {same}"


def test_the_cells_are_those_of_the_map() -> None:
    """At the shapes of this model as at the shape of the map, so that no cell is missing here."""
    matrix = target_matrix()
    listed = {(cell.target, cell.grid, cell.group) for target in TARGETS.values() for cell in held(target, SHAPES)}
    of_map = {
        (target, grid, group)
        for target, row in matrix.items()
        for grid, cell in row.items()
        for group, judgement in cell.judgements.items()
        if judgement.verdict != "cannot"
    }
    assert listed == of_map
    assert len(listed) > 1000
    assert {target for target, _, _ in listed} == set(TARGETS)
