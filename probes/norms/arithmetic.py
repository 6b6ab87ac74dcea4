"""A norm taken apart: centring, division by a scale, gain and bias; with the scale its own or another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.errors import PointError

TOLERANCE = 1e-5
"""How far, relative to its largest output, a norm may differ from the parts it is taken apart into."""


@dataclass(frozen=True, eq=False)
class NormParts:
    """A LayerNorm or RMSNorm of any family: `(x - mean) / scale * gain + bias`, the mean of an RMSNorm being 0."""

    norm: nn.Module
    eps: float
    centred: bool
    gain_offset: float
    """What the family adds to the stored weight: 1 where it keeps the gain less one (Gemma), else 0."""

    @property
    def gain(self) -> Tensor:
        """[width] float32, part of the graph; ones where the norm has no weight."""
        weight = getattr(self.norm, "weight", None)
        return torch.ones(()) if weight is None else weight.float() + self.gain_offset

    @property
    def bias(self) -> Tensor | None:
        """[width] float32, or None."""
        bias = getattr(self.norm, "bias", None)
        return bias.float() if isinstance(bias, Tensor) else None

    def inverse_scale(self, x: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest 1"]:
        """Return one over each row's own scale sqrt(var + eps), [..., width] -> [..., 1] float32, as the norm itself computes it."""
        rows = x.float()
        if self.centred:
            return torch.native_layer_norm(rows, [rows.shape[-1]], None, None, self.eps)[2]
        return torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.eps)

    def scale(self, x: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest"]:
        """Return each row's own scale, [..., width] -> [...] float32, differentiable."""
        rows = x.float()
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return (rows.square().mean(-1) + self.eps).sqrt()

    def own(self, x: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest width"]:
        """Return the norm put together again from its parts with every row's own scale, in the norm's order of operations."""
        rows = x.float()
        if not self.centred:
            return self._affine(rows * self.inverse_scale(rows)).to(x.dtype)
        _, mean, inverse = torch.native_layer_norm(rows, [rows.shape[-1]], None, None, self.eps)
        return self._affine((rows - mean) * inverse).to(x.dtype)

    def divided(self, x: Float[Tensor, "*rest width"], scale: Float[Tensor, ...]) -> Float[Tensor, "*rest width"]:
        """Return the norm with a given scale [..., 1] or scalar in place of its own, in `x`'s dtype; differentiable."""
        rows = x.float()
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return self._affine(rows / scale).to(x.dtype)

    def _affine(self, rows: Tensor) -> Tensor:
        gain, bias = self.gain.to(rows.device), self.bias
        return gain * rows if bias is None else torch.addcmul(bias, rows, gain)


@torch.no_grad()
def parts_of(norm: nn.Module, width: int, eps: float) -> NormParts:
    """Return a norm's parts, told by comparing it with every way of putting them together.

    Args:
        eps: used where the module does not state its own.

    Raises:
        PointError: it is neither a LayerNorm nor an RMSNorm over its last axis.
    """
    stated = next((getattr(norm, n) for n in ("eps", "variance_epsilon", "norm_eps") if hasattr(norm, n)), eps)
    weight = next(norm.parameters(), torch.empty(0))
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) * 3 + 1
    x = x.to(weight.device, weight.dtype if weight.numel() else torch.float32)
    expected = norm(x)
    tolerance = TOLERANCE if x.dtype == torch.float32 else 1e-2
    for centred in (False, True):
        for offset in (0.0, 1.0):
            parts = NormParts(norm, float(stated), centred, offset)
            error = (parts.own(x).float() - expected.float()).abs().max() / expected.float().abs().max()
            if error <= tolerance:
                return parts
    raise PointError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm over its last axis")
