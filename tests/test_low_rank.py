"""LR-QAT: the base and its storage, gradients in closed form, every surrogate and grid, merge, files, training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from fewbits import Rule, Scheme, convert, fake_quantize, prepare, quantize
from fewbits.adapters import WEIGHTS_FILE, base_digest, load_adapter, save_adapter
from fewbits.checkpoint import load_prepared, save_prepared
from fewbits.convert import owned_layers
from fewbits.data import TokenBlocks
from fewbits.drives import NoDrive
from fewbits.fake_quant import scale_gradient_factor
from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.io import ADAPTER_FILE, read_json_object, write_json
from fewbits.nn import QATLinear
from fewbits.objectives import Objective
from fewbits.optim import parameter_groups
from fewbits.optim.codebooks import refit_codebooks_
from fewbits.parametrizations import PARAMETRIZATIONS, LowRank, Tanh, parametrization_from_dict
from fewbits.ptq import apply_ptq
from fewbits.rotations import Rotation
from fewbits.scales import ScaleSpec, find_scale, stored_scale
from fewbits.surrogates import STE, SURROGATES, ClippedSTE, JacQuant, Surrogate
from fewbits.testing.tiny import TINY_MODELS, VOCAB_SIZE, toy_blocks
from fewbits.training import QATSettings, QATTrainer

GRIDS: list[AnyGrid] = [
    Binary(),
    Ternary(),
    Int(2),
    Int(4),
    HalfShifted(1),
    HalfShifted(2),
    Codebook((-3.0, -1.0, 1.0, 7.0)),
]
IDS = torch.arange(48).view(2, 24) % VOCAB_SIZE
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
ONE_SUM = 2e-6
"""Relative tolerance of one fp32 matrix product taken in two orders."""


def weight(rows: int = 6, width: int = 100, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def scheme_of(grid: AnyGrid, **options: Any) -> Scheme:
    return Scheme(grid=grid, scale=ScaleSpec(granularity="per_group", group_size=32), **options)


def moved(how: LowRank, scheme: Scheme, w: Tensor, size: float = 0.5) -> tuple[Tensor, ...]:
    """Base, factors that look trained, and raw scales that have moved since the base was made."""
    scale = find_scale(scheme.rotation.apply(w), scheme.grid, scheme.scale)
    base = how.compress(w, scheme, scale)
    a, b = how.start(w.shape, "layer", w)
    return base, a + size * weight(*a.shape, seed=3), b, 1.1 * scale


# ---------------------------------------------------------------------------------------------------------------- base


@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        (Int(2), 6),
        (Int(3), 5),
        (Int(4), 4),
        (Int(7), 1),
        (Int(8), 0),
        (Ternary(), 6),
        (Binary(), 6),
        (HalfShifted(1), 7),
    ],
    ids=str,
)
def test_fixed_point_leaves_the_bits_that_the_levels_do_not_need(grid: AnyGrid, bits: int) -> None:
    """b-bit integers get 8 - b fraction bits, the authors' Qb.(8-b)."""
    assert LowRank().fraction_bits(grid) == bits


@every_grid
@pytest.mark.parametrize("storage", ["int8", "bf16", "fp32"])
def test_at_the_start_the_forward_is_rounding_of_the_stored_base(grid: AnyGrid, storage: Any) -> None:
    scheme, w = scheme_of(grid), weight()
    how = LowRank(rank=2, storage=storage)
    scale = find_scale(w, grid, scheme.scale)
    base = how.compress(w, scheme, scale)
    a, b = how.start(w.shape, "", w)
    assert not a.any()
    assert b.abs().max() <= 1 / math.sqrt(100)
    s = scheme.scale.view(w.shape).expand(stored_scale(scale, scheme.scale))
    phi = base.float() / 2 ** how.fraction_bits(grid) if storage == "int8" else base.float()
    levels = grid.decode(grid.encode(phi))
    assert torch.equal(how.weight(base, a, b, scale, scheme, STE(), {}), levels * s)
    assert base.dtype == how.storage_dtype
    v = w / s
    inside = (v >= -128 / 2 ** how.fraction_bits(grid)) & (v <= 127 / 2 ** how.fraction_bits(grid))
    error = {"int8": 2.0 ** -how.fraction_bits(grid) / 2, "bf16": 2**-8 * v.abs().max(), "fp32": 0.0}[storage]
    assert bool(((phi - v).abs() <= error)[inside | (storage != "int8")].all())
    if storage == "fp32":
        assert torch.equal(how.qtensor(base, a, b, scale, scheme).codes, quantize(w, scheme, scale).codes)


