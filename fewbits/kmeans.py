r"""Codebooks by one-dimensional k-means (Lloyd-Max) on block-normalised weights.

Lloyd's iteration alternates two optimal steps: boundaries at midpoints, levels at the (weighted) means of their cells.
On sorted data with prefix sums both cost :math:`K \log n`, so that it runs to its fixed point, in float64 and without
any dependence on threads or devices.

Reference: 1-Bit Wonder, arXiv:2602.15563.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.grids import MAX_BITS, Codebook
from fewbits.scales import ScaleSpec, block_size, stored_scale
from fewbits.scheme import Scheme

FIRST_SAMPLE = 2**16
"""Values in the sample that seeds the levels; it then doubles until it holds all."""
NUM_SEEDINGS = 8
"""Seedings tried on the first sample; the best goes on (a density with two modes has several local minima)."""
SAMPLE_TOLERANCE = 1e-4
"""Share of changed assignments at which a sample that is not the whole is good enough."""
MAX_ITERATIONS = 10_000


@dataclass(frozen=True)
class SortedSample:
    """Sorted values with prefix sums of their weights, all float64 on the CPU.

    Attributes:
        x: ``(n,)``, ascending.
        mass: ``(n + 1,)``, sum of the weights of the first i values.
        moment: ``(n + 1,)``, sum of weight times value of the first i values.
    """

    x: Tensor
    mass: Tensor
    moment: Tensor

    @classmethod
    def of(cls, x: Tensor, weights: Tensor | None = None) -> SortedSample:
        """Sort values ``(n,)`` with their weights (1 each if None)."""
        x, order = x.detach().cpu().double().sort()
        w = torch.ones_like(x) if weights is None else weights.detach().cpu().double()[order]
        zero = torch.zeros(1, dtype=torch.float64)
        return cls(x, torch.cat([zero, w.cumsum(0)]), torch.cat([zero, (w * x).cumsum(0)]))

    def boundaries(self, levels: Tensor) -> Tensor:
        """How many values lie at or below each midpoint of neighbouring levels, ``(K - 1,)``."""
        return torch.searchsorted(self.x, (levels[1:] + levels[:-1]) / 2, right=True)

    def means(self, boundaries: Tensor, levels: Tensor) -> Tensor:
        """Weighted mean of every cell; a cell without mass keeps its level."""
        ends = torch.cat([torch.tensor([0]), boundaries, torch.tensor([len(self.x)])])
        mass = self.mass[ends].diff()
        return torch.where(mass > 0, self.moment[ends].diff() / mass.clamp_min(1e-300), levels)

    def explained(self, levels: Tensor) -> float:
        """Weighted sum of squares of the cells' means: the larger, the smaller the distortion at these boundaries."""
        boundaries = self.boundaries(levels)
        ends = torch.cat([torch.tensor([0]), boundaries, torch.tensor([len(self.x)])])
        return float((self.mass[ends].diff() * self.means(boundaries, levels).square()).sum())


def lloyd(
    sample: SortedSample, levels: Tensor, *, tolerance: float = 0.0, max_iterations: int = MAX_ITERATIONS
) -> Tensor:
    """Lloyd's iteration from given levels; the distortion never rises.

    Args:
        sample: the data.
        levels: start, ``(K,)`` float64, ascending.
        tolerance: stop when at most this share of the values changed its cell; 0 is the fixed point, where every level
            is the mean of its cell and every boundary a midpoint.
        max_iterations: stop at the latest after as many.

    Returns:
        ``(K,)`` float64, ascending.

    Example:
        >>> sample = SortedSample.of(torch.tensor([-1.2, -0.8, 0.9, 1.1]))
        >>> lloyd(sample, torch.tensor([-1.0, 0.5]).double()).round(decimals=6)
        tensor([-1.,  1.], dtype=torch.float64)
    """
    boundaries = sample.boundaries(levels)
    for _ in range(max_iterations):
        levels = sample.means(boundaries, levels)
        new = sample.boundaries(levels)
        changed = int((new - boundaries).abs().sum())
        boundaries = new
        if changed <= tolerance * len(sample.x):
            break
    return levels


