"""GGUF files: what is written is read back equal by us, gguf-py and llama.cpp; bad files raise ValueError only."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits.grids import Int
from fewbits.targets import ggml
from fewbits.targets.gguf_blocks import pack_f32
from fewbits.targets.gguf_codec import dequantize
from fewbits.targets.gguf_file import ALIGNMENT, GGUFTensor, write_gguf
from fewbits.targets.gguf_reader import read_gguf
from fewbits.targets.gguf_tensor import pack_tensor
from fewbits.targets.gguf_types import GGUF_TYPES

SCALARS = {
    "u8": np.uint8(250), "i8": np.int8(-3), "u16": np.uint16(65535), "i16": np.int16(-300), "u32": np.uint32(2**32 - 1),
    "i32": np.int32(-5), "f32": np.float32(1e-5), "u64": np.uint64(2**63), "i64": np.int64(-(2**40)),
    "f64": np.float64(0.1), "nan": np.float32(np.nan),
}  # fmt: skip
METADATA = {
    "general.architecture": "llama",
    "general.name": "größe ▁x",
    "a.flag": True,
    "empty": "",
    **{f"scalar.{key}": value for key, value in SCALARS.items()},
    "tokenizer.ggml.tokens": ["<unk>", "", "▁the", "\n"],
    "tokenizer.ggml.scores": np.array([0.0, -1.5, np.inf], dtype=np.float32),
    "tokenizer.ggml.token_type": np.array([1, 2, 6], dtype=np.int32),
    "flags": np.array([True, False]),
    "none": np.array([], dtype=np.uint64),
    "no strings": [],
}


def tensors() -> list[GGUFTensor]:
    """One tensor of every type, in shapes whose sizes are not multiples of the alignment, and a vector."""
    rng = np.random.default_rng(0)
    made = [
        GGUFTensor(name="norm.weight", shape=(7,), gguf_type="F32", data=pack_f32(rng.normal(size=(1, 7)).astype("f4")))
    ]
    for name, kind in GGUF_TYPES.items():
        cols = 2 * kind.block
        data = rng.integers(0, 128, (3, kind.row_bytes(cols)), dtype=np.uint8)
        made.append(GGUFTensor(name=f"blk.{name}.weight", shape=(3, cols), gguf_type=name, data=data))
    return made


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    write_gguf(path, METADATA, tensors())
    return path


def assert_same(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(wanted, np.ndarray | np.generic):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    else:
        assert found == wanted


def test_what_is_written_is_read(sample):
    read = read_gguf(sample)
    assert list(read.metadata) == list(METADATA)
    for key, value in METADATA.items():
        assert_same(read.metadata[key], value)
    assert list(read.tensors) == [t.name for t in tensors()]
    for t in tensors():
        info = read.tensors[t.name]
        assert (info.shape, info.gguf_type, info.num_bytes) == (t.shape, t.gguf_type, t.num_bytes)
        assert info.offset % ALIGNMENT == 0
        np.testing.assert_array_equal(read.read(t.name).ravel(), t.data.ravel())
    assert sample.stat().st_size % ALIGNMENT == 0
    assert list(sample.parent.iterdir()) == [sample]  # no temporary file is left


def test_llama_cpp_sees_the_same_tensors(sample):
    ours = {
        name: (GGUF_TYPES[info.gguf_type].type_id, info.offset, info.num_bytes)
        for name, info in read_gguf(sample).tensors.items()
    }
    assert ggml.ggml_gguf_tensors(sample) == ours


def test_gguf_py_reads_the_same_file(tmp_path):
    known = [t for t in tensors() if t.gguf_type != "Q2_0"]  # gguf 0.19 does not know the number of Q2_0
    path = tmp_path / "known.gguf"
    write_gguf(path, METADATA, known)
    theirs = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        if isinstance(value, list | np.ndarray) and len(value) == 0:
            continue  # gguf-py has no contents for an empty array
        found = theirs.get_field(key).contents()
        np.testing.assert_array_equal(found, value)
    for t, other in zip(known, theirs.tensors, strict=True):
        assert (other.name, other.tensor_type.name, tuple(other.shape[::-1])) == (t.name, t.gguf_type, t.shape)
        np.testing.assert_array_equal(np.ascontiguousarray(other.data).view(np.uint8).ravel(), t.data.ravel())


def test_we_read_the_file_of_gguf_py(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 5)
    writer.add_token_list(["a", "b"])
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor(
        "w", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("bias", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(path)
    assert_same(read.metadata["llama.block_count"], np.uint32(5))
    assert read.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert read.tensors["w"].shape == (2, 32)
    np.testing.assert_array_equal(dequantize("F32", read.read("bias"))[0], values[0])


def test_from_codes_to_the_c_code_of_llama_cpp(tmp_path):
    """The whole bottom half: codes and scales, packed lazily into a file, read back, decoded by ggml."""
    rng = np.random.default_rng(1)
    codes, scale = rng.integers(-2, 2, (4, 576)), rng.choice([0.25, 0.0390625], (4, 9)).astype(np.float32)
    path = tmp_path / "m.gguf"
    made = []

    def data():
        made.append(True)
        return pack_tensor(Int(2), codes, scale, 64, "Q2_0")

    tensor = GGUFTensor(name="w", shape=(4, 576), gguf_type="Q2_0", data=data)
    assert not made
    write_gguf(path, {}, [tensor])
    values = ggml.ggml_dequantize("Q2_0", read_gguf(path).read("w"), codes.size)
    np.testing.assert_array_equal(values.reshape(4, 576), scale.repeat(64, axis=1) * codes)


def test_a_file_without_anything(tmp_path):
    write_gguf(tmp_path / "empty.gguf", {}, [])
    read = read_gguf(tmp_path / "empty.gguf")
    assert (read.metadata, read.tensors) == ({}, {})


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        ({"n": 5}, {}, r"metadata 'n' is int, which has no GGUF type; use .* np.uint32\(5\)"),
        ({"n": 0.5}, {}, "metadata 'n' is float"),
        ({"n": [1, 2]}, {}, "metadata 'n' is list"),
        ({"n": np.zeros((2, 2))}, {}, "one-dimensional"),
        ({"n": np.float16(1)}, {}, "metadata 'n' is float16"),
        ({"": "x"}, {}, "metadata key of 0 bytes"),
        ({"a\0b": "x"}, {}, "none of them 0"),
        ({"general.alignment": np.uint32(64)}, {}, "general.alignment=64; this writer aligns to 32"),
        ({}, {"name": "x" * 64}, "has 64 bytes; ggml holds 1..63"),
        ({}, {"name": ""}, "has 0 bytes"),
        ({}, {"shape": (1, 1, 1, 1, 32)}, "1 to 4 positive sizes"),
        ({}, {"shape": (0, 32)}, "1 to 4 positive sizes"),
        ({}, {"shape": (1, 33)}, "a row of 33 values cannot be Q4_0"),
        ({}, {"gguf_type": "Q7"}, "GGUF type 'Q7' is unknown"),
        (
            {},
            {"data": np.zeros(17, dtype=np.uint8)},
            r"data of tensor 'w' are uint8 x 17; Q4_0 of shape \(1, 32\) is uint8 x 18",
        ),
        ({}, {"data": np.zeros(18, dtype=np.int8)}, "data of tensor 'w' are int8 x 18"),
    ],
)
def test_writer_refuses(tmp_path, metadata, changes, message):
    given = {"name": "w", "shape": (1, 32), "gguf_type": "Q4_0", "data": np.zeros(18, dtype=np.uint8)}
    path = tmp_path / "x.gguf"
    path.write_bytes(b"the old file")
    with pytest.raises(ValueError, match=message):
        write_gguf(path, metadata, [GGUFTensor(**{**given, **changes})])
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_writer_refuses_repeated_names(tmp_path):
    one = GGUFTensor(name="w", shape=(1, 32), gguf_type="Q4_0", data=np.zeros(18, dtype=np.uint8))
    with pytest.raises(ValueError, match="tensor 'w' occurs twice"):
        write_gguf(tmp_path / "x.gguf", {}, [one, one])


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def file(
    *, magic=b"GGUF", version=3, num_tensors=None, num_entries=None, entries=(), infos=(), data=bytes(64)
) -> bytes:
    """Bytes of a file that may lie about itself."""
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    head += b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def entry(key=b"k", kind=4, value=b"\x07\0\0\0") -> bytes:
    return text(key) + struct.pack("<i", kind) + value


def info(name=b"w", shape=(32,), type_id=2, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QiQ", len(shape), *shape, type_id, offset)


ARRAY = 9
BAD_FILES = {
    "empty": (b"", "the magic needs 4 bytes"),
    "magic": (file(magic=b"GGML"), "not a GGUF file"),
    "version": (file(version=2), "GGUF version 2; only version 3"),
    "big-endian": (file(version=3 << 24), "seems to be big-endian"),
    "tensor count": (file(num_tensors=2**63), "the header needs"),
    "entry count": (file(num_entries=2**40), "the header needs"),
    "count beyond the file": (file(num_entries=9), "the header needs"),
    "key length": (
        file(entries=[struct.pack("<Q", 2**62) + bytes(32)]),
        "a metadata key has 4611686018427387904 bytes",
    ),
    "no key": (file(entries=[entry(key=b"")]), "a metadata key has 0 bytes"),
    "key twice": (file(entries=[entry(), entry()]), "metadata 'k' occurs twice"),
    "key not text": (file(entries=[entry(key=b"\xff\xfe")]), "a metadata key is not UTF-8"),
    "value type": (file(entries=[entry(kind=13)]), "value type 13"),
    "negative value type": (file(entries=[entry(kind=-1)]), "value type -1"),
    "string length": (file(entries=[entry(kind=8, value=struct.pack("<Q", 2**40))]), "needs 1099511627776 bytes"),
    "string not text": (file(entries=[entry(kind=8, value=text(b"\xc3\x28"))]), "metadata 'k' is not UTF-8"),
    "bool": (file(entries=[entry(kind=7, value=b"\x02")]), "neither 0 nor 1"),
    "nested array": (file(entries=[entry(kind=ARRAY, value=struct.pack("<iQ", ARRAY, 1))]), "value type 9"),
    "array length": (
        file(entries=[entry(kind=ARRAY, value=struct.pack("<iQ", 6, 2**61))]),
        "needs 9223372036854775808",
    ),
    "string array length": (
        file(entries=[entry(kind=ARRAY, value=struct.pack("<iQ", 8, 2**61))]),
        "needs 1844674407370955",
    ),
    "alignment 0": (file(entries=[entry(key=b"general.alignment", value=bytes(4))]), "power of two"),
    "alignment 48": (file(entries=[entry(key=b"general.alignment", value=struct.pack("<I", 48))]), "power of two"),
    "alignment type": (file(entries=[entry(key=b"general.alignment", kind=5)]), "power of two"),
    "name length": (file(infos=[info(name=b"x" * 64)]), "a tensor name has 64 bytes"),
    "name with a zero": (file(infos=[info(name=b"a\0b")]), "holds a zero byte"),
    "name twice": (file(infos=[info(), info(offset=32)]), "tensor 'w' occurs twice"),
    "no axes": (file(infos=[info(shape=())]), "has 0 axes"),
    "five axes": (file(infos=[info(shape=(32, 1, 1, 1, 1))]), "has 5 axes"),
    "many axes": (file(infos=[text(b"w") + struct.pack("<I", 2**32 - 1) + bytes(64)]), "has 4294967295 axes"),
    "size 0": (file(infos=[info(shape=(32, 0))]), "every size must be positive"),
    "huge": (file(infos=[info(shape=(2**62, 2**62))]), "but the file has"),
    "ragged": (file(infos=[info(shape=(33,))]), "a row of 33 values cannot be Q4_0"),
    "type": (file(infos=[info(type_id=12)]), "tensor 'w' has type 12; this reader knows 0 F32"),
    "negative type": (file(infos=[info(type_id=-1)]), "has type -1"),
    "misaligned": (file(infos=[info(offset=8)]), "offset 8, which is not a multiple of 32"),
    "beyond the file": (file(infos=[info(offset=64)]), "tensor 'w' ends at byte"),
    "far beyond": (file(infos=[info(offset=2**64 - 32)]), "tensor 'w' ends at byte"),
    "overlap": (file(infos=[info(), info(name=b"v", shape=(64,)), info(name=b"u", offset=32)]), "overlap"),
    "no data": (file(infos=[info()], data=b""), "tensor 'w' ends at byte"),
}


@pytest.mark.parametrize(("raw", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_reader_refuses(tmp_path, raw, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as caught:
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert peak < 2**20  # no header number is ever the size of an allocation


def test_helper_makes_good_files_too(tmp_path):
    """The bad files above differ from a good one only in what they are named for."""
    path = tmp_path / "good.gguf"
    path.write_bytes(file(entries=[entry()], infos=[info(), info(name=b"v", offset=32)]))
    read = read_gguf(path)
    assert read.metadata == {"k": np.uint32(7)}
    assert [t.offset % 32 for t in read.tensors.values()] == [0, 0]


def test_other_alignment_and_gaps_are_read(tmp_path):
    path = tmp_path / "wide.gguf"
    aligned = entry(key=b"general.alignment", value=struct.pack("<I", 256))
    head = file(entries=[aligned], infos=[info(offset=256)], data=b"")
    path.write_bytes(head + bytes(-len(head) % 256) + bytes(256) + bytes(range(18)))
    assert read_gguf(path).read("w").tolist() == [list(range(18))]


def test_reading_a_tensor_that_is_not_there_or_no_longer(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(file(infos=[info()]))
    read = read_gguf(path)
    with pytest.raises(ValueError, match="has no tensor 'v'; it has 1 others"):
        read.read("v")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match="ends inside tensor 'w'"):
        read.read("w")


def test_every_truncation_raises(tmp_path, sample):
    raw, path = sample.read_bytes(), tmp_path / "cut.gguf"
    end = max(t.offset + t.num_bytes for t in read_gguf(sample).tensors.values())
    for length in range(0, end, 7):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: "):
            read_gguf(path)


mutation = st.tuples(
    st.integers(0, 10**6), st.binary(min_size=1, max_size=9), st.sampled_from(["put", "insert", "drop"])
)


@settings(
    deadline=None, derandomize=True, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutations=st.lists(mutation, min_size=1, max_size=4), cut=st.none() | st.integers(0, 2500), big=st.booleans())
def test_fuzzed_files_raise_value_errors_or_are_whole(tmp_path, sample, mutations, cut, big):
    raw = bytearray(sample.read_bytes())
    header = min(t.offset for t in read_gguf(sample).tensors.values())
    for position, patch, how in mutations:
        at = position % header
        if big:  # lengths and counts are little-endian: a large high byte makes them absurd
            patch = bytes(len(patch) - 1) + b"\x7f"
        raw[at : at + (0 if how == "insert" else len(patch))] = b"" if how == "drop" else patch
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(bytes(raw[:cut]))
    try:
        read = read_gguf(path)
    except ValueError as error:
        message = str(error)
    else:
        message = f"{path}: read"
        for name, found in read.tensors.items():
            assert read.read(name).size == found.num_bytes
    assert message.startswith(f"{path}: ")


@settings(
    deadline=None, derandomize=True, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    raw=st.binary(max_size=200),
    prefix=st.sampled_from([b"", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + struct.pack("<QQ", 1, 1)]),
)
def test_random_bytes_raise_value_errors(tmp_path, raw, prefix):
    path = tmp_path / "random.gguf"
    path.write_bytes(prefix + raw)
    try:
        read = read_gguf(path)
    except ValueError:
        return
    assert read.tensors == {}  # 200 random bytes may spell an empty file, never a tensor


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)
values = (
    st.text(max_size=9)
    | st.booleans()
    | st.lists(st.text(max_size=5), max_size=4)
    | st.sampled_from(list(SCALARS.values()))
    | st.lists(st.integers(0, 100), min_size=1, max_size=5).map(lambda x: np.array(x, dtype=np.int64))
)


@settings(
    deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(metadata=st.dictionaries(names, values, max_size=5))
def test_any_metadata_comes_back(tmp_path, metadata):
    write_gguf(tmp_path / "m.gguf", metadata, [])
    read = read_gguf(tmp_path / "m.gguf").metadata
    assert list(read) == list(metadata)
    for key, value in metadata.items():
        assert_same(read[key], value)
