"""Scheme: parsing, round trips, true bits per weight, and every refusal with its fix."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.grids import AnyGrid, Binary, Codebook, HalfShifted, Int, Ternary
from fewbits.rotations import Rotation
from fewbits.scales import ScaleSpec
from fewbits.scheme import Scheme

grids = st.one_of(
    st.just(Binary()),
    st.just(Ternary()),
    st.builds(Int, st.integers(2, 8)),
    st.builds(HalfShifted, st.integers(1, 8)),
    st.sampled_from([2, 3, 4, 16]).map(Codebook.lloyd_max),
)
specs = st.one_of(
    st.builds(ScaleSpec, granularity=st.sampled_from(["per_tensor", "per_channel"]), mode=st.sampled_from(["learned"])),
    st.builds(
        ScaleSpec,
        granularity=st.just("per_group"),
        group_size=st.sampled_from([32, 64, 128]),
        rule=st.sampled_from(["absmax", "mse", "gaussian", "absmean"]),
        mode=st.sampled_from(["learned", "dynamic", "frozen"]),
        dtype=st.sampled_from(["portable", "fp16", "bf16", "fp32"]),
        superblock=st.sampled_from([None, 256]),
        multiplier_bits=st.integers(1, 8),
    ),
)
rotations = st.builds(
    Rotation,
    kind=st.sampled_from(["none", "hadamard", "random_hadamard"]),
    block_size=st.sampled_from([2, 64, 128]),
    seed=st.integers(0, 9),
)


@given(scheme=st.builds(Scheme, grid=grids, scale=specs, rotation=rotations))
def test_json_round_trip(scheme: Scheme) -> None:
    assert Scheme.from_json(scheme.to_json()) == scheme
    assert hash(Scheme.from_dict(json.loads(scheme.to_json()))) == hash(scheme)


@pytest.mark.parametrize(
    ("text", "grid", "group_size"),
    [
        ("W1", Binary(), None),
        ("W1.58", Ternary(), None),
        ("W1.58A16G128", Ternary(), 128),
        ("W2A16G64", Int(2), 64),
        ("W2G64", Int(2), 64),
        ("W8", Int(8), None),
        ("W4A16G-1", Int(4), None),
        ("W2HG32", HalfShifted(2), 32),
        ("W3KA16G256", Codebook.lloyd_max(8), 256),
        ("W1K", Codebook.lloyd_max(2), None),
        (" W2A16G64 ", Int(2), 64),
    ],
)
def test_parse(text: str, grid: AnyGrid, group_size: int | None) -> None:
    scheme = Scheme.parse(text)
    assert scheme.grid == grid
    assert scheme.scale.group_size == group_size
    assert scheme.scale.granularity == ("per_channel" if group_size is None else "per_group")
    assert Scheme.parse(scheme.name) == scheme


def test_parse_takes_overrides() -> None:
    rotation = Rotation(kind="hadamard")
    scheme = Scheme.parse("W2A16G64", rule="absmean", mode="dynamic", dtype="bf16", rotation=rotation, superblock=256)
    expected = ScaleSpec(
        granularity="per_group", group_size=64, rule="absmean", mode="dynamic", dtype="bf16", superblock=256
    )
    assert (scheme.scale, scheme.rotation) == (expected, rotation)
    assert Scheme.parse("W2", grid=Int(1)).grid == Int(1)
    assert Scheme.parse("W2", granularity="per_tensor").scale.granularity == "per_tensor"
    assert scheme.with_scale(rule="mse").scale.rule == "mse"


@pytest.mark.parametrize("text", ["", "2", "W0", "W9", "W1.5", "W2A", "w2", "W2G", "W2A16G64x", "W2G64A16", "W16A16"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not of the form W<1\|1.58\|2..8>\[H\|K\]\[A16\]\[G<size>\], e.g. W2A16G64"
    ):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("W2A8", {}, "8-bit activations; only A16"),
        ("W1H", {}, "the letter H has no meaning at 1 bits"),
        ("W1.58K", {}, "the letter K has no meaning at 1.58 bits"),
        ("W2A16G16", {}, "group_size=16 is outside 32..256"),
        ("W2", {"group_sise": 64}, "unknown scheme option 'group_sise'; known options: granularity, group_size"),
        ("W2", {"rule": "rms"}, "rule 'rms' needs a centred grid, not 'int'; use rule 'gaussian'"),
        ("W2K", {"rule": "rms"}, "needs a centred grid, not 'codebook'"),
        ("W2", {"grid": Int(1), "rule": "absmean"}, "'absmean' needs a positive level"),
        ("W2", {"grid": Int(1), "rule": "absmax_qmax"}, "'absmax_qmax' needs a positive level"),
        ("W2", {"grid": "int"}, "grid must be a grid of fewbits.grids, got 'int'"),
    ],
)
def test_meaningless_combinations_are_refused(text: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text, **overrides)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "keys grid, scale, rotation"),
        ([], "keys grid, scale, rotation"),
        ({"grid": {"kind": "int", "num_bits": 2}, "bits": 2}, "unknown key 'bits'"),
        ({"grid": {"kind": "int", "num_bits": 2}, "scale": {"size": 2}}, "bad scheme: .*size"),
        ({"grid": {"kind": "int", "num_bits": 2}, "rotation": {"angle": 2}}, "bad scheme: .*angle"),
        ({"grid": {"kind": "int", "num_bits": 12}}, "integer from 1 to 8"),
    ],
)
def test_bad_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.from_dict(data)


@pytest.mark.parametrize(
    ("scheme", "shape", "bits"),
    [
        (Scheme.parse("W2A16G64"), (256, 256), 2 + 16 / 64),
        (Scheme.parse("W1A16G64"), (256, 256), 1 + 16 / 64),
        (Scheme.parse("W1.58A16G128"), (8, 256), 1.6 + 16 / 128),
        (Scheme.parse("W4"), (8, 256), 4 + 16 / 256),
        (Scheme.parse("W4", dtype="fp32"), (8, 256), 4 + 32 / 256),
        (Scheme.parse("W2", granularity="per_tensor"), (8, 256), 2 + 16 / 2048),
        (Scheme.parse("W2A16G64"), (4, 100), 2 + 2 * 16 / 100),
        # as k-quants store it: 16 bits per 256 weights and 4 bits per 32
        (Scheme.parse("W3A16G32", superblock=256), (8, 512), 3 + 4 / 32 + 16 / 256),
        (Scheme.parse("W3A16G32", superblock=256, multiplier_bits=6), (1, 300), 3 + (10 * 6 + 2 * 16) / 300),
    ],
)
def test_bits_per_weight_count_every_scale(scheme: Scheme, shape: tuple[int, int], bits: float) -> None:
    assert scheme.bits_per_weight(shape) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (Scheme.parse("W2A16G64"), (4, 32), "weight: group_size=64 is larger than its in_features=32; use a smaller"),
        (Scheme.parse("W2"), (4,), "a matrix"),
        (Scheme.parse("W2"), (2, 3, 4), "a matrix"),
        (Scheme.parse("W2"), (0, 4), "a matrix"),
        (Scheme.parse("W2", rotation=Rotation(kind="hadamard")), (4, 33), "odd width 33"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(scheme: Scheme, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheme.check_shape(shape)


def test_a_scheme_is_frozen() -> None:
    scheme = Scheme.parse("W2")
    for name in ("grid", "scale", "rotation"):
        with pytest.raises(FrozenInstanceError):
            setattr(scheme, name, None)
