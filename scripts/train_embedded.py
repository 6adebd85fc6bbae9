r"""Train the embedded model of fewbits: tokenizer, small Llama, held-out text, model card.  CPU only, no download.

    OMP_NUM_THREADS=2 python scripts/train_embedded.py --output fewbits/assets/pydoc-llama --bf16

Text is what ``fewbits.corpora`` extracts from the running Python.  Weights are trained in fp32 and rounded once to
bf16 at the end; those bf16 values are the model, and every number in ``training.json`` is measured after the rounding.
Held-out text is scored in windows of ``SCORE_LENGTH`` tokens that do not overlap, with the documents laid end to end
as ``<|bos|> text <|eos|>``; the first token of a window is given, not predicted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fewbits.corpora import (
    DOCUMENT_SEPARATOR,
    pydoc_corpus,
    split_documents,
    without_shared_paragraphs,
)

BOS, EOS = "<|bos|>", "<|eos|>"
VALID_BYTES = 300_000
SCORE_LENGTH = 256
SLICE_WINDOWS = 24


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token, therefore every text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


class Windows(Dataset[dict[str, torch.Tensor]]):
    """``num_windows`` training windows; each pass over the text cuts and joins it anew.

    A pass shuffles whole documents in runs that stay in order (neighbours come from one module and belong together),
    writes every second document start without ``<|bos|>`` (so that text packed with ``<|eos|>`` alone is familiar
    too), and begins at a random offset.
    """

    def __init__(
        self, documents: list[list[int]], tokenizer: PreTrainedTokenizerBase, length: int, num_windows: int, seed: int
    ) -> None:
        draw = random.Random(seed)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.rows: list[torch.Tensor] = []
        runs = [documents[start : start + 8] for start in range(0, len(documents), 8)]
        while len(self.rows) < num_windows:
            draw.shuffle(runs)
            stream: list[int] = []
            for document in (document for run in runs for document in run):
                stream += [bos] * draw.getrandbits(1) + document + [eos]
            stream = stream[draw.randrange(length) :]
            rows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
            order = list(range(len(rows)))
            draw.shuffle(order)
            self.rows += [rows[index] for index in order]
        del self.rows[num_windows:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class InOrderTrainer(Trainer):
    """``Windows`` is shuffled already; keeping its order makes the run a function of one seed."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def score_rows(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """``bos d1 eos bos d2 eos ..`` cut into windows of shape ``(num_windows, SCORE_LENGTH)``; the rest is dropped."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for document in encoded for token in (bos, *document, eos)])
    if len(stream) < SCORE_LENGTH:
        raise ValueError(f"{len(stream)} tokens are less than one window of {SCORE_LENGTH}; pass more text.")
    return stream[: len(stream) // SCORE_LENGTH * SCORE_LENGTH].view(-1, SCORE_LENGTH)


@torch.no_grad()
def score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_windows: int | None = None
) -> dict[str, float]:
    r"""Cross-entropy of ``texts`` per token (perplexity) and per UTF-8 byte (bits).

    Bytes are those of the tokens that are predicted: :math:`\text{bpb} = \frac{N\,\bar\ell}{B \ln 2}`, where B counts
    the text of all predicted tokens (``<|bos|>`` and ``<|eos|>`` have no bytes, their loss is counted).
    """
    rows = score_rows(tokenizer, texts)[:max_windows]
    widths = token_widths(tokenizer)
    model.eval()
    nats = 0.0
    for batch in rows.split(16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    predicted = rows[:, 1:].flatten()
    num_bytes = int(widths[predicted].sum())
    return {
        "num_tokens": predicted.numel(),
        "num_bytes": num_bytes,
        "loss": nats / predicted.numel(),
        "perplexity": math.exp(nats / predicted.numel()),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }


def token_widths(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Bytes of text behind each token id: one character of the byte-level alphabet each, none for special tokens."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if name in (BOS, EOS) else len(name) for name in names])


def held_out(valid: list[str]) -> list[str]:
    """At most ``VALID_BYTES`` of ``valid``: those first in the order of their hash, in the order of the corpus."""
    kept: set[str] = set()
    size = 0
    for text in sorted(valid, key=lambda text: hashlib.sha256(text.encode()).digest()):
        size += len((text + DOCUMENT_SEPARATOR).encode())
        if size > VALID_BYTES:
            break
        kept.add(text)
    return [text for text in valid if text in kept]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced file by file at the end")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows per step (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per window (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the cosine (default %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="multiple of 256 (default %(default)s)")
    parser.add_argument("--intermediate-size", type=int, default=512, help="multiple of 256 (default %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens with the two special ones")
    parser.add_argument("--weight-decay", type=float, default=0.5, help="of AdamW (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and order of the text")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 while training")
    args = parser.parse_args()
    for name in ("hidden_size", "intermediate_size"):
        if getattr(args, name) % 256:
            parser.error(f"{name}={getattr(args, name)} does not hold whole groups of 256; use 256, 512, 768 ..")
    return args


def main() -> None:
    args = parse()
    train, valid = split_documents(pydoc_corpus())
    valid = held_out(valid)
    train = without_shared_paragraphs(train, valid)
    train_bytes = sum(len(text.encode()) for text in train)

    tokenizer = train_tokenizer(train, args.vocab_size, args.length)
    encoded = tokenizer(train, add_special_tokens=False, verbose=False)["input_ids"]
    num_tokens = sum(map(len, encoded))
    print(f"{len(train)} documents, {train_bytes} bytes, {num_tokens} tokens; {len(valid)} held out", flush=True)

    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 128,
        head_dim=64,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # no padding token: the embedding would keep its row from training, and that row is <|eos|>
    model = LlamaForCausalLM(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    windows = Windows(encoded, tokenizer, args.length, args.steps * args.batch_size, args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = InOrderTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, args.steps // 25),
                weight_decay=args.weight_decay,
                adam_beta2=0.95,
                max_grad_norm=1.0,
                logging_steps=100,
                eval_strategy="steps",
                eval_steps=500,
                per_device_eval_batch_size=16,
                prediction_loss_only=True,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=args.bf16,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                seed=args.seed,
            ),
            train_dataset=windows,
            eval_dataset=[{"input_ids": row, "labels": row} for row in score_rows(tokenizer, valid)],
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started

    model.to(torch.bfloat16)  # the one rounding; scored in fp32 arithmetic on the rounded values
    weights = LlamaForCausalLM(config)
    weights.load_state_dict(model.state_dict())
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate")},
        "num_threads": torch.get_num_threads(),
        "num_parameters": num_parameters,
        "text": {
            "train_documents": len(train),
            "train_bytes": train_bytes,
            "train_tokens": num_tokens,
            "train_sha256": digest(train),
            "valid_documents": len(valid),
            "valid_sha256": digest(valid),
        },
        "steps": args.steps,
        "tokens_seen": args.steps * args.batch_size * args.length,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(args.steps * args.batch_size * args.length / seconds),
        "held_out": score(weights, tokenizer, valid),
        "held_out_slice": {"num_windows": SLICE_WINDOWS, **score(weights, tokenizer, valid, SLICE_WINDOWS)},
        "train_slice": score(weights, tokenizer, train[::10]),
        "train_loss": [
            [entry["step"], round(float(entry["loss"]), 4)] for entry in trainer.state.log_history if "loss" in entry
        ],
        "held_out_loss": [
            [entry["step"], round(float(entry["eval_loss"]), 4)]
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ],
    }
    write(args.output, model, tokenizer, valid, record)
    print(json.dumps({key: value for key, value in record.items() if not key.endswith("_loss")}, indent=1))


def digest(texts: list[str]) -> str:
    """Identity of a list of documents."""
    return hashlib.sha256(DOCUMENT_SEPARATOR.join(texts).encode()).hexdigest()


def write(
    output: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    valid: list[str],
    record: dict[str, object],
) -> None:
    """Fill a folder beside ``output``, then move file by file: an interrupt leaves no half-written file."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=output.name, suffix=".tmp") as scratch:
        folder = Path(scratch)
        model.config.use_cache = True  # the trainer turns it off; generation wants it
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "valid.txt").write_text(DOCUMENT_SEPARATOR.join(valid), encoding="utf-8", newline="\n")
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            os.replace(path, output / path.name)


if __name__ == "__main__":
    main()
