"""fewbits.runtime: every kernel against float64, bit-for-bit invariants, the build, the swap of layers, generation."""

from __future__ import annotations

import copy
import math
import os
import stat
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewbits.convert import Rule, convert, prepare, quantized_layers
from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.nn import QuantizedLinear
from fewbits.qtensor import QTensor, quantize
from fewbits.rotations import Rotation
from fewbits.runtime import (
    PackedWeight,
    RuntimeEmbedding,
    RuntimeLinear,
    choose_kernel,
    describe,
    generate_stream,
    rounding_bound,
    runtime_bytes,
    runtime_layers,
    to_runtime,
)
from fewbits.runtime import build as build_module
from fewbits.runtime.activations import dequantize_activations, quantize_activations
from fewbits.runtime.build import BuildError, build_kernels, load_kernels, open_kernels
from fewbits.runtime.packed import MAX_KERNEL_TOKENS, NO_VECTORS
from fewbits.scheme import Scheme

GRIDS: list[AnyGrid] = [
    Binary(),
    Ternary(),
    Int(2),
    Int(3),
    Int(4),
    Int(8),
    HalfShifted(1),
    HalfShifted(2),
    HalfShifted(3),
    HalfShifted(4),
    HalfShifted(5),
    Codebook((-0.75, 1.875)),
    Codebook((-3.0, 0.25, 7.0)),
    Codebook.lloyd_max(4),
    Codebook((-5.0, -1.5, 0.0, 0.75, 2.5)),
    Codebook.lloyd_max(8),
    Codebook.lloyd_max(16),
]
SHAPES = [(7, 33), (13, 576), (5, 1000), (10, 1536)]
GROUPS = [None, 32, 64, 96, 128, 256]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def kernels() -> list[str]:
    library = load_kernels()
    assert library is not None, "these tests need a C compiler"
    return ["portable", *(name for i, name in ((1, "avx2"), (2, "avx512")) if library.fb_supports(i))]


def make_scheme(grid: AnyGrid, group: int | None, **options: object) -> Scheme:
    """per_tensor for group 0."""
    text = f"W2G{group}" if group else "W2"
    if group == 0:
        options["granularity"] = "per_tensor"
    return Scheme.parse(text, grid=grid, rule="absmax", mode="frozen", **options)


