"""The loss that a diagnosis measures: a fixed token set, dropout off, on the latent or the deployed weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewbits.convert import owned_layers
from fewbits.data import TokenBlocks
from fewbits.geometry import combine, gradient, hvp
from fewbits.geometry.curvature import Operator
from fewbits.geometry.directions import Vector


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and drives off inside; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def latent_weights(model: nn.Module) -> Iterator[None]:
    """A prepared model runs on its latent weights inside, unrounded; without prepared layers nothing changes."""
    layers = [(layer, layer.fake_quant_enabled) for _, layer in owned_layers(model)]
    try:
        for layer, _ in layers:
            layer.fake_quant_enabled = False
        yield
    finally:
        for layer, enabled in layers:
            layer.fake_quant_enabled = enabled


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLoss:
    r"""Mean cross-entropy :math:`L(w)` of a causal LM on a fixed token set, nats per token; a closure for the geometry.

    Calling it computes the loss at the model's current parameters, with a graph unless gradients are off. On a prepared
    model it is the *deployed* loss (rounded weights), with ``latent=True`` the latent one. The value without a graph
    equals ``evaluate(model, blocks, batch_size=batch_size).loss``.

    Args:
        model: maps ``input_ids`` to an output with ``logits``.
        tokens: int64 ``(num_blocks, block_size)``, on the model's device.
        batch_size: blocks per forward pass, at least 1.
        latent: switch fake quantization off during the call.

    Raises:
        ValueError: for tokens that are not blocks of at least two tokens, or a batch size below 1.

    Reference: arXiv:2606.09012 (its losses are of fixed batches).
    """

    model: nn.Module
    tokens: Tensor
    batch_size: int = 8
    latent: bool = False

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape[1] < 2 or len(self.tokens) == 0:
            raise ValueError(f"tokens have shape {tuple(self.tokens.shape)}; at least one block of two is needed")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    @property
    def num_tokens(self) -> int:
        """Scored tokens; the first of each block is context only."""
        return self.tokens[:, 1:].numel()

    def __call__(self) -> Tensor:
        """The loss, a float64 scalar."""
        with evaluation_mode(self.model):
            if not self.latent:
                return self._mean()
            with latent_weights(self.model):
                return self._mean()

    def _mean(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.tokens.device)
        for ids in self.tokens.split(self.batch_size):
            log_p = self.model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
            total = total - log_p.gather(-1, ids[:, 1:, None]).sum(dtype=torch.float64)
        return total / self.num_tokens

    def halves(self) -> tuple[TokenLoss, TokenLoss]:
        """Losses on the even and the odd blocks: disjoint, equally many, spread over the same text.

        Raises:
            ValueError: with fewer than two blocks.
        """
        pairs = len(self.tokens) // 2
        if pairs < 1:
            raise ValueError("two disjoint halves need at least two token blocks")
        return replace(self, tokens=self.tokens[0 : 2 * pairs : 2]), replace(
            self, tokens=self.tokens[1 : 2 * pairs : 2]
        )

    def parts(self) -> Iterator[tuple[float, TokenLoss]]:
        """One loss per batch with its share of the tokens; the weighted sum is the whole loss."""
        for ids in self.tokens.split(self.batch_size):
            yield len(ids) / len(self.tokens), replace(self, tokens=ids)


def token_loss(model: nn.Module, blocks: TokenBlocks, *, batch_size: int = 8, latent: bool = False) -> TokenLoss:
    """The loss on token blocks, on the model's device.

    Example:
        >>> from fewbits.testing.tiny import tiny_llama, toy_blocks
        >>> loss = token_loss(tiny_llama(), TokenBlocks(toy_blocks(4, 16).numpy(), 1.0))
        >>> loss.num_tokens, loss.halves()[0].num_tokens
        (60, 30)
    """
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    tokens = torch.from_numpy(blocks.tokens.astype("int64")).to(device)
    return TokenLoss(model=model, tokens=tokens, batch_size=batch_size, latent=latent)


def batched_gradient(loss: TokenLoss, params: Sequence[Tensor]) -> Vector:
    """The gradient of the whole loss, holding the graph of one batch at a time; nats per unit of ``w``."""
    return combine(*((share, gradient(part, params)) for share, part in loss.parts()))


def batched_hessian(loss: TokenLoss, params: Sequence[Tensor]) -> Operator:
    """The Hessian of the whole loss as an operator, holding the graph of one batch at a time."""
    return lambda vector: combine(*((share, hvp(part, params, vector)) for share, part in loss.parts()))
