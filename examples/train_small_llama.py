r"""Train a Llama of about three million parameters and its tokenizer on a text of yours.  CPU will do, no download.

    python examples/train_small_llama.py book.txt -o book-llama
    fewbits train demo-clipped-ste model=book-llama data.source=text data.path=book.txt -o run
    fewbits arena --model book-llama --text book.txt

The folder holds an ordinary Transformers checkpoint in fp32 with a byte-level BPE tokenizer, and ``training.json`` with
the scores on held-out text. Vocabulary 2048, three layers of width 256 (groups of 64, 128 and 256 divide every row),
tied embedding: 2.9 million parameters, 2.4 million of them in linear layers.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from fewbits.data import TokenBlocks, pack_texts, read_texts
from fewbits.evaluate import evaluate
from fewbits.io import atomic_folder, is_occupied, write_json

BOS, EOS = "<|bos|>", "<|eos|>"
HEAD_DIM = 64


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``vocab_size`` tokens; every byte is one of them, so that every text survives."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        (line for text in texts for line in text.splitlines(keepends=True)),  # one huge string would be slow
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with heads of 64, two query heads for one of keys, and a tied embedding."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // HEAD_DIM,
        num_key_value_heads=args.hidden_size // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=max(512, args.block_size),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # no padding token: its row of the embedding would not be trained, and that row is the end token's
    return LlamaForCausalLM(config)


def load_text(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """``(train, valid)``: without a file of its own, the last twentieth of the text is held out."""
    texts = read_texts(args.text)
    if args.valid is not None:
        return texts, read_texts(args.valid)
    whole = "\n".join(texts)
    cut = max(1, len(whole) * 19 // 20)
    return [whole[:cut]], [whole[cut:]]


def train(model: LlamaForCausalLM, blocks: TokenBlocks, args: argparse.Namespace) -> None:
    """AdamW, cosine with warm-up, the Trainer's own loop; nothing of it is kept on disk."""
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 25),
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=max(1, args.steps // 20),
            save_strategy="no",
            report_to=[],
            bf16=args.bf16,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            seed=args.seed,
        )
        Trainer(model, arguments, train_dataset=blocks, data_collator=default_data_collator).train()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="a text file, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder of the checkpoint")
    parser.add_argument("--valid", type=Path, help="text to score; default: the last twentieth of the text")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks per step (default %(default)s)")
    parser.add_argument("--block-size", type=int, default=256, help="tokens per block (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the cosine (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, 258 or more (default %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 128 (default %(default)s)")
    parser.add_argument("--intermediate-size", type=int, default=768, help="of the MLP (default %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 while training")
    args = parser.parse_args(argv)
    if args.hidden_size % (2 * HEAD_DIM) or args.hidden_size < 2 * HEAD_DIM:
        parser.error(f"--hidden-size {args.hidden_size} is not a multiple of {2 * HEAD_DIM}; use 128, 256, 384 ..")
    if args.vocab_size < 258:
        parser.error(f"--vocab-size {args.vocab_size} does not hold 256 bytes and two special tokens; use 258 or more")
    if args.steps < 1:
        parser.error(f"--steps {args.steps} trains nothing; use 1 or more")
    if is_occupied(args.output):
        parser.error(f"{args.output} exists already; give a new folder")
    return args


def main(argv: list[str] | None = None) -> None:
    """Train, score, save."""
    args = parse(argv)
    texts, held_out = load_text(args)
    tokenizer = train_tokenizer(texts, args.vocab_size, max(512, args.block_size))
    blocks = pack_texts(texts, tokenizer, args.block_size)
    valid = pack_texts(held_out, tokenizer, args.block_size).take(64)
    set_seed(args.seed)
    model = build_model(tokenizer, args)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{blocks.num_tokens} tokens of {blocks.bytes_per_token:.2f} bytes, {num_parameters} parameters", flush=True)
    started = time.perf_counter()
    train(model, blocks, args)
    seconds = time.perf_counter() - started
    model.to("cpu").eval()
    model.config.use_cache = True  # the trainer turns it off; generation wants it
    score = evaluate(model, valid)
    record = {
        "num_parameters": num_parameters,
        "steps": args.steps,
        "tokens_seen": args.steps * args.batch_size * args.block_size,
        "seconds": round(seconds, 1),
        "seed": args.seed,
        "held_out": score.model_dump(),
    }
    with atomic_folder(args.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "training.json", record)
    print(f"held out: perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits per byte; {args.output}")


if __name__ == "__main__":
    main()
