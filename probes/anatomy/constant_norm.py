"""The linear map that a norm with a constant divisor is."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class ConstantNorm(nn.Module):
    """(x - mean(x)) * weight + bias, or x * weight for a norm that does not subtract the mean.

    The weight holds the norm's gain over its constant divisor, so the divisor left over is one. Parameters keep the
    names they have in the norm whose place this takes.

    Args:
        gain: [width].
        bias: [width], or None.
        centred: whether the mean over the last axis is subtracted.
    """

    def __init__(self, gain: Float[Tensor, width], bias: Float[Tensor, width] | None, centred: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.centred = centred

    def forward(self, x: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest width"]:
        """Return the map's output [..., width] of `x` [..., width], computed in float32."""
        rows = x.float()
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        out = rows * self.weight.float()
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the width and whether the mean is subtracted, for the module's repr."""
        return f"{self.weight.numel()}, centred={self.centred}"


def is_constant(norm: nn.Module) -> bool:
    """Return whether a module in a norm's place divides by no function of its input."""
    return isinstance(norm, ConstantNorm | nn.Identity)
