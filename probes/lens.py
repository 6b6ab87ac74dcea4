"""Reading a residual through the final norm and the unembedding, one vocabulary tile at a time.

The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens"): softmax of unembed(final_norm(x)) for a
residual x of any layer. Memory is one tile of logits, independent of how many rows or tokens there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.models.base import Unembedding

VOCAB_TILE = 4096
"""Tokens per tile."""
ROW_TILE = 512
"""Residual rows per tile."""
LOG2 = 0.6931471805599453


@dataclass(frozen=True)
class LensRead:
    """Read-outs of n residual rows; log-probabilities and divergence in nats, entropy in bits, all float32."""

    log_z: Tensor
    """[n], the log-sum-exp of the logits."""
    entropy_bits: Tensor
    """[n]."""
    top_logprobs: Tensor
    """[n, top_k], most probable first."""
    top_ids: Tensor
    """[n, top_k]."""
    logprobs: Tensor
    """[n, m], of the tokens asked for."""
    kl: Tensor
    """[n], KL(reference's distribution || row's distribution); empty without a reference."""


def normalized(rows: Tensor, unembedding: Unembedding) -> Tensor:
    """Rows after the final norm, [n, d_model] float32."""
    weight = unembedding.weight
    parts = torch.split(rows, ROW_TILE) if rows.shape[0] else [rows]
    return torch.cat([unembedding.norm(part.to(weight.device, weight.dtype)).float() for part in parts])


def token_logits(hidden: Tensor, unembedding: Unembedding, ids: Tensor) -> Tensor:
    """Logits of chosen tokens for normalised rows [n, d_model]: ids [m] for all rows, or [n, m]; [n, m]."""
    bias = None if unembedding.bias is None else unembedding.bias[ids]
    if ids.ndim == 1:
        return _logits(hidden, unembedding.weight[ids].float(), bias, unembedding.softcap)
    pairs = zip(torch.split(hidden, ROW_TILE), torch.split(ids, ROW_TILE), strict=True)
    parts = [torch.einsum("nmd,nd->nm", unembedding.weight[wanted].float(), rows) for rows, wanted in pairs]
    logits = torch.cat(parts) if parts else hidden.new_zeros(ids.shape)
    if bias is not None:
        logits += bias.float()
    return _capped(logits, unembedding.softcap)


@torch.inference_mode()
def read(
    rows: Tensor,
    unembedding: Unembedding,
    *,
    ids: Tensor | None = None,
    top_k: int = 0,
    reference: Tensor | None = None,
    reference_of: Tensor | None = None,
    tile: int = VOCAB_TILE,
) -> LensRead:
    """Logit lens of residual rows [n, d_model].

    Args:
        ids: tokens whose log-probability is wanted, [m] for all rows or [n, m].
        top_k: how many of the most probable tokens to return.
        reference: residual rows [r, d_model] to which each row's distribution is compared.
        reference_of: [n], which reference each row is compared to; row i to reference i when left out.
        tile: vocabulary tile, in tokens; changes memory, not the result.
    """
    hidden = normalized(rows, unembedding)
    sums = _Sums(hidden.shape[0], top_k, hidden.device)
    if reference is None:
        _read_block(hidden, torch.arange(len(hidden)), unembedding, sums, None, tile)
    else:
        expected = normalized(reference, unembedding)
        target = torch.arange(len(hidden)) if reference_of is None else reference_of.cpu()
        for first in range(0, len(expected), ROW_TILE):
            mine = torch.nonzero((target >= first) & (target < first + ROW_TILE))[:, 0]
            against = _Reference(expected[first : first + ROW_TILE], target[mine] - first)
            _read_block(hidden, mine, unembedding, sums, against, tile)
    wanted = hidden.new_zeros(len(hidden), 0)
    if ids is not None:
        wanted = token_logits(hidden, unembedding, ids.to(hidden.device)) - sums.log_z[:, None]
    entropy = ((sums.log_z - sums.logit / sums.mass) / LOG2).clamp_min(0)
    kl = sums.kl if reference is not None else hidden.new_zeros(0)
    return LensRead(sums.log_z, entropy, sums.top_logits - sums.log_z[:, None], sums.top_ids, wanted, kl)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits += bias.float()
    return _capped(logits, softcap)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _tiles(unembedding: Unembedding, tile: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first token id, weight rows, bias) over the vocabulary, in float32."""
    for start in range(0, unembedding.weight.shape[0], tile):
        bias = None if unembedding.bias is None else unembedding.bias[start : start + tile]
        yield start, unembedding.weight[start : start + tile].float(), bias


