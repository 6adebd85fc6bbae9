r"""After training: did it come back into the basin, and through which door?

Three models in one weight space: the full-precision one (fp), its plain rounding (PTQ) and the trained one (QAT), the
last both as *latent* weights ``w`` and as *deployed* ones ``Q(w)``. Reference: arXiv:2606.09012.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbits.convert import owned_layers
from fewbits.diagnose.losses import TokenLoss, batched_hessian
from fewbits.diagnose.trajectory import Trajectory
from fewbits.geometry import (
    Displacements,
    InwardReport,
    PlanePoint,
    Profile,
    Slice2D,
    compare_displacements,
    difference,
    flip_rate,
    inward_report,
    loss_value,
    norm,
    placed,
    plane_through,
    profile,
    slice_2d,
)
from fewbits.geometry._result import Result
from fewbits.geometry.directions import Vector
from fewbits.qtensor import quantize


@dataclass(frozen=True, kw_only=True, eq=False)
class Triple:
    """The points over the parameters of the fp model; ``quantized`` are the indices of the weights with codes.

    ``params`` are the fp model's own parameters (they hold the point fp); every other field is a point of their shapes.
    Parameters without codes (norms, biases) keep their fp values at ``ptq`` and have the trained ones at QAT.
    """

    params: Vector
    ptq: Vector
    latent: Vector
    deployed: Vector
    quantized: tuple[int, ...]
    flips: float

    def codes_only(self, point: Vector) -> Vector:
        """The tensors of a point that have codes."""
        return [point[i] for i in self.quantized]


@dataclass(frozen=True, kw_only=True)
class AfterReport(Result):
    r"""What training did; losses in nats per token, lengths in units of ``w``.

    ``recovered``: the deployed loss is within ``2 tol`` of fp. ``gap_closed``: share of the PTQ rise that is gone.
    ``angle_latent`` and ``angle_deployed`` compare the PTQ displacement :math:`q_{ptq} - w_{fp}` with
    :math:`w_{qat} - w_{fp}` and :math:`Q(w_{qat}) - w_{fp}` over the weights with codes; the latter contains a rounding
    error itself, so it stands below 90 degrees for that reason alone. ``flip_rate``: share of codes that differ from
    those of PTQ. ``inward_ptq`` is measured at the PTQ point about fp, ``inward_qat`` at the deployed point about the
    latent one, both with their two controls. ``path_latent`` and ``path_deployed`` are the training as it was recorded
    (empty if it was not), in the coordinates of the slice; ``profiles``: losses on straight lines between models.
    """

    loss_fp: float
    loss_ptq: float
    loss_latent: float
    loss_deployed: float
    tol: float
    recovered: bool
    gap_closed: float | None
    angle_latent: Displacements | None
    angle_deployed: Displacements
    flip_rate: float
    rounding_error_ptq: float
    rounding_error_qat: float
    inward_ptq: InwardReport
    inward_qat: InwardReport
    slice: Slice2D
    latent_point: PlanePoint
    path_steps: tuple[int, ...]
    path_latent: tuple[PlanePoint, ...]
    path_deployed: tuple[PlanePoint, ...]
    profiles: dict[str, Profile]
    verdict: str


def triple(fp_model: nn.Module, qat_model: nn.Module) -> Triple:
    """The points fp, PTQ and QAT of a plain model and the prepared model that was trained from it.

    PTQ rounds the fp weights to nearest with each layer's own scheme, scales by the scheme's rule.

    Raises:
        ValueError: if the second model is not prepared, or the two do not have the same parameters.
    """
    layers = dict(owned_layers(qat_model))
    if not layers:
        raise ValueError("the trained model has no prepared layer; give a finished QAT run, not an export")
    trained = dict(qat_model.named_parameters())
    by_weight = {id(layer.weight): layer for layer in layers.values()}
    params: Vector = []
    ptq: Vector = []
    latent: Vector = []
    deployed: Vector = []
    quantized: list[int] = []
    codes_before, codes_after = [], []
    with torch.no_grad():
        for index, (name, p) in enumerate(fp_model.named_parameters()):
            value: Tensor | None = trained.get(name)
            layer = by_weight.get(id(value))
            if value is not None and layer is not None and (layer.parametrization or layer.transform) is not None:
                value = layer.latent().t() if layer.transposed else layer.latent()
            if value is None or value.shape != p.shape:
                raise ValueError(f"parameter {name} of the original is missing or has another shape in the trained one")
            params.append(p)
            latent.append(value.detach().to(p).clone())
            if layer is None:
                ptq.append(p.detach().clone())
                deployed.append(latent[-1])
                continue

            def stored(matrix: Tensor, transposed: bool = layer.transposed, like: Tensor = p) -> Tensor:
                return (matrix.t() if transposed else matrix).to(like).contiguous()

            before = quantize(p.t() if layer.transposed else p, layer.scheme)
            after = layer.qtensor()
            ptq.append(stored(before.dequantize()))
            deployed.append(stored(after.dequantize(value.dtype)))
            quantized.append(index)
            codes_before.append(before.codes)
            codes_after.append(after.codes)
    return Triple(
        params=params,
        ptq=ptq,
        latent=latent,
        deployed=deployed,
        quantized=tuple(quantized),
        flips=flip_rate(codes_before, codes_after),
    )


def after_training(
    loss: TokenLoss,
    qat_model: nn.Module,
    *,
    tol: float,
    num_points: int = 9,
    trajectory: Trajectory | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> AfterReport:
    """Compare fp, PTQ and QAT; both models are restored bit for bit.

    Args:
        loss: of the plain fp model, on tokens that training did not see.
        qat_model: the prepared model after training.
        tol: band of the basin, nats, e.g. the baseline's.
        num_points: rows and columns of the slice, at least 2.
        trajectory: of the training, to be drawn into the plane.
        say: takes lines of progress.

    Raises:
        ValueError: from :func:`triple`, or where the three points lie on a line (nothing was trained).
    """
    if not tol > 0:
        raise ValueError(f"tol={tol} nats must be positive")
    points = triple(loss.model, qat_model)
    params = points.params
    fp = loss_value(loss)
    values = {}
    for name in ("ptq", "latent", "deployed"):
        with placed(params, getattr(points, name)):
            values[name] = loss_value(loss)
    say(f"fp {fp:.4f}, PTQ {values['ptq']:.4f}, latent {values['latent']:.4f}, deployed {values['deployed']:.4f}")
    error = points.codes_only(difference(points.ptq, params))
    moved = points.codes_only(difference(points.latent, params))
    shipped = points.codes_only(difference(points.deployed, params))
    angle = compare_displacements(error, moved) if norm(moved) > 0 else None
    inward_ptq = inward_report(loss, params, points.ptq, batched_hessian(loss, params))
    with placed(params, points.latent):
        inward_qat = inward_report(loss, params, points.deployed, batched_hessian(loss, params))
    plane = plane_through(params, points.ptq, points.deployed)
    latent_point = plane.project(points.latent)
    say(f"slice of {num_points} x {num_points} points")
    paths: dict[bool, tuple[PlanePoint, ...]] = {False: (), True: ()}
    if trajectory is not None:
        names = [name for name, _ in loss.model.named_parameters()]
        paths = {flag: trajectory.project(plane, names, deployed=flag) for flag in paths}
    marks = [latent_point, *paths[False], *paths[True]]
    picture = slice_2d(loss, params, plane, num_x=num_points, num_y=num_points, trajectory=marks)
    rise, left = values["ptq"] - fp, values["deployed"] - fp
    return AfterReport(
        loss_fp=fp,
        loss_ptq=values["ptq"],
        loss_latent=values["latent"],
        loss_deployed=values["deployed"],
        tol=tol,
        recovered=left <= 2 * tol,
        gap_closed=(rise - left) / rise if rise > 0 else None,
        angle_latent=angle,
        angle_deployed=compare_displacements(error, shipped),
        flip_rate=points.flips,
        rounding_error_ptq=norm(error),
        rounding_error_qat=norm(difference(points.codes_only(points.deployed), points.codes_only(points.latent))),
        inward_ptq=inward_ptq,
        inward_qat=inward_qat,
        slice=picture,
        latent_point=latent_point,
        path_steps=() if trajectory is None else trajectory.steps,
        path_latent=paths[False],
        path_deployed=paths[True],
        profiles=profiles_between(loss, points),
        verdict=describe(fp, values, tol, angle, points.flips),
    )


LINES = {
    "original to rounded": ("params", "ptq"),
    "original to trained, deployed": ("params", "deployed"),
    "rounded to trained, deployed": ("ptq", "deployed"),
    "trained: latent to deployed": ("latent", "deployed"),
}
"""The straight lines between two models that are walked after training."""


def profiles_between(loss: TokenLoss, points: Triple, *, num_points: int = 7) -> dict[str, Profile]:
    """Losses on the lines of :data:`LINES`, from a quarter before the first model to a quarter behind the second.

    Args:
        loss: of the plain model; restored bit for bit.
        points: the models.
        num_points: samples per line, at least 2; with 7 both models are among them.
    """
    ts = [-0.25 + 1.5 * i / (num_points - 1) for i in range(num_points)]
    found = {}
    for name, ends in LINES.items():
        start, end = (getattr(points, end) for end in ends)
        with placed(points.params, start):
            found[name] = profile(loss, points.params, difference(end, points.params), ts)
    return found


def describe(fp: float, values: dict[str, float], tol: float, angle: Displacements | None, flips: float) -> str:
    """The verdict in words: came back or not, where the latent weights are, and in which direction they went."""
    left, latent = values["deployed"] - fp, values["latent"] - fp
    came = "The deployed model came back into the basin" if left <= 2 * tol else "The deployed model did not come back"
    text = [f"{came}: {left:+.4f} nats against the original, {values['ptq'] - fp:+.4f} before training."]
    where = "lie inside it" if latent <= 2 * tol else "lie outside it"
    text.append(f"The latent weights {where} ({latent:+.4f} nats).")
    if angle is not None:
        turned = angle.angle_deg - 90
        door = "mostly sideways" if abs(turned) < 15 else f"{'against' if turned > 0 else 'along'} the rounding error"
        text.append(
            f"They moved {door}: {angle.angle_deg:.1f} degrees from the error of plain rounding (unrelated directions "
            f"stand at 90 +- {angle.null_sd_deg:.2f}), and {flips:.1%} of the codes changed."
        )
    return " ".join(text)
