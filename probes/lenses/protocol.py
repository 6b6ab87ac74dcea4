"""What a lens is: a map from rows of a layer to rows that the final norm and unembedding can read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from probes.lenses.card import LensCard


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
    ranks: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    """[n, m], how many tokens have a larger logit than each token asked for; empty where ranks were not asked for."""


@runtime_checkable
class Lens(Protocol):
    """A way to read rows of any layer as distributions over tokens; `probes.lenses.logit.read` reads what it returns."""

    @property
    def card(self) -> LensCard:
        """What the lens was fitted on and how."""
        ...

    def readable(self, rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "row d_model"]:
        """Return rows that leave block `layer` as rows that the final norm and unembedding can read, float32.

        The last layer's come back as they are, so that its reading is the model's own output.

        Raises:
            OptionError: a layer the lens was not fitted for.
        """
        ...
