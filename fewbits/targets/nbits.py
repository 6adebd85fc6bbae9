"""``MatMulNBits`` of onnxruntime: what it holds, its tensors and its node, for every target whose file is such a graph.

The tensors of a layer are ``PREFIX.codes`` (uint8, rows x blocks x bytes of a block), ``PREFIX.scales`` (fp32, rows x
blocks) and, where the zero is not the middle code, ``PREFIX.zeros`` (fp32, as the scales). One node may stand for
several layers with the same input, whose rows then follow one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.qtensor import QTensor
from fewbits.scheme import Scheme
from fewbits.targets.affine import (
    Fit,
    Judgement,
    affine_fit,
    assemble,
    codes_from_stored,
    engine_group,
    explain_misfit,
    gather_scale,
    refuse_scheme,
    spread_scale,
    stored_codes,
    times,
)
from fewbits.targets.layers import stored_tensor
from fewbits.targets.words import pack_words, unpack_words

OP, DOMAIN = "MatMulNBits", "com.microsoft"
LEAVES = ("codes", "scales", "zeros")
WIDTHS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
_FAST_BLOCKS = BLOCKS[:4]
"""Blocks of 256 have no fast 2-bit kernel."""

Packing = tuple[QTensor, Fit, int]
"""Codes and scales of a layer, how its levels are stored, and the block size."""


def find_nbits(
    scheme: Scheme, shape: tuple[int, int], num_bits: int | None = None, *, padded: bool = True
) -> tuple[Fit, int] | str:
    """Codes and block size, or why there are none.

    Args:
        scheme: of the weight.
        shape: ``(out_features, in_features)``.
        num_bits: of a stored code; None takes the fewest.
        padded: whether the last block of a row may be short.

    Example:
        >>> fit, block = find_nbits(Scheme.parse("W2HA16G64"), (8, 96))
        >>> fit.num_bits, fit.zero, block
        (2, Fraction(3, 2), 64)
    """
    if reason := refuse_scheme(scheme, shape):
        return reason
    widths = WIDTHS if num_bits is None else (num_bits,)
    found = (affine_fit(scheme.grid, (n,), ("middle", "float") if n == 2 else ("middle",)) for n in widths)
    fit = next((f for f in found if f is not None), None)
    if fit is None:
        why = "" if widths == (2,) else "; a zero point between two codes has no kernel beyond 2 bits"
        return explain_misfit(scheme.grid, widths, ("float",) if widths == (2,) else ("middle",)) + why
    size = scheme.scale.group_size
    block: int | None
    if not padded:
        block = engine_group(scheme, shape, BLOCKS if size else _FAST_BLOCKS)
    elif size is None:  # one scale a row, written for every block
        block = max(n for n in _FAST_BLOCKS if n <= max(shape[1], BLOCKS[0]))
    else:
        block = max((n for n in BLOCKS if size % n == 0), default=None)
    if block is None:
        unit = f"in_features={shape[1]}" if size is None else f"group_size={size} in rows of {shape[1]}"
        return f"{unit} cannot be cut into blocks of {', '.join(map(str, BLOCKS))}"
    return fit, block


def judge_nbits(found: tuple[Fit, int] | str) -> Judgement:
    """The verdict on :func:`find_nbits`'s answer; scales are fp32, so that nothing depends on the numbers."""
    if isinstance(found, str):
        return Judgement(verdict="cannot", reason=found)
    fit, block = found
    reason = f"{fit.num_bits}-bit codes, zero point {fit.zero}, blocks of {block}"
    return Judgement(verdict="lossless", reason=reason)


def pack_nbits(name: str, q: QTensor, fit: Fit, block: int) -> dict[str, Tensor]:
    """The tensors of one layer by :data:`LEAVES`.

    Raises:
        ValueError: naming the layer whose scales are not exact in fp32.
    """
    rows, width = q.shape
    stored = nn.functional.pad(stored_codes(q, fit), (0, -width % block))
    scales = times(spread_scale(q, block), fit.multiplier, torch.float32, name)
    codes = pack_words(stored, fit.num_bits).view(torch.uint8).view(rows, -1, block * fit.num_bits // 8)
    zeros = {} if fit.zeros == "middle" else {"zeros": torch.full_like(scales, float(fit.zero))}
    return {"codes": codes, "scales": scales.contiguous()} | zeros


def node_attributes(rows: int, width: int, fit: Fit, block: int) -> dict[str, int]:
    """What the node says of its tensors."""
    return {"K": width, "N": rows, "bits": fit.num_bits, "block_size": block}


def unpack_nbits(
    prefix: str,
    node: Any,
    tensors: Mapping[str, Tensor],
    layers: Sequence[tuple[str, Scheme, tuple[int, int]]],
    *,
    padded: bool = True,
) -> dict[str, QTensor]:
    """Codes and scales of the layers that a node stands for, in the order of their rows.

    Raises:
        ValueError: for a node or tensors that do not belong to the schemes.
    """
    found_attributes = {a.name: a.i for a in node.attribute}
    bits: int = found_attributes.get("bits", 0)
    if bits not in WIDTHS:
        raise ValueError(f"the node has bits={bits}")
    plans = []
    for _, scheme, shape in layers:
        found = find_nbits(scheme, shape, bits, padded=padded)
        if isinstance(found, str):
            raise ValueError(found)
        plans.append(found)
    fit, block = plans[0]
    rows, width = sum(shape[0] for _, _, shape in layers), layers[0][2][1]
    wanted = node_attributes(rows, width, fit, block)
    inputs = [f"{prefix}.{leaf}" for leaf in LEAVES[: 2 if fit.zeros == "middle" else 3]]
    alike = {(f.num_bits, f.zeros, b) for f, b in plans} == {(fit.num_bits, fit.zeros, block)}
    if not alike or {k: found_attributes.get(k) for k in wanted} != wanted or list(node.input[1:]) != inputs:
        is_ = f"{found_attributes} and inputs {list(node.input[1:])}"
        raise ValueError(f"the node has {is_}; {wanted} and {inputs} are needed")
    num_blocks = -(-width // block)
    codes = stored_tensor(tensors, inputs[0], torch.uint8, (rows, num_blocks, block * bits // 8))
    scales = stored_tensor(tensors, inputs[1], torch.float32, (rows, num_blocks))
    zeros = stored_tensor(tensors, inputs[2], torch.float32, (rows, num_blocks)) if len(inputs) == 3 else None
    stored = unpack_words(codes.reshape(rows, -1).view(torch.int32), num_blocks * block, bits)[:, :width]
    start, result = 0, {}
    for (name, scheme, shape), (own, _) in zip(layers, plans, strict=True):
        part = slice(start, start + shape[0])
        start += shape[0]
        if zeros is not None and bool((zeros[part] != float(own.zero)).any()):
            raise ValueError(f"a zero point is not {own.zero}")
        scale = gather_scale(scales[part], own.multiplier, scheme, shape, block)
        result[name] = assemble(codes_from_stored(stored[part], scheme, own), scale, scheme)
    return result