def test_rounding_twice_flips_the_share_of_codes_that_ties_cost() -> None:
    """A 16th of all values meets a tie of Q4.4, and half-to-even sends half of these the wrong way: 1/32."""
    v = 14 * torch.rand(400, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float() - 7
    scheme = Scheme.parse("W4", dtype="fp32")
    ones = torch.ones(400, 1)
    how = LowRank(storage="int8")
    base = how.compress(v, scheme, ones)
    zeros = torch.zeros(400, 1), torch.zeros(1, 1000)
    flipped = (how.qtensor(base, *zeros, ones, scheme).codes != quantize(v, scheme, ones).codes).double().mean()
    spread = math.sqrt(1 / 32 * (31 / 32) / v.numel())
    assert abs(float(flipped) - 1 / 32) < 4 * spread


def test_the_start_is_a_function_of_seed_and_name_and_leaves_the_random_stream_alone() -> None:
    stream = torch.get_rng_state()
    b = LowRank(rank=4).start((8, 16), "x", torch.empty(0))[1]
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(b, LowRank(rank=4).start((8, 16), "x", torch.empty(0))[1])
    assert not torch.equal(b, LowRank(rank=4).start((8, 16), "y", torch.empty(0))[1])
    assert not torch.equal(b, LowRank(rank=4, seed=1).start((8, 16), "x", torch.empty(0))[1])


# ----------------------------------------------------------------------------------------- surrogates and grids inside


def backward(how: LowRank, parts: tuple[Tensor, ...], scheme: Scheme, surrogate: Surrogate, upstream: Tensor) -> Any:
    base, a, b, scale = parts
    a, b, scale = (t.clone().requires_grad_() for t in (a, b, scale))
    state = surrogate.init_state(base.shape)
    out = how.weight(base, a, b, scale, scheme, surrogate, state)
    return out.detach(), *torch.autograd.grad(out, (a, b, scale), upstream)


@every_grid
@pytest.mark.parametrize("surrogate", [cls() for cls in SURROGATES.values()], ids=lambda s: s.name)
def test_every_surrogate_and_grid_works_inside(surrogate: Surrogate, grid: AnyGrid) -> None:
    scheme, how, w = scheme_of(grid), LowRank(rank=3, alpha=6.0), weight()
    parts = moved(how, scheme, w)
    upstream = weight(seed=1)
    stream = torch.get_rng_state()
    ours = backward(how, parts, scheme, surrogate, upstream)
    assert torch.equal(torch.get_rng_state(), stream)
    plain = backward(how, parts, scheme, STE(), upstream)
    assert torch.equal(ours[0], plain[0])  # the forward pass does not know the surrogate
    assert torch.equal(ours[3], plain[3])  # nor does the gradient of the scale
    assert torch.equal(ours[0], how.qtensor(*parts, scheme).dequantize())
    assert all(bool(torch.isfinite(g).all()) for g in ours)
    four = backward(how, parts, scheme, surrogate, 4 * upstream)
    assert all(torch.equal(x, 4 * y) for x, y in zip(four[1:], ours[1:], strict=True))  # homogeneous in G
    # closed forms: dL/dA = alpha/r P(s G) B^T, dL/dB = alpha/r A^T P(s G), dL/ds = sum of G level / sqrt(n q_p)
    base, a, b, scale = parts
    v = how.steps(base, a, b, grid)
    view = scheme.scale.view(w.shape)
    s = view.expand(stored_scale(scale, scheme.scale))
    inner = surrogate.pullback(s * upstream, v, grid, surrogate.init_state(w.shape))
    torch.testing.assert_close(ours[1], 2 * inner @ b.t(), rtol=ONE_SUM, atol=2e-5)
    torch.testing.assert_close(ours[2], 2 * a.t() @ inner, rtol=ONE_SUM, atol=2e-5)
    levels = grid.decode(grid.encode(v))
    expected = view.split(upstream * levels).sum(-1) * scale_gradient_factor(scheme, w.shape)
    torch.testing.assert_close(ours[3], expected, rtol=ONE_SUM, atol=1e-5)


def test_the_change_in_steps_has_the_rank_and_b_has_no_gradient_at_the_start() -> None:
    scheme, how, w = scheme_of(Int(4)), LowRank(rank=3), weight(24, 64)
    base, a, b, scale = moved(how, scheme, w)
    change = how.steps(base, a, b, scheme.grid) - how.steps(base, 0 * a, b, scheme.grid)
    assert int(torch.linalg.matrix_rank(change.double(), rtol=1e-5)) == 3
    grads = backward(how, (base, 0 * a, b, scale), scheme, ClippedSTE(), weight(24, 64, seed=1))
    assert not grads[2].any()
    assert grads[1].any()


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard"])
def test_rotations_and_double_quantized_scales(kind: Any) -> None:
    scheme = Scheme.parse("W4G32", rotation=Rotation(kind=kind), superblock=128, dtype="fp16")
    how, w = LowRank(rank=2, storage="fp32"), weight(6, 256)
    parts = moved(how, scheme, w, size=0.0)
    first = (*parts[:3], parts[3] / 1.1)
    assert torch.equal(how.weight(*first, scheme, STE(), {}), fake_quantize(w, scheme, first[3]))
    parts = moved(how, scheme, w)
    q = how.qtensor(*parts, scheme)
    assert torch.equal(how.weight(*parts, scheme, STE(), {}), q.dequantize())
    grads = backward(how, parts, scheme, STE(), weight(6, 256, seed=1))
    s = scheme.scale.view(w.shape).expand(q.scale)
    latent = scheme.rotation.invert(how.steps(*parts[:3], scheme.grid) * s)
    assert torch.equal(how.latent(*parts, scheme), latent)
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in grads)


