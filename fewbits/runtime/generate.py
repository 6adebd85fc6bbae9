"""Text from a model, piece by piece: :mod:`fewbits.runtime.decoder` where it can, else transformers' ``generate``.

Both take the same tokens in the same order from the same random numbers; a test compares them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopPLogitsWarper,
)

from fewbits.runtime.decoder import Decoder, refusal

_KNOWN = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache", "output_attentions"}
_KNOWN |= {"output_hidden_states", "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"}
"""Generation settings of a checkpoint that :func:`generate_stream` replaces or that change no token; with others (a
repetition penalty, say) transformers generates."""


class _Stop(StoppingCriteria):
    """Ends the generation when nobody listens any more."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def generate_stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue a prompt and yield the text as it comes; the joined pieces are the whole continuation.

    The generation runs in a thread of its own, which ends soon after the iterator is closed. Its random numbers come
    from ``seed`` alone and the caller's generator is left as it was.

    Args:
        model: a transformers causal language model, on whatever layers.
        tokenizer: its tokenizer.
        prompt: text, at least one token.
        max_new_tokens: >= 1; the end-of-text token ends earlier.
        temperature: of the softmax, >= 0; 0 is greedy.
        top_p: in (0, 1]: sample from the smallest set of tokens of this mass.
        seed: of the sampling.

    Yields:
        Pieces of text, special tokens left out.

    Raises:
        ValueError: for options outside their range or a prompt without tokens (at the call); whatever the model raises
            comes out of the iterator.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive and finite")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is outside (0, 1]; 1 keeps every token")
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise ValueError(f"prompt {prompt!r} has no token; give at least one word")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
    return _stream(model, tokenizer, inputs, options, seed)


def _stream(model: Any, tokenizer: Any, inputs: Any, options: dict[str, Any], seed: int) -> Iterator[str]:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()
    failures: list[BaseException] = []
    device = next(model.parameters()).device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    fast = uses_decoder(model)

    def work() -> None:
        try:
            with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.inference_mode():
                torch.manual_seed(seed)
                if fast:
                    _decode(model, inputs["input_ids"][0], streamer, stop, options)
                    return
                model.generate(
                    input_ids=inputs["input_ids"].to(device),
                    attention_mask=inputs["attention_mask"].to(device),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                    pad_token_id=pad,
                    **options,
                )
        except BaseException as error:  # handed to the listener, who would otherwise wait for ever
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, name="fewbits-generate", daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def uses_decoder(model: Any) -> bool:
    """Whether :func:`generate_stream` runs this model through :class:`~fewbits.runtime.decoder.Decoder`."""
    if refusal(model) is not None:
        return False
    settings = model.generation_config.to_diff_dict()
    return all(name in _KNOWN or name.startswith("_") for name in settings)


def _decode(model: Any, ids: torch.Tensor, streamer: Any, stop: threading.Event, options: dict[str, Any]) -> None:
    warpers = LogitsProcessorList()
    if options["do_sample"]:
        warpers.append(TemperatureLogitsWarper(options["temperature"]))
        if options["top_p"] < 1:
            warpers.append(TopPLogitsWarper(options["top_p"]))
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    sequence: Any = ids[None]  # the two that are used look at the scores only
    streamer.put(ids)
    decoder = Decoder(model, len(ids) + options["max_new_tokens"])
    logits = decoder.prefill(ids)
    for left in reversed(range(options["max_new_tokens"])):
        scores: Any = warpers(sequence, logits[None])
        choice = scores.softmax(-1).multinomial(1)[0] if options["do_sample"] else scores.argmax(-1)
        streamer.put(choice)
        if int(choice) in ends or stop.is_set() or not left:
            break
        logits = decoder.step(int(choice))
    streamer.end()
