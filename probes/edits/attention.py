"""Writes of attention probabilities that forbid queries to see keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.edits.positions import At, chosen
from probes.models.protocol import Write


@dataclass(frozen=True)
class Blocked:
    """A write of attention probabilities. A backend that has the scores masks these instead, which is exact."""

    queries: At | str
    keys: At | str
    heads: tuple[int, ...] | None
    lengths: Sequence[int] | None

    def mask(self, batch: int, n_heads: int, n_queries: int, n_keys: int) -> Bool[Tensor, "batch head query key"]:
        """Return where attention is forbidden."""
        out = torch.zeros(batch, n_heads, n_queries, n_keys, dtype=torch.bool)
        heads = torch.arange(n_heads) if self.heads is None else torch.tensor(self.heads)
        for row, n in enumerate(self.lengths or [n_keys] * batch):
            # While decoding there are fewer queries than keys, and `all` means those there are.
            queries = torch.arange(n_queries) if n_queries < n_keys else chosen(n, self.queries)
            keys = chosen(n, self.keys)
            out[row, heads[:, None, None], queries[None, :, None], keys[None, None, :]] = True
        return out

    def __call__(self, pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """Return the probabilities without the forbidden keys, the others grown to the same sum."""
        batch, n_heads, n_queries, n_keys = pattern.shape
        blocked = self.mask(batch, n_heads, n_queries, n_keys).to(pattern.device)
        left = pattern.masked_fill(blocked, 0.0)
        touched = blocked.any(-1, keepdim=True)
        share = left.sum(-1, keepdim=True) / pattern.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(touched & (share > 0), left / share.clamp_min(torch.finfo(torch.float32).tiny), left)


@dataclass(frozen=True)
class BlockedRows:
    """A write of attention probabilities with other forbidden keys in each row of the batch."""

    rows: tuple[tuple[int, Write], ...]

    def mask(self, batch: int, n_heads: int, n_queries: int, n_keys: int) -> Bool[Tensor, "batch head query key"]:
        """Return where attention is forbidden."""
        out = torch.zeros(batch, n_heads, n_queries, n_keys, dtype=torch.bool)
        for row, write in self.rows:
            out[row] = write.mask(1, n_heads, n_queries, n_keys)[0]  # type: ignore[attr-defined]
        return out

    def __call__(self, pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """Return the probabilities without the forbidden keys."""
        out = pattern.clone()
        for row, write in self.rows:
            out[row : row + 1] = write(pattern[row : row + 1])
        return out