def make_layer(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = QuantizedLinear(scheme, shape, dtype)
    layer.load_qtensor_(quantize(torch.randn(shape, generator=generator) * 0.3 + 0.05, scheme))
    return layer


def tokens(count: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 3


def twin(x: torch.Tensor, q: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin in float64 and what its rounding is measured against, sum |x| |w|."""
    w = q.dequantize().double()
    return x.double() @ w.t(), x.double().abs() @ w.abs().t()


def assert_within_bound(y: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, width: int) -> None:
    excess = (y.double() - exact).abs() - rounding_bound(width) * magnitude
    assert float(excess.max()) <= 0, f"off by {float(((y.double() - exact).abs() / magnitude).max()):.2e} of sum |x w|"


# ---- products --------------------------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize("group", GROUPS)
def test_fp32_products_agree_with_the_float64_twin(grid, group):
    for shape in SHAPES:
        if group is not None and group > shape[1]:
            continue
        layer = make_layer(make_scheme(grid, group), shape)
        q = layer.qtensor()
        for name in kernels():
            if name != "portable" and grid.num_bits > 4:
                continue
            packed = PackedWeight(layer, kernel=name)
            for batch in (1, 3, 16, 66):
                x = tokens(batch, shape[1])
                assert_within_bound(packed.linear(x, 1), *twin(x, q), shape[1])


@every_grid
@pytest.mark.parametrize("group", [0, *GROUPS])
def test_int8_products_agree_with_the_emulated_activations(grid, group):
    for shape in SHAPES:
        if group and group > shape[1]:
            continue
        layer = make_layer(make_scheme(grid, group), shape)
        q = layer.qtensor()
        for name in kernels():
            if name != "portable" and grid.num_bits > 4:
                continue
            packed = PackedWeight(layer, kernel=name, activations="int8")
            if isinstance(grid, Codebook):
                assert packed.activations == "fp32"
                assert "codebook" in packed.reason
                continue
            assert packed.group_size == min(group or 128, shape[1])
            for batch in (1, 3, 16, 66):
                x = tokens(batch, shape[1])
                codes, scale = quantize_activations(x, packed.group_size)
                spread = scale.double().repeat_interleave(packed.group_size, 1)[:, : shape[1]]
                assert_within_bound(packed.linear(x, 1), *twin(codes.double() * spread, q), shape[1])


@pytest.mark.parametrize("kernel", ["portable", "torch"])
@pytest.mark.parametrize("group", [48, 100])
def test_groups_that_lanes_do_not_divide(kernel, group):
    layer = make_layer(make_scheme(Int(3), group), (9, 250))
    for activations in ("fp32", "int8"):
        packed = PackedWeight(layer, kernel=kernel, activations=activations)
        x = tokens(3, 250)
        seen = x
        if activations == "int8":
            seen = dequantize_activations(*quantize_activations(x, group), group)
        assert_within_bound(packed.linear(x, 1), *twin(seen, layer.qtensor()), 250)
    with pytest.warns(UserWarning, match="not a multiple of 32"):
        model = to_runtime(nn.Sequential(make_layer(make_scheme(Int(3), group), (9, 250))))
    assert model[0].packed.kernel == "portable"


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@every_grid
def test_the_torch_path_agrees_too(grid, activations):
    layer = make_layer(make_scheme(grid, 64), (11, 200))
    x = tokens(5, 200)
    packed = PackedWeight(layer, kernel="torch", activations=activations)
    seen = x if packed.activations == "fp32" else dequantize_activations(*quantize_activations(x, 64), 64)
    assert_within_bound(packed.linear(x), *twin(seen, layer.qtensor()), 200)
    assert torch.equal(packed.lookup(torch.arange(11)), layer.qtensor().dequantize())


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "fp16"}, {"superblock": 256}])
@pytest.mark.parametrize("group", [32, 128])
def test_stored_dtypes_of_scales(options, group):
    layer = make_layer(make_scheme(Int(2), group, **options), (9, 700))
    x = tokens(4, 700)
    for name in [*kernels(), "torch"]:
        packed = PackedWeight(layer, kernel=name)
        assert_within_bound(packed.linear(x, 1), *twin(x, layer.qtensor()), 700)
        assert torch.equal(packed.lookup(torch.arange(9)), layer.qtensor().dequantize())


def test_scales_across_the_whole_range_of_fp16_are_read_exactly():
    scheme = make_scheme(Int(2), 32, dtype="fp16")
    scale = torch.tensor([2.0**-14, 1.0 / 3, 65504.0, 1.5, 2.0**-14 * 1.125, 1023.5, 7.0, 0.1]).half().float()[None]
    codes = torch.ones(1, 256, dtype=torch.int8)
    layer = QuantizedLinear(scheme, (1, 256), torch.float32)
    layer.load_qtensor_(QTensor(codes, scale, scheme))
    for name in kernels():
        packed = PackedWeight(layer, kernel=name)
        for k in range(8):
            x = torch.zeros(1, 256)
            x[0, 32 * k + 5] = 1.0
            assert packed.linear(x).item() == scale[0, k].item()


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_token_has_the_same_bits_in_every_batch_and_with_every_number_of_threads(bits, activations):
    layer = make_layer(make_scheme(HalfShifted(bits), 64), (1030, 1088))
    for name in kernels():
        packed = PackedWeight(layer, kernel=name, activations=activations)
        x = tokens(16 if activations == "int8" else min(16, MAX_KERNEL_TOKENS[name]), 1088)
        whole = packed.linear(x, 1)
        for threads in (2, 5):
            assert torch.equal(packed.linear(x, threads), whole)
        for start, stop in ((0, 1), (1, 4), (3, 4), (4, 10), (15, 16)):
            assert torch.equal(packed.linear(x[start:stop], 2), whole[start:stop])


def test_many_tokens_and_threads_in_tiles():
    layer = make_layer(make_scheme(Ternary(), 128), (700, 1500))
    x = tokens(80, 1500)
    for name in kernels():
        packed = PackedWeight(layer, kernel=name)
        assert torch.equal(packed.linear(x, 1), packed.linear(x, 3))
        assert_within_bound(packed.linear(x), *twin(x, layer.qtensor()), 1500)
    assert PackedWeight(layer).linear(x[:0]).shape == (0, 700)


def test_bound_is_not_vacuous():
    """A kernel that dropped one product in a thousand would be caught."""
    layer = make_layer(make_scheme(Int(2), 64), (8, 1024))
    x = tokens(1, 1024)
    damaged = x.clone()
    damaged[0, 77] = 0
    exact, magnitude = twin(x, layer.qtensor())
    with pytest.raises(AssertionError, match="off by"):
        assert_within_bound(PackedWeight(layer).linear(damaged), exact, magnitude, 1024)


# ---- activations -----------------------------------------------------------------------------------------------------

LIMIT = torch.finfo(torch.float32).max
EDGES = [0.0, -0.0, 1e-45, 1e-39, 1.5e-36, -1.5e-36, 0.5, -127.0, 1e30, LIMIT, -LIMIT, math.inf, -math.inf, math.nan]


@given(x=st.lists(st.one_of(st.sampled_from(EDGES), st.floats(width=32)), min_size=1, max_size=70))
def test_kernels_round_activations_bit_for_bit_as_torch_does(x):
    """An identity weight shows the rounded activations themselves."""
    scheme = Scheme.parse("W2G32", mode="frozen")
    codes = torch.eye(96, dtype=torch.int8)
    layer = QuantizedLinear(scheme, (96, 96), torch.float32)
    layer.load_qtensor_(QTensor(codes, torch.ones(96, 3), scheme))
    padded = torch.zeros(1, 96)
    padded[0, : len(x)] = torch.tensor(x)
    q, scale = quantize_activations(padded, 32)
    expected = dequantize_activations(q, scale, 32)
    finite = scale.isfinite().all()  # NaN of one group reaches every sum of the token
    for name in kernels():
        y = PackedWeight(layer, kernel=name, activations="int8").linear(padded, 1)
        assert torch.equal(y, expected) if finite else y.isnan().all()


def test_activation_rounding_closed_form():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 0.0, 0.0, 0.0, 0.0, 1e-40]])
    q, scale = quantize_activations(x, 4)
    assert q.tolist() == [[127, 0, 2, -2, 0, 0, 0, 0, 0]]  # ties to even
    assert scale.tolist() == [[1.0, 0.0, 0.0]]
    assert quantize_activations(torch.tensor([[1.0, math.inf]]), 2)[1].isnan().all()


# ---- rows and memory -------------------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize("group", [None, 0, 32, 96])
def test_the_weight_is_the_converted_one_bit_for_bit(grid, group):
    layer = make_layer(make_scheme(grid, group), (9, 333))
    for activations in ("fp32", "int8"):
        packed = PackedWeight(layer, activations=activations)
        assert torch.equal(RuntimeLinear(layer, packed).weight, layer.weight)
    picked = torch.tensor([[8, 0], [3, 3]])
    assert torch.equal(packed.lookup(picked), layer.weight[picked])
    for bad in (-1, 9):
        with pytest.raises(IndexError, match="9 rows"):
            packed.lookup(torch.tensor([bad]))


def test_a_tile_of_the_vector_kernels_is_the_weight_in_another_order():
    """One-hot tokens in a batch that goes through tiles: exact, since 0 * finite adds nothing."""
    layer = make_layer(make_scheme(Codebook.lloyd_max(8), 32), (6, 200))
    for name in kernels():
        y = PackedWeight(layer, kernel=name).linear(torch.eye(200))
        assert torch.equal(y.t(), layer.weight)


@pytest.mark.parametrize("scheme", ["W1G128", "W1.58G128", "W2G128", "W2KG64", "W3G128", "W4HG32"])
def test_memory_is_that_of_the_packed_codes(scheme):
    layer = make_layer(Scheme.parse(scheme, rule="absmax"), (512, 4096))
    two_bit = make_layer(Scheme.parse("W2G128", rule="absmax"), (512, 4096)) if scheme == "W1.58G128" else layer
    on_disk = sum(b.numel() * b.element_size() for b in two_bit.buffers())
    assert PackedWeight(layer).num_bytes <= 1.05 * on_disk


def test_ternary_is_decoded_from_trits_of_every_width():
    for width in (32, 33, 34, 35, 36, 37, 40, 64):
        layer = make_layer(make_scheme(Ternary(), None), (4, width))
        assert torch.equal(PackedWeight(layer).lookup(torch.arange(4)), layer.weight)


# ---- choice of kernel ------------------------------------------------------------------------------------------------


def test_choice_of_kernel():
    best = kernels()[-1]
    assert choose_kernel(Int(2), 64) == (best, NO_VECTORS if best == "portable" else "")
    assert choose_kernel(Int(2), None, "torch") == ("torch", "asked for")
    if best == "portable":
        return
    assert choose_kernel(Int(8), 64) == ("portable", "num_bits=8; the vector kernels hold 1 to 4")
    assert choose_kernel(Int(2), 40)[0] == "portable"
    with pytest.raises(ValueError, match="not a multiple of 32"):
        choose_kernel(Int(2), 40, "avx2")
    with pytest.raises(ValueError, match="unknown"):
        choose_kernel(Int(2), 64, "sse")


def test_a_cpu_without_vector_instructions(monkeypatch):
    class Old:
        @staticmethod
        def fb_supports(variant: int) -> int:
            return int(variant == 0)

    monkeypatch.setattr("fewbits.runtime.packed.load_kernels", lambda: Old)
    assert choose_kernel(Int(2), 64) == ("portable", NO_VECTORS)
    with pytest.raises(ValueError, match="this CPU does not support it"):
        choose_kernel(Int(2), 64, "avx2")


# ---- the build -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_kernels():
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


def fake_compiler(path: Path, body: str) -> str:
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1.0; exit 0; fi\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_there_is_a_warning_and_the_torch_path(monkeypatch, tmp_path, fresh_kernels):
    layer = make_layer(make_scheme(Int(2), 64), (16, 256))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="slow torch path.*no C compiler found"):
        model = to_runtime(nn.Sequential(layer))
    assert model[0].packed.kernel == "torch"
    assert model[0].packed.reason == "no compiled kernels"
    x = tokens(3, 256)
    with torch.inference_mode():
        assert_within_bound(model(x), *twin(x, layer.qtensor()), 256)
    with pytest.raises(ValueError, match="needs a C compiler"):
        PackedWeight(layer, kernel="portable")


def test_compiler_failures_are_reported(monkeypatch, tmp_path, fresh_kernels):
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "cc", "echo 'kernels.c:1: error: broken' >&2; exit 1"))
    with pytest.raises(BuildError, match="error: broken"):
        build_kernels()
    assert list((tmp_path / "cache").iterdir()) == []  # no half file stays
    with pytest.warns(RuntimeWarning, match="broken"):
        assert load_kernels() is None
    with warnings.catch_warnings():
        assert load_kernels() is None  # warned once
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    with pytest.raises(BuildError, match="is not an executable"):
        build_kernels()
    file = tmp_path / "file"
    file.touch()
    monkeypatch.delenv("CC")
    with pytest.raises(BuildError, match="cannot write the kernel cache"):
        build_kernels(file / "below")


def test_the_cache_is_keyed_by_compiler_and_flags(monkeypatch, tmp_path):
    built = build_kernels()
    count = tmp_path / "count"
    script = f'echo x >> {count}; for last; do :; done; cp "{built}" "$last"'
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "cc", script))
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    first = build_kernels()
    assert build_kernels() == first
    assert count.read_text() == "x\n"
    assert open_kernels(first).fb_supports(0) == 1
    monkeypatch.setattr(build_module, "FLAGS", (*build_module.FLAGS, "-g"))
    assert build_kernels() != first
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".so", ".so"]


def test_a_foreign_library_is_refused(tmp_path):
    (tmp_path / "x.so").write_bytes(b"not a library")
    with pytest.raises(BuildError, match="not a kernel library"):
        open_kernels(tmp_path / "x.so")


# ---- threads and processes -------------------------------------------------------------------------------------------


def test_calls_from_several_python_threads():
    packed = PackedWeight(make_layer(make_scheme(Int(2), 64), (2000, 1024)))
    xs = [tokens(1, 1024, seed=s) for s in range(4)]
    expected = [packed.linear(x, 1) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(packed.linear(xs[i], 2), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_child_of_a_fork_gets_threads_of_its_own():
    packed = PackedWeight(make_layer(make_scheme(Int(2), 64), (2000, 1024)))
    x = tokens(1, 1024)
    expected = packed.linear(x, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork with threads; that is the point
        child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(packed.linear(x, 2), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- layers and models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard"])
def test_rotated_weights_rotate_the_activations(kind):
    scheme = make_scheme(HalfShifted(2), 64, rotation=Rotation(kind=kind, block_size=64))
    layer = make_layer(scheme, (12, 256))
    x = tokens(3, 256)
    q = layer.qtensor()
    plain = QTensor(q.codes, q.scale, make_scheme(HalfShifted(2), 64))
    fast = RuntimeLinear(layer, PackedWeight(layer))
    with torch.inference_mode():
        y = fast(x)
    assert_within_bound(y, *twin(scheme.rotation.apply(x), plain), 256)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-5 * float(twin(x, plain)[1].max()))
    assert torch.equal(fast.weight, layer.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_round_once(dtype):
    layer = make_layer(make_scheme(Int(2), 64), (12, 256), dtype)
    layer.bias = nn.Parameter(torch.linspace(-1, 1, 12).to(dtype))
    x = tokens(2, 256).to(dtype).view(1, 2, 256)
    with torch.inference_mode():
        y = RuntimeLinear(layer, PackedWeight(layer))(x)
    assert y.dtype == dtype
    assert y.shape == (1, 2, 12)
    exact, magnitude = twin(x[0], layer.qtensor())
    exact = exact + layer.bias.double()
    slack = rounding_bound(256) * magnitude + torch.finfo(dtype).eps * exact.abs()
    assert bool(((y[0].double() - exact).abs() <= slack).all())


def tiny_llama(tied: bool = True, group: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    rules = [Rule(pattern="*layers*", scheme=f"W3G{group}"), Rule(pattern="*embed*", scheme="W4G32", embeddings=True)]
    return convert(prepare(model, rules))


def test_a_tied_model_shares_one_packed_table_and_gives_the_same_logits():
    model = tiny_llama()
    ids = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        before = model(ids).logits
        on_disk = sum(b.numel() * b.element_size() for _, m in quantized_layers(model) for b in m.buffers())
        fast = to_runtime(model, num_threads=1)
        assert fast is model
        after = model(ids).logits
    assert isinstance(model.model.embed_tokens, RuntimeEmbedding)
    assert model.model.embed_tokens.packed is model.lm_head.packed
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert len(list(runtime_layers(model))) == 16
    assert on_disk < runtime_bytes(model) < 1.2 * on_disk  # tiny layers: 64 readable bytes and the lane tables count
    assert describe(model).startswith("2 x W4A16G32, fp32 activations, kernel ")
    assert "14 x W3A16G32" in describe(model)


def test_embeddings_are_equal_bit_for_bit():
    model = nn.Sequential(nn.Embedding(30, 96, padding_idx=0).to(torch.bfloat16))
    scheme = make_scheme(Int(3), 32, rotation=Rotation(kind="hadamard", block_size=32))
    convert(prepare(model, Rule(scheme=scheme, embeddings=True)))
    model[0].embed_scale = 9.8
    ids = torch.tensor([[0, 29, 7], [7, 7, 1]])
    before = model(ids)
    assert torch.equal(to_runtime(model)(ids), before)


def test_int8_model_stays_close():
    ids = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        before = tiny_llama()(ids).logits
        after = to_runtime(tiny_llama(), activations="int8")(ids).logits
    error = float((after - before).norm() / before.norm())
    assert 1e-5 < error < 0.05  # int8 is really used, and 1/127 per activation stays small


def test_misuse_is_refused():
    model = tiny_llama()
    for bad in ({"num_threads": 0}, {"activations": "int4"}, {"kernel": "cuda"}):
        with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
            to_runtime(model, **bad)
    assert not list(runtime_layers(model))  # unchanged
    to_runtime(model)
    with pytest.raises(ValueError, match="no converted layer"):
        to_runtime(model)
    with pytest.raises(RuntimeError, match="save the converted model"):
        model.state_dict()
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="64"):
        layer(torch.ones(1, 65))
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(torch.ones(1, 64, requires_grad=True))
    assert "scheme=W3A16G32" in repr(layer)


def test_copies_share_the_packed_weight_and_to_leaves_it_alone():
    layer = make_layer(make_scheme(Int(2), 32), (8, 64))
    model = to_runtime(nn.Sequential(layer))
    x = tokens(1, 64)
    with torch.inference_mode():
        expected = model(x)
        copied = copy.deepcopy(model).to(torch.bfloat16)
        assert copied[0].packed is model[0].packed
        assert torch.equal(copied(x), expected)


@pytest.mark.parametrize("damage", ["scale", "trits", "codebook", "codes"])
def test_damaged_weights_are_refused(damage):
    grid = {"scale": Int(2), "trits": Ternary()}.get(damage, Codebook((-3.0, 0.25, 7.0)))
    layer = make_layer(make_scheme(grid, 32), (4, 64))
    message = {"scale": "scale", "trits": "five trits", "codebook": "codebook", "codes": "3 levels"}[damage]
    if damage == "scale":
        layer.weight_scale[2, 1] = math.nan
    elif damage == "codebook":
        layer.weight_codebook[0] = -2.0
    else:
        layer.weight_packed[3, -1] = 255
    with pytest.raises(ValueError, match=message):
        PackedWeight(layer)


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(37))]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return to_runtime(tiny_llama()), tokenizer


def test_streamed_text_is_the_generated_text(chat):
    model, tokenizer = chat
    inputs = tokenizer("w3 w7 w9", return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12, do_sample=False
        )
    expected = tokenizer.decode(out[0, 3:], skip_special_tokens=True)
    pieces = list(generate_stream(model, tokenizer, "w3 w7 w9", max_new_tokens=12))
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_sampling_depends_on_the_seed_alone(chat):
    model, tokenizer = chat
    torch.manual_seed(5)
    state = torch.get_rng_state()
    texts = [
        "".join(generate_stream(model, tokenizer, "w1", max_new_tokens=8, temperature=2.0, seed=s)) for s in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    greedy = "".join(generate_stream(model, tokenizer, "w1", max_new_tokens=8))
    assert "".join(generate_stream(model, tokenizer, "w1", max_new_tokens=8, temperature=3.0, top_p=1e-6)) == greedy


def test_closing_the_stream_ends_the_thread_and_errors_come_out(chat, monkeypatch):
    model, tokenizer = chat
    stream = generate_stream(model, tokenizer, "w1 w2", max_new_tokens=100)
    next(stream)
    stream.close()
    assert not any(t.name == "fewbits-generate" for t in threading.enumerate())

    def broken(*args, **kwargs):
        raise FloatingPointError("broken model")

    for name, fast in (("forward", True), ("generate", False)):  # the decoder's prompt; transformers' own loop
        with monkeypatch.context() as patch:
            patch.setattr(model, name, broken)
            patch.setattr("fewbits.runtime.generate.uses_decoder", lambda _, fast=fast: fast)
            with pytest.raises(FloatingPointError, match="broken model"):
                list(generate_stream(model, tokenizer, "w1", max_new_tokens=2))


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"temperature": math.inf}, {"prompt": " "}]
)
def test_bad_generation_options_are_refused(chat, bad):
    model, tokenizer = chat
    prompt = bad.pop("prompt", "w1")
    with pytest.raises(ValueError, match=r"prompt|max_new_tokens|temperature|top_p"):
        generate_stream(model, tokenizer, prompt, **bad)
