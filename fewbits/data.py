"""Text to packed token blocks: deterministic, so that a resumed run sees the same batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


def read_texts(path: str | Path) -> list[str]:
    """The documents of a text file, or of all text files below a folder in sorted order.

    Raises:
        ValueError: if nothing is there, no file has a text suffix, a file is not UTF-8, or everything is empty.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"text {str(path)!r} does not exist; give a text file or a folder of text files")
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES)
        if not files:
            raise ValueError(f"folder {str(path)!r} holds no file with a suffix {', '.join(TEXT_SUFFIXES)}")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not any(text.strip() for text in texts):
        raise ValueError(f"text {str(path)!r} is empty")
    return texts


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Token ids cut into blocks of one length; item i is ``{"input_ids", "labels"}`` of ``(block_size,)``.

    Args:
        tokens: integer array ``(num_blocks, block_size)``.
        bytes_per_token: mean UTF-8 bytes of a token of this text, to turn nats per token into bits per byte.
    """

    def __init__(self, tokens: np.ndarray, bytes_per_token: float) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < 2 or len(tokens) == 0:
            raise ValueError(f"token blocks have shape {tokens.shape}; at least one block of two tokens is needed")
        self.tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        self.bytes_per_token = bytes_per_token

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return int(self.tokens.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return int(self.tokens.size)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": block, "labels": block}

    def take(self, num_blocks: int) -> TokenBlocks:
        """The first blocks, spread evenly over the text (all if there are fewer)."""
        if num_blocks >= len(self):
            return self
        index = np.linspace(0, len(self) - 1, num_blocks).round().astype(int)
        return TokenBlocks(self.tokens[index], self.bytes_per_token)

    def split(self, holdout: float) -> tuple[TokenBlocks, TokenBlocks]:
        """``(train, valid)``: the last part of the text is held out.

        Raises:
            ValueError: if either part would be empty.
        """
        num_valid = max(1, round(len(self) * holdout))
        if num_valid >= len(self):
            raise ValueError(
                f"{len(self)} blocks are too few to hold out {holdout:.0%}; use more text or smaller blocks"
            )
        train, valid = self.tokens[:-num_valid], self.tokens[-num_valid:]
        return TokenBlocks(train, self.bytes_per_token), TokenBlocks(valid, self.bytes_per_token)


def pack_texts(texts: Iterable[str], tokenizer: Any, block_size: int, *, max_tokens: int | None = None) -> TokenBlocks:
    """Tokenize documents, end each with the EOS token, and cut the stream into blocks; the rest is dropped.

    Args:
        texts: documents in a fixed order.
        tokenizer: a Hugging Face tokenizer; no special tokens of its own are added.
        block_size: tokens per block, >= 2.
        max_tokens: stop after so many tokens.

    Raises:
        ValueError: if there is no text, or less than one block of it.
    """
    if block_size < 2:
        raise ValueError(f"block_size={block_size} must be at least 2")
    stream: list[int] = []
    num_bytes = 0
    for text in texts:
        if not text.strip():
            continue
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        num_bytes += len(text.encode())
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if max_tokens is not None and len(stream) >= max_tokens:
            break
    if not stream:
        raise ValueError("there is no text to train on: every document is empty")
    if len(stream) < block_size:
        raise ValueError(
            f"the text has {len(stream)} tokens, less than one block of {block_size}; use a smaller block_size"
        )
    usable = len(stream) if max_tokens is None else min(len(stream), max(max_tokens, block_size))
    num_blocks = usable // block_size
    tokens = np.asarray(stream[: num_blocks * block_size]).reshape(num_blocks, block_size)
    return TokenBlocks(tokens, num_bytes / len(stream))


def pack_dataset(
    dataset: Any, tokenizer: Any, block_size: int, *, column: str = "text", max_tokens: int | None = None
) -> TokenBlocks:
    """The same from a ``datasets`` dataset (map-style or streaming).

    Raises:
        ValueError: if the column is missing.
    """
    columns: Sequence[str] | None = getattr(dataset, "column_names", None)
    if columns is not None and column not in columns:
        raise ValueError(f"the dataset has no column {column!r}; its columns are {', '.join(columns)}")
    return pack_texts((row[column] for row in dataset), tokenizer, block_size, max_tokens=max_tokens)


@torch.no_grad()
def sample_teacher(
    teacher: torch.nn.Module,
    tokenizer: Any,
    *,
    num_tokens: int,
    block_size: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> TokenBlocks:
    """Blocks sampled from the teacher itself, for users without data.

    Every block starts from the BOS (or EOS) token, or from a random token where the tokenizer has neither.

    Args:
        teacher: a causal LM; put into eval mode for the sampling.
        tokenizer: its tokenizer.
        num_tokens: how many tokens to sample, rounded up to whole blocks.
        block_size: tokens per block.
        temperature: > 0.
        seed: of the sampling; torch's global stream is left as it was.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be positive")
    device = next(teacher.parameters()).device
    num_blocks = -(-num_tokens // block_size)
    was_training = teacher.training
    teacher.eval()
    generator = torch.Generator().manual_seed(seed)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    embeddings: Any = teacher.get_input_embeddings()  # type: ignore[operator]
    vocab = int(embeddings.weight.shape[0])
    blocks: list[Tensor] = []
    # transformers 5 renames the argument on the way; either name is asked of the model itself
    key = "cache" if "cache" in inspect.signature(teacher.forward).parameters else "past_key_values"
    for first in range(0, num_blocks, batch_size):
        rows = min(batch_size, num_blocks - first)
        if start is None:
            ids = torch.randint(0, vocab, (rows, 1), generator=generator)
        else:
            ids = torch.full((rows, 1), start)
        cache, step = None, ids.to(device)
        out = [ids]
        for _ in range(block_size - 1):
            result = teacher(input_ids=step, use_cache=True, **{key: cache})
            cache = result[key]
            probabilities = (result.logits[:, -1].float() / temperature).softmax(-1).cpu()
            ids = torch.multinomial(probabilities, 1, generator=generator)
            out.append(ids)
            step = ids.to(device)
        blocks.append(torch.cat(out, dim=1))
    teacher.train(was_training)
    tokens = torch.cat(blocks).numpy()
    sample = tokenizer.batch_decode(tokens.tolist())
    return TokenBlocks(tokens, sum(len(text.encode()) for text in sample) / tokens.size)
