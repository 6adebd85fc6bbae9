r"""The verdict of the engines themselves on a file: three levels, each with its measure.

``weights``
    The engine's own dequantizer makes the trained weights: every number equal (0.0 and -0.0 count as the same).

``float``
    The engine computes in fp32 from the weights of the file. Sums run in another order, and their rounding errors grow
    with the numbers that are summed (logits of trained models reach 35), so

    .. math:: \max |\ell - \hat\ell| \le 10^{-4} \max(1, \max |\ell|).

``int8``
    The engine rounds the input of every quantized layer to 8 bits a block. How much that costs is a matter of the model
    (KL 2e-4 for one with quiet activations, 2e-2 for SmolLM2-135M even with 8-bit weights), so the measure is the
    trained model itself with the same rounding of its activations put in: with KL divergence :math:`D` and share of
    changed first tokens :math:`T` of the engine, and :math:`D_0, T_0` of that control,

    .. math:: D \le \max(0.005, 3 D_0), \qquad T \le \max(0.1, 2 T_0).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fewbits.comparison import Difference, Logits, LogitsComparison, compare_logits
from fewbits.nn import QATEmbedding, QuantizedEmbedding
from fewbits.qtensor import QTensor
from fewbits.targets.base import Target, trained_layers
from fewbits.targets.engine import EngineCheck, Level, round_activations

INT8_KL = 5e-3
INT8_TOP1 = 0.1
_KL_FACTOR, _TOP1_FACTOR = 3.0, 2.0


class EngineVerdict(BaseModel):
    """What one engine said at one level.

    Attributes:
        engine: who was asked, and how.
        level: of the question.
        passed: whether the answer is within ``limit``.
        limit: in words and numbers.
        num_different: weights that differ; None for logits.
        num_total: weights compared.
        logits: the engine against the reference; None for weights, or if it does not run the file.
        control: for ``int8``: the reference with its own activations rounded, against the reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str
    level: Level
    passed: bool
    limit: str
    num_different: int | None = None
    num_total: int | None = None
    logits: LogitsComparison | None = None
    control: LogitsComparison | None = None


def ask_engines(
    target: Target, folder: Path, model: Any, codes: dict[str, QTensor], ids: Tensor, truth: nn.Module, expected: Logits
) -> tuple[list[EngineVerdict], list[Difference], list[str]]:
    """Put the questions of a target to its engines.

    A level is asked only if the ones before it passed: an int8 difference says nothing about a file whose graph is
    wrong, and C code should not meet a file that is.

    Args:
        target: of the export.
        folder: the export, whose codes and tensors were found right.
        model: the trained model.
        codes: of its layers.
        ids: int ``(sequences, length)``.
        truth: the target's reference.
        expected: its logits.

    Returns:
        Verdicts, differences, and notes about engines that are not installed.
    """
    verdicts: list[EngineVerdict] = []
    try:
        checks = target.engine_checks(folder)
    except ImportError as error:
        return [], [], [f"no engine was asked: {error}"]
    for check in checks:
        try:
            verdict, rows = _ask(check, model, codes, ids, truth, expected)
        except ImportError as error:  # the file may be right; only the engine to ask is not here
            return verdicts, [], [f"{check.engine} was not asked: {error}"]
        except Exception as error:  # any engine can raise anything over a file that it does not like
            what = f"does not run the file: {type(error).__name__}: {str(error)[:400]}"
            verdict = EngineVerdict(engine=check.engine, level=check.level, passed=False, limit="runs the file")
            rows = [Difference(where=check.engine, what=what, level=check.level)]
        verdicts.append(verdict)
        if rows:
            return verdicts, rows, []
    return verdicts, [], []


def _ask(
    check: EngineCheck, model: Any, codes: dict[str, QTensor], ids: Tensor, truth: nn.Module, expected: Logits
) -> tuple[EngineVerdict, list[Difference]]:
    if check.weights is not None:
        return _weights(check, codes)
    assert check.logits is not None
    logits = compare_logits(expected, _looked_up(ids, check.logits(ids).to(ids.device)), ids)
    control = None
    if check.level == "float":
        most = check.tolerance * max(1.0, logits.max_abs_logit)
        passed, limit = logits.max_abs_diff <= most, f"max |difference| <= {most:.2g}"
    else:
        with rounding_activations(truth, linear_names(model), check.block):
            rounded = torch.cat([expected(row[None]) for row in ids])
        control = compare_logits(expected, _looked_up(ids, rounded), ids)
        most_kl = max(INT8_KL, _KL_FACTOR * control.kl)
        least = 1 - max(INT8_TOP1, _TOP1_FACTOR * (1 - control.top1_agreement))
        passed = logits.kl <= most_kl and logits.top1_agreement >= least
        limit = f"KL <= {most_kl:.2g}, top-1 >= {max(least, 0.0):.2f}"
    passed = passed and logits.finite
    verdict = EngineVerdict(
        engine=check.engine, level=check.level, passed=passed, limit=limit, logits=logits, control=control
    )
    if passed:
        return verdict, []
    what = (
        f"logits differ by up to {logits.max_abs_diff:.3g}, KL {logits.kl:.3g}, top-1 agreement "
        f"{logits.top1_agreement:.4f}{'' if logits.finite else ', not all finite'}; allowed: {limit}"
    )
    return verdict, [Difference(where=check.engine, what=what, level=check.level)]


def _looked_up(ids: Tensor, logits: Tensor) -> Logits:
    """A model that knows the logits of these sequences only."""
    known = {tuple(row.tolist()): value for row, value in zip(ids, logits, strict=True)}
    return lambda rows: torch.stack([known[tuple(row.tolist())] for row in rows])


def _weights(check: EngineCheck, codes: dict[str, QTensor]) -> tuple[EngineVerdict, list[Difference]]:
    assert check.weights is not None
    rows, num_different, num_total, seen = [], 0, 0, set()
    for name, weight in check.weights():
        seen.add(name)
        trained = codes[name].dequantize().cpu()
        wrong = trained.numel() if weight.shape != trained.shape else int((weight != trained).sum())
        num_different, num_total = num_different + wrong, num_total + trained.numel()
        if wrong:
            what = f"{check.engine} decodes other weights"
            rows.append(Difference(where=name, what=what, num_different=wrong, num_total=trained.numel()))
    rows += [Difference(where=name, what=f"{check.engine} finds no weight") for name in sorted(set(codes) - seen)]
    verdict = EngineVerdict(
        engine=check.engine,
        level="weights",
        passed=not rows,
        limit="every weight equal",
        num_different=num_different,
        num_total=num_total,
    )
    return verdict, rows


@contextmanager
def rounding_activations(model: nn.Module, layers: set[str], block: int) -> Iterator[None]:
    """The model with :func:`~fewbits.targets.engine.round_activations` before these layers (names of linear ones)."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return round_activations(inputs[0], block), *inputs[1:]

    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name in sorted(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_names(model: nn.Module) -> set[str]:
    """Names of the trained layers whose input an engine can round: all but embeddings."""
    embeddings = (QATEmbedding, QuantizedEmbedding)
    return {name for name, layer in trained_layers(model).items() if not isinstance(layer, embeddings)}
