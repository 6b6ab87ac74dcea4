"""The lens over vocabulary tiles: logits are computed, summed, ranked and dropped in registers, never written.

One program takes a block of normalised rows through its share of the vocabulary with the running maximum and mass of
Milakov & Gimelshein (2018, "Online normalizer calculation for softmax"); a second step merges the shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from probes.kernels import eager
from probes.lenses.protocol import LensRead
from probes.lenses.row_sums import LOG2

PROGRAMS = 264
"""Programs that keep a large GPU busy; small inputs share the vocabulary among that many."""
MAX_TOP = 32
"""The most tokens per row that the kernel keeps in registers."""


@dataclass(frozen=True)
class Tiles:
    """Rows, tokens and model dimensions of a program's tile, and how it is run."""

    rows: int
    tokens: int
    depth: int
    warps: int
    stages: int


@triton.jit
@no_type_check
def lens_kernel(
    hidden,
    weight,
    bias,
    ids,
    high_out,
    mass_out,
    above_out,
    chosen_out,
    top_out,
    top_ids_out,
    n,
    width,
    vocab,
    share,
    hidden_stride,
    weight_stride,
    softcap,
    n_ids,
    CAPPED: tl.constexpr,
    TOP: tl.constexpr,
    TOP_PADDED: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, j): row block i through the tokens [j * share, (j + 1) * share)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    deep = tl.arange(0, DEPTH)
    rows = hidden + row.to(tl.int64)[:, None] * hidden_stride
    high = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    above = tl.zeros([ROWS], tl.float32)
    if TOP > 0:
        rank = tl.arange(0, TOP_PADDED)
        # Slots beyond TOP hold +inf, so they are never the weakest and never replaced.
        best = tl.where(rank[None, :] < TOP, tl.full([ROWS, TOP_PADDED], float("-inf"), tl.float32), float("inf"))
        best_ids = tl.zeros([ROWS, TOP_PADDED], tl.int32)
    end = tl.minimum(vocab, (part + 1) * share)
    for first in range(part * share, end, TOKENS):
        ids_here = first + token
        columns = weight + ids_here.to(tl.int64)[None, :] * weight_stride
        logits = tl.zeros([ROWS, TOKENS], tl.float32)
        for start in range(0, width, DEPTH):
            d = start + deep
            a = tl.load(rows + d[None, :], mask=(row < n)[:, None] & (d < width)[None, :], other=0.0)
            b = tl.load(columns + d[:, None], mask=(ids_here < end)[None, :] & (d < width)[:, None], other=0.0)
            if EXACT:
                logits = tl.dot(a.to(tl.float32), b.to(tl.float32), logits, input_precision="ieee")
            else:
                logits = tl.dot(a, b, logits)
        if bias is not None:
            logits += tl.load(bias + ids_here, mask=ids_here < end, other=0.0).to(tl.float32)[None, :]
        if CAPPED:
            logits = (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0) * softcap
        logits = tl.where((ids_here < end)[None, :], logits, float("-inf"))
        if ids is not None:
            for k in range(0, n_ids):
                chosen = tl.load(ids + k).to(tl.int32)
                if (chosen >= first) & (chosen < tl.minimum(first + TOKENS, end)):
                    logit = tl.sum(tl.where((ids_here == chosen)[None, :], logits, 0.0), axis=1)
                    tl.store(chosen_out + row.to(tl.int64) * n_ids + k, logit, mask=row < n)
        peak = tl.max(logits, axis=1)
        higher = tl.maximum(high, peak)
        shrink = tl.exp(high - higher)
        below = logits - higher[:, None]
        weights = tl.exp(below)
        lost = tl.where(mass > 0, high - higher, 0.0)
        above = (above + lost * mass) * shrink + tl.sum(weights * tl.where(weights > 0, below, 0.0), axis=1)
        mass = mass * shrink + tl.sum(weights, axis=1)
        high = higher
        if TOP > 0:
            weakest = tl.min(best, axis=1)
            while tl.max(tl.where(row < n, (peak > weakest).to(tl.int32), 0), axis=0) > 0:
                where = tl.argmax(logits, axis=1)
                takes = peak > weakest
                slot = tl.argmin(best, axis=1)
                hit = (rank[None, :] == slot[:, None]) & takes[:, None]
                best = tl.where(hit, peak[:, None], best)
                best_ids = tl.where(hit, (first + where)[:, None], best_ids)
                logits = tl.where((token[None, :] == where[:, None]) & takes[:, None], float("-inf"), logits)
                weakest = tl.min(best, axis=1)
                peak = tl.max(logits, axis=1)
    place = part.to(tl.int64) * n + row
    tl.store(high_out + place, high, mask=row < n)
    tl.store(mass_out + place, mass, mask=row < n)
    tl.store(above_out + place, above, mask=row < n)
    if TOP > 0:
        spots = place[:, None] * TOP + rank[None, :]
        keep = (row < n)[:, None] & (rank < TOP)[None, :]
        tl.store(top_out + spots, best, mask=keep)
        tl.store(top_ids_out + spots, best_ids, mask=keep)


