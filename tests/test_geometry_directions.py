"""Vectors of tensors, and moves that give every parameter back bit for bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.geometry import (
    Crossing,
    Width,
    combine,
    copy_of,
    difference,
    dot,
    gradient,
    moving,
    norm,
    normalized,
    orthonormal,
    perturbed,
    placed,
    random_like,
    random_vector,
    remove_span,
    restrict,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(x: torch.Tensor) -> list[int]:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().view(kind).flatten().tolist()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_move_is_undone_bit_for_bit_including_nan_and_negative_zero(dtype: torch.dtype) -> None:
    w = torch.randn(50, generator=generator(), dtype=torch.float64).to(dtype)
    w[:3] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=dtype)
    w.requires_grad_(True)
    before = bits(w)
    with perturbed([w], [torch.full((50,), 1e3, dtype=dtype)], 0.3):
        assert bits(w) != before
    assert bits(w) == before
    # The reason for the copy: arithmetic does not come back.
    d = torch.randn(50, generator=generator(1), dtype=torch.float64).to(dtype) * 10
    assert bits((w.detach() + d) - d) != before


def test_a_move_is_undone_when_the_body_raises() -> None:
    w = torch.tensor([0.1, 0.2])
    before = bits(w)

    def interrupted() -> None:
        with moving([w]) as move:
            move((5.0, [torch.ones(2)]))
            assert bits(w) != before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    assert bits(w) == before


def test_moves_start_from_the_saved_point_and_never_accumulate() -> None:
    w = torch.tensor([0.1])
    d = [torch.tensor([0.7])]
    with moving([w]) as move:
        for _ in range(1000):
            move((0.1, d))
        assert w.item() == torch.tensor([0.1]).add(d[0], alpha=0.1).item()
        move((1.0, d), (2.0, d))
        assert w.item() == pytest.approx(0.1 + 3 * 0.7)
        move()
        assert w.item() == torch.tensor(0.1).item()


def test_nested_moves_restore_in_order() -> None:
    w = torch.zeros(1)
    with perturbed([w], [torch.ones(1)]):
        with placed([w], [torch.full((1,), 7.0)]):
            assert w.item() == 7
        assert w.item() == 1
    assert w.item() == 0


def test_a_parameter_keeps_its_identity_and_flags() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    pointer = w.data_ptr()
    with perturbed([w], [torch.ones(2)]):
        assert w.requires_grad
        assert w.data_ptr() == pointer
    assert w.grad is None


@pytest.mark.parametrize(
    ("params", "direction", "message"),
    [
        ([], [], "empty"),
        ([torch.zeros(2)], [torch.zeros(3)], "shape"),
        ([torch.zeros(2)], [torch.zeros(1)], "shape"),  # would broadcast
        ([torch.zeros(2)], [], "does not fit"),
        ([torch.zeros(2, dtype=torch.int64)], [torch.zeros(2)], "floating"),
        ([torch.zeros(2, requires_grad=True) * 2], [torch.zeros(2)], "leaf"),
    ],
)
def test_wrong_moves_are_refused(params: list, direction: list, message: str) -> None:
    with pytest.raises(ValueError, match=message), perturbed(params, direction):
        pass


def test_tied_weights_are_refused() -> None:
    w = torch.zeros(2)
    with pytest.raises(ValueError, match="twice"), perturbed([w, w], [w, w]):
        pass


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    x=st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4),
    y=st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4),
)
def test_dot_equals_the_flat_dot_product(x: list[float], y: list[float]) -> None:
    a = [torch.tensor(x[:1]), torch.tensor(x[1:]).reshape(3, 1)]
    b = [torch.tensor(y[:1]), torch.tensor(y[1:]).reshape(3, 1)]
    assert dot(a, b) == pytest.approx(math.fsum(p * q for p, q in zip(x, y, strict=True)), abs=1e-8)
    assert norm(a) == pytest.approx(math.hypot(*x), rel=1e-12)


def test_the_norm_of_many_small_fp32_numbers_is_exact() -> None:
    # A running fp32 sum of ten million equal squares stalls; the float64 one does not.
    assert norm([torch.full((10_000_000,), 1e-3)]) == pytest.approx(1e-3 * math.sqrt(1e7), rel=1e-7)


def test_combine_difference_and_restrict() -> None:
    a, b = [torch.ones(2), torch.ones(1)], [torch.full((2,), 3.0), torch.zeros(1)]
    assert torch.equal(combine((2.0, a), (1.0, b))[0], torch.full((2,), 5.0))
    assert torch.equal(difference(b, a)[0], torch.full((2,), 2.0))
    only = restrict(b, [0])
    assert torch.equal(only[0], b[0])
    assert torch.equal(only[1], torch.zeros(1))
    assert only[0].data_ptr() != b[0].data_ptr()
    with pytest.raises(ValueError, match=r"0\.\.1"):
        restrict(a, [2])
    with pytest.raises(ValueError, match="at least one"):
        combine()


def test_random_directions_match_the_error_norm_tensor_by_tensor() -> None:
    error = [torch.randn(30, 4, generator=generator(1)), torch.zeros(5), 1e-4 * torch.randn(7, generator=generator(2))]
    d = random_like(error, generator())
    for found, wanted in zip(d, error, strict=True):
        assert norm([found]) == pytest.approx(norm([wanted]), rel=1e-6)
    assert abs(dot(d, error)) < 0.3 * norm(d) * norm(error)
    again = random_like(error, generator())
    assert all(torch.equal(p, q) for p, q in zip(d, again, strict=True))
    assert not torch.equal(d[0], random_like(error, generator(9))[0])


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_random_vectors_have_mean_zero_and_variance_one(law: str) -> None:
    v = random_vector([torch.zeros(200_000, dtype=torch.bfloat16)], generator(), law=law)[0]
    assert v.dtype == torch.bfloat16
    assert abs(v.double().mean().item()) < 0.01
    assert v.double().square().mean().item() == pytest.approx(1, abs=0.01)
    if law == "rademacher":
        assert set(v.tolist()) == {-1.0, 1.0}
    with pytest.raises(ValueError, match="cauchy"):
        random_vector([v], generator(), law="cauchy")


def test_gradient_leaves_no_trace_on_frozen_and_unused_parameters() -> None:
    w, frozen, unused = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(3)
    with torch.no_grad():  # the caller may be in no_grad
        g = gradient(lambda: (w * frozen * 3).sum(), [w, frozen, unused])
    assert torch.equal(g[0], torch.full((2,), 3.0))
    assert torch.equal(g[1], torch.full((2,), 3.0))
    assert torch.equal(g[2], torch.zeros(3))
    assert w.grad is None
    assert not frozen.requires_grad
    with pytest.raises(ValueError, match="no graph"):
        gradient(lambda: torch.ones(()), [w])


def test_orthonormal_basis_spans_the_same_space() -> None:
    raw = [[torch.randn(20, generator=generator(i)), torch.randn(3, generator=generator(i + 50))] for i in range(4)]
    raw[3] = combine((1.0, raw[0]), (1e-3, raw[3]))  # nearly dependent: the second pass matters
    basis = orthonormal(raw)
    for i, a in enumerate(basis):
        for j, b in enumerate(basis):
            assert dot(a, b) == pytest.approx(float(i == j), abs=1e-6)
    for vector in raw:
        assert norm(remove_span(vector, basis)) < 1e-5 * norm(vector)
    with pytest.raises(ValueError, match="vector 1"):
        orthonormal([raw[0], combine((2.0, raw[0]))])


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_vectors_without_direction_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="no direction"):
        normalized([torch.full((2,), bad)])


def test_copies_do_not_follow_the_parameter() -> None:
    w = torch.zeros(1, requires_grad=True)
    saved = copy_of([w])
    with torch.no_grad():
        w += 1
    assert saved[0].item() == 0
    assert not saved[0].requires_grad


def test_results_become_strict_json_without_weight_sized_tensors() -> None:
    never = Crossing(t=math.inf, below=8.0, above=math.inf, num_evaluations=4)
    found = Width(plus=never, minus=Crossing(t=1.0, below=0.5, above=1.5, num_evaluations=9), tol=0.1)
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["plus"] == {"t": None, "below": 8.0, "above": None, "num_evaluations": 4}
    assert written["first"] == 1.0
