r"""The promises that every grid, every surrogate and every scale rule keeps, as plain functions that raise on a breach.

They need no test runner, so a new method of your own can be held to them in one line::

    @pytest.mark.parametrize("grid", [Int(2), HalfShifted(3)])
    def test_my_surrogate_keeps_the_promises(grid):
        check_surrogate(MySurrogate(), grid)

Properties over all weights are searched by hypothesis (``pip install 'fewbits[dev]'``), deterministically.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from fewbits.fake_quant import fake_quantize
from fewbits.grids import GRIDS, AnyGrid, grid_from_dict
from fewbits.packing import pack_codes, packed_width, unpack_codes
from fewbits.qtensor import quantize
from fewbits.scales import ScaleRule, ScaleSpec, find_scale
from fewbits.scheme import Scheme
from fewbits.surrogates import STE, SURROGATES, ElementwiseSurrogate, Surrogate, surrogate_from_dict

NEAREST_ULPS = 1.0
"""A code may miss the nearest level by this many units in the last place of ``v``: shifting ``v`` rounds once."""
SAME_SUM = 2e-6
"""Relative tolerance for one sum taken in two orders in fp32."""
_WIDTH = 100
"""Columns of the test weights: ragged in groups of 32 and 64."""


def _hypothesis() -> Any:
    try:
        import hypothesis
    except ImportError as error:
        raise ImportError("the contract suite searches with hypothesis: pip install 'fewbits[dev]'") from error
    return hypothesis


def for_all_weights(check: Callable[[Tensor], None], *, dtype: torch.dtype = torch.float32, limit: float = 1e3) -> None:
    """Call ``check`` on many 1-D tensors of finite numbers within ``limit``, and report the smallest failing one."""
    hypothesis = _hypothesis()
    st = hypothesis.strategies
    halves = st.integers(-600, 600).map(lambda k: k / 2)  # levels and decision boundaries of the uniform grids
    numbers = st.lists(halves | st.floats(-limit, limit, width=32), min_size=1, max_size=16)

    @hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=20)
    @hypothesis.given(numbers)
    def search(values: list[float]) -> None:
        check(torch.tensor(values, dtype=dtype))

    search()


def check_grid(grid: AnyGrid) -> None:
    """Levels, codes, nearest rounding, edges, cells, plain data and packing of one grid.

    Raises:
        AssertionError: naming the promise that is broken.

    Example:
        >>> from fewbits.grids import HalfShifted
        >>> check_grid(HalfShifted(2))
    """
    levels = torch.tensor(grid.levels)
    codes = torch.arange(grid.qmin, grid.qmin + grid.num_levels).to(grid.code_dtype)
    assert levels.tolist() == list(grid.levels), "levels are exact in fp32"
    assert bool((levels.diff() > 0).all()), "levels ascend"
    assert grid.num_levels == len(grid.levels) <= 2**grid.num_bits, "a code of num_bits holds every level"
    assert math.log2(grid.num_levels) <= grid.storage_bits <= grid.num_bits, "storage lies between entropy and a word"
    assert (grid.min_level, grid.max_level, grid.qmax) == (levels[0], levels[-1], codes[-1]), "outermost levels"
    assert torch.equal(grid.decode(codes), levels), "code qmin + i decodes to levels[i]"
    assert torch.equal(grid.encode(levels), codes), "every level encodes to its own code"
    assert grid.encode(levels).dtype == grid.code_dtype, "codes have the code dtype"
    assert math.isclose(grid.step, float(levels.diff().mean()), rel_tol=1e-6), "step is the mean distance of levels"
    far = torch.tensor([-1e30, 1e30])
    assert grid.decode(grid.encode(far)).tolist() == [grid.min_level, grid.max_level], "far weights saturate"
    _check_edges_and_cells(grid, levels)
    for dtype in (torch.float32, torch.float64):
        for_all_weights(lambda v: _check_rounding(grid, v), dtype=dtype)
    _check_value(grid)
    data = json.loads(json.dumps(grid.to_dict()))
    if grid.kind in GRIDS:
        assert grid_from_dict(data) == grid, "to_dict and grid_from_dict are inverse, through JSON"
    _check_packing(grid, codes)


def _check_edges_and_cells(grid: AnyGrid, levels: Tensor) -> None:
    low, high = grid.bin_edge
    assert grid.level_edge == (grid.min_level, grid.max_level), "level_edge is the outermost levels"
    assert low < grid.min_level < grid.max_level < high, "bin_edge lies outside level_edge"
    assert grid.scale_edge in (grid.level_edge, grid.bin_edge), "scale_edge is one of the two"
    assert grid.scale_gradient in ("lsq", "level"), "the scale gradient has one of two forms"
    wide = levels.double()
    at_levels, at_boundaries = grid.cell_coordinate(wide), grid.cell_coordinate((wide[1:] + wide[:-1]) / 2)
    assert torch.equal(at_levels, at_levels.round()), "cell coordinates are whole on levels"
    assert bool((at_levels.diff() == 1).all()), "neighbouring levels are one cell apart"
    assert bool(((at_boundaries - at_levels[:-1] - 0.5).abs() < 1e-9).all()), "boundaries lie at half cells"


def _check_rounding(grid: AnyGrid, v: Tensor) -> None:
    before = v.clone()
    codes = grid.encode(v)
    assert torch.equal(v, before), "encode leaves its input alone"
    assert int(codes.min()) >= grid.qmin, "codes are at least qmin"
    assert int(codes.max()) <= grid.qmax, "codes are at most qmax"
    chosen = grid.decode(codes).to(v.dtype)
    levels = torch.tensor(grid.levels, dtype=v.dtype)
    nearest = (v[:, None] - levels).abs().amin(dim=1)
    slack = NEAREST_ULPS * torch.finfo(v.dtype).eps * (v.abs() + grid.step)
    assert bool(((v - chosen).abs() <= nearest + slack).all()), "encode picks a nearest level"
    projected = grid.project_(v)
    assert projected.data_ptr() == v.data_ptr(), "project_ works in place"
    assert torch.equal(projected, chosen), "project_ equals decode(encode(v))"
    assert torch.equal(grid.project_(v.clone()), chosen), "rounding twice changes nothing"
    order = before.argsort()
    assert bool((chosen[order].diff() >= 0).all()), "rounding is monotone"


def _check_value(thing: Any) -> None:
    assert is_dataclass(thing), "a frozen dataclass"
    assert hash(thing) == hash(thing), "hashable"
    for entry in fields(thing):
        try:
            setattr(thing, entry.name, None)
        except FrozenInstanceError:
            continue
        raise AssertionError(f"{type(thing).__name__}.{entry.name} can be assigned; make the dataclass frozen")


def _check_packing(grid: AnyGrid, codes: Tensor) -> None:
    for width in (1, 5, 8, 33):
        rows = codes.repeat(-(-3 * width // len(codes)))[: 3 * width].view(3, width)
        packed = pack_codes(rows, grid)
        assert packed.shape == (3, packed_width(width, grid)), "a packed row has the promised width"
        assert torch.equal(unpack_codes(packed, width, grid), rows), "unpack(pack(codes)) gives the codes"


def _weight(rows: int = 6, width: int = _WIDTH, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _backward(
    w: Tensor, scheme: Scheme, scale: Tensor, surrogate: Surrogate, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the weight and gradient of the scale."""
    w, scale = w.clone().requires_grad_(), scale.clone().requires_grad_()
    out = fake_quantize(w, scheme, scale, surrogate)
    grad_w, grad_scale = torch.autograd.grad(out, (w, scale), upstream.to(out.dtype))
    return out.detach(), grad_w, grad_scale


