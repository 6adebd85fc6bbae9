"""A weight in packed memory, ready for the kernels: built once, shared by tied layers, never changed.

The codes stay in the dense layout of :mod:`fewbits.packing`; only ternary codes are stored anew, as the 2-bit integers
that they are (1.6 bits a weight on disk, 2 bits in memory). Scales stay in their stored dtype.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from fewbits.grids import AnyGrid, Codebook, Int, Ternary
from fewbits.nn import QuantizedLayer
from fewbits.numerics import is_representable
from fewbits.packing import packed_width, unpack_codes
from fewbits.runtime.activations import DEFAULT_GROUP, dequantize_activations, quantize_activations
from fewbits.runtime.build import Layer, load_kernels
from fewbits.scales import GroupView, combine

Activations = Literal["fp32", "int8"]
KernelName = Literal["auto", "avx512", "avx2", "portable", "torch"]

_VARIANTS = {"portable": 0, "avx2": 1, "avx512": 2}
_LANES = {"avx2": 8, "avx512": 16}
_LANE_WIDTH = {1: 32, 2: 16, 3: 8, 4: 8}
_SCALE_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_READABLE = 64  # bytes behind the codes that a kernel may read, all zero
MAX_KERNEL_TOKENS = {"avx512": 64, "avx2": 64, "portable": 4}
"""Up to here fp32 activations go through the kernel; more tokens dequantize tiles of rows for a dense product."""
NO_VECTORS = "no AVX2 and FMA on this CPU"
_INT8_TOKENS = 64  # of one call: bounds its working memory
_TILE_FLOATS = 2**19  # 2 MB: a tile of dequantized rows stays in the cache


def rounding_bound(width: int) -> float:
    r"""What any variant may differ from exact arithmetic, relative to :math:`\sum_k |x_k \hat w_k|`.

    A product passes through at most 32 additions inside its lane, one per block or group of the row (at most
    ``width / 32``), and 8 more (horizontal sum, the canonical rounding of ``scale * level``):
    :math:`(40 + K / 32)\, 2^{-24}` to first order.

    Example:
        >>> rounding_bound(4096) < 1.1e-5
        True
    """
    return (40 + width / 32) * 2.0**-24


def choose_kernel(grid: AnyGrid, group_size: int | None, requested: KernelName = "auto") -> tuple[str, str]:
    """The fastest variant that holds a weight here, and why it is not a faster one (empty where it is the fastest).

    Args:
        grid: the weight's levels.
        group_size: weights that share a scale; None for one scale a row or tensor.
        requested: a variant by name; it is refused if the layer or this machine cannot run it.

    Raises:
        ValueError: for an unknown name or a request that cannot be met.
    """
    if requested not in ("auto", "torch", *_VARIANTS):
        raise ValueError(f"kernel={requested!r} is unknown; use one of auto, torch, {', '.join(_VARIANTS)}")
    if requested == "torch":
        return "torch", "asked for"
    library = load_kernels()
    if library is None:
        if requested == "auto":
            return "torch", "no compiled kernels"
        raise ValueError(f"kernel={requested!r} needs a C compiler (see the warning); use kernel='torch'")
    reason = ""
    if grid.num_bits > max(_LANE_WIDTH):
        reason = f"num_bits={grid.num_bits}; the vector kernels hold 1 to 4"
    elif group_size is not None and group_size % 32:
        reason = f"group_size={group_size} is not a multiple of 32"
    for name in ("avx512", "avx2"):
        if not reason and requested in (name, "auto") and library.fb_supports(_VARIANTS[name]):
            return name, ""
    if requested in ("auto", "portable"):
        return "portable", reason or ("asked for" if requested == "portable" else NO_VECTORS)
    raise ValueError(f"kernel={requested!r} cannot be used: {reason or 'this CPU does not support it'}; use 'auto'")


class PackedWeight:
    r"""Codes, scales and level table of one weight; products with it.

    Args:
        layer: a converted layer on the CPU; of a tied pair, either one.
        activations: ``fp32`` (exact up to :func:`rounding_bound`) or ``int8`` (activations rounded per token and
            group, see :func:`~fewbits.runtime.activations.quantize_activations`; then the same bound). Grids that are
            not uniform keep ``fp32``.
        kernel: see :func:`choose_kernel`.

    Attributes:
        kernel: ``avx512``, ``avx2``, ``portable`` or ``torch``.
        reason: why it is not a faster one, or not int8.
        activations: what the products use.

    Raises:
        ValueError: for a layer that is not on the CPU, damaged codes, scales or codebook, or a bad option.
    """

    def __init__(
        self, layer: QuantizedLayer, *, activations: Activations = "fp32", kernel: KernelName = "auto"
    ) -> None:
        if activations not in ("fp32", "int8"):
            raise ValueError(f"activations={activations!r} is unknown; use fp32 or int8")
        owner, spec, self.scheme = layer.owner, layer.scheme.scale, layer.scheme
        packed = owner.weight_packed
        if packed.device.type != "cpu":
            raise ValueError(f"the weight is on {packed.device}; the runtime's kernels are for the CPU, move it there")
        self.shape = layer.shape
        width = self.shape[1]
        self.grid: AnyGrid = Int(2) if isinstance(layer.scheme.grid, Ternary) else layer.scheme.grid
        self.kernel, self.reason = choose_kernel(self.grid, spec.group_size, kernel)
        self.activations: Activations = activations
        if activations == "int8" and isinstance(self.grid, Codebook):
            self.activations = "fp32"
            self.reason = "; ".join(filter(None, (self.reason, "a codebook is not uniform: fp32 activations")))
        view = spec.view(self.shape)
        wide = spec.granularity != "per_group"
        self.group_size = min(DEFAULT_GROUP, width) if wide and self.activations == "int8" else min(view.size, width)
        self._view = GroupView(self.shape, "per_group", self.group_size)
        _check_stored(owner)
        self.codes = _flat_codes(packed, width, layer.scheme.grid)
        double = spec.superblock is not None
        self.scales = (owner.weight_super_scale if double else owner.weight_scale).detach().clone().contiguous()
        self.multipliers = owner.weight_multipliers.detach().clone().contiguous() if double else None
        self.levels = _level_table(self.grid)
        self.first, self.lane = self._lane_tables()
        self.layer = self._layer()

    @property
    def num_bytes(self) -> int:
        """Memory that the weight takes (without the table of levels, 1 kB for all layers of a grid)."""
        held = (self.codes, self.scales, self.multipliers, self.first, self.lane)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def _lane_tables(self) -> tuple[Tensor, Tensor]:
        """Per block of lanes: the first group, and every lane's group relative to it."""
        lanes = _LANES.get(self.kernel)
        if lanes is None:
            return torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
        lane_width, width = _LANE_WIDTH[self.grid.num_bits], self.shape[1]
        num_blocks = -(-width // (lanes * lane_width))
        start = torch.arange(num_blocks * lanes).view(num_blocks, lanes) * lane_width
        group = start.clamp(max=width - 1) // self.group_size
        return group[:, 0].to(torch.int32).contiguous(), (group - group[:, :1]).to(torch.int32).contiguous()

    def _layer(self) -> Layer:
        spec, (rows, width) = self.scheme.scale, self.shape
        step, low = self.grid.step, self.grid.levels[0]
        return Layer(
            codes=self.codes.data_ptr(),
            scales=self.scales.data_ptr(),
            multipliers=None if self.multipliers is None else self.multipliers.data_ptr(),
            levels=self.levels.data_ptr(),
            first=self.first.data_ptr(),
            lane=self.lane.data_ptr(),
            rows=rows,
            width=width,
            stride=packed_width(width, self.grid),
            group=self.group_size,
            num_groups=self._view.num_groups,
            scale_cols=self.scales.shape[1],
            per_super=1 if spec.superblock is None else spec.superblock // self.group_size,
            scale_rows=self.scales.shape[0],
            scale_kind=_SCALE_KINDS[self.scales.dtype],
            bits=self.grid.num_bits,
            twice_zero=0 if isinstance(self.grid, Codebook) else round(-2 * low / step),
            half_step=step / 2,
            variant=_VARIANTS.get(self.kernel, 0),
        )

    # ---- products -------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, num_threads: int | None = None) -> Tensor:
        r"""``x @ weight.T`` before the rotation: :math:`y_{tr} = \sum_k x_{tk}\, s_{r g(k)}\, \ell_{rk}`.

        Args:
            x: fp32 ``(tokens, width)``, already rotated if the scheme rotates.
            num_threads: ``torch.get_num_threads()`` if None. Threads change no bit of the result.

        Returns:
            fp32 ``(tokens, rows)``.
        """
        x = x.contiguous()
        threads = torch.get_num_threads() if num_threads is None else num_threads
        library = load_kernels() if self.kernel != "torch" else None
        if library is None:
            return self._dense(self._rounded(x))
        count = x.shape[0]
        y = torch.empty(count, self.shape[0])
        int8 = self.activations == "int8"
        if not int8 and count > MAX_KERNEL_TOKENS[self.kernel]:
            return self._tiled(library, x, y, threads)
        for start in range(0, count, _INT8_TOKENS):
            source, target = x.data_ptr() + 4 * start * x.shape[1], y.data_ptr() + 4 * start * y.shape[1]
            part = min(count - start, _INT8_TOKENS)
            if library.fb_linear(self.layer, source, target, part, int8, threads):
                raise MemoryError(f"no memory for the activations of {part} tokens of {self.shape[1]} features")
        return y

    def _tiled(self, library: Any, x: Tensor, y: Tensor, threads: int) -> Tensor:
        """Rows of the weight by tiles in kernel order, times the activations in the same order."""
        rows, padded = self.shape[0], int(library.fb_padded_width(self.layer))
        permuted = torch.empty(len(x), padded)
        library.fb_permute(self.layer, x.data_ptr(), permuted.data_ptr(), len(x))
        per_tile = max(16, min(rows, _TILE_FLOATS // padded))
        scratch = torch.empty(per_tile, padded)
        for start in range(0, rows, per_tile):
            tile = scratch[: min(per_tile, rows - start)]
            library.fb_tile(self.layer, start, len(tile), tile.data_ptr(), threads)
            y[:, start : start + len(tile)] = permuted @ tile.t()
        return y

    def _rounded(self, x: Tensor) -> Tensor:
        if self.activations == "fp32":
            return x
        return dequantize_activations(*quantize_activations(x, self.group_size), self.group_size)

    def _dense(self, x: Tensor) -> Tensor:
        rows, width = self.shape
        per_tile = max(16, _TILE_FLOATS // width)
        starts = range(0, rows, per_tile)
        return torch.cat([x @ self._torch_rows(slice(i, i + per_tile)).t() for i in starts], dim=1)

    # ---- rows -----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, num_threads: int | None = None) -> Tensor:
        """Rows of the weight, ``fp32(scale) * level``, before the inverse rotation.

        Args:
            ids: int64, any shape.
            num_threads: ``torch.get_num_threads()`` if None.

        Returns:
            fp32 ``(*ids.shape, width)``.

        Raises:
            IndexError: for an id outside the table.
        """
        rows, width = self.shape
        flat = ids.reshape(-1).to("cpu", torch.int64).contiguous()
        if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= rows):
            raise IndexError(f"ids run from {int(flat.min())} to {int(flat.max())}; the table has {rows} rows")
        library = load_kernels() if self.kernel != "torch" else None
        if library is None:
            return self._torch_rows(flat).view(*ids.shape, width)
        out = torch.empty(*ids.shape, width)
        threads = torch.get_num_threads() if num_threads is None else num_threads
        library.fb_lookup(self.layer, flat.data_ptr(), flat.numel(), out.data_ptr(), threads)
        return out

    def _torch_rows(self, which: Tensor | slice) -> Tensor:
        rows, width = self.shape
        stride = packed_width(width, self.grid)
        packed = self.codes[: rows * stride].view(rows, stride)[which]
        levels = self._row_view(len(packed)).split(self.grid.decode(unpack_codes(packed, width, self.grid)))
        return self._row_view(len(packed)).merge(levels * self._group_scales(which, len(packed))[..., None])

    def _row_view(self, rows: int) -> GroupView:
        return GroupView((rows, self.shape[1]), "per_group", self.group_size)

    def _group_scales(self, which: Tensor | slice, rows: int) -> Tensor:
        """fp32 ``(rows, num_groups)``."""
        scales = self.scales if self.scales.shape[0] == 1 and self.shape[0] > 1 else self.scales[which]
        if self.multipliers is not None:
            return combine(scales.float(), self.multipliers[which], self.scheme.scale)
        return scales.float().expand(rows, self._view.num_groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        """The same object: it never changes, and its addresses must stay."""
        return self


def _check_stored(owner: QuantizedLayer) -> None:
    """The invariants of QTensor that a damaged file can break without a change of shape; codes are checked apart."""
    spec, grid = owner.scheme.scale, owner.scheme.grid
    stored = owner.weight_scale if spec.superblock is None else owner.weight_super_scale
    if not is_representable(stored, spec.dtype):
        raise ValueError(f"a stored scale is not finite, not positive or not exact in {spec.dtype!r}: a damaged file")
    if isinstance(grid, Codebook) and tuple(owner.weight_codebook.float().tolist()) != grid.codebook:
        raise ValueError(f"the stored codebook differs from the scheme's {grid.codebook}")


def _flat_codes(packed: Tensor, width: int, grid: AnyGrid) -> Tensor:
    """Dense codes of all rows, with readable bytes behind them."""
    if isinstance(grid, Codebook) and len(grid.levels) < 2**grid.num_bits:
        for start in range(0, len(packed), 256):
            unpack_codes(packed[start : start + 256], width, grid)  # raises for a code that has no level
    dense = _trits_to_dense(packed, width) if isinstance(grid, Ternary) else packed
    flat = torch.empty(dense.numel() + _READABLE, dtype=torch.uint8)
    flat[: dense.numel()] = dense.reshape(-1)
    flat[dense.numel() :] = 0
    return flat


def _trits_to_dense(packed: Tensor, width: int) -> Tensor:
    """Five trits a byte to 2-bit integers (code + 2), by a table of 10-bit fields; four bytes become five.

    Raises:
        ValueError: for bytes that are not five trits.
    """
    if packed.numel() and int(packed.max()) >= 3**5:
        raise ValueError(f"packed byte {int(packed.max())} is not five trits (it must be below {3**5})")
    values = torch.arange(3**5)
    fields = sum((values // 3**i % 3 + 1) << (2 * i) for i in range(5))
    assert isinstance(fields, Tensor)
    rows, stride = len(packed), packed_width(width, Int(2))
    out = torch.empty(rows, stride, dtype=torch.uint8)
    per_part = max(1, 2**22 // max(1, packed.shape[1]))
    for start in range(0, rows, per_part):
        part = torch.nn.functional.pad(packed[start : start + per_part], (0, -packed.shape[1] % 4))
        words = fields[part.view(len(part), -1, 4).long()] << torch.tensor([0, 10, 20, 30])
        dense = words.sum(-1, keepdim=True).view(torch.uint8)[..., :5].reshape(len(part), -1)
        out[start : start + per_part] = dense[:, :stride]
    return out


@functools.cache
def _level_table(grid: AnyGrid) -> Tensor:
    """256 levels by unsigned code, one tensor for all layers of a grid.

    A table of ``2**num_bits`` entries repeats; entries without a level are 0, since the kernels need them finite.
    """
    table = torch.zeros(2**grid.num_bits)
    table[: len(grid.levels)] = torch.tensor(grid.levels)
    return table.repeat(256 // len(table))
