"""What every lens gives: rows of a layer read as distributions over tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LensRead:
    """Read-outs of n rows; log-probabilities and divergence in nats, entropy in bits, all float32."""

    log_z: Tensor
    """[n], the log-sum-exp of the logits."""
    entropy_bits: Tensor
    """[n]."""
    logprobs: Tensor
    """[n, m], of the tokens asked for."""
    top_logprobs: Tensor
    """[n, top_k], most probable first."""
    top_ids: Tensor
    """[n, top_k]."""
    kl: Tensor = field(default_factory=lambda: torch.empty(0))
    """[n], KL(reference's distribution || row's distribution); empty without a reference."""


@runtime_checkable
class Lens(Protocol):
    """A way to read rows of any layer as distributions over tokens; memory does not grow with the vocabulary."""

    def read(
        self,
        rows: Float[Tensor, "row d_model"],
        layer: int,
        *,
        ids: Int[Tensor, "*any token"] | None = None,
        top_k: int = 0,
    ) -> LensRead:
        """Read rows that leave block `layer`.

        Args:
            ids: tokens whose log-probability is returned, [m] for all rows or [n, m].
            top_k: how many of the most probable tokens to return.
        """
        ...
