"""A teacher's top-k logits on disk: written once, read memory-mapped, found by the content of each block.

A folder holds ``manifest.json`` and shards ``shard-00000.safetensors``. Per block of tokens a shard has ``ids`` int32
and ``log_probs`` ``(length, k)``, ``tail`` ``(length,)`` (log of the mass of all other tokens) and ``key`` int64, the
first eight bytes of SHA-256 over the tokens. Training looks a block up by its key: order, shuffling, held-out parts
and resumed runs need no bookkeeping, and a block that the teacher has not seen is an error.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from fewbits.data import TokenBlocks
from fewbits.io import atomic_folder, read_json_object, write_json
from fewbits.objectives import top_k_logits

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
SHARD_BYTES = 2**28
Dtype = Literal["float16", "bfloat16", "float32"]
BATCH_KEYS = ("teacher_ids", "teacher_log_probs", "teacher_tail")
"""What an item of :class:`DistilledBlocks` has beside tokens and labels."""


class Shard(BaseModel):
    """One file and how many blocks it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^shard-\d{5}\.safetensors$")
    num_blocks: int = Field(ge=1)


class LogitsManifest(BaseModel):
    """What the logits are of.

    Attributes:
        format_version: of the folder.
        model_digest: SHA-256 of the teacher's tensors.
        text_digest: SHA-256 of all blocks in their order.
        block_size: tokens in a block.
        num_blocks: blocks in all shards.
        top_k: kept tokens per position.
        vocab_size: of the teacher.
        temperature: at which ``log_probs`` and ``tail`` were taken; the objective's must be the same.
        dtype: of ``log_probs`` and ``tail``.
        shards: files in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    model_digest: str
    text_digest: str
    block_size: int = Field(ge=2)
    num_blocks: int = Field(ge=1)
    top_k: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    temperature: float = Field(gt=0)
    dtype: Dtype
    shards: tuple[Shard, ...] = Field(min_length=1)


def block_keys(tokens: np.ndarray) -> list[int]:
    """Per block, the first eight bytes of SHA-256 over its tokens (int32, little endian) as a signed number.

    Example:
        >>> block_keys(np.zeros((1, 4), dtype=np.int32)) == block_keys(np.zeros((2, 4), dtype=np.int32))[1:]
        True
    """
    rows = np.ascontiguousarray(tokens, dtype="<i4")
    return [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "little", signed=True) for row in rows]


def text_digest(tokens: np.ndarray) -> str:
    """SHA-256 over shape and tokens of all blocks."""
    total = hashlib.sha256(f"{tokens.shape}".encode())
    total.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return total.hexdigest()


def is_teacher_logits(folder: str | Path) -> bool:
    """Whether the folder was written by :func:`write_teacher_logits`."""
    path = Path(folder) / MANIFEST_FILE
    return path.is_file() and (Path(folder) / "shard-00000.safetensors").is_file()


@torch.no_grad()
def write_teacher_logits(
    teacher: nn.Module,
    blocks: TokenBlocks,
    folder: str | Path,
    *,
    model_digest: str,
    top_k: int = 64,
    temperature: float = 1.0,
    dtype: Dtype = "float16",
    batch_size: int = 8,
    shard_bytes: int = SHARD_BYTES,
) -> LogitsManifest:
    """Run the teacher once over every block and keep its k most likely tokens.

    Size: ``6 k + 2`` bytes per token in 16 bits; 64 tokens of a text of 100M tokens are 39 GB.

    Args:
        teacher: a causal LM; run in eval mode, its mode is restored.
        blocks: what training will see, and perhaps more.
        folder: new or empty; it appears when it is whole.
        model_digest: of the teacher, see :func:`fewbits.checkpoint.model_digest`.
        top_k: kept tokens, at most the vocabulary.
        temperature: of the distillation.
        dtype: of the numbers on disk.
        batch_size: blocks per forward pass.
        shard_bytes: largest size of a file, one batch at least.

    Raises:
        ValueError: for a top_k larger than the vocabulary, or a folder that is taken.
    """
    first = next(iter([*teacher.parameters(), *teacher.buffers()]))
    modes = [(part, part.training) for part in teacher.modules()]
    teacher.eval()
    keys = torch.tensor(block_keys(blocks.tokens))
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    per_block = blocks.block_size * (top_k * (4 + width) + width)
    limit = max(batch_size, shard_bytes // per_block // batch_size * batch_size)
    shards: list[Shard] = []
    vocab_size = 0
    with atomic_folder(folder) as partial:
        for begin in range(0, len(blocks), limit):
            end = min(begin + limit, len(blocks))
            parts = []
            for low in range(begin, end, batch_size):
                ids = torch.stack([blocks[i]["input_ids"] for i in range(low, min(low + batch_size, end))])
                logits = teacher(input_ids=ids.to(first.device)).logits
                vocab_size = int(logits.shape[-1])
                parts.append(top_k_logits(logits, top_k, temperature=temperature))
            tensors = {
                "ids": torch.cat([part.ids for part in parts]).to("cpu", torch.int32),
                "log_probs": torch.cat([part.log_probs for part in parts]).to("cpu", getattr(torch, dtype)),
                "tail": torch.cat([part.tail for part in parts]).to("cpu", getattr(torch, dtype)),
                "key": keys[begin:end].clone(),
            }
            shards.append(Shard(file=f"shard-{len(shards):05d}.safetensors", num_blocks=end - begin))
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial / shards[-1].file)
        manifest = LogitsManifest(
            model_digest=model_digest,
            text_digest=text_digest(blocks.tokens),
            block_size=blocks.block_size,
            num_blocks=len(blocks),
            top_k=top_k,
            vocab_size=vocab_size,
            temperature=temperature,
            dtype=dtype,
            shards=tuple(shards),
        )
        write_json(partial / MANIFEST_FILE, manifest.model_dump())
    for part, training in modes:
        part.training = training
    return manifest


class TeacherLogits:
    """The folder, opened: rows are read from the memory-mapped files when they are asked for.

    Args:
        folder: what :func:`write_teacher_logits` wrote.

    Raises:
        ValueError: for a folder that is missing, damaged, or does not hold what its manifest says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = LogitsManifest.model_validate(read_json_object(self.folder / MANIFEST_FILE))
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(f"{self.folder / MANIFEST_FILE} is damaged: {problem['loc']}: {problem['msg']}") from None
        self._files: dict[int, Any] = {}
        self._place: dict[int, tuple[int, int]] = {}
        for number, shard in enumerate(self.manifest.shards):
            self._check(number, shard)
            for row, key in enumerate(self._open(number).get_tensor("key").tolist()):
                self._place[key] = number, row
        if sum(shard.num_blocks for shard in self.manifest.shards) != self.manifest.num_blocks:
            raise ValueError(f"{self.folder / MANIFEST_FILE} is damaged: shards do not add up to num_blocks")

    def _open(self, number: int) -> Any:
        if number not in self._files:
            path = self.folder / self.manifest.shards[number].file
            try:
                self._files[number] = safe_open(path, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} is missing or damaged: {error}") from None
        return self._files[number]

    def _check(self, number: int, shard: Shard) -> None:
        m, file = self.manifest, self._open(number)
        rows = [shard.num_blocks, m.block_size]
        shapes = {"ids": [*rows, m.top_k], "log_probs": [*rows, m.top_k], "tail": rows, "key": rows[:1]}
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - a handle
        if found != shapes:
            raise ValueError(f"{self.folder / shard.file} holds {found}; the manifest says {shapes}")

    def row(self, key: int) -> dict[str, Tensor]:
        """What was kept of the block with this key.

        Raises:
            ValueError: if the teacher has not seen it.
        """
        if key not in self._place:
            raise ValueError(
                f"{self.folder} has nothing for a block of the training text; write it for this text, tokenizer and "
                f"block size (it has {self.manifest.num_blocks} blocks of {self.manifest.block_size} tokens)"
            )
        number, row = self._place[key]
        file = self._open(number)
        return {
            "teacher_ids": file.get_slice("ids")[row].long(),
            "teacher_log_probs": file.get_slice("log_probs")[row].float(),
            "teacher_tail": file.get_slice("tail")[row].float(),
        }

    def attach(self, blocks: TokenBlocks, *, vocab_size: int, temperature: float) -> DistilledBlocks:
        """The blocks with what the teacher says of them.

        Raises:
            ValueError: if a block is not there, or vocabulary, block size or temperature are others.
        """
        m = self.manifest
        for name, here in (("vocab_size", vocab_size), ("temperature", temperature), ("block_size", blocks.block_size)):
            if getattr(m, name) != here:
                raise ValueError(f"{self.folder} has {name}={getattr(m, name)}, the run {here}; write it anew")
        return DistilledBlocks(blocks, self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # workers of a data loader open the files anew


class DistilledBlocks(Dataset[dict[str, Tensor]]):
    """Token blocks whose items also have ``teacher_ids``, ``teacher_log_probs`` and ``teacher_tail``."""

    def __init__(self, blocks: TokenBlocks, cache: TeacherLogits) -> None:
        self.blocks, self.cache = blocks, cache
        self._keys = block_keys(blocks.tokens)
        for key in self._keys:
            if key not in cache._place:
                cache.row(key)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.blocks[index], **self.cache.row(self._keys[index])}
