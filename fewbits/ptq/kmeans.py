r"""k-means: a codebook for each weight, its levels and scales fitted in turn.

With scales s of the blocks, levels c and codes k, the error of a weight and that of its layer's outputs are

.. math:: \sum_{ij} h_j\, s_{ij}^2 \bigl(w_{ij}/s_{ij} - c_{k(ij)}\bigr)^2
          \qquad\text{and}\qquad \mathrm{tr}(\Delta H \Delta^\top).

Levels: Lloyd's iteration on w / s finds a minimum of the first sum, with h = 1 where there is no data and
:math:`h_j = H_{jj}` where there is. Scales: a search over each block's, by the second (the first without data) with the
levels fixed. With data, rounds without them come first, and the best pair by the outputs is kept. Codes are nearest
levels and the latent weight is untouched.

1-Bit Wonder fits levels once, to blocks divided by their size, without the factor :math:`h s^2`: ``rounds=0,
weighted=False``. That is about as good as the codebook of a Gaussian with the best scales; the search for scales by the
outputs is what pays (``docs/methods.md`` has numbers).

Reference: 1-Bit Wonder, arXiv:2602.15563.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from fewbits.kmeans import block_scale, fit_codebook, require_codebook
from fewbits.ptq._base import PTQResult, check_scale, check_weight, output_error, resolve_hessian, rotate_hessian
from fewbits.ptq.clip import clip_scale
from fewbits.qtensor import quantize
from fewbits.scales import GRID_FREE_RULES, ScaleRule, find_scale, stored_scale
from fewbits.scheme import Scheme

Block = Literal["absmax", "absmean", "rms"]
Found = tuple[float, Scheme, Tensor]
"""Error, scheme with the fitted codebook, raw scales."""
_RULES: dict[str, ScaleRule] = {"absmax": "block_absmax", "absmean": "block_absmean", "rms": "block_rms"}
ROUNDS = 3
"""Searches for scales, each followed by a fit of levels, where the scheme asks for scales of least squared error."""
_FIRST_OCTAVES, _OCTAVES = 1.0, 0.25
"""How far the search for scales goes: the size of a block may be far from its best scale, a found scale is near."""


def kmeans(
    w: Tensor,
    scheme: Scheme,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    scale: Tensor | None = None,
    block: Block | None = None,
    rounds: int | None = None,
    weighted: bool = True,
    seed: int = 0,
) -> PTQResult:
    r"""Round to the nearest level of a codebook that is fitted to this weight.

    Args:
        w: ``(out_features, in_features)``.
        scheme: with a codebook, of which only the number of levels counts.
        hessian: ``(in, in)``; None, or one without any entry (a layer that is never called), weighs all columns alike.
        inputs: ``(.., in_features)`` in its place.
        scale: raw scales ``(R, G)`` to start from, > 0; None takes the sizes of the blocks.
        block: what the size of a block is; None reads it from the scheme's rule, of which ``mse`` and ``gaussian``
            mean the root mean square.
        rounds: searches for scales, each followed by a fit of levels, >= 0; None is 3 where the scheme's rule is
            ``mse``, and 0 where it is another: the scales are then the sizes themselves.
        weighted: measure errors in units of the weight, and of the output where there is data; False in units of the
            block, as published.
        seed: of the seedings.

    Returns:
        :class:`PTQResult` whose scheme has the fitted codebook and whose latent weight is ``w`` itself.

    Raises:
        ValueError: for a scheme without a codebook, dynamic scales that are not the sizes of the blocks, a bad option
            or shape, and as :func:`~fewbits.kmeans.fit_codebook`.

    Example:
        >>> w = torch.tensor([[-3.0, -1.0, 1.0, 8.0] * 16])
        >>> result = kmeans(w, Scheme.parse("W2KG64", rule="absmax"))
        >>> result.qtensor.scheme.grid.levels, torch.equal(result.qtensor.dequantize(), w)
        ((-0.375, -0.125, 0.125, 1.0), True)
    """
    w = check_weight(w, scheme)
    require_codebook(scheme)
    spec = scheme.scale
    rounds = (ROUNDS if spec.rule == "mse" else 0) if rounds is None else rounds
    if rounds < 0:
        raise ValueError(f"rounds={rounds} must be at least 0")
    if block is not None and block not in _RULES:
        raise ValueError(f"block={block!r} is unknown; use one of {', '.join(_RULES)}")
    rule = spec.rule if block is None else _RULES[block]
    if spec.mode == "dynamic" and (
        scale is not None or rounds > 0 or spec.rule not in GRID_FREE_RULES or rule != spec.rule
    ):
        raise ValueError(
            f"dynamic scales are what their rule finds at every use; use one of {', '.join(GRID_FREE_RULES)} with "
            f"rounds=0 and no other block or scale (got {spec.rule!r}, rounds={rounds}, block={block!r}), or "
            "mode='learned' or 'frozen'"
        )
    x = scheme.rotation.apply(w.float())
    h = None
    if hessian is not None or inputs is not None:
        h = rotate_hessian(resolve_hessian(w, hessian, inputs), scheme)
        h = h if weighted and bool((h.diagonal() > 0).any()) else None
    raw = block_scale(x, replace(spec, rule=rule)) if scale is None else check_scale(w, scheme, scale)
    best = _in_turn(x, scheme, raw, None, rounds=rounds, weighted=weighted, seed=seed)
    if h is not None:  # from there on by the outputs, so that data never do harm to what they measure
        best = _better(None, x, best[1], best[2], h)
        best = _in_turn(x, scheme, best[2], h, rounds=rounds, weighted=True, seed=seed, best=best)
    _, fitted, raw = best
    return PTQResult(qtensor=quantize(w, fitted, raw), scale=raw, latent=w.clone())


def _in_turn(
    x: Tensor,
    scheme: Scheme,
    raw: Tensor,
    hessian: Tensor | None,
    *,
    rounds: int,
    weighted: bool,
    seed: int,
    best: Found | None = None,
) -> Found:
    """Fit levels and search scales in turn from given scales, and keep the best pair (or what was best before)."""
    spec, view = scheme.scale, scheme.scale.view(x.shape)
    for i in range(rounds + 1):
        importance = view.expand(stored_scale(raw, spec)).square() if weighted else None
        if importance is not None and hessian is not None:
            importance = importance * hessian.diagonal().clamp_min(0).float()
        grid = fit_codebook(x, len(scheme.grid.levels), spec, scale=raw, weights=importance, seed=seed)
        fitted = replace(scheme, grid=grid)
        best = _better(best, x, fitted, raw, hessian)
        if i == rounds:
            break
        if hessian is None:
            raw = find_scale(x, grid, replace(spec, rule="mse"))
        else:
            raw = clip_scale(x, fitted, hessian, raw, octaves=_FIRST_OCTAVES if i == 0 else _OCTAVES)
        best = _better(best, x, fitted, raw, hessian)
    assert best is not None
    return best


def _better(best: Found | None, x: Tensor, scheme: Scheme, raw: Tensor, hessian: Tensor | None) -> Found:
    """The better of what was best and a new pair of levels and scales; ``x`` is in the basis in which it is rounded."""
    view = scheme.scale.view(x.shape)
    s = view.expand(stored_scale(raw, scheme.scale))
    rounded = scheme.grid.project_(x / s) * s
    error = float((rounded - x).double().square().sum()) if hessian is None else output_error(x, rounded, hessian)
    return (error, scheme, raw) if best is None or error < best[0] else best
