"""Rates of learned-Jacobian training, predicted beside measured; writes docs/convergence.md.

    python scripts/convergence.py

About a minute on one core. Seeds are fixed, so the page only changes when the code does (to the last digits, between
machines: float32 sums of the small network differ).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits import Rule, Scheme, prepare
from fewbits.convert import owned_layers
from fewbits.fake_quant import fake_quantize, scale_as_function
from fewbits.grids import AnyGrid, HalfShifted, Int
from fewbits.optim import VarianceReduced, VarianceReduction
from fewbits.surrogates import ClippedSTE, JacQuant
from fewbits.surrogates.sensitivity import dither_exact
from fewbits.training.windows import CodeWindows, calibration

PAGE = Path(__file__).resolve().parent.parent / "docs" / "convergence.md"
SEEDS = range(5)


# the dithered quadratic ---------------------------------------------------------------------------------------------


def quadratic_step(
    w: Tensor, a: float, *, rate: float, curvature: float, gain: float | str, grid: AnyGrid, generator: torch.Generator
) -> Tensor:
    """One step on ``h/2 (q - a)^2`` with ``q = Q(w + r) - r``; steps of the grid are the unit.

    ``gain``: a number b, or ``"J"`` for the mean-field Jacobian at w (0 or 1).
    """
    r = (torch.rand(w.shape, generator=generator, dtype=w.dtype) - 0.5) * grid.step
    upstream = curvature * (grid.project_(w + r) - r - a)
    return w - rate * upstream * (dither_exact(w, grid) if gain == "J" else gain)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of a constant gain b on the unclipped grid: mean error times ``contraction`` each step, then this variance."""

    contraction: float
    floor: float


def predict(rate: float, gain: float, curvature: float, step: float = 1.0) -> Prediction:
    r"""Contraction :math:`1 - \eta b h` and floor :math:`\eta b h D^2 / (12 (2 - \eta b h))` (A-T8).

    The dithered q is w plus noise of variance :math:`D^2/12`, uniform and independent of w. Hence
    :math:`e \leftarrow (1 - x) e - x n` with :math:`x = \eta b h`, and :math:`V = (1 - x)^2 V + x^2 D^2/12`.

    Raises:
        ValueError: unless 0 < x < 2, the range of stable steps.
    """
    x = rate * gain * curvature
    if not 0 < x < 2:
        raise ValueError(f"eta b h = {x} is outside (0, 2): the iteration does not converge")
    return Prediction(contraction=1 - x, floor=x * step * step / (12 * (2 - x)))


def measure(
    rate: float, gain: float, curvature: float, *, num_steps: int, chains: int = 20_000, seed: int = 0
) -> tuple[float, float]:
    """Contraction of the mean per step (first steps, down to 1 %), and the variance at the end, over chains."""
    grid, a, start = Int(8), 0.3, 20.0
    looked = max(1, min(10, int(math.log(0.01) / math.log(abs(predict(rate, gain, curvature).contraction)))))
    generator = torch.Generator().manual_seed(seed)
    w = torch.full((chains,), start, dtype=torch.float64)
    factor = math.nan
    for t in range(1, num_steps + 1):
        w = quadratic_step(w, a, rate=rate, curvature=curvature, gain=gain, grid=grid, generator=generator)
        if t == looked:
            factor = abs((w.mean().item() - a) / (start - a)) ** (1 / looked)
    return factor, w.var().item()


def steps_to_return(start: float, *, target: float, rate: float, curvature: float, gain: float, grid: AnyGrid) -> int:
    """Predicted steps of a saturated weight, on average over the dither, back to the outermost level.

    Beyond it Q(w + r) is qmax for every dither r: the mean gradient is the constant ``h (qmax - a)``, the weight walks.
    """
    speed = rate * gain * curvature * (grid.max_level - target)
    return math.ceil((start - grid.max_level) / speed - 1e-9)  # in exact arithmetic it may be a whole number


def saturated(gain: float | str, *, start: float, target: float, num_steps: int, seed: int = 0) -> tuple[int, float]:
    """Steps until the mean of 4000 chains is back within the levels (-1: never), and the final mean."""
    grid = HalfShifted(2)
    generator = torch.Generator().manual_seed(seed)
    w = torch.full((4000,), start, dtype=torch.float64)
    back = -1
    for t in range(1, num_steps + 1):
        w = quadratic_step(w, target, rate=0.1, curvature=1.0, gain=gain, grid=grid, generator=generator)
        if back < 0 and w.mean().item() <= grid.max_level:
            back = t
    return back, w.mean().item()


# a small network ----------------------------------------------------------------------------------------------------

NUM_BATCHES, BATCH, IN, HIDDEN = 32, 8, 16, 32


