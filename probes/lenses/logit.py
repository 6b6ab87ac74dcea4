"""Reading a residual through the final norm and the unembedding, one vocabulary tile at a time.

The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens"): softmax of unembed(final_norm(x)) for a
residual x of any layer. Memory is one tile of logits, independent of how many rows or tokens there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes import one_dnn
from probes.lenses.card import LensCard
from probes.lenses.divergence import Distributions, KnownReference, ReferenceRows, slices
from probes.lenses.protocol import LensRead
from probes.lenses.row_sums import LOG2, RowSums
from probes.models.protocol import Unembedding

VOCAB_TILE = 4096
"""Tokens per tile."""
ROW_TILE = 1024
"""Residual rows per tile."""
WAITING = 2**23
"""Logits of tiles with tokens asked for that wait for their turn: 32 MB."""
ROW_BLOCK = 8192
"""Residual rows normalised at once, which bounds memory."""


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


def unembedded(hidden: Float[Tensor, "*rows d_model"], unembedding: Unembedding) -> Float[Tensor, "*rows d_vocab"]:
    """Return the logit of every token for normalised rows, in float32."""
    rows = hidden.float().reshape(-1, hidden.shape[-1])
    logits = _logits(rows, unembedding.weight.float(), unembedding.bias, unembedding.softcap)
    return logits.view(*hidden.shape[:-1], -1)


@torch.inference_mode()
def all_logprobs(rows: Float[Tensor, "row d_model"], unembedding: Unembedding) -> Float[Tensor, "row d_vocab"]:
    """Return the log-probability of every token, for few rows: memory grows with rows times tokens."""
    return logprobs_of(rows, unembedding)


def logprobs_of(rows: Float[Tensor, "row d_model"], unembedding: Unembedding) -> Float[Tensor, "row d_vocab"]:
    """Return what `all_logprobs` does, differentiably."""
    return unembedded(normalized(rows, unembedding), unembedding).log_softmax(-1)


@torch.inference_mode()
def all_logits(rows: Float[Tensor, "row d_model"], unembedding: Unembedding) -> Float[Tensor, "row d_vocab"]:
    """Return the logit of every token, for few rows: memory grows with rows times tokens."""
    return unembedded(normalized(rows, unembedding), unembedding)


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
    sums = RowSums(rows.shape[0], top_k, None if ids is None else ids.to(device), device, ranks and ids is not None)
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
    sums = RowSums(rows.shape[0], top_k, None if ids is None else ids.to(device), device, ranks and ids is not None)
    logits = all_logits(rows, unembedding)
    for place, whole in slices(logits):
        block = torch.arange(place.start, place.stop)
        if len(sums.ranks):
            sums.choose(block, whole, 0)
        sums.add(block, whole, 0)
    return sums.lens_read(), Distributions(logits, sums.mass, sums.entropy_bits * LOG2)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, out: Tensor | None = None
) -> Tensor:
    logits = one_dnn.linear(hidden, weight) if one_dnn.quicker(hidden, weight) else torch.mm(hidden, weight.T, out=out)
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


def _choose_first(
    hidden: Tensor, block: Tensor, unembedding: Unembedding, sums: RowSums, tile: int
) -> dict[tuple[int, int], Tensor]:
    """Compute the logits asked for before the pass that compares with them, by the same products and so to the same bits.

    Returns the tiles they lie in, by first token and first row, as far as `WAITING` goes.
    """
    computed: dict[tuple[int, int], Tensor] = {}
    for start, weight, bias in _tiles(unembedding, tile):
        for first in range(0, len(block), ROW_TILE):
            part = slice(first, first + ROW_TILE)
            if sums.has_ids(block[part], start, len(weight)):
                logits = _logits(hidden[part], weight, bias, unembedding.softcap)
                sums.choose(block[part], logits, start)
                if sum(map(torch.numel, computed.values())) + logits.numel() <= WAITING:
                    computed[start, first] = logits
    return computed


def _read_block(
    rows: Tensor,
    block: Tensor,
    unembedding: Unembedding,
    sums: RowSums,
    against: ReferenceRows | KnownReference | None,
    tile: int,
) -> None:
    """Add every vocabulary tile to the sums of the rows of `block`, compared to one block of references."""
    hidden = normalized(rows[block], unembedding)
    computed = _choose_first(hidden, block, unembedding, sums, tile) if len(sums.ranks) else {}
    # One tile is written over the other: fresh memory of this size costs a fifth of the product.
    space = hidden.new_empty(min(len(block), ROW_TILE) * min(tile, unembedding.weight.shape[0]))
    for start, weight, bias in _tiles(unembedding, tile):
        logits_of = partial(_logits, weight=weight, bias=bias, softcap=unembedding.softcap)
        if against is not None:
            against.turn_to(slice(start, start + len(weight)), logits_of)
        for first in range(0, len(block), ROW_TILE):
            part = slice(first, min(first + ROW_TILE, len(block)))
            shape = part.stop - part.start, len(weight)
            logits = computed.pop((start, first), None)
            if logits is None:
                logits = logits_of(hidden[part], out=space[: math.prod(shape)].view(shape))
            if against is not None:
                against.compare(part, logits)
            sums.add(block[part], logits, start)
    if against is not None:
        sums.kl[block] = against.kl(sums.log_z[block])
