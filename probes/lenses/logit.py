"""Reading a residual through the final norm and the unembedding, one vocabulary tile at a time.

The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens"): softmax of unembed(final_norm(x)) for a
residual x of any layer. Memory is one tile of logits, independent of how many rows or tokens there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.lenses.card import LensCard
from probes.lenses.divergence import Distributions, KnownReference, ReferenceRows
from probes.lenses.protocol import LensRead
from probes.models.protocol import Unembedding

VOCAB_TILE = 4096
"""Tokens per tile."""
ROW_TILE = 512
"""Residual rows per tile."""
CHUNK = 64
"""Neighbouring tokens whose maximum is looked at first when top tokens are sought."""
WHOLE_ROWS = 16
"""Residual rows per tile where all their logits are there already."""
ROW_BLOCK = 8192
"""Residual rows normalised at once, which bounds memory."""
LOG2 = 0.6931471805599453


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The lens that reads every layer as if it were the last."""

    card: LensCard

    def readable(self, rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "row d_model"]:
        """Return the rows as they are; see `Lens.readable`."""
        return rows


def normalized(rows: Float[Tensor, "row d_model"], unembedding: Unembedding) -> Float[Tensor, "row d_model"]:
    """Return rows after the final norm, in float32."""
    weight = unembedding.weight
    parts = torch.split(rows, ROW_TILE) if rows.shape[0] else [rows]
    return torch.cat([unembedding.norm(part.to(weight.device, weight.dtype)).float() for part in parts])


def token_logits(
    hidden: Float[Tensor, "row d_model"], unembedding: Unembedding, ids: Int[Tensor, "*any token"]
) -> Float[Tensor, "row token"]:
    """Return the logits of chosen tokens for normalised rows; ids are [token] for all rows, or [row, token]."""
    bias = None if unembedding.bias is None else unembedding.bias[ids]
    if ids.ndim == 1:
        return _logits(hidden, unembedding.weight[ids].float(), bias, unembedding.softcap)
    pairs = zip(torch.split(hidden, ROW_TILE), torch.split(ids, ROW_TILE), strict=True)
    parts = [torch.einsum("nmd,nd->nm", unembedding.weight[tokens].float(), rows) for rows, tokens in pairs]
    logits = torch.cat(parts) if parts else hidden.new_zeros(ids.shape)
    if bias is not None:
        logits += bias.float()
    return _capped(logits, unembedding.softcap)


@torch.inference_mode()
def all_logprobs(rows: Float[Tensor, "row d_model"], unembedding: Unembedding) -> Float[Tensor, "row d_vocab"]:
    """Return the log-probability of every token, for few rows: memory grows with rows times tokens."""
    return logprobs_of(rows, unembedding)


def logprobs_of(rows: Float[Tensor, "row d_model"], unembedding: Unembedding) -> Float[Tensor, "row d_vocab"]:
    """Return what `all_logprobs` does, differentiably."""
    hidden = normalized(rows, unembedding)
    return _logits(hidden, unembedding.weight.float(), unembedding.bias, unembedding.softcap).log_softmax(-1)


@torch.inference_mode()
def all_logits(rows: Float[Tensor, "row d_model"], unembedding: Unembedding) -> Float[Tensor, "row d_vocab"]:
    """Return the logit of every token, for few rows: memory grows with rows times tokens."""
    hidden = normalized(rows, unembedding)
    return _logits(hidden, unembedding.weight.float(), unembedding.bias, unembedding.softcap)


@torch.inference_mode()
def read(
    rows: Float[Tensor, "row d_model"],
    unembedding: Unembedding,
    *,
    ids: Int[Tensor, "*any token"] | None = None,
    top_k: int = 0,
    reference: Float[Tensor, "reference d_model"] | Distributions | None = None,
    reference_of: Int[Tensor, " row"] | None = None,
    ranks: bool = False,
    tile: int = VOCAB_TILE,
) -> LensRead:
    """Read residual rows [n, d_model] of any layer by the logit lens.

    Args:
        ids: tokens whose log-probability is returned, [m] for all rows or [n, m].
        top_k: how many of the most probable tokens to return.
        reference: residual rows [r, d_model] to which each row's distribution is compared, or what `read_whole` kept of them.
        reference_of: [n], which reference each row is compared to; row i to reference i when left out.
        ranks: also count the tokens whose logit is larger than that of each of `ids`.
        tile: vocabulary tile, in tokens; changes memory, not the result.
    """
    device = unembedding.weight.device
    sums = _Sums(rows.shape[0], top_k, None if ids is None else ids.to(device), device, ranks and ids is not None)
    target = torch.arange(rows.shape[0]) if reference_of is None else reference_of.cpu()
    if reference is None or isinstance(reference, Distributions):
        for block in torch.split(torch.arange(rows.shape[0]), ROW_BLOCK):
            known = None if reference is None else KnownReference(reference, target[block])
            _read_block(rows, block, unembedding, sums, known, tile)
    else:
        for first in range(0, len(reference), ROW_TILE):
            block = torch.nonzero((target >= first) & (target < first + ROW_TILE))[:, 0]
            hidden = normalized(reference[first : first + ROW_TILE], unembedding)
            _read_block(rows, block, unembedding, sums, ReferenceRows(hidden, target[block] - first), tile)
    return sums.lens_read(compared=reference is not None)