def test_only_the_parts_wait_for_the_backward_pass() -> None:
    scheme, how = scheme_of(Int(4)), LowRank(rank=3)
    base, a, b, scale = moved(how, scheme, weight())
    a, b, scale = (t.clone().requires_grad_() for t in (a, b, scale))
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        how.weight(base, a, b, scale, scheme, ClippedSTE(), {})
    assert all(size < base.numel() for size in saved)


# --------------------------------------------------------------------------------------------------------------- layers


def train_a_little(model: Any, steps: int = 3, **rates: float) -> list[float]:
    groups = parameter_groups(
        model, **{"learning_rate": 0.02, "scale_learning_rate": 1e-3, "rest_learning_rate": 0} | rates
    )
    optimizer = torch.optim.AdamW(groups)
    blocks = toy_blocks(4, 32)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=blocks, labels=blocks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def low_rank_model(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    rules = [
        Rule(pattern="*mlp*", scheme="W4G32", parametrization=LowRank(**{"rank": 4, **options})),
        Rule(scheme="W2A16G64", surrogate="jacquant", embeddings=True, parametrization={"name": "low_rank", "rank": 8}),
    ]
    return prepare(TINY_MODELS[name](dtype=dtype), rules)


@pytest.mark.parametrize("storage", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma3"])
def test_convert_gives_exactly_the_codes_of_training(name: str, storage: Any) -> None:
    model = low_rank_model(name, storage=storage)
    losses = train_a_little(model)
    assert losses[-1] < losses[0]
    for _, layer in owned_layers(model):
        assert layer.weight_a.any()
        assert torch.equal(layer.quantized_weight(), layer.qtensor().dequantize())
        assert torch.equal(layer.forward_weight(torch.float32), layer.qtensor().dequantize())
    with torch.no_grad():
        before = model(IDS).logits
        assert torch.equal(convert(model)(IDS).logits, before)


def test_tied_layers_share_the_parts() -> None:
    model = low_rank_model("llama_tied")
    head, table = model.lm_head, model.model.embed_tokens
    assert head.owner is table
    assert head.weight is table.weight
    assert head.weight.dtype == torch.int8
    assert not head.weight.requires_grad
    assert head.weight_dtype == torch.float32
    assert not hasattr(head, "weight_a")


def test_bf16_models_train_and_convert() -> None:
    model = low_rank_model(dtype=torch.bfloat16)
    train_a_little(model)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.quantized_weight().dtype == layer.weight_a.dtype == torch.bfloat16
    with torch.no_grad():
        before = model(IDS).logits
        assert torch.equal(convert(model)(IDS).logits, before)


def test_autocast_does_not_touch_the_codes() -> None:
    layer = low_rank_model().model.layers[0].mlp.up_proj
    nn.init.normal_(layer.weight_a)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.quantized_weight(), layer.qtensor().dequantize())


def test_groups_hold_the_factors_and_the_optimizer_is_small() -> None:
    model = low_rank_model()
    groups = {
        g["name"]: g for g in parameter_groups(model, learning_rate=1, scale_learning_rate=1, rest_learning_rate=0)
    }
    trained = {id(p) for p in groups["latent"]["params"]}
    assert trained == {id(p) for _, layer in owned_layers(model) for p in (layer.weight_a, layer.weight_b)}
    numbers = sum(p.numel() for p in groups["latent"]["params"])
    assert numbers == sum(x.parametrization.num_trained(x.latent().shape) for _, x in owned_layers(model))


def test_without_a_parametrization_nothing_is_different() -> None:
    layer = prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2A16G64"))[0]
    assert isinstance(layer, QATLinear)
    assert layer.latent() is layer.weight
    assert "parametrization" not in Rule(scheme="W2").to_dict()
    rule = Rule(scheme="W2", parametrization="low_rank")
    assert Rule(**rule.to_dict()) == rule


def test_ptq_starts_low_rank_training() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    plain = copy.deepcopy(model)
    data = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"rank": 4, "storage": "fp32"}
    apply_ptq(plain, Rule(scheme="W2A16G64"), "gptq", data)
    apply_ptq(model, Rule(scheme="W2A16G64", parametrization=LowRank(**options)), "gptq", data)
    assert torch.equal(model[0].qtensor().codes, plain[0].qtensor().codes)
    assert model[0].weight_a.requires_grad


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = low_rank_model().train(), low_rank_model().train()
    saving.activation_checkpointing_enable()
    for model in (plain, saving):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def trainer(folder: Path, **more: Any) -> QATTrainer:
    model = low_rank_model("llama_tied")
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        activation_checkpointing=True,
    )
    blocks = TokenBlocks(toy_blocks(16, 16).int().numpy(), 1.0)
    settings = QATSettings(objective=Objective(cross_entropy=1, kl=0), telemetry_interval=2)
    return QATTrainer(model, args, settings=settings, train_dataset=blocks, **more)


