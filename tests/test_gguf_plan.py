"""What the plan calls lossless is lossless for every scale, judged by llama.cpp's own C code; the rest raises."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.grids import Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.targets import ggml
from fewbits.targets.gguf_codec import dequantize
from fewbits.targets.gguf_plan import choose_type, plan
from fewbits.targets.gguf_tensor import pack_tensor, unpack_tensor
from fewbits.targets.gguf_types import GGUF_TYPES, gguf_type

IN_GGUF_PY = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"]
QUANTIZED = [name for name, kind in GGUF_TYPES.items() if kind.codes is not None]

GRIDS = {
    "binary": Binary(),
    "ternary": Ternary(),
    **{f"int{b}": Int(b) for b in (1, 2, 3, 4, 5, 8)},
    **{f"half{b}": HalfShifted(b) for b in (1, 2, 3, 4, 7)},
    "book small": Codebook((-7.0, -2.0, 2.0, 7.0)),
    "book wide": Codebook((-100.0, -30.0, 30.0, 100.0)),
    "book affine": Codebook((3.0, 5.0, 7.0)),
    "book gcd": Codebook((-14.0, -4.0, 4.0, 14.0)),
    "book quarter": Codebook((-0.75, -0.25, 0.25, 0.75)),
    "book sixteenth": Codebook((-5 / 16, 0.0, 0.5, 0.75)),
    "book free": Codebook.lloyd_max(4),
}
LAYOUTS = [  # cols, group_size, superblock
    (512, 32, None),
    (576, 64, None),
    (512, 128, None),
    (512, 256, None),
    (768, 768, None),
    (160, 64, None),
    (512, 32, 256),
    (512, 64, 256),
    (1024, 128, 512),
]


def all_scales(scale_dtype: str) -> np.ndarray:
    """Every significand of the dtype at its lowest exponent, the hardest one for fp16, and a few larger scales."""
    bits = {"portable": 7, "fp16": 10}[scale_dtype]
    significands = 1 + np.arange(2**bits) / 2**bits
    return np.concatenate([significands * 2.0**-14, significands[-5:] / 32, significands[:5] * 8]).astype(np.float32)


def random_codes(grid, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    index = np.random.default_rng(seed).integers(0, len(grid.levels), (rows, cols))
    index[:, :2] = 0, len(grid.levels) - 1  # the outermost levels are always there
    return index + grid.qmin


def wanted_weights(grid, codes: np.ndarray, scale: np.ndarray, group_size: int) -> np.ndarray:
    """The canonical order: fp32(scale) times level."""
    levels = np.array(grid.levels, dtype=np.float32)[codes - grid.qmin]
    return scale.repeat(group_size, axis=1)[:, : codes.shape[1]] * levels


def scales_of(layout, scale_dtype: str):
    """Scale, super-scale and multipliers that between them show every scale of the dtype."""
    cols, group_size, superblock = layout
    groups = -(-cols // group_size)
    values = all_scales(scale_dtype)
    if superblock is None:
        rows = -(-values.size // groups)
        return np.resize(values, (rows, groups)), None, None
    supers = -(-cols // superblock)
    rows = -(-values.size // supers)
    super_scale = np.resize(values, (rows, supers))
    multipliers = np.random.default_rng(5).integers(1, 16, (rows, groups))
    multipliers[:, 0] = 15
    return (
        super_scale.repeat(superblock // group_size, axis=1) * multipliers.astype(np.float32),
        super_scale,
        multipliers,
    )


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_what_is_called_lossless_is_lossless_for_every_scale(grid, name):
    for scale_dtype in ("portable", "fp16"):
        for layout in LAYOUTS:
            cols, group_size, superblock = layout
            verdict = plan(grid, group_size, cols, name, superblock=superblock, scale_dtype=scale_dtype).verdict
            scale, super_scale, multipliers = scales_of(layout, scale_dtype)
            codes = random_codes(grid, len(scale), cols)

            def pack(r, layout=layout, given=(codes, scale, super_scale, multipliers)):
                codes, scale, super_scale, multipliers = (None if x is None else x[r] for x in given)
                return pack_tensor(
                    grid, codes, scale, layout[1], name,
                    superblock=layout[2], super_scale=super_scale, multipliers=multipliers,
                )  # fmt: skip

            if verdict == "cannot":
                with pytest.raises(ValueError, match=r"cannot hold|multiple of its block"):
                    pack(slice(0, 1))
                continue
            if verdict == "lossless if":
                with pytest.raises(ValueError, match=r"fp16|must be|does not hold"):
                    pack(slice(None))  # the verdict is not pessimistic: some scale of the dtype does fail
                continue
            data = pack(slice(None))
            weights = wanted_weights(grid, codes, scale, group_size)
            np.testing.assert_array_equal(ggml.ggml_dequantize(name, data, codes.size).reshape(codes.shape), weights)
            if name in IN_GGUF_PY:
                theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
                np.testing.assert_array_equal(theirs, weights)
            read_codes, read_scale = unpack_tensor(grid, data, group_size, name, superblock=superblock)
            np.testing.assert_array_equal(read_codes, codes)
            np.testing.assert_array_equal(read_scale, scale)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_float_types_hold_what_the_plan_says(grid, name):
    scale, _, _ = scales_of((64, 64, None), "portable")
    codes = np.broadcast_to(np.resize(np.arange(len(grid.levels)), (1, 256)) + grid.qmin, (len(scale), 256))
    verdict = plan(grid, 256, 256, name).verdict
    if verdict == "lossless if":
        with pytest.raises(ValueError, match=r"not a finite fp16|not a bf16"):
            pack_tensor(grid, codes, scale, 256, name)
    else:
        assert verdict == "lossless"
        data = pack_tensor(grid, codes, scale, 256, name)
        np.testing.assert_array_equal(dequantize(name, data), wanted_weights(grid, codes, scale, 256))


@pytest.mark.parametrize(
    ("grid", "layout", "name", "verdict"),
    [  # the table of what goes where: levels, (cols, group, superblock), type
        (Binary(), (512, 128, None), "Q1_0", "lossless"),
        (Ternary(), (512, 256, None), "TQ1_0", "lossless"),
        (Int(2), (512, 256, None), "TQ2_0", "lossless"),
        (Int(2), (576, 64, None), "Q2_0", "lossless"),
        (Int(2), (512, 64, None), "TQ2_0", "cannot"),
        (HalfShifted(2), (512, 256, None), "Q2_K", "lossless"),
        (HalfShifted(2), (512, 64, None), "Q2_K", "cannot"),
        (HalfShifted(2), (512, 64, 256), "Q2_K", "lossless"),
        (Int(2), (512, 32, 256), "Q2_K", "lossless"),
        (Int(3), (512, 256, None), "Q3_K", "lossless"),
        (Int(3), (512, 32, 256), "Q3_K", "lossless"),
        (Int(4), (512, 32, None), "Q4_0", "lossless"),
        (HalfShifted(3), (512, 32, None), "Q4_0", "lossless"),
        (HalfShifted(3), (512, 32, None), "Q4_1", "lossless"),  # 7 * 8 bits fit 11
        (HalfShifted(4), (512, 32, None), "Q4_1", "lossless if"),  # 15 * 8 bits are 12
        (HalfShifted(4), (512, 32, None), "Q4_0", "cannot"),
        (HalfShifted(4), (512, 32, None), "Q5_0", "lossless"),
        (HalfShifted(2), (512, 32, None), "Q2_0", "cannot"),
        (Codebook((-10.0, -3.0, 3.0, 10.0)), (512, 32, None), "Q4_0", "cannot"),
        (Codebook((-10.0, -3.0, 3.0, 10.0)), (512, 32, None), "Q5_0", "lossless"),
        (Codebook((-0.75, -0.25, 0.25, 0.75)), (512, 32, None), "Q4_0", "lossless"),
        (Codebook.lloyd_max(4), (512, 32, None), "Q8_0", "cannot"),
    ],
)
def test_map_of_grids_and_types(grid, layout, name, verdict):
    cols, group_size, superblock = layout
    assert plan(grid, group_size, cols, name, superblock=superblock).verdict == verdict


def test_scale_dtypes_without_fp16_are_decided_by_the_numbers():
    for scale_dtype in ("bf16", "fp32"):
        assert plan(Int(2), 64, 512, "Q2_0", scale_dtype=scale_dtype).verdict == "lossless if"
    codes = random_codes(Int(2), 1, 64)
    assert pack_tensor(Int(2), codes, np.float32([[0.5]]), 64, "Q2_0").shape == (1, 18)
    with pytest.raises(ValueError, match=r"scale=-0\.100.* is not a finite fp16 number"):
        pack_tensor(Int(2), codes, np.float32([[0.1]]), 64, "Q2_0")


def test_small_multipliers_need_no_portable_super_scale():
    """Half-shifted codes in Q2_K: d = dmin = D / 2 holds any fp16 D for k <= 5; beyond, 1.5 D must be fp16."""
    super_scale = np.float32([[2047 / 1024]])  # 11 significant bits: 1.5 D has 13
    codes = random_codes(HalfShifted(2), 1, 256)
    for k, fits in ((5, True), (6, False)):
        multipliers = np.full((1, 4), k)
        scale = super_scale.repeat(4, axis=1) * np.float32(k)

        def pack(m=multipliers, s=scale):
            return pack_tensor(
                HalfShifted(2), codes, s, 64, "Q2_K", superblock=256, super_scale=super_scale, multipliers=m
            )

        if fits:
            values = ggml.ggml_dequantize("Q2_K", pack(), 256)
            np.testing.assert_array_equal(values[None], wanted_weights(HalfShifted(2), codes, scale, 64))
        else:
            with pytest.raises(ValueError, match="fp16"):
                pack()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    name=st.sampled_from(QUANTIZED),
    grid=st.sampled_from([Binary(), Ternary(), Int(2), HalfShifted(2), Int(3), HalfShifted(3), Int(4)]),
    scale=st.floats(-64, 64, width=16, allow_nan=False),
    seed=st.integers(0, 2**16),
)
def test_pack_is_exact_or_raises(name, grid, scale, seed):
    codes = random_codes(grid, 2, 256, seed)
    s = np.full((2, 1), scale, dtype=np.float32)  # negative, zero and subnormal scales too
    try:
        data = pack_tensor(grid, codes, s, 256, name)
    except ValueError:
        return
    values = ggml.ggml_dequantize(name, data, codes.size).reshape(codes.shape)
    np.testing.assert_array_equal(values, wanted_weights(grid, codes, s, 256))


@pytest.mark.parametrize(
    ("grid", "in_features", "group_size", "superblock", "x86", "gpu"),
    [
        (Binary(), 512, 128, None, "Q1_0", "Q1_0"),
        (Binary(), 576, 64, None, "Q2_0", "Q2_0"),
        (Ternary(), 512, 256, None, "TQ2_0", "Q2_0"),
        (Int(2), 512, 64, None, "Q2_0", "Q2_0"),
        (Int(2), 512, 512, None, "TQ2_0", "Q2_0"),
        (Int(2), 512, 32, 256, "Q2_K", "Q2_K"),
        (HalfShifted(2), 512, 256, None, "Q2_K", "Q2_K"),
        (HalfShifted(2), 512, 64, 256, "Q2_K", "Q2_K"),
        (HalfShifted(2), 512, 64, None, "Q4_0", "Q4_0"),
        (Int(3), 512, 256, None, "Q3_K", "Q3_K"),
        (Int(3), 512, 64, None, "Q4_0", "Q4_0"),
        (Int(4), 512, 32, None, "Q4_0", "Q4_0"),
        (HalfShifted(4), 512, 32, None, "Q5_0", "Q5_0"),
        (Int(8), 512, 32, None, "Q8_0", "Q8_0"),
    ],
)
def test_automatic_choice(grid, in_features, group_size, superblock, x86, gpu):
    for prefer, expected in (("x86", x86), ("gpu", gpu)):
        name, reason = choose_type(grid, group_size, in_features, superblock=superblock, prefer=prefer)
        assert name == expected
        assert "bits per weight" in reason


def test_choice_fails_with_the_reason_of_every_type():
    with pytest.raises(ValueError, match=r"(?s)Q1_0: .*TQ2_0: .*Q8_0: levels are not multiples of 1/1024"):
        choose_type(Codebook.lloyd_max(4), 256, 512)
    with pytest.raises(ValueError, match="prefer='tpu' is unknown; use one of x86, gpu"):
        choose_type(Int(2), 64, 512, prefer="tpu")


def test_row_of_one_scale_and_chunks():
    """One scale a row, and the order of rows kept across the chunks that are packed at a time."""
    rows, cols = 5, 2**19
    scale = np.arange(1, rows + 1, dtype=np.float32)[:, None]
    codes = random_codes(Int(2), rows, cols).astype(np.int8)
    data = pack_tensor(Int(2), codes, scale, cols, "TQ2_0")
    read_codes, read_scale = unpack_tensor(Int(2), data, cols, "TQ2_0")
    assert np.array_equal(read_codes, codes)
    assert np.array_equal(read_scale, scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.full((1, 64), 2)}, "codes run from 2 to 2; the grid has -2..1"),
        ({"codes": np.zeros((1, 64))}, "codes are float64"),
        ({"codes": np.zeros(64, dtype=int)}, "a nonempty integer matrix"),
        ({"codes": np.zeros((1, 63), dtype=int)}, r"a row of 63 values cannot be Q2_0.*block of 64"),
        ({"scale": np.float32([[np.nan]])}, "finite float32"),
        ({"scale": np.float32([[np.inf]])}, "finite float32"),
        ({"scale": np.array([[0.5]])}, "scale is float64"),
        ({"scale": np.float32([[0.5, 0.5]])}, r"finite float32 \(1, 1\) is needed"),
        ({"scale": np.float32([[1e5]])}, "not a finite fp16 number"),
        ({"super_scale": np.float32([[1]])}, "belong together"),
        ({"group_size": 32, "scale": np.float32([[1, 1]])}, "group_size=32 is not a multiple of 64"),
        ({"gguf_type_name": "Q9_9"}, "GGUF type 'Q9_9' is unknown; use one of F32"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"codes": np.zeros((1, 64), dtype=int), "scale": np.float32([[0.5]]), "group_size": 64}
    with pytest.raises(ValueError, match=message):
        pack_tensor(Int(2), **{"gguf_type_name": "Q2_0", **given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multipliers": np.full((1, 4), 16)}, "sub_scale run from 16 to 16; they must be 0..15"),
        ({"multipliers": np.full((1, 4), -1)}, "integers >= 0"),
        ({"multipliers": np.full((1, 4), 1.0)}, "multipliers are float64"),
        ({"multipliers": np.full((1, 3), 1)}, "must be"),
        ({"multipliers": np.full((1, 4), 2)}, r"does not hold \d+ of 256 weights exactly, first \[0, 0\] = -2"),
        ({"superblock": 128, "super_scale": np.float32([[1, 1]])}, "superblock=128 is not a multiple of 256"),
    ],
)
def test_bad_superblocks_are_named(change, message):
    given = {"superblock": 256, "super_scale": np.float32([[1]]), "multipliers": np.ones((1, 4), dtype=int)}
    with pytest.raises(ValueError, match=message):
        pack_tensor(
            Int(2), random_codes(Int(2), 1, 256), np.ones((1, 4), np.float32), 64, "Q2_K", **{**given, **change}
        )


def test_reading_back_refuses_foreign_data():
    half = np.float32([[0.5, 0.25]])
    data = pack_tensor(Int(2), random_codes(Int(2), 1, 128), half, 64, "Q2_0")
    with pytest.raises(ValueError, match=r"stored code .* of Q2_0 is not a level of the grid"):
        unpack_tensor(Ternary(), data, 64, "Q2_0")
    with pytest.raises(ValueError, match="differ inside a group of 128"):
        unpack_tensor(Int(2), data, 128, "Q2_0")
    data = pack_tensor(Int(3), random_codes(Int(3), 1, 32), np.float32([[0.5]]), 32, "Q4_1")
    data[0, 3] ^= 1
    with pytest.raises(ValueError, match="a minimum in the Q4_1 data does not belong"):
        unpack_tensor(Int(3), data, 32, "Q4_1")
    with pytest.raises(ValueError, match="stores weights, not codes"):
        unpack_tensor(Int(3), data, 32, "F16")
    with pytest.raises(ValueError, match="Q1_0 cannot hold this grid"):
        unpack_tensor(Int(3), np.zeros((1, 18), dtype=np.uint8), 128, "Q1_0")


def test_plan_checks_its_arguments():
    with pytest.raises(ValueError, match="scale_dtype='fp8' is unknown; use one of portable"):
        plan(Int(2), 64, 512, "Q2_0", scale_dtype="fp8")
    with pytest.raises(ValueError, match="group_size=0"):
        plan(Int(2), 0, 512, "Q2_0")
    assert gguf_type("tq2_0") is GGUF_TYPES["TQ2_0"]
