"""Token blocks: deterministic, exact, with clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewbits.data import TokenBlocks, pack_dataset, pack_texts, read_texts, sample_teacher
from fewbits.testing.tiny import tiny_llama


class ByteTokenizer:
    """Bytes as ids, 2 as end of text: enough of a tokenizer to test packing."""

    eos_token_id = 2
    bos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(chr(i) for i in row) for row in rows]


def test_packing_keeps_the_stream_and_ends_documents() -> None:
    blocks = pack_texts(["abcd", " ", "efg"], ByteTokenizer(), 3)
    stream = [*b"abcd", 2, *b"efg", 2]
    assert blocks.tokens.flatten().tolist() == stream[:9]
    assert blocks.bytes_per_token == 7 / 9
    item = blocks[1]
    assert torch.equal(item["input_ids"], item["labels"])


def test_max_tokens_and_take_and_split() -> None:
    blocks = pack_texts(["a" * 1000], ByteTokenizer(), 10, max_tokens=205)
    assert len(blocks) == 20
    assert len(blocks.take(4)) == 4
    train, valid = blocks.split(0.1)
    assert (len(train), len(valid)) == (18, 2)
    assert np.array_equal(np.concatenate([train.tokens, valid.tokens]), blocks.tokens)


def test_empty_and_short_texts() -> None:
    with pytest.raises(ValueError, match="empty"):
        pack_texts(["", "  \n"], ByteTokenizer(), 8)
    with pytest.raises(ValueError, match="less than one block"):
        pack_texts(["abc"], ByteTokenizer(), 8)
    with pytest.raises(ValueError, match="too few"):
        TokenBlocks(np.zeros((1, 4), dtype=int), 1.0).split(0.5)
    with pytest.raises(ValueError, match="block_size"):
        pack_texts(["abc"], ByteTokenizer(), 1)


def test_reading_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "skip.bin").write_bytes(b"\xff\xfe")
    assert read_texts(tmp_path) == ["first", "second"]
    with pytest.raises(ValueError, match="does not exist"):
        read_texts(tmp_path / "missing")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_texts(tmp_path / "skip.bin")
    (tmp_path / "only").mkdir()
    with pytest.raises(ValueError, match="suffix"):
        read_texts(tmp_path / "only")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        read_texts(tmp_path / "empty.txt")


def test_a_datasets_dataset() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["abcd", "efgh"]})
    assert len(pack_dataset(rows, ByteTokenizer(), 5, column="body")) == 2
    with pytest.raises(ValueError, match="its columns are body"):
        pack_dataset(rows, ByteTokenizer(), 5)


def test_samples_of_the_teacher_are_deterministic_and_leave_the_global_stream_alone() -> None:
    teacher = tiny_llama()
    state = torch.get_rng_state()
    first = sample_teacher(teacher, ByteTokenizer(), num_tokens=48, block_size=16, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    again = sample_teacher(teacher, ByteTokenizer(), num_tokens=48, block_size=16, seed=3)
    other = sample_teacher(teacher, ByteTokenizer(), num_tokens=48, block_size=16, seed=4)
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)
    assert (first.tokens[:, 0] == 1).all()


def test_samples_follow_the_teacher() -> None:
    """At low temperature the samples, drawn with a cache, are the argmax of one pass without it."""
    teacher = tiny_llama(seed=5)
    block = sample_teacher(teacher, ByteTokenizer(), num_tokens=12, block_size=12, temperature=1e-4).tokens[0]
    with torch.no_grad():
        logits = teacher(input_ids=torch.tensor(block[None].astype(np.int64))).logits[0]
    assert logits[:-1].argmax(-1).tolist() == block[1:].tolist()
