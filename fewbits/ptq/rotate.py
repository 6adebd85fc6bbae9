r"""QuaRot: rotate the residual stream of a model by folding an orthonormal matrix into its weights.

A network whose blocks read the stream x through an RMS norm and add to it does not change if the stream is rotated:

.. math:: \mathrm{rms}(x Q) = \mathrm{rms}(x)\,Q, \qquad W_{in} \leftarrow W_{in}\,\mathrm{diag}(g)\,Q, \qquad
          W_{out} \leftarrow Q^\top W_{out}, \qquad E \leftarrow E\,Q,

once the gains g of the norms have gone into the layers that read them. Weights that mix all channels have no outliers.
The mean of the embedding is *not* subtracted: that is an invariance of LayerNorm, not of RMS norms (the published code
does it all the same).

Reference: Ashkboos et al., arXiv:2404.00456.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbits.ptq.folding import gain_offset, multiply_columns_


def rotation_matrix(size: int, seed: int = 0) -> Tensor:
    r"""A random orthonormal matrix that mixes all channels, :math:`\mathrm{diag}(\pm1)\,(H \otimes O)`.

    H is the Hadamard matrix of the largest power of two that divides ``size``, divided by the root of its size; O is a
    random orthonormal matrix of the odd rest (1 if there is none, which is the randomised Hadamard of the paper).

    Args:
        size: of the stream, >= 1.
        seed: of the signs and of O.

    Returns:
        ``(size, size)`` float64.

    Example:
        >>> q = rotation_matrix(12)
        >>> torch.allclose(q @ q.t(), torch.eye(12).double(), atol=1e-12)
        True
    """
    power, generator = size & -size, torch.Generator().manual_seed(seed)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    odd = size // power
    gaussian = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    rest = (q * r.diagonal().sign()).contiguous() if odd > 1 else torch.ones(1, 1, dtype=torch.float64)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return signs[:, None] * torch.kron(hadamard / math.sqrt(power), rest)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Everything that touches the residual stream.

    Attributes:
        embedding: writes its rows into the stream.
        readers: norms with the linear layers that read them, the output head included.
        writers: linear layers whose output is added to the stream.
        heads: pairs ``(v_proj, o_proj, head_dim)``: the attention average between them commutes with a rotation of
            every head.
    """

    embedding: nn.Embedding
    readers: Sequence[tuple[nn.Module, Sequence[nn.Linear]]]
    writers: Sequence[nn.Linear]
    heads: Sequence[tuple[nn.Linear, nn.Linear, int]] = ()

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that a rotation changes."""
        modules: list[nn.Module] = [self.embedding, *self.writers]
        modules += [m for norm, layers in self.readers for m in (norm, *layers)]
        modules += [m for value, output, _ in self.heads for m in (value, output)]
        return list({id(p): p for m in modules for p in m.parameters(recurse=False)}.values())


def is_rms_norm(norm: nn.Module) -> bool:
    """Whether a norm commutes with rotations apart from its gain, which has a known form (LayerNorm does not)."""
    weight, offset = norm.weight, gain_offset(norm)
    assert isinstance(weight, Tensor)
    if offset is None or getattr(norm, "bias", None) is not None:
        return False
    n = weight.numel()
    q = rotation_matrix(n).to(weight)
    x = torch.linspace(-1, 3, n).to(weight)[None]
    with torch.no_grad():
        gain = (weight + offset)[None]
        return torch.allclose(norm(x @ q) / gain, norm(x) / gain @ q, rtol=1e-2, atol=2e-2)


@torch.no_grad()
def rotate_stream_(stream: Stream, *, seed: int = 0) -> None:
    """Fold the gains and a random rotation into the weights, in place; computed in float64.

    Args:
        stream: what touches the residual stream. Norms keep a gain of 1.
        seed: of the rotation.

    Raises:
        ValueError: for a norm that is no RMS norm.
    """
    for norm, _ in stream.readers:
        if not is_rms_norm(norm):
            raise ValueError(
                f"{type(norm).__name__} does not commute with rotations: only models with RMS norms can be rotated"
            )
    table = stream.embedding.weight
    q = rotation_matrix(table.shape[1], seed).to(table.device)
    table.copy_(table.double() @ q)
    for norm, layers in stream.readers:
        gain, offset = norm.weight, gain_offset(norm)
        assert isinstance(gain, Tensor)
        assert offset is not None
        for layer in layers:
            multiply_columns_(layer, gain.double() + offset)
            layer.weight.copy_(layer.weight.double() @ q)
        gain.fill_(1.0 - offset)
    for layer in stream.writers:
        _rotate_rows_(layer, q)
    for value, output, head_dim in stream.heads:
        r = rotation_matrix(head_dim, seed + 1).to(table.device)
        _rotate_rows_(value, torch.block_diag(*[r] * (value.out_features // head_dim)))
        blocks = torch.block_diag(*[r] * (output.in_features // head_dim))
        output.weight.copy_(output.weight.double() @ blocks)


def _rotate_rows_(layer: nn.Linear, q: Tensor) -> None:
    layer.weight.copy_(q.t() @ layer.weight.double())
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() @ q)
