"""The residual stream of a Transformers model: what reads it and what writes it, found by running the model once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.ptq.calibration import run_model
from fewbits.ptq.capture import is_norm, is_same, recording
from fewbits.ptq.rotate import Stream, rotate_stream_

_INVARIANT = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest change of the logits, in units of the largest one (norms compute in fp32 everywhere); half types: 5e-2."""
_PROBE_LENGTH = 16


def find_stream(model: PreTrainedModel, tokens: Tensor) -> Stream:
    """Layers that read a norm's output, and layers of the blocks that give the stream's width without reading a norm.

    Raises:
        ValueError: for a model without an ordinary embedding, or of which no part looks like that.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"the embedding of {type(model).__name__} is no table; the model cannot be rotated")
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    with torch.no_grad(), recording(linear, {n: m for n, m in modules.items() if is_norm(m)}) as (calls, norms):
        run_model(model, tokens)
    readers: dict[str, dict[str, nn.Linear]] = {}
    for name, x in calls:
        for norm, output in norms:
            if is_same(output, x):
                readers.setdefault(norm, {})[name] = linear[name]
    reading = {name for layers in readers.values() for name in layers}
    width = embedding.weight.shape[1]
    writers = [layer for name, layer in linear.items() if name not in reading and layer.out_features == width]
    if not readers or not writers:
        raise ValueError(f"no residual stream was found in {type(model).__name__}; the model cannot be rotated")
    heads: list[tuple[nn.Linear, nn.Linear, int]] = []
    for module in modules.values():
        value, out, size = (getattr(module, key, None) for key in ("v_proj", "o_proj", "head_dim"))
        if isinstance(value, nn.Linear) and isinstance(out, nn.Linear) and isinstance(size, int):
            heads.append((value, out, size))
    return Stream(
        embedding=embedding,
        readers=[(modules[norm], list(layers.values())) for norm, layers in readers.items()],
        writers=writers,
        heads=heads,
    )


def rotate_(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Rotate a model's residual stream and the heads of its values, in place; what it computes does not change.

    A head that is tied to the embedding is untied (the gain of the last norm goes into the head alone), which costs one
    more table. Nothing is left changed if the logits would be.

    Args:
        model: a Transformers model with RMS norms, not prepared yet.
        seed: of the rotation.

    Returns:
        The same model.

    Raises:
        ValueError: for a model of another kind, one whose norms are no RMS norms, or one whose logits would change
            (norms behind the layers, as in Gemma 2 and 3, do not commute with a rotation).

    Example:
        >>> from fewbits.testing.tiny import tiny_llama
        >>> model, tokens = tiny_llama(), torch.arange(8)[None]
        >>> before = run_model(model, tokens)
        >>> bool((run_model(rotate_(model), tokens) - before).abs().max() < 1e-5)
        True
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"only Transformers models can be rotated, not {type(model).__name__}")
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    tokens = (torch.arange(_PROBE_LENGTH, device=table.device) % table.shape[0])[None]
    stream = find_stream(model, tokens)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table
    kept = [(p, p.detach().clone()) for p in stream.parameters()]
    with torch.no_grad():
        before = run_model(model, tokens)
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    try:
        rotate_stream_(stream, seed=seed)
        with torch.no_grad():
            change = float((run_model(model, tokens) - before).abs().max() / before.abs().max().clamp_min(1e-30))
        if not change <= _INVARIANT.get(before.dtype, 5e-2):
            raise ValueError(
                f"rotating {type(model).__name__} would change its logits by {change:.1e} of the largest: something "
                "else than RMS norms and linear layers touches its residual stream"
            )
    except ValueError:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)
        if tied:
            head.weight = table
        raise
    if tied:
        _forget_tie(model)
    return model


def _forget_tie(model: PreTrainedModel) -> None:
    """So that saving writes both tables and loading does not tie them again."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