def test_the_trainer_resumes_bit_for_bit_with_activation_checkpointing(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    base = {name: layer.weight.clone() for name, layer in owned_layers(whole.model)}
    whole.train()
    broken = trainer(tmp_path / "broken", callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "broken/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    for name, layer in owned_layers(whole.model):
        assert torch.equal(layer.weight, base[name])  # the base is never trained
        assert layer.weight_a.any()


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_a_saved_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = low_rank_model(name)
    train_a_little(model)
    model.eval()
    save_prepared(model, None, tmp_path / "m")
    again, _ = load_prepared(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        plain = TINY_MODELS[name]().from_pretrained(tmp_path / "m")  # an ordinary folder: latent weights in their place
        layers = dict(owned_layers(model))
        for key, layer in layers.items():
            w = plain.get_submodule(key).weight
            assert torch.equal(w.t() if layer.transposed else w, layer.latent())
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
        assert value.dtype == theirs[key].dtype, key
    assert train_a_little(again) == train_a_little(model)


def test_an_adapter_comes_back_bit_for_bit_and_is_small(tmp_path: Path) -> None:
    model = low_rank_model("gpt2")
    train_a_little(model)
    save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a", overwrite=True)
    fresh = low_rank_model("gpt2")
    assert not torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert load_adapter(fresh, tmp_path / "a") is fresh
    for (name, value), other in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    with torch.no_grad():
        assert torch.equal(convert(fresh)(IDS).logits, model(IDS).logits)
    numbers = sum(p.numel() for _, x in owned_layers(model) for p in (x.weight_a, x.weight_b, x.weight_scale))
    assert numbers * 4 < (tmp_path / "a" / WEIGHTS_FILE).stat().st_size < numbers * 4 + 8000


def test_a_base_of_another_checkpoint_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    model = low_rank_model()
    train_a_little(model)
    save_adapter(model, tmp_path / "a")
    other = low_rank_model()
    layer = other.model.layers[1].mlp.down_proj
    layer.weight.data[3, 5] += 1
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj was trained on another base"):
        load_adapter(other, tmp_path / "a")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("damage", ["cut", "garbage", "no_config", "foreign", "newer", "rank", "layers", "tensor"])
def test_adapters_that_are_damaged_or_of_something_else(damage: str, tmp_path: Path) -> None:
    model, folder = low_rank_model(), tmp_path / "a"
    save_adapter(model, folder)
    config = read_json_object(folder / ADAPTER_FILE)
    path, layer = folder / WEIGHTS_FILE, "model.layers.0.mlp.up_proj"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "garbage":
        path.write_bytes(b"hello")
    elif damage == "no_config":
        (folder / ADAPTER_FILE).unlink()
    elif damage == "foreign":
        config["method"] = "LORA"
    elif damage == "newer":
        config["format_version"] = 2
    elif damage == "rank":
        config["layers"][layer]["parametrization"]["rank"] = 5
    elif damage == "layers":
        del config["layers"][layer]
    else:
        save_file({k: v for k, v in load_file(path).items() if k != f"{layer}.weight_b"}, path)
    if damage in ("foreign", "newer", "rank", "layers"):
        write_json(folder / ADAPTER_FILE, config)
    messages = {
        "cut": "truncated",
        "garbage": "not a safetensors file",
        "no_config": "does not exist",
        "foreign": "type 'LORA'",
        "newer": "upgrade",
        "rank": "parametrization",
        "layers": "of the model only",
        "tensor": "weight_b is missing",
    }
    with pytest.raises(ValueError, match=messages[damage]):
        load_adapter(model, folder)


def test_a_model_of_full_weights_has_no_adapter(tmp_path: Path) -> None:
    model = prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2A16G64"))
    with pytest.raises(ValueError, match="no low-rank layer"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="no frozen base"):
        base_digest(model[0])


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"storage": "int4"}, "int8, bf16, fp32"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRank(**options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": Scheme.parse("W2", mode="dynamic")}, "mode 'learned' or 'frozen'"),
        ({"scheme": "W2", "drive": "winq"}, "drive 'winq'"),
        ({"scheme": "W2", "surrogate": JacQuant(apply="update")}, "apply='grad'"),
        ({"scheme": "W2", "parametrization": {"name": "low_rank", "ranks": 2}}, "no option 'ranks'"),
        ({"scheme": "W2", "parametrization": "lora"}, "unknown parametrization 'lora'"),
        ({"scheme": "W2", "parametrization": 3}, "a LowRank, a Tanh or None"),
        ({"scheme": Scheme(grid=Codebook((-200.0, 1.0)))}, "storage 'int8' cannot hold"),
    ],
)
def test_rules_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**{"parametrization": "low_rank", **fields})


