"""What is added up of each row over tiles of the vocabulary: mass, entropy, tokens asked for, the most probable ones, ranks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probes.lenses.divergence import slices
from probes.lenses.protocol import LensRead

CHUNK = 64
"""Neighbouring tokens whose maximum is looked at first when top tokens are sought."""
LOG2 = 0.6931471805599453


def largest_of(logits: Float[Tensor, "row token"], k: int) -> tuple[Tensor, Tensor]:
    """Return what `logits.topk(k)` does, several times faster: the k largest lie in the k chunks of largest maxima."""
    rows, width = logits.shape
    if width % CHUNK or width < k * CHUNK:
        return logits.topk(k, dim=-1)
    chunks = logits.view(rows, -1, CHUNK)
    best = chunks.amax(dim=-1).topk(k, dim=-1).indices
    values, places = chunks.gather(1, best[:, :, None].expand(-1, -1, CHUNK)).flatten(1).topk(k, dim=-1)
    return values, best.gather(1, places // CHUNK) * CHUNK + places % CHUNK


class RowSums:
    """Per row: running maximum, mass and exp-weighted logit above it, chosen and top tokens, divergence from a reference."""

    def __init__(self, n: int, top_k: int, ids: Tensor | None, device: torch.device, ranked: bool = False) -> None:
        self.high = torch.full((n,), -torch.inf, device=device)
        self.mass = torch.zeros(n, device=device)
        self.above = torch.zeros(n, device=device)
        self.kl = torch.zeros(n, device=device)
        self.top_logits = torch.full((n, top_k), -torch.inf, device=device)
        self.top_ids = torch.zeros(n, top_k, dtype=torch.long, device=device)
        self.ids = ids
        self.chosen = torch.zeros(n, 0 if ids is None else ids.shape[-1], device=device)
        self.ranks = torch.zeros(self.chosen.shape if ranked else (0, 0), dtype=torch.long, device=device)

    @property
    def log_z(self) -> Tensor:
        """[n], the log-sum-exp of the logits."""
        return self.high + self.mass.log()

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities of tokens with these logits, [n, m]."""
        # The maximum goes first, so that log_z, which is large, is never rounded.
        return (logits - self.high[:, None]) - self.mass.log()[:, None]

    @property
    def entropy_bits(self) -> Tensor:
        """[n]."""
        # Logits are summed relative to the maximum, so that nothing large cancels here.
        return ((self.mass.log() - self.above / self.mass) / LOG2).clamp_min(0)

    def lens_read(self, compared: bool = False) -> LensRead:
        """Return what was read."""
        top, chosen = self.logprobs(self.top_logits), self.logprobs(self.chosen)
        kl = self.kl if compared else self.kl[:0]
        return LensRead(self.log_z, self.entropy_bits, chosen, top, self.top_ids, kl, self.ranks)

    def add(self, rows: Tensor, logits: Tensor, start: int) -> None:
        """Take in the logits [rows, tile] of the tokens from `start`, which become exp(logits - maximum so far)."""
        best = self._add_tokens(rows, logits, start)
        before, mass = self.high[rows], self.mass[rows]
        high = torch.maximum(before, best)
        shrink = (before - high).exp()
        lower = torch.where(mass > 0, before - high, 0)
        above, mass_here = torch.empty_like(high), torch.empty_like(high)
        for own, values in slices(logits):
            apart = values - high[own, None]
            weights = torch.exp(apart, out=values)
            torch.sum(weights, dim=-1, out=mass_here[own])
            torch.sum(apart.mul_(weights), dim=-1, out=above[own])
        self.above[rows] = (self.above[rows] + lower * mass) * shrink + above
        self.mass[rows] = mass * shrink + mass_here
        self.high[rows] = high

    def _add_tokens(self, rows: Tensor, logits: Tensor, start: int) -> Tensor:
        """Take in the top tokens, those asked for and ranks; return the largest logit of each row."""
        width = logits.shape[1]
        top_k = self.top_ids.shape[1]
        largest = None
        if top_k:
            values, places = largest_of(logits, min(top_k, width))
            largest = values[:, 0]
            best, order = torch.cat([self.top_logits[rows], values], dim=-1).topk(top_k, dim=-1)
            self.top_logits[rows] = best
            self.top_ids[rows] = torch.cat([self.top_ids[rows], places + start], dim=-1).gather(1, order)
        if len(self.ranks):
            # Ones and zeros as floats are counted several times faster than truth values, and as exactly in one tile.
            chosen = self.chosen[rows]
            for own, values in slices(logits):
                larger = torch.empty_like(values)
                for column in range(chosen.shape[1]):
                    torch.gt(values, chosen[own, column, None], out=larger)
                    self.ranks[rows[own], column] += larger.sum(dim=-1).long()
        else:
            self.choose(rows, logits, start)
        return logits.amax(dim=-1) if largest is None else largest

    def has_ids(self, rows: Tensor, start: int, width: int) -> bool:
        """Whether any token asked for, of these rows, lies in a tile."""
        if self.ids is None or not self.ids.shape[-1]:
            return False
        ids = self.ids if self.ids.ndim == 1 else self.ids[rows]
        return bool(((ids >= start) & (ids < start + width)).any())

    def choose(self, rows: Tensor, logits: Tensor, start: int) -> None:
        """Keep the logits of the tokens asked for that lie in this tile."""
        width = logits.shape[1]
        if self.ids is None or not self.has_ids(rows, start, width):
            return
        ids = self.ids.expand(len(rows), -1) if self.ids.ndim == 1 else self.ids[rows]
        here = (ids >= start) & (ids < start + width)
        seen = logits.gather(1, (ids - start).clamp(0, width - 1))
        self.chosen[rows] = torch.where(here, seen, self.chosen[rows])