def check_surrogate(surrogate: Surrogate, grid: AnyGrid) -> None:
    """A surrogate touches the gradient of the latent weight, and nothing else.

    Raises:
        AssertionError: naming the promise that is broken.

    Example:
        >>> from fewbits.grids import Ternary
        >>> check_surrogate(STE(), Ternary())
    """
    scheme = Scheme(grid=grid, scale=ScaleSpec(granularity="per_group", group_size=32))
    w = _weight()
    scale = find_scale(w, grid, scheme.scale)
    upstream = _weight(seed=1)
    base = _backward(w, scheme, scale, STE(), upstream)
    stream = torch.get_rng_state()
    ours = _backward(w, scheme, scale, surrogate, upstream)
    assert torch.equal(torch.get_rng_state(), stream), "torch's random stream is untouched"
    assert torch.equal(ours[0], base[0]), "the forward pass is the same bit for bit"
    assert torch.equal(ours[2], base[2]), "the scale's gradient is the same bit for bit"
    assert ours[1].shape == w.shape, "one gradient per weight"
    assert bool(torch.isfinite(ours[1]).all()), "gradients are finite"
    assert torch.equal(_backward(w, scheme, scale, surrogate, upstream)[1], ours[1]), "the same twice"
    assert torch.equal(_backward(w, scheme, scale, surrogate, 4 * upstream)[1], 4 * ours[1]), "homogeneous in G"
    assert not _backward(w, scheme, scale, surrogate, 0 * upstream)[1].any(), "no gradient from no gradient"
    half = _backward(w.bfloat16(), scheme, scale, surrogate, upstream)
    assert half[1].dtype == torch.bfloat16, "the gradient has the weight's dtype"
    _check_value(surrogate)
    if surrogate.name in SURROGATES:
        assert surrogate_from_dict(json.loads(json.dumps(surrogate.to_dict()))) == surrogate, "round trip by JSON"
    _check_state(surrogate)
    _check_pullback(surrogate, grid, w, upstream)
    _check_saved(surrogate, scheme, w, scale)


