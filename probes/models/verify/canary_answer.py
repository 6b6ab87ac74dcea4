"""A model's outputs on a fixed short input, from the forward that checks it anyway, and how two of them differ."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.models.protocol import Canary

_WIDTH = 64
"""Outputs kept of every position."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative difference between devices and library versions by dtype; 1e-1 in half precision, which rounds everywhere."""


def canary_of(tokens: Int[Tensor, "batch pos"], outputs: Float[Tensor, "batch pos width"]) -> Canary:
    """Return the canary of a model that answers `tokens` [rows, pos] with `outputs` [rows, pos, width]."""
    kept = torch.linspace(0, outputs.shape[-1] - 1, _WIDTH).long()
    return Canary(tokens, outputs[..., kept].float().cpu().contiguous(), _TOLERANCE.get(outputs.dtype, 1e-1))


def difference(actual: Float[Tensor, "_ _ _"], expected: Float[Tensor, "_ _ _"]) -> float:
    """Return how far two canaries' values [rows, pos, width] differ: the median over positions of the relative distance.

    Each position is taken without its mean, and by the median, because a router of experts may flip at single ones.
    """
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = (v - v.mean(-1, keepdim=True) for v in (actual.double(), expected.double()))
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(error.median().nan_to_num(float("inf")))
