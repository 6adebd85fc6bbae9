r"""The promises that every method of the arena keeps, whatever its parts: one function that raises on a breach.

::

    @pytest.mark.parametrize("name", METHODS)
    def test_method(name):
        check_method(name, "W2G32")
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.arena import METHODS, ArenaSettings, Method
from fewbits.arena.execute import Batches, StepTimes, train_method
from fewbits.arena.methods import split_scheme
from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.convert import convert, owned_layers
from fewbits.data import TokenBlocks
from fewbits.recipe import Recipe
from fewbits.surrogates import STE
from fewbits.testing.tiny import tiny_llama, toy_blocks

STEPS = 3
LEARNING_RATE = 2e-3


def check_method(name: str, scheme: str) -> None:
    """Train a tiny model for a few steps by the method's own recipe, and hold it to the library's promises.

    1. The recipe is a value: written as YAML and read back it is the same.
    2. The same call ends at the same weights, bit for bit, and the teacher is not touched.
    3. Training moves the quantized weights.
    4. The surrogate does not change the forward pass: with the identity in its place logits are the same, bit for bit.
    5. Every group of dequantized weights has at most as many values as the grid has levels.
    6. What trains is what ships: logits of the converted model and of the model saved and read back are those of the
       fake-quantized one, bit for bit.

    Args:
        name: of :data:`fewbits.arena.METHODS`.
        scheme: such as ``W2G32``.

    Raises:
        fewbits.arena.NotForScheme: if the method is not defined there.
        AssertionError: for a broken promise.

    Example:
        >>> check_method("ewgs", "W2G32")
    """
    method = METHODS[name].at(split_scheme(scheme)[0])
    recipe = _recipe(name, scheme, method)
    assert Recipe.parse(recipe.to_yaml()) == recipe, "the recipe does not survive YAML"

    model, start = _run(recipe, method)
    again, _ = _run(recipe, method)
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{key} differs between two runs of the same seed"
    weights = {key: layer.weight for key, layer in owned_layers(model)}
    moved = [key for key, w in weights.items() if not torch.equal(w, start[key])]
    if method.stage != "ptq":
        assert moved, "training moved no quantized weight"
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters()), "a parameter is not finite"

    tokens = toy_blocks(2, 24, seed=5)
    logits = _logits(model, tokens)
    plain = copy.deepcopy(model)
    for _, layer in owned_layers(plain):
        layer.surrogate = STE()
    assert torch.equal(_logits(plain, tokens), logits), "the surrogate changes the forward pass"

    _check_levels(model)
    shipped: Any = convert(copy.deepcopy(model))
    assert torch.equal(_logits(shipped, tokens), logits), "the converted model differs from the trained one"
    with tempfile.TemporaryDirectory() as folder:
        save_prepared(model, None, Path(folder) / "model")
        loaded, _ = load_prepared(Path(folder) / "model")
    assert torch.equal(_logits(loaded, tokens), logits), "the saved model differs from the trained one"


def _recipe(name: str, scheme: str, method: Method) -> Recipe:
    settings = ArenaSettings(
        schemes=(scheme,),
        methods=(name,),
        budget=f"steps={STEPS}",
        eval_tokens=64,
        block_size=32,
        batch_size=2,
    )
    return settings.recipe(scheme, name, None if method.stage == "ptq" else LEARNING_RATE, seed=0)


def _run(recipe: Recipe, method: Method) -> tuple[nn.Module, dict[str, Tensor]]:
    """The trained model, and the weights that it started from."""
    blocks = TokenBlocks(toy_blocks(64, 32).numpy().astype(np.int32), 1.0)
    torch.manual_seed(0)
    model, teacher = tiny_llama(), tiny_llama()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trained = train_method(recipe, method, model, teacher, blocks, Batches(STEPS), StepTimes())
    for key, p in teacher.named_parameters():
        assert torch.equal(p, before[key]), f"{key} of the teacher was changed"
    return trained, {key.removesuffix(".weight"): w for key, w in before.items()}


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def _check_levels(model: nn.Module) -> None:
    for name, layer in owned_layers(model):
        scheme = layer.scheme
        if scheme.rotation.kind != "none":
            continue  # levels are those of the rotated weight
        w = layer.quantized_weight()
        for part in w.split(scheme.scale.group_size or w.shape[1], dim=1):
            used = max(len(row.unique()) for row in part)
            assert used <= len(scheme.grid.levels), (
                f"{name}: {used} values in a group, {len(scheme.grid.levels)} levels"
            )