def test_more_errors() -> None:
    with pytest.raises(ValueError, match=r"0: rank=9 is above the smaller side of \(8, 64\)"):
        prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2", parametrization=LowRank(rank=9)))
    assert Rule(scheme="W2", drive=NoDrive(), parametrization="low_rank").parametrization == LowRank()
    model = prepare(nn.Sequential(nn.Linear(64, 8)), Rule(scheme="W2K", parametrization=LowRank(rank=2)))
    with pytest.raises(ValueError, match="refit before"):
        refit_codebooks_(model)
    with torch.no_grad():
        model[0].weight_a.fill_(math.nan)
    with pytest.raises(ValueError, match="non-finite"):
        convert(model)


def test_the_table_is_complete_and_round_trips() -> None:
    assert {"low_rank": LowRank, "tanh": Tanh} == PARAMETRIZATIONS
    assert parametrization_from_dict(LowRank(rank=3).to_dict()) == LowRank(rank=3)


# ------------------------------------------------------------------------------------------------------------- memory


def trained_bytes(parametrization: Any) -> dict[str, int]:
    """Bytes of trained parameters, gradients and AdamW's state of one layer after one step, and of what is frozen."""
    model = nn.Sequential(nn.Linear(256, 128, bias=False))
    prepare(model, Rule(scheme="W4A16G64", parametrization=parametrization))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    layer = model[0]
    weights = [p for p in layer.trained_weights() if p.requires_grad]
    state = [t for p in weights for t in optimizer.state[p].values() if t.ndim]
    return {
        "trained": sum(p.nbytes for p in weights),
        "gradients": sum(p.grad.nbytes for p in weights),
        "optimizer": sum(t.nbytes for t in state),
        "base": layer.weight.nbytes if parametrization else 0,
    }


def test_trained_memory_is_that_of_the_factors() -> None:
    full, low = trained_bytes(None), trained_bytes(LowRank(rank=4))
    numbers = 4 * (256 + 128)
    assert full == {"trained": 4 * 2**15, "gradients": 4 * 2**15, "optimizer": 8 * 2**15, "base": 0}
    assert low == {"trained": 4 * numbers, "gradients": 4 * numbers, "optimizer": 8 * numbers, "base": 2**15}