def tiles_for(n: int, top_k: int, dtype: torch.dtype) -> Tiles:
    """Return the tile for n rows, as large as the registers hold; float32 is multiplied exactly, without tensor cores."""
    if dtype == torch.float32:
        return Tiles(16, 64, 32, 4, 2) if n <= 16 else Tiles(64, 64, 16, 8, 2)
    if n <= 16:
        return Tiles(16, 128, 64, 4, 4)
    if n <= 256:
        return Tiles(64, 128, 64, 8, 3)
    return Tiles(128, 64 if top_k else 128, 64, 8, 3)


def lens_rows(
    hidden: Float[Tensor, "row d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    bias: Float[Tensor, " d_vocab"] | None,
    softcap: float | None,
    ids: Int[Tensor, " token"] | None,
    top_k: int,
) -> LensRead:
    """Read normalised rows as `probes.kernels.eager.lens_rows` does, which serves more than `MAX_TOP` tokens."""
    if top_k > MAX_TOP:
        return eager.lens_rows(hidden, weight, bias, softcap, ids, top_k)
    n, vocab = hidden.shape[0], weight.shape[0]
    tiles = tiles_for(n, top_k, weight.dtype)
    blocks = max(1, triton.cdiv(n, tiles.rows))
    parts = max(1, min(triton.cdiv(vocab, tiles.tokens), PROGRAMS // blocks))
    share = triton.cdiv(triton.cdiv(vocab, parts), tiles.tokens) * tiles.tokens
    parts = triton.cdiv(vocab, share)
    n_ids = 0 if ids is None else len(ids)
    make: dict[str, Any] = {"device": hidden.device, "dtype": torch.float32}
    high, mass, above = (torch.empty(parts, n, **make) for _ in range(3))
    chosen_logits = torch.empty(n, n_ids, **make)
    top = torch.empty(parts, n, top_k, **make)
    top_ids = torch.empty(parts, n, top_k, device=hidden.device, dtype=torch.int32)
    if n:
        with torch.cuda.device(hidden.device) if hidden.is_cuda else torch.no_grad():
            lens_kernel[(blocks, parts)](
                hidden,
                weight,
                bias,
                ids,
                high,
                mass,
                above,
                chosen_logits,
                top,
                top_ids,
                n,
                hidden.shape[1],
                vocab,
                share,
                hidden.stride(0),
                weight.stride(0),
                1.0 if softcap is None else softcap,
                n_ids,
                CAPPED=softcap is not None,
                TOP=top_k,
                TOP_PADDED=triton.next_power_of_2(max(1, top_k)),
                # Triton's interpreter would multiply the bit patterns of bfloat16, so it gets float32 too.
                EXACT=weight.dtype == torch.float32 or not isinstance(lens_kernel, triton.JITFunction),
                ROWS=tiles.rows,
                TOKENS=tiles.tokens,
                DEPTH=tiles.depth,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    return _merged(high, mass, above, chosen_logits, top, top_ids)


def _merged(high: Tensor, mass: Tensor, above: Tensor, chosen_logits: Tensor, top: Tensor, top_ids: Tensor) -> LensRead:
    """Merge the shares [parts, n, ...] of the vocabulary."""
    peak = high.amax(dim=0)
    lower = high - peak
    weights = lower.exp()
    total = (mass * weights).sum(dim=0)
    over = ((above + lower * mass) * weights).sum(dim=0)
    log_z = peak + total.log()
    entropy = ((total.log() - over / total) / LOG2).clamp_min(0)
    values, order = top.transpose(0, 1).flatten(1).topk(top.shape[2], dim=-1)
    best_ids = top_ids.transpose(0, 1).flatten(1).gather(1, order)
    return LensRead(log_z, entropy, chosen_logits - log_z[:, None], values - log_z[:, None], best_ids)