def problem(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Minibatches of a noisy teacher network: 256 examples in 32 batches."""
    g = torch.Generator().manual_seed(1000 + seed)
    first, second = torch.randn(HIDDEN, IN, generator=g) / IN**0.5, torch.randn(1, HIDDEN, generator=g) / HIDDEN**0.5
    x = torch.randn(NUM_BATCHES, BATCH, IN, generator=g)
    y = torch.tanh(2 * x @ first.T) @ second.T + 0.3 * torch.randn(NUM_BATCHES, BATCH, 1, generator=g)
    return list(zip(x, y, strict=True))


def network(seed: int, surrogate: Any) -> nn.Sequential:
    """The student: 2-bit weights with frozen scales, so that only the Jacobian of the weights matters."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
    scheme = Scheme.parse("W2", mode="frozen", dtype="fp32")
    prepare(model, Rule(scheme=scheme, surrogate=surrogate), ignore=[])
    return model


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    """Mean squared error of a batch."""
    return lambda batch: (model(batch[0]) - batch[1]).square().mean()


def full_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Over all batches, with the deployed (quantized) weights."""
    with torch.no_grad():
        return float(torch.stack([loss_of(model)(batch) for batch in batches]).mean())


def set_constant_gain(model: nn.Module, gain: float) -> None:
    """Constant B in every layer."""
    for _, layer in owned_layers(model):
        layer.state()["gain"].fill_(gain)


def train(
    seed: int,
    surrogate: Any,
    *,
    gain: float | None = None,
    rate: float = 0.1,
    passes: int = 1600,
    settings: VarianceReduction | None = None,
) -> list[float]:
    """Losses after each tenth of a budget of gradient passes; ``rate`` is that of latent weights, biases have .1."""
    batches, model = problem(seed), network(seed, surrogate)
    if gain is not None:
        set_constant_gain(model, gain)
    latent = [layer.weight for _, layer in owned_layers(model)]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    sgd = torch.optim.SGD([{"params": latent, "lr": rate}, {"params": biases, "lr": 0.1}])
    vr = VarianceReduced(sgd, model, batches, settings)
    order = torch.Generator().manual_seed(seed)
    losses, loss_fn = [], loss_of(model)
    while vr.num_passes < passes:
        vr.step(loss_fn, batches[int(torch.randint(NUM_BATCHES, (), generator=order))])
        while len(losses) < 10 and vr.num_passes >= passes * (len(losses) + 1) / 10:
            losses.append(full_loss(model, batches))
    return losses


def statistics(runs: list[list[float]]) -> str:
    """Loss at a tenth, at half and at the end (the mean of the last three looks), mean and sd over seeds."""
    ends = torch.tensor([sum(run[-3:]) / 3 for run in runs])
    at = [torch.tensor([run[i] for run in runs]).mean().item() for i in (0, 4)]
    return f"{at[0]:.4f} | {at[1]:.4f} | {ends.mean():.4f} ± {ends.std():.4f}"


def window_row(rate: float, interval: int = 100, num_steps: int = 800) -> str:
    """Windows and calibration of the first layer under SGD and STE, means over seeds."""
    found: list[list[float]] = []
    for seed in SEEDS:
        batches, model = problem(seed), network(seed, JacQuant(granularity="group", group_size=IN))
        sgd, order, windows = (
            torch.optim.SGD(model.parameters(), lr=rate),
            torch.Generator().manual_seed(seed),
            CodeWindows(),
        )
        layer: Any = model[0]
        windows.start(model)
        old, calibrations = layer.weight.detach().clone(), []
        for step in range(1, num_steps + 1):
            sgd.zero_grad()
            loss_of(model)(batches[int(torch.randint(NUM_BATCHES, (), generator=order))]).backward()
            sgd.step()
            windows.look(model, step=step)
            if step % interval == 0:
                calibrations.append(calibration(layer, old))
                old = layer.weight.detach().clone()
        w = windows.summary()["0"]
        keys = ("slope_mean", "cal_identity", "cal_best")
        found.append(
            [w[k] for k in ("flip_rate", "mean_window", "layer_window_mean", "return_share", "outer_share")]
            + [sum(c[k] for c in calibrations) / len(calibrations) for k in keys]
        )
    flip, window, layer_window, returned, outer, slope, cal, best = torch.tensor(found).mean(0).tolist()
    return (
        f"| {rate} | {flip:.2e} | {window:.0f} | {layer_window:.1f} | {returned:.0%} | {outer:.0%} | "
        f"{slope:.2f} | {cal:.2f} | {best:.2f} |"
    )


def windows_table() -> str:
    """Windows and calibration by learning rate."""
    rows = [
        "| rate | flips per weight and step | window of a weight | of the layer | flips back | at an outer code "
        "| slope | cal, b = 1 | cal, best b |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*rows, *(window_row(rate) for rate in (0.3, 0.1, 0.03))])


def term_size(grid_text: str, rule: str, seed: int = 0) -> tuple[float, float]:
    """Norm of the rank-one term over that of the surrogate's gradient: random upstream gradient, and one along w."""
    torch.manual_seed(seed)
    scheme = Scheme.parse(grid_text, rule=rule, dtype="fp32", mode="dynamic")  # type: ignore[arg-type]
    w = torch.randn(512, 128)
    sizes = []
    for upstream in (torch.randn(512, 128), w):
        x = w.clone().requires_grad_()
        base = torch.autograd.grad(fake_quantize(x, scheme, None, ClippedSTE()), x, upstream)[0]
        whole = torch.autograd.grad(fake_quantize(x, scheme, scale_as_function(x, scheme), ClippedSTE()), x, upstream)
        sizes.append(float((whole[0] - base).norm() / base.norm()))
    return sizes[0], sizes[1]


# the page -----------------------------------------------------------------------------------------------------------


def interior_table() -> str:
    """Contraction and floor for right and wrong gains."""
    rows = [
        "| eta h | b | contraction, predicted | measured | floor / D², predicted | measured |",
        "|---|---|---|---|---|---|",
    ]
    for rate, gain, steps in ((0.05, 1.0, 400), (0.05, 0.25, 1200), (0.7, 1.0, 60), (0.7, 0.5, 60), (0.7, 2.0, 60)):
        p, (factor, floor) = predict(rate, gain, 1.0), measure(rate, gain, 1.0, num_steps=steps)
        rows.append(f"| {rate} | {gain} | {abs(p.contraction):.4f} | {factor:.4f} | {p.floor:.3e} | {floor:.3e} |")
    return "\n".join(rows)


def saturated_table() -> str:
    """Weights beyond the outermost level: one that should come back, one that has to stay."""
    grid = HalfShifted(2)
    rows = [
        "| B | start 4, target 0.5: steps back, predicted | measured | start 1, target 3: final w, 400 steps |",
        "|---|---|---|---|",
    ]
    for label, gain in (("J (mask)", "J"), ("I", 1.0), ("wrong: 0.25", 0.25)):
        back, _ = saturated(gain, start=4.0, target=0.5, num_steps=400)
        _, away = saturated(gain, start=1.0, target=3.0, num_steps=400)
        told = "never"
        if gain != "J":
            told = str(steps_to_return(4.0, target=0.5, rate=0.1, curvature=1.0, gain=float(gain), grid=grid))
        rows.append(f"| {label} | {told} | {'never' if back < 0 else back} | {away:.2f} |")
    return "\n".join(rows)


def network_table() -> str:
    """B = J, B = I, B wrong, on the small network under SGD."""
    rows = ["| B | rate | loss after 10 % | 50 % | end |", "|---|---|---|---|---|"]
    constant = JacQuant(granularity="element")
    arms: list[tuple[str, Any, float | None, float]] = [
        ("J, per weight, exact (clipped STE)", ClippedSTE(), None, 0.1),
        ("I (STE)", constant, 1.0, 0.1),
        ("wrong: 0.25", constant, 0.25, 0.1),
        ("wrong: 0.25, rate times 4", constant, 0.25, 0.4),
    ]
    for label, surrogate, gain, rate in arms:
        runs = [train(seed, surrogate, gain=gain, rate=rate) for seed in SEEDS]
        rows.append(f"| {label} | {rate} | {statistics(runs)} |")
    return "\n".join(rows)


def reduction_table() -> str:
    """Control variates at an equal budget of gradient passes."""
    rows = ["| form | passes per step | loss after 10 % | 50 % | end |", "|---|---|---|---|---|"]
    for form in ("none", "l_svrg", "svrg", "sarah", "saga"):
        settings = VarianceReduction(form=form, probability=1 / 32, interval=32)  # type: ignore[arg-type]
        runs = [train(seed, ClippedSTE(), settings=settings) for seed in SEEDS]
        rows.append(f"| `{form}` | {settings.expected_passes(NUM_BATCHES):.0f} | {statistics(runs)} |")
    return "\n".join(rows)


def term_table() -> str:
    """Size of the term that dynamic scales drop."""
    rows = ["| scheme, groups of 128 | rule | G random | G along w |", "|---|---|---|---|"]
    for text, rule in (
        ("W1A16G128", "absmean"),
        ("W1.58A16G128", "absmean"),
        ("W2A16G128", "absmax"),
        ("W4A16G128", "absmax"),
    ):
        random, along = term_size(text, rule)
        rows.append(f"| {text} | {rule} | {random:.3f} | {along:.3f} |")
    return "\n".join(rows)


PROSE = Path(__file__).with_name("convergence_page.md")


def main() -> None:
    """Fill the tables into the prose."""
    page = PROSE.read_text(encoding="utf-8")
    for make in (interior_table, saturated_table, network_table, reduction_table, windows_table, term_table):
        print(f"{make.__name__} ...", flush=True)
        page = page.replace(f"{{{make.__name__}}}", make())
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
