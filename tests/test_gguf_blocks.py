"""GGUF blocks: our packers and their slow twins against llama.cpp's own C code and gguf-py, byte for byte."""

from __future__ import annotations

import importlib.util

import gguf
import numpy as np
import pytest

from fewbits.targets import ggml
from fewbits.targets.gguf_codec import PACK, UNPACK, dequantize
from fewbits.targets.gguf_types import GGUF_TYPES

IN_GGUF_PY = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"]
C_TYPES = [name for name in GGUF_TYPES if name != "F32"]
FP16_HIGH_BYTES = {"Q2_K": (81, 83), "Q3_K": (109,), "TQ1_0": (53,), "TQ2_0": (65,), "Q4_1": (1, 3)}


def finite_bytes(name: str, rows: int, cols: int, seed: int) -> np.ndarray:
    """Random packed rows, with a bit of every fp16 exponent cleared so that no scale is infinite or NaN."""
    kind = GGUF_TYPES[name]
    data = np.random.default_rng(seed).integers(0, 256, (rows, kind.row_bytes(cols)), dtype=np.uint8)
    for k in FP16_HIGH_BYTES.get(name, (1,)):
        data.reshape(-1, kind.bytes_per_block)[:, k] &= 0xBB
    return data


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_table_is_ggmls(name):
    kind = GGUF_TYPES[name]
    assert ggml.ggml_type_facts(kind.type_id) == (name.lower().replace("_k", "_K"), kind.block, kind.bytes_per_block)
    if name in {t.name for t in gguf.GGMLQuantizationType}:
        number = gguf.GGMLQuantizationType[name]
        assert (kind.type_id, kind.block, kind.bytes_per_block) == (number, *gguf.GGML_QUANT_SIZES[number])


def test_every_type_has_both_twins():
    assert list(PACK) == list(UNPACK)
    assert set(PACK) == set(GGUF_TYPES)


@pytest.mark.parametrize("name", C_TYPES)
def test_any_bytes_decode_as_in_llama_cpp(name):
    cols = max(GGUF_TYPES[name].block * 2, 64)
    data = finite_bytes(name, 8, cols, seed=1)
    np.testing.assert_array_equal(dequantize(name, data).ravel(), ggml.ggml_dequantize(name, data, 8 * cols))


@pytest.mark.parametrize("name", IN_GGUF_PY)
def test_any_bytes_decode_as_in_gguf_py(name):
    data = finite_bytes(name, 8, max(GGUF_TYPES[name].block * 2, 64), seed=2)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(dequantize(name, data), theirs)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_pack_inverts_unpack(name):
    data = finite_bytes(name, 8, max(GGUF_TYPES[name].block * 2, 64), seed=3)
    if name == "F32":
        data.reshape(-1, 4)[:, 3] &= 0xBF
    parts = UNPACK[name](data)
    again = PACK[name](*parts)
    if name != "TQ1_0":  # 256 bytes for 243 numbers: other bytes decode, but only one is written
        np.testing.assert_array_equal(again, data)
    for one, two in zip(parts, UNPACK[name](again), strict=True):
        np.testing.assert_array_equal(one, two)


def test_tq1_0_byte_of_five_digits_is_the_rounded_up_fraction():
    digits = np.stack(np.meshgrid(*[np.arange(3)] * 5, indexing="ij"), axis=-1).reshape(243, 5)
    for start in range(0, 243, 32):
        part = digits[start : start + 32]
        codes = np.zeros((1, 256), dtype=np.int8)
        for m, five in enumerate(part):
            codes[0, [m + 32 * n for n in range(5)]] = five - 1
        data = PACK["TQ1_0"](codes, np.ones((1, 1)))
        expected = [-(-int("".join(map(str, five)), 3) * 256 // 243) for five in part]
        assert data[0, : len(part)].tolist() == expected


def test_hand_made_blocks():
    codes = np.arange(32)[None] % 16 - 8
    data = PACK["Q4_0"](codes, np.array([[1.0]]))  # value j and j + 16 share byte j
    assert data[0].tolist() == [0x00, 0x3C, *(17 * j for j in range(16))]
    codes = np.arange(32)[None] - 16
    data = PACK["Q5_0"](codes, np.array([[-2.0]]))
    assert data[0].tolist() == [0x00, 0xC0, 0, 0, 255, 255, *(17 * j for j in range(16))]
    codes = np.tile([-1, 0, 1, 2], 16)[None]
    assert PACK["Q2_0"](codes, np.array([[1.0]]))[0].tolist() == [0x00, 0x3C] + [0b11100100] * 16


def test_block_functions_check_their_parts():
    codes, one = np.zeros((1, 256), dtype=int), np.ones((1, 1))
    with pytest.raises(ValueError, match=r"codes of Q1_0 run from 0 to 0; they must be one of \[-1, 1\]"):
        PACK["Q1_0"](codes, np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"scale has shape \(1, 1\); one value per block is needed, \(1, 8\)"):
        PACK["Q4_0"](codes, one)
    with pytest.raises(ValueError, match=r"codes of TQ1_0 run from 2 to 2; they must be -1\.\.1"):
        PACK["TQ1_0"](codes + 2, one)
    with pytest.raises(ValueError, match=r"sub_scale run from 32 to 32; they must be -32\.\.31"):
        PACK["Q3_K"](codes, one, np.full((1, 16), 32))
    with pytest.raises(ValueError, match="sub_scale has dtype float64"):
        PACK["Q3_K"](codes, one, np.full((1, 16), 1.0))
    with pytest.raises(ValueError, match=r"value=0\.1.* is not a bf16 number"):
        PACK["BF16"](np.float32([[0.1]]))
    with pytest.raises(ValueError, match="not finite or not exact in fp32"):
        PACK["F32"](np.array([[0.1]]))
    with pytest.raises(ValueError, match="not finite"):
        PACK["F16"](np.float32([[np.nan]]))
    for name in GGUF_TYPES:
        with pytest.raises(ValueError, match=f"{name} data is uint8"):
            UNPACK[name](np.zeros((1, GGUF_TYPES[name].bytes_per_block + 1), dtype=np.uint8))


def test_oracle_says_how_to_install_it(monkeypatch):
    ggml.ggml_library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'fewbits"):
        ggml.ggml_dequantize("Q4_0", bytes(18), 32)
    monkeypatch.undo()
    ggml.ggml_library.cache_clear()


def test_oracle_guards_the_c_code():
    with pytest.raises(ValueError, match="17 bytes of Q4_0 do not hold 32 values"):
        ggml.ggml_dequantize("Q4_0", bytes(17), 32)
    with pytest.raises(ValueError, match="ggml_dequantize knows"):
        ggml.ggml_dequantize("Q4_K", bytes(144), 256)
