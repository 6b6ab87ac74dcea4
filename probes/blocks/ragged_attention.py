"""Causal attention of rows that are positions of continuations, each of any length, of one prompt."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def with_prompt(
    rows: Float[Tensor, "row kv_head d_head"],
    prompt: Float[Tensor, "kv_head pos d_head"],
    owner: Int[Tensor, " row"],
    at: Int[Tensor, " row"],
) -> Float[Tensor, "continuation kv_head pos d_head"]:
    """Return keys or values at all positions of each continuation: its own rows, and where it has none the prompt's.

    Args:
        rows: of the continuations.
        prompt: of the prompt.
        owner: whose each row is, counted from 0, in order.
        at: the position of each.
    """
    heads, length, _ = prompt.shape
    whole = prompt.transpose(0, 1).flatten(1).repeat(int(owner[-1]) + 1, 1)
    whole[owner * length + at] = rows.flatten(1)
    return whole.view(-1, length, heads, prompt.shape[-1]).transpose(1, 2)


def ragged_attention(
    query: Float[Tensor, "row head d_head"],
    keys: Float[Tensor, "continuation kv_head pos d_head"],
    values: Float[Tensor, "continuation kv_head pos d_value"],
    owner: Int[Tensor, " row"],
    at: Int[Tensor, " row"],
    scale: float | None = None,
) -> Float[Tensor, "row head d_value"]:
    """Return what each row's heads mix from the values at its own position and before it.

    Args:
        query: of the rows.
        keys: of every position of each continuation.
        values: likewise.
        owner: whose each row is, counted from 0, in order.
        at: the position of each.
        scale: what scores are multiplied by; d_head ** -0.5 by default.
    """
    (n, groups, length, d_head), heads = keys.shape, query.shape[1]
    start = int(at.min())
    width, shared = length - start, heads // groups
    # One rectangle for all continuations, empty where one begins later: small products one by one would take longer.
    place = owner * width + at - start
    padded = query.new_zeros(n * width, heads * d_head)
    padded[place] = query.flatten(1)
    padded = padded.view(n, width, groups, shared, d_head).permute(0, 2, 3, 1, 4).reshape(n * groups, -1, d_head)
    future = query.new_full((width, length), -math.inf).triu(start + 1).repeat(shared, 1)
    scores = torch.baddbmm(
        future, padded, keys.flatten(0, 1).transpose(1, 2), alpha=d_head**-0.5 if scale is None else scale
    )
    mixed = (scores.softmax(-1) @ values.flatten(0, 1)).view(n, groups, shared, width, -1)
    return mixed.permute(0, 3, 1, 2, 4).reshape(n * width, heads, -1)[place]