class _Reference:
    """A block of normalised reference rows, and which of them each row of the block is compared to."""

    def __init__(self, hidden: Tensor, of: Tensor) -> None:
        self.hidden, self.of = hidden, of.to(hidden.device)
        self.high = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        self.mass = torch.zeros(len(hidden), device=hidden.device)

    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(exp(logits - running maximum), factor by which earlier sums shrink), and the running mass brought up to date."""
        high = torch.maximum(self.high, logits.amax(dim=-1))
        shrink = (self.high - high).exp()
        weights = (logits - high[:, None]).exp_()
        self.mass = self.mass * shrink + weights.sum(dim=-1)
        self.high = high
        return weights, shrink

    @property
    def log_z(self) -> Tensor:
        return self.high + self.mass.log()


class _Sums:
    """Per row: running maximum, mass and exp-weighted logit, top tokens, and divergence from a reference."""

    def __init__(self, n: int, top_k: int, device: torch.device) -> None:
        self.high = torch.full((n,), -torch.inf, device=device)
        self.mass = torch.zeros(n, device=device)
        self.logit = torch.zeros(n, device=device)
        self.kl = torch.zeros(n, device=device)
        self.top_logits = torch.full((n, top_k), -torch.inf, device=device)
        self.top_ids = torch.zeros(n, top_k, dtype=torch.long, device=device)

    @property
    def log_z(self) -> Tensor:
        return self.high + self.mass.log()

    def add(self, rows: Tensor, logits: Tensor, start: int) -> None:
        high = torch.maximum(self.high[rows], logits.amax(dim=-1))
        shrink = (self.high[rows] - high).exp()
        weights = (logits - high[:, None]).exp_()
        self.mass[rows] = self.mass[rows] * shrink + weights.sum(dim=-1)
        self.logit[rows] = self.logit[rows] * shrink + torch.linalg.vecdot(weights, logits)
        self.high[rows] = high
        top_k = self.top_ids.shape[1]
        if top_k:
            values, found = logits.topk(min(top_k, logits.shape[1]), dim=-1)
            best, order = torch.cat([self.top_logits[rows], values], dim=-1).topk(top_k, dim=-1)
            self.top_logits[rows] = best
            self.top_ids[rows] = torch.cat([self.top_ids[rows], found + start], dim=-1).gather(1, order)


def _read_block(
    hidden: Tensor, rows: Tensor, unembedding: Unembedding, sums: _Sums, against: _Reference | None, tile: int
) -> None:
    """Adds every vocabulary tile to the sums of `rows`, compared to one block of references."""
    difference = torch.zeros(len(rows), device=hidden.device)
    for start, weight, bias in _tiles(unembedding, tile):
        expected = weights = shrink = None
        if against is not None:
            expected = _logits(against.hidden, weight, bias, unembedding.softcap)
            weights, shrink = against.weights(expected)
        for first in range(0, len(rows), ROW_TILE):
            part = slice(first, first + ROW_TILE)
            logits = _logits(hidden[rows[part]], weight, bias, unembedding.softcap)
            sums.add(rows[part], logits, start)
            if against is not None and expected is not None and weights is not None and shrink is not None:
                of = against.of[part]
                change = torch.linalg.vecdot(weights[of], expected[of] - logits)
                difference[part] = difference[part] * shrink[of] + change
    if against is not None:
        mean = difference / against.mass[against.of]
        sums.kl[rows] = (mean - against.log_z[against.of] + sums.log_z[rows]).clamp_min(0)
