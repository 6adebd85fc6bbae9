"""Tables of a diagnosis that need a word of explanation: arms, recovery, spectra, river."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

from fewbits.diagnose.arms import ArmsReport
from fewbits.diagnose.diagnosis import Diagnosis
from fewbits.diagnose.terrain import ZERO
from fewbits.report import html_table


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none.

    Example:
        >>> number(1.23456), number(None), number(float("inf"))
        ('1.23', '-', '-')
    """
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


ARM_HEADER = (
    "arm", "loss, latent", "loss, rounded", "moved", "angle to the first error", "kappa_rand", "inward slope",
    "unrounded", "quadratic", "ratio",
)  # fmt: skip


def arm_rows(report: ArmsReport) -> list[list[str]]:
    """One row per arm; slopes in nats per unit of ``w``, with both controls beside them."""
    return [
        [
            name,
            f"{a.loss_latent:.4f}",
            f"{a.loss_deployed:.4f}",
            number(a.moved),
            "-" if a.angle is None else f"{a.angle.angle_deg:.1f}",
            number(a.kappa_rand),
            number(a.inward.at_rounded.slope),
            number(a.inward.at_latent.slope),
            number(a.inward.quadratic_slope),
            number(a.inward.wall_ratio),
        ]
        for name, a in report.arms.items()
    ]


def recovery_text(found: Diagnosis) -> str:
    """When the deployed model came back, if the training was watched."""
    r = found.recovery
    if r is None:
        return ""
    back = "never, while it was watched" if r.recovery_step is None else f"at step {r.recovery_step}"
    first = {None: "", True: " The deployed loss fell first.", False: " The latent loss fell first."}[r.deployed_first]
    halves = f"half of the drop of the deployed loss was done at step {number(r.deployed_half_time)}"
    return (
        f"<p>Watched while it trained: the deployed model came back {back}; {halves}, of the latent loss at "
        f"{number(r.latent_half_time)}.{first} The best deployed loss was {r.best_deployed:.4f} at step {r.best_step}, "
        f"the last {r.last_deployed:.4f}.</p>"
    )


def terrain_section(found: Diagnosis, pictures: Mapping[str, str]) -> str:
    """Spectra and river as HTML; empty where neither was measured."""
    parts = []
    if found.terrain.spectra:
        rows = [
            [name, number(r.spectrum.largest), number(r.spectrum.smallest), number(r.trace), f"{r.zero_share:.1%}",
             f"{r.negative_share:.2%}"]
            for name, r in found.terrain.spectra.items()
        ]  # fmt: skip
        header = ("model", "largest", "smallest", "trace", f"below {ZERO:g} in size", f"below -{ZERO:g}")
        parts += [
            "<p>How curved is the loss around the model, and around its quantized versions? Most directions are flat; "
            "few are steep, and they decide how fine a grid must be.</p>",
            pictures["spectrum"],
            html_table(header, rows),
        ]
    if found.river is not None:
        parts += [_river(found), pictures["river"]]
    return "".join(parts)


def _river(found: Diagnosis) -> str:
    river = found.river
    assert river is not None
    tangents = [
        [name, number(t.width.first), number(t.curvature), number(t.curvature_ratio), "yes" if t.accepted else "no",
         number(t.gradient_cosine), ", ".join(f"{n} {s.share:.2%}" for n, s in t.splits.items())]
        for name, t in river.tangents.items()
    ]  # fmt: skip
    vectors = [
        [name, number(v.length), f"{v.share:.3%}", f"{v.chance:.5%}",
         number(v.normal_energy / v.energy if v.energy else None)]
        for name, v in river.vectors.items()
    ]  # fmt: skip
    return (
        "<p>A <i>river</i> is a direction that stays cheap over the length of a rounding error; <i>walls</i> are the "
        f"{len(river.eigenvalues)} steepest directions of the curvature averaged over moves as long as the error of "
        f"{html.escape(river.smoothed_at)}. They hold {river.gradient_in_normals:.1%} of the squared gradient.</p>"
        + html_table(
            ("river by", "width", "curvature", "over the largest", "below 1e-2", "cosine to the gradient", "share of"),
            tangents,
        )
        + html_table(("vector", "length", "into the walls", "by chance", "share of its energy there"), vectors)
    )
