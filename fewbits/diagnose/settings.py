"""How thorough a diagnosis is; every default is a trade of minutes for digits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbits.geometry._result import Result


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings(Result):
    """Counts, tolerance and seed.

    Args:
        tol: allowed rise of the loss inside the basin, nats; None measures it: the larger of 0.02 and three standard
            deviations of the disagreement of two halves of the tokens.
        num_random: random directions per scheme, at least 1.
        num_bisections: 5 gives widths to 2%.
        num_probes: Hessian-vector products of the trace estimate, at least 2; 0 leaves out everything made of them.
        num_monte_carlo: random errors in the cells of the grid, whose share outside the basin checks P(fail); 0: none.
        profile_points: samples of the loss from the model to a quarter beyond its rounding, at least 2.
        batch_size: token blocks per forward pass.
        num_layer_random: random directions per layer, whose median width gives ``kappa_rand`` of each layer; 0: none.
        curvature_blocks: token blocks of spectra and river, the costly part.
        num_spectrum_probes: Lanczos runs per spectrum; 0 draws no spectra. WinQ takes 200.
        num_lanczos_steps: Hessian products per Lanczos run, at least 2. WinQ takes 100.
        num_normals: leading directions of the smoothed Hessian that count as normal to the river, at most half of
            ``num_lanczos_steps``; 0 leaves the river out.
        num_deltas: displacements that smooth the Hessian, even.
        slice_points: rows and columns of the plane after training, at least 2.
        seed: of all random directions.

    Raises:
        ValueError: for a value outside these ranges.
    """

    tol: float | None = None
    num_random: int = 5
    num_bisections: int = 5
    num_probes: int = 8
    num_monte_carlo: int = 8
    profile_points: int = 6
    batch_size: int = 8
    num_layer_random: int = 1
    curvature_blocks: int = 4
    num_spectrum_probes: int = 1
    num_lanczos_steps: int = 24
    num_normals: int = 8
    num_deltas: int = 2
    slice_points: int = 11
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tol is not None and not 0 < self.tol < math.inf:
            raise ValueError(f"tol={self.tol} nats must be positive and finite, or None to measure it")
        lowest = {
            "num_random": 1, "num_bisections": 0, "num_monte_carlo": 0, "profile_points": 2, "batch_size": 1,
            "num_layer_random": 0, "curvature_blocks": 1, "num_spectrum_probes": 0, "num_lanczos_steps": 2,
            "num_normals": 0, "slice_points": 2,
        }  # fmt: skip
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if self.num_probes < 0 or self.num_probes == 1:
            raise ValueError(f"num_probes={self.num_probes} gives no standard error; use at least 2, or 0 for none")
        if self.num_normals > self.num_lanczos_steps // 2:
            raise ValueError(
                f"num_normals={self.num_normals} must be at most half of num_lanczos_steps={self.num_lanczos_steps}: "
                "the other half of the Ritz values has not converged"
            )
        if self.num_deltas < 2 or self.num_deltas % 2:
            raise ValueError(f"num_deltas={self.num_deltas} must be even and positive; they come in pairs")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
