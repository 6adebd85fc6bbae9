"""Round to nearest: the baseline that every other method has to beat on outputs."""

from __future__ import annotations

from torch import Tensor

from fewbits.ptq._base import PTQResult, check_scale, check_weight
from fewbits.qtensor import initial_scale, quantize
from fewbits.scheme import Scheme


def rtn(
    w: Tensor,
    scheme: Scheme,
    *,
    hessian: Tensor | None = None,
    inputs: Tensor | None = None,
    scale: Tensor | None = None,
) -> PTQResult:
    r"""Round every weight to the nearest level, :math:`\mathrm{code} = \mathrm{nearest}(R w / s)`; needs no data.

    With the scale rule ``mse`` this is round-to-nearest with an optimal clip, with ``absmax`` the plain one.

    Args:
        w: ``(out_features, in_features)``.
        scheme: grid, scale and rotation.
        hessian: not used; every layer method takes it.
        inputs: not used either.
        scale: raw scales ``(R, G)``; None finds them by the scheme's rule.

    Returns:
        :class:`PTQResult` whose latent weight is ``w`` itself.

    Raises:
        ValueError: for a shape that the scheme cannot take, or weights that are not finite.

    Example:
        >>> import torch
        >>> rtn(torch.tensor([[-1.3, -0.6, 0.05, 2.0]]), Scheme.parse("W2"), scale=torch.tensor([[0.5]])).qtensor.codes
        tensor([[-2, -1,  0,  1]], dtype=torch.int8)
    """
    del hessian, inputs
    w = check_weight(w, scheme)
    scale = initial_scale(w, scheme) if scale is None else check_scale(w, scheme, scale)
    return PTQResult(qtensor=quantize(w, scheme, scale), scale=scale, latent=w.clone())