def plus_plus(sample: SortedSample, num_levels: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeds: values drawn with probability weight times squared distance to the nearest seed so far."""
    weights = sample.mass.diff()
    distance = torch.ones_like(weights)
    seeds: list[Tensor] = []
    for _ in range(num_levels):
        total = (weights * distance).cumsum(0)
        target = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
        index = int(torch.searchsorted(total, target, right=True).clamp(max=len(total) - 1))
        seeds.append(sample.x[index])
        gap = (sample.x - seeds[-1]).square()
        distance = gap if len(seeds) == 1 else torch.minimum(distance, gap)
    return torch.stack(seeds).sort().values


def kmeans_levels(
    x: Tensor,
    num_levels: int,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
    first_sample: int = FIRST_SAMPLE,
) -> Tensor:
    r"""Levels of a local minimum of :math:`\sum_i h_i \min_k (x_i - c_k)^2`.

    On a random sample of ``first_sample`` values the best of several seedings is found; Lloyd's iteration goes on with
    samples twice as large, each from where the last one ended, and to its fixed point on all values.

    Args:
        x: any shape, finite.
        num_levels: K, 2 to 256.
        weights: h >= 0, same shape (Fisher information, for example Adam's second moment); None is 1.
        seed: of the sample and the seeds.
        first_sample: size of the first sample, at least ``num_levels``.

    Returns:
        ``(K,)`` float64, ascending.

    Raises:
        ValueError: for values or weights that are not finite, negative weights, or fewer than ``num_levels`` distinct
            values with weight.

    Example:
        >>> x = torch.special.ndtri((torch.arange(10_000).double() + 0.5) / 10_000)  # N(0, 1)
        >>> kmeans_levels(x, 4).round(decimals=2)
        tensor([-1.5100, -0.4500,  0.4500,  1.5100], dtype=torch.float64)
    """
    if not 2 <= num_levels <= 2**MAX_BITS:
        raise ValueError(f"num_levels={num_levels} is outside 2..{2**MAX_BITS}")
    if first_sample < num_levels:
        raise ValueError(f"first_sample={first_sample} is smaller than num_levels={num_levels}")
    x = x.detach().flatten().cpu()
    if not bool(torch.isfinite(x).all()):
        raise ValueError("k-means on values that are not finite; look for a diverged run or a damaged checkpoint")
    h = None if weights is None else weights.detach().flatten().cpu()
    if h is not None:
        if h.shape != x.shape or not bool(torch.isfinite(h).all()) or bool((h < 0).any()):
            raise ValueError(f"weights must be finite, >= 0 and one per value ({len(x)}), got {len(h)}")
        x, h = x[h > 0], h[h > 0]
    distinct = len(x[:first_sample].unique())
    if distinct < num_levels and (distinct := len(x.unique())) < num_levels:
        raise ValueError(f"{distinct} distinct values with weight cannot carry {num_levels} levels; use fewer levels")
    generator = torch.Generator().manual_seed(seed)
    n = len(x)
    if n > first_sample:  # a random order, of which every sample is a beginning
        order = torch.randperm(n, generator=generator)
        x, h = x[order], None if h is None else h[order]
    size = min(n, first_sample)
    sample = SortedSample.of(x[:size], None if h is None else h[:size])
    starts = [lloyd(sample, plus_plus(sample, num_levels, generator), tolerance=1e-3) for _ in range(NUM_SEEDINGS)]
    levels = max(starts, key=sample.explained)
    while size < n:
        levels = lloyd(sample, levels, tolerance=SAMPLE_TOLERANCE)
        size = min(n, 2 * size)
        sample = SortedSample.of(x[:size], None if h is None else h[:size])
    return lloyd(sample, levels)


def block_scale(w: Tensor, spec: ScaleSpec) -> Tensor:
    """The size of every block by which k-means normalises: the largest, mean or root mean square magnitude.

    Unlike :func:`fewbits.scales.find_scale` this knows no grid: the rules ``absmax*`` mean max abs(w), ``absmean`` mean
    abs(w), all others the rms. Pass it as the raw scale that belongs to a codebook of :func:`fit_codebook`; with the
    rules ``block_*`` it is what :func:`~fewbits.scales.find_scale` gives, so that scales may be dynamic.

    Args:
        w: ``(out_features, in_features)``.
        spec: granularity and rule.

    Returns:
        fp32 ``(R, G)``, >= 0, units of ``w``.

    Example:
        >>> block_scale(torch.tensor([[3.0, -4.0]]), ScaleSpec(rule="absmean"))
        tensor([[3.5000]])
    """
    view = spec.view(w.shape)
    x = view.split(w.detach().float())
    return block_size(x, view.counts().to(x.device), spec.rule)


def fit_codebook(
    w: Tensor,
    num_levels: int,
    spec: ScaleSpec,
    *,
    scale: Tensor | None = None,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Codebook:
    r"""One codebook for a weight: k-means on :math:`w / s` with the blocks' scales s as they are stored.

    Args:
        w: ``(out_features, in_features)`` in the basis in which it is rounded (after the rotation, if there is one).
        num_levels: K, 2 to 256.
        spec: granularity, rule (see :func:`block_scale`) and stored dtype of the scales.
        scale: raw scales ``(R, G)`` in place of the sizes of the blocks.
        weights: of the entries, same shape, >= 0. The error is measured in units of the scale; to minimise the error of
            the weight itself, pass the squared scale of every weight (times the Fisher information, if any).
        seed: of the sample and the seeds; the result depends on nothing else.

    Returns:
        A :class:`Codebook` whose levels are the means of their cells, rounded to fp32.

    Raises:
        ValueError: as :func:`kmeans_levels`.

    Example:
        >>> from fewbits.qtensor import quantize
        >>> from fewbits.scheme import Scheme
        >>> w, spec = torch.randn(64, 128), ScaleSpec(granularity="per_group", group_size=64, rule="absmax")
        >>> grid = fit_codebook(w, 4, spec)
        >>> q = quantize(w, Scheme(grid=grid, scale=spec), scale=block_scale(w, spec))
        >>> bool((q.dequantize() - w).square().mean() < 0.2)
        True
    """
    raw = block_scale(w, spec) if scale is None else scale
    stored = spec.view(w.shape).expand(stored_scale(raw, spec))
    levels = kmeans_levels(w.detach().float() / stored, num_levels, weights=weights, seed=seed).float().tolist()
    if any(a >= b for a, b in itertools.pairwise(levels)):
        raise ValueError(f"two of {num_levels} levels fall on the same fp32 number; use fewer levels")
    return Codebook(tuple(levels))


def require_codebook(scheme: Scheme, name: str = "the scheme") -> None:
    """Refuse a grid whose levels nothing can fit.

    Args:
        scheme: of a weight.
        name: whose, for the message.

    Raises:
        ValueError: for a grid that is no codebook.

    Example:
        >>> require_codebook(Scheme.parse("W2KG64"))
    """
    if not isinstance(scheme.grid, Codebook):
        raise ValueError(
            f"{name} {scheme.name} has the {scheme.grid.kind} grid, of fixed levels, and k-means fits a codebook: "
            "use the letter K, such as W2KG64"
        )


def codebook_spelling(text: str) -> str:
    """A scheme's text with a codebook of as many bits in place of its plain grid.

    Args:
        text: such as ``W2A16G64``; one with the letter K, or one that is no scheme, comes back as it is.

    Raises:
        ValueError: for ternary (three levels take 2 bits in a codebook) and half-shifted grids.

    Example:
        >>> codebook_spelling("W2A16G64"), codebook_spelling("W1"), codebook_spelling("W4A8KV4G32")
        ('W2KA16G64', 'W1K', 'W4KA8KV4G32')
    """
    match = re.match(r"W(1\.58|[1-8])(H?)(?![HK.\d])", text.strip())
    if match is None:
        return text
    if match[1] == "1.58" or match[2]:
        what = "a codebook of three levels takes 2 bits" if match[1] == "1.58" else "k-means finds levels of its own"
        raise ValueError(f"scheme {text!r} has a fixed grid and {what}; use W{match[1][0] if match[2] else 2}K..")
    return f"W{match[1]}K{text.strip()[match.end() :]}"
