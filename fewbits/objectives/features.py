"""Channel-standardized feature distillation: hidden states of student and teacher, compared channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.objectives.losses import IGNORE_INDEX

EPSILON = 1e-5
"""Added to the variance of a channel, as in batch normalization; channels that hardly vary count less."""


def standardize(z: Tensor) -> Tensor:
    r"""Each channel with mean 0 and variance 1 over the tokens: :math:`(z - \mu_c) / \sqrt{\sigma_c^2 + \epsilon}`.

    Args:
        z: ``(tokens, channels)``; computed in fp32 or wider.

    Example:
        >>> standardize(torch.tensor([[0.0], [2.0]])).flatten().round(decimals=3).tolist()
        [-1.0, 1.0]
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    variance, mean = torch.var_mean(z, dim=0, correction=0, keepdim=True)
    return (z - mean) / (variance + EPSILON).sqrt()


def feature_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor, layers: Sequence[int] | None = None
) -> Tensor:
    r"""Mean squared difference of standardized hidden states,

    .. math:: \frac1{|L|} \sum_{l \in L} \frac1{C n} \sum_{c, t} \bigl(N(z^T_{l}) - N(z^S_{l})\bigr)_{c t}^2
              = \frac1{|L|} \sum_{l \in L} \frac1C \sum_c 2\,(1 - \rho_{l c}) \quad (\epsilon \to 0)

    with :math:`\rho` the correlation of a channel over the tokens: 0 where the student's channel is an increasing
    affine function of the teacher's, 2 where they are unrelated, 4 at most. FPQ takes the sum over the channels of
    every convolution; the mean over channels, tokens and layers is ours and has no scale of its own, and so is the
    choice of a language model's hidden states over its tokens.

    Args:
        student: hidden states as transformers returns them, ``(batch, length, channels)`` each: the embedding first,
            then one per block.
        teacher: the same of the teacher; detached.
        labels: ``(batch, length)``; tokens with label -100 are left out.
        layers: places in the two lists, negative ones from the end; None for all but the embedding.

    Raises:
        ValueError: for layers that are not there, or shapes that differ.

    Example:
        >>> z = torch.arange(6.0).view(1, 3, 2)
        >>> feature_distance([z], [2 * z + 1], torch.zeros(1, 3), [0]).item() < 1e-9
        True

    Reference: FPQ, arXiv:2503.11159.
    """
    if len(student) != len(teacher):
        raise ValueError(f"the student has {len(student)} hidden states, the teacher {len(teacher)}; set features=0")
    chosen = range(1, len(student)) if layers is None else layers
    if bad := [i for i in chosen if not -len(student) <= i < len(student)]:
        raise ValueError(f"feature layer {bad[0]} does not exist; there are {len(student)} hidden states, 0 first")
    kept = labels != IGNORE_INDEX
    total = student[0].new_zeros((), dtype=torch.float32)
    for i in chosen:
        if student[i].shape != teacher[i].shape:
            raise ValueError(
                f"hidden state {i} has shape {tuple(student[i].shape)}, the teacher's {tuple(teacher[i].shape)}"
            )
        difference = standardize(teacher[i].detach()[kept]) - standardize(student[i][kept])
        total = total + difference.square().sum() / max(1, difference.numel())
    return total / max(1, len(chosen))
