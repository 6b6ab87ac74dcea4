"""Refusal of weights that are NaN or infinite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from probes.errors import ModelError


def check_weights(module: nn.Module, ref: str) -> None:
    """Raise ModelError naming the first tensor with a NaN or an infinite value."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        check_finite(tensor, name, ref)


def check_finite(tensor: Tensor, name: str, ref: str) -> None:
    """Raise ModelError naming a weight with a NaN or an infinite value; one without data passes."""
    if tensor.is_meta or not tensor.is_floating_point():
        return
    # One sum is cheaper than a test of each value; it can overflow where all are finite, hence the second look.
    if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        raise ModelError(f"{ref}: weight {name!r} holds NaN or infinite values; fetch or convert the model again")
