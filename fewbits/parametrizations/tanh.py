r"""DoReFa: the quantizer sees the hyperbolic tangent of the trained weight.

.. math:: z = \frac{\tanh w}{\max|\tanh w|}, \qquad
          \hat w = \frac{2}{N} \left\lfloor \frac{N}{2} (z + 1) \right\rceil - 1, \quad N = 2^k - 1.

The levels of :math:`\hat w` are odd multiples of 1/N: the half-shifted grid at one scale 2/N for the whole tensor,
which is what the scale rule ``absmax`` finds on z, whatever the weights are. So DoReFa is this map, and nothing else,
in front of an ordinary quantizer: codes, scales, conversion and export are those of any other layer.

Reference: DoReFa-Net, arXiv:1606.06160.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.drives import Drive, NoDrive
from fewbits.scheme import Scheme
from fewbits.surrogates import JacQuant, Surrogate


@dataclass(frozen=True, kw_only=True)
class Tanh:
    r"""The latent weight is :math:`\tanh w`, over its largest magnitude in the tensor or as it is.

    Args:
        normalize: divide by :math:`\max|\tanh w|`, as the paper does; every weight then lies in [-1, 1], so that a
            trained model without normalization after its layers starts from nothing. False keeps the size, which for
            weights far below 1 is hardly a change; DoReFa times that maximum is then the dynamic rule ``absmax``.
        detach_max: take the maximum as a constant of the backward pass, as some codes do; False differentiates it.

    Raises:
        ValueError: for options that are not true or false, or ``detach_max`` without ``normalize``.

    Example:
        >>> Tanh().apply(torch.tensor([[-0.5, 0.0, 2.0]])).round(decimals=3)
        tensor([[-0.4790,  0.0000,  1.0000]])

    Reference: arXiv:1606.06160.
    """

    name: ClassVar[str] = "tanh"
    normalize: bool = True
    detach_max: bool = False

    def __post_init__(self) -> None:
        for name in ("normalize", "detach_max"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.detach_max and not self.normalize:
            raise ValueError("detach_max=True with normalize=False: there is no maximum; drop one of the two")

    def check(self, scheme: Scheme, surrogate: Surrogate, drive: Drive | None) -> None:
        """Refuse what acts on the trained weight as if it were the latent one.

        Raises:
            ValueError: for a drive, or a gain that is applied to the optimizer's step.
        """
        del scheme
        if drive is not None and not isinstance(drive, NoDrive):
            raise ValueError(
                f"drive {drive.name!r} acts on a latent weight that is trained itself, with tanh it is a function of "
                "the trained one; drop one of the two"
            )
        if isinstance(surrogate, JacQuant) and surrogate.apply == "update":
            raise ValueError(
                "jacquant with apply='update' multiplies the step of the latent weight, with tanh another one is "
                "trained; use apply='grad'"
            )

    def apply(self, w: Tensor) -> Tensor:
        r"""The latent weight, differentiable in ``w``.

        With t = tanh w and m = max|t|, reached at index M: :math:`\partial z_i/\partial w_j = \frac{1 - t_j^2}{m}
        (\delta_{ij} - z_i\,\mathrm{sign}(t_M)\,\delta_{jM})`, the last term without ``detach_max`` only; several
        largest entries share it.

        Args:
            w: ``(out_features, in_features)``, floating point; computed in fp32 or float64.

        Returns:
            Same shape and dtype; zeros for a tensor of zeros.
        """
        t = (w if w.dtype == torch.float64 else w.float()).tanh()
        if self.normalize:
            largest = t.abs().amax().clamp_min(torch.finfo(t.dtype).tiny)
            t = t / (largest.detach() if self.detach_max else largest)
        return t.to(w.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :func:`fewbits.parametrizations.parametrization_from_dict` is the inverse."""
        return {"name": self.name, **asdict(self)}