@torch.inference_mode()
def read_whole(
    rows: Float[Tensor, "row d_model"],
    unembedding: Unembedding,
    *,
    ids: Int[Tensor, "*any token"] | None = None,
    top_k: int = 0,
    ranks: bool = False,
) -> tuple[LensRead, Distributions]:
    """Return what `read` does of few rows, and their distributions, to compare with: memory grows with rows times tokens."""
    device = unembedding.weight.device
    sums = _Sums(rows.shape[0], top_k, None if ids is None else ids.to(device), device, ranks and ids is not None)
    logits = all_logits(rows, unembedding)
    for block in torch.split(torch.arange(rows.shape[0]), WHOLE_ROWS):
        whole = logits[block[0] : block[-1] + 1]
        if len(sums.ranks):
            sums.choose(block, whole, 0)
        # In place of the logits, which are used up.
        whole.copy_(sums.add(block, whole, 0))
    return sums.lens_read(), Distributions(logits, sums.mass, sums.entropy_bits * LOG2)


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


def largest_of(logits: Float[Tensor, "row token"], k: int) -> tuple[Tensor, Tensor]:
    """Return what `logits.topk(k)` does, several times faster: the k largest lie in the k chunks of largest maxima."""
    rows, width = logits.shape
    if width % CHUNK or width < k * CHUNK:
        return logits.topk(k, dim=-1)
    chunks = logits.view(rows, -1, CHUNK)
    best = chunks.amax(dim=-1).topk(k, dim=-1).indices
    values, places = chunks.gather(1, best[:, :, None].expand(-1, -1, CHUNK)).flatten(1).topk(k, dim=-1)
    return values, best.gather(1, places // CHUNK) * CHUNK + places % CHUNK


class _Sums:
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
        return self.high + self.mass.log()

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities of tokens with these logits, [n, m]."""
        # The maximum goes first, so that log_z, which is large, is never rounded.
        return (logits - self.high[:, None]) - self.mass.log()[:, None]

    @property
    def entropy_bits(self) -> Tensor:
        # Logits are summed relative to the maximum, so that nothing large cancels here.
        return ((self.mass.log() - self.above / self.mass) / LOG2).clamp_min(0)

    def lens_read(self, compared: bool = False) -> LensRead:
        """Return what was read."""
        top, chosen = self.logprobs(self.top_logits), self.logprobs(self.chosen)
        kl = self.kl if compared else self.kl[:0]
        return LensRead(self.log_z, self.entropy_bits, chosen, top, self.top_ids, kl, self.ranks)

    def add(self, rows: Tensor, logits: Tensor, start: int) -> Tensor:
        """Take in the logits [rows, tile] of the tokens from `start`, which are used up; return exp(logits - maximum so far)."""
        best = self._add_tokens(rows, logits, start)
        before, mass = self.high[rows], self.mass[rows]
        high = torch.maximum(before, best)
        shrink = (before - high).exp()
        lower = torch.where(mass > 0, before - high, 0)
        logits.sub_(high[:, None])
        weights = logits.exp()
        above = (self.above[rows] + lower * mass) * shrink
        self.above[rows] = above + logits.mul_(weights).sum(dim=-1)
        self.mass[rows] = mass * shrink + weights.sum(dim=-1)
        self.high[rows] = high
        return weights

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
            larger = torch.empty_like(logits)
            for column in range(self.ranks.shape[1]):
                torch.gt(logits, self.chosen[rows, column][:, None], out=larger)
                self.ranks[rows, column] += larger.sum(dim=-1).long()
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


def _choose_first(hidden: Tensor, block: Tensor, unembedding: Unembedding, sums: _Sums, tile: int) -> None:
    """Compute the logits asked for before the pass that compares with them, by the same products and so to the same bits."""
    for start, weight, bias in _tiles(unembedding, tile):
        for first in range(0, len(block), ROW_TILE):
            part = slice(first, first + ROW_TILE)
            if sums.has_ids(block[part], start, len(weight)):
                sums.choose(block[part], _logits(hidden[part], weight, bias, unembedding.softcap), start)


def _read_block(
    rows: Tensor,
    block: Tensor,
    unembedding: Unembedding,
    sums: _Sums,
    against: ReferenceRows | KnownReference | None,
    tile: int,
) -> None:
    """Add every vocabulary tile to the sums of the rows of `block`, compared to one block of references."""
    hidden = normalized(rows[block], unembedding)
    if len(sums.ranks):
        _choose_first(hidden, block, unembedding, sums, tile)
    for start, weight, bias in _tiles(unembedding, tile):
        logits_of = partial(_logits, weight=weight, bias=bias, softcap=unembedding.softcap)
        if against is not None:
            against.turn_to(slice(start, start + len(weight)), logits_of)
        for first in range(0, len(block), ROW_TILE):
            part = slice(first, first + ROW_TILE)
            logits = logits_of(hidden[part])
            if against is not None:
                against.compare(part, logits)
            sums.add(block[part], logits, start)
    if against is not None:
        sums.kl[block] = against.kl(sums.log_z[block])
