"""A trained layer's QTensor as one GGUF tensor and back: the choice of the type, the packing, the reading."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewbits.numerics import FP16_MIN_NORMAL, is_representable
from fewbits.qtensor import QTensor, quantize
from fewbits.scheme import Scheme
from fewbits.targets.base import ROTATED_INPUTS
from fewbits.targets.gguf_codec import PACK
from fewbits.targets.gguf_file import GGUFTensor
from fewbits.targets.gguf_plan import Plan, choose_type, plan
from fewbits.targets.gguf_tensor import pack_tensor, unpack_tensor
from fewbits.targets.gguf_types import F32, U8, gguf_type

_PROBE_ROWS, _NUM_PROBES = 4, 16
Order = NDArray[np.int64] | None


def _plan(scheme: Scheme, in_features: int, name: str) -> Plan:
    spec = scheme.scale
    return plan(
        scheme.grid,
        spec.group_size or in_features,
        in_features,
        name,
        superblock=spec.superblock,
        scale_dtype=spec.dtype,
        multiplier_bits=spec.multiplier_bits,
    )


def choose_layer_type(scheme: Scheme, shape: tuple[int, int], name: str | None) -> tuple[str, str]:
    """The GGUF type of a layer, and why.

    Args:
        scheme: of the layer.
        shape: ``(out_features, in_features)``.
        name: the type that is asked for; None takes the smallest that llama.cpp is fast with on x86.

    Returns:
        ``(type, reason)``.

    Raises:
        ValueError: naming the condition that fails.

    Example:
        >>> choose_layer_type(Scheme.parse("W1.58A16G256"), (8, 512), None)[0]
        'TQ2_0'
    """
    scheme.check_shape(shape)
    in_features, spec = shape[1], scheme.scale
    if scheme.rotation.basis == "rotated":
        raise ValueError(ROTATED_INPUTS)
    if name is not None and gguf_type(name).codes is None:
        return gguf_type(name).name, "dequantized weights"
    if scheme.rotation.kind != "none":
        raise ValueError(
            f"the scheme has the rotation {scheme.rotation.kind!r}, which no engine undoes; train without it, or use "
            "gguf:f32"
        )
    if name is None:
        found, reason = choose_type(
            scheme.grid,
            spec.group_size or in_features,
            in_features,
            superblock=spec.superblock,
            scale_dtype=spec.dtype,
            multiplier_bits=spec.multiplier_bits,
        )
    else:
        chosen = _plan(scheme, in_features, name)
        found, reason = chosen.gguf_type, chosen.reason
        if chosen.verdict == "cannot":
            raise ValueError(f"{found} cannot hold it: {reason}")
    if _plan(scheme, in_features, found).verdict == "lossless if":
        _probe(scheme, in_features, found)
    return found, reason


@functools.lru_cache(maxsize=256)
def _probe(scheme: Scheme, in_features: int, name: str) -> None:
    """Where the numbers decide: whether ordinary trained scales pass. If not, training for this type is in vain."""
    generator = torch.Generator().manual_seed(0)
    w = 0.05 * torch.randn(_PROBE_ROWS, in_features, generator=generator)
    for _ in range(_NUM_PROBES):  # a row or a whole matrix may have one scale only, and one may be exact by luck
        scale = 0.02 + 0.02 * torch.rand(scheme.scale.view(w.shape).scale_shape, generator=generator)
        try:
            pack_layer(quantize(w, scheme, scale), name)
        except ValueError as error:
            reason = _plan(scheme, in_features, name).reason
            raise ValueError(
                f"{name} holds it only if {reason}, which scales of dtype {scheme.scale.dtype!r} do not meet "
                f"({error}); use {'another type' if scheme.scale.dtype == 'portable' else 'scale dtype portable'}"
            ) from None


def pack_layer(q: QTensor, name: str, order: Order = None) -> U8:
    """The bytes of a quantized layer, exactly.

    Args:
        q: codes and scales.
        name: a GGUF type with codes.
        order: stored row i is row ``order[i]`` of ``q``; None leaves the rows.

    Returns:
        uint8 ``(rows, bytes per row)``.

    Raises:
        ValueError: if the type does not hold the codes and scales, or their split into super scales and multipliers.
    """
    rows, cols = q.shape
    spec = q.scheme.scale
    codes = q.codes.cpu().numpy()
    parts = [None if x is None else _every_row(x, rows) for x in (q.scale, q.super_scale, q.multipliers)]
    if order is not None:
        codes, parts = codes[order], [None if x is None else x[order] for x in parts]
    scale, super_scale, multipliers = parts
    assert scale is not None
    if q.super_scale is not None and q.multipliers is not None:
        try:
            back: tuple[torch.Tensor, ...] = _factor(q.scale, q.scheme)
        except ValueError:
            back = ()
        if not back or not torch.equal(back[0], q.super_scale) or not torch.equal(back[1], q.multipliers):
            raise ValueError(
                "super scales whose largest multiplier is not the largest possible one cannot be told from the file; "
                "use fewbits.scales.double_quantize, which does not make them"
            )
    return pack_tensor(
        q.scheme.grid,
        codes,
        scale,
        spec.group_size or cols,
        name,
        superblock=spec.superblock,
        super_scale=super_scale,
        multipliers=multipliers,
    )


def _every_row(x: torch.Tensor, rows: int) -> NDArray[Any]:
    """Per-tensor scales, stored once, belong to every row."""
    return x.expand(rows, -1).cpu().numpy()


def unpack_layer(data: U8, scheme: Scheme, name: str, order: Order = None) -> QTensor:
    """Inverse of :func:`pack_layer`.

    Raises:
        ValueError: for bytes that :func:`pack_layer` does not make of this scheme.
    """
    cols = data.shape[1] // gguf_type(name).bytes_per_block * gguf_type(name).block
    scheme.check_shape((len(data), cols))
    spec = scheme.scale
    with np.errstate(invalid="ignore", over="ignore"):  # scales that are not finite are refused below
        codes, scale = unpack_tensor(scheme.grid, data, spec.group_size or cols, name, superblock=spec.superblock)
    if order is not None:
        if len(order) != len(codes):
            raise ValueError(f"the tensor has {len(codes)} rows; its heads have {len(order)}")
        back = np.argsort(order)
        codes, scale = codes[back], scale[back]
    if spec.granularity == "per_tensor":
        if (scale != scale[0]).any():
            raise ValueError("the scales of a per_tensor scheme differ between rows")
        scale = scale[:1]
    stored, whole = torch.from_numpy(codes).to(scheme.grid.code_dtype), torch.from_numpy(np.ascontiguousarray(scale))
    if spec.superblock is None:
        return QTensor(stored, whole, scheme)
    return QTensor(stored, whole, scheme, *_factor(whole, scheme))


def _factor(scale: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Super scales and multipliers from their products.

    Not every GGUF type stores them apart. The largest multiplier of a superblock is the largest possible one, except
    where the super scale is the smallest that its dtype has.
    """
    spec = scheme.scale
    assert spec.superblock is not None
    assert spec.group_size is not None
    per, top = spec.superblock // spec.group_size, 2**spec.multiplier_bits - 1
    rows, groups = scale.shape
    num = -(-groups // per)
    padded = torch.nn.functional.pad(scale.double(), (0, num * per - groups))
    super_scale = padded.view(rows, num, per).amax(-1) / top
    if spec.dtype in ("portable", "fp16"):
        super_scale = super_scale.clamp_min(FP16_MIN_NORMAL)
    super_scale = super_scale.float()
    multipliers = (scale.double() / super_scale.double().repeat_interleave(per, dim=1)[:, :groups]).round()
    if not is_representable(super_scale, spec.dtype) or int(multipliers.max()) > top or int(multipliers.min()) < 1:
        raise ValueError(f"the scales are not {spec.dtype} super scales times multipliers from 1 to {top}")
    return super_scale, multipliers.to(torch.uint8)


def float_tensor(name: str, shape: tuple[int, ...], kind: str, make: Callable[[], F32]) -> GGUFTensor:
    """A tensor without codes, in a float type that must hold every value; ``make`` gives them when they are written."""
    return GGUFTensor(name=name, shape=shape, gguf_type=kind, data=lambda: PACK[kind](np.atleast_2d(make())))


def exact_float_type(values: Any) -> str:
    """The smallest of BF16, F16 and F32 that holds every value.

    Example:
        >>> exact_float_type([1.0, 1.5]), exact_float_type([1 + 2**-9]), exact_float_type([0.1])
        ('BF16', 'F16', 'F32')
    """
    x = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    for kind, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        if torch.equal(x.to(dtype).float(), x):
            return kind
    return "F32"
