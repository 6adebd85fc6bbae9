"""Losses: closed forms, identities and limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fewbits.objectives import Objective, cross_entropy, kl_divergence


def test_kl_and_its_gradient_vanish_at_the_teacher() -> None:
    z = torch.randn(3, 5, 11, requires_grad=True)
    loss = kl_divergence(z, z.detach().clone(), torch.zeros(3, 5, dtype=torch.long))
    loss.backward()
    assert abs(loss.item()) < 1e-7
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-8


def test_forward_and_reverse_kl_of_the_two_token_example() -> None:
    p, q, label = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0])
    assert kl_divergence(q, p, label).item() == pytest.approx(0.36806, abs=1e-5)
    assert kl_divergence(p, q, label).item() == pytest.approx(0.51083, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_temperature_times_difference_of_probabilities(temperature: float) -> None:
    z, t = torch.randn(6, 7, requires_grad=True), torch.randn(6, 7)
    kl_divergence(z, t, torch.zeros(6, dtype=torch.long), temperature=temperature).backward()
    expected = temperature * (F.softmax(z / temperature, -1) - F.softmax(t / temperature, -1)) / 6
    torch.testing.assert_close(z.grad, expected.detach(), rtol=1e-5, atol=1e-7)


def test_kl_is_cross_entropy_minus_entropy() -> None:
    z, t = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    p = t.softmax(-1)
    ce = -(p * z.log_softmax(-1)).sum(-1).mean()
    entropy = -(p * p.log()).sum(-1).mean()
    assert kl_divergence(z, t, torch.zeros(4, dtype=torch.long)).item() == pytest.approx(
        (ce - entropy).item(), abs=1e-6
    )


def test_high_temperature_limit() -> None:
    """T -> inf: T^2 KL -> ||(z_t - mean) - (z_s - mean)||^2 / (2K)."""
    z, t = torch.randn(1, 6), torch.randn(1, 6)
    d = (t - t.mean()) - (z - z.mean())
    value = kl_divergence(z.double(), t.double(), torch.tensor([0]), temperature=100.0)
    assert value.item() == pytest.approx((d.square().sum() / 12).item(), rel=2e-2)


def test_masked_labels_do_not_count() -> None:
    z, t = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    labels = torch.randint(0, 5, (2, 4))
    labels[0] = -100
    assert torch.equal(cross_entropy(z, labels), cross_entropy(z[1:], labels[1:]))
    assert torch.equal(kl_divergence(z, t, labels), kl_divergence(z[1:], t[1:], labels[1:]))


def test_cross_entropy_alone_is_the_model_loss() -> None:
    z, labels = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
    loss = Objective(cross_entropy=1, kl=0)(z, labels, None)
    assert loss.item() == pytest.approx(F.cross_entropy(z[:, :-1].reshape(-1, 9), labels[:, 1:].flatten()).item())


def test_no_gradient_reaches_the_teacher() -> None:
    z, t = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 3, 4, requires_grad=True)
    Objective(cross_entropy=0.3, kl=0.7)(z, torch.zeros(1, 3, dtype=torch.long), t).backward()
    assert z.grad is not None
    assert t.grad is None


@pytest.mark.parametrize("bad", [{"kl": -1}, {"kl": 0}, {"temperature": 0}, {"cross_entropy": -0.1}])
def test_bad_objectives_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Objective(**bad)


def test_missing_teacher_and_other_vocabulary() -> None:
    z, labels = torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="no teacher"):
        Objective()(z, labels, None)
    with pytest.raises(ValueError, match="same vocabulary"):
        Objective()(z, labels, torch.randn(1, 3, 5))