def _check_state(surrogate: Surrogate) -> None:
    first, second = surrogate.init_state((6, _WIDTH)), surrogate.init_state((6, _WIDTH))
    assert first.keys() == second.keys(), "the state has fixed names"
    for key, value in first.items():
        assert isinstance(value, Tensor), f"state {key} is a tensor"
        assert not value.requires_grad, f"state {key} has no gradient"
        assert torch.equal(value, second[key]), f"state {key} starts the same"
        assert value.data_ptr() != second[key].data_ptr(), f"every layer has its own {key}"


def _check_pullback(surrogate: Surrogate, grid: AnyGrid, w: Tensor, upstream: Tensor) -> None:
    v = 3 * w
    state = surrogate.init_state(w.shape)
    copies = v.clone(), upstream.clone(), {key: value.clone() for key, value in state.items()}
    result = surrogate.pullback(upstream, v, grid, state)
    assert torch.equal(v, copies[0]), "pullback leaves v alone"
    assert torch.equal(upstream, copies[1]), "pullback leaves the gradient alone"
    assert all(torch.equal(state[key], copies[2][key]) for key in state), "pullback leaves the state alone"
    if not surrogate.needs_v:
        assert torch.equal(surrogate.pullback(upstream, None, grid, state), result), "needs_v=False means it"
    if isinstance(surrogate, ElementwiseSurrogate):
        assert torch.equal(result, upstream * surrogate.gain(v, grid)), "pullback is grad * gain"
        for dtype in (torch.float32, torch.float64):
            for_all_weights(lambda v: _check_gain(surrogate, grid, v), dtype=dtype)


def _check_gain(surrogate: ElementwiseSurrogate, grid: AnyGrid, v: Tensor) -> None:
    gain = surrogate.gain(v, grid)
    assert gain.shape == v.shape, "one gain per weight"
    assert gain.dtype == v.dtype, "the gain has the dtype of v"
    assert bool(torch.isfinite(gain).all()), "the gain is finite"
    assert bool((gain >= 0).all()), "the gain never turns a gradient round"


def _check_saved(surrogate: Surrogate, scheme: Scheme, w: Tensor, scale: Tensor) -> None:
    """Memory: only the latent weight and the scale wait for the backward pass, as themselves."""
    w, scale = w.clone().requires_grad_(), scale.clone().requires_grad_()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fake_quantize(w, scheme, scale, surrogate)
    assert sorted(saved) == sorted([w.data_ptr(), scale.data_ptr()]), "backward saves only the weight and its scale"
    assert not [value for value in vars(out.grad_fn).values() if isinstance(value, Tensor)], "and keeps nothing aside"
    (first,) = torch.autograd.grad((out * out).sum(), w, create_graph=True)
    if first.requires_grad:  # a surrogate may pass no gradient at all
        (second,) = torch.autograd.grad(first.sum(), w)
        assert bool(torch.isfinite(second).all()), "double backward works"


def check_scale_rule(rule: ScaleRule, grid: AnyGrid) -> bool:
    """A scale rule finds positive scales, group by group, in the units of the weight; or it is refused at birth.

    Returns:
        False if :class:`Scheme` refuses the pair, with a message that names the rule; True if all promises hold.

    Raises:
        AssertionError: naming the promise that is broken.

    Example:
        >>> from fewbits.grids import Int
        >>> check_scale_rule("absmax", Int(4)), check_scale_rule("rms", Int(4))
        (True, False)
    """
    assert rule in get_args(ScaleRule), f"{rule!r} is a rule"
    spec = ScaleSpec(granularity="per_group", group_size=32, rule=rule)
    refusal = None
    try:
        scheme = Scheme(grid=grid, scale=spec)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert repr(rule) in refusal, "a refusal names the rule"
        return False
    w = _weight()
    w[0, :32] = 0
    before, stream = w.clone(), torch.get_rng_state()
    scale = find_scale(w.requires_grad_(), grid, spec)
    w = w.detach()
    assert torch.equal(torch.get_rng_state(), stream), "torch's random stream is untouched"
    assert torch.equal(w, before), "the weight is left alone"
    assert not scale.requires_grad, "the start of a scale is a constant"
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, spec.view(w.shape).scale_shape), "fp32 (R, G)"
    assert bool(torch.isfinite(scale).all()), "scales are finite"
    assert (scale <= 0).nonzero().tolist() == [[0, 0]], "scales are positive, but 0 for the group of zeros"
    for factor in (0.25, 8.0):  # powers of two round nothing
        assert torch.equal(find_scale(factor * w, grid, spec), factor * scale), "scales have the units of the weight"
    if list(grid.levels) == [-level for level in reversed(grid.levels)]:
        assert torch.equal(find_scale(-w, grid, spec), scale), "a symmetric grid ignores the sign"
    for g, start in enumerate(range(0, _WIDTH, 32)):  # each group by itself, the ragged last one too
        alone = find_scale(w[:, start : start + 32], grid, ScaleSpec(rule=rule))
        torch.testing.assert_close(alone[:, 0], scale[:, g], rtol=SAME_SUM, atol=0)
    q = quantize(w, scheme)  # checks the invariants of QTensor
    assert torch.equal(q.dequantize(), fake_quantize(w, scheme)), "what trains is what ships"
    return True
