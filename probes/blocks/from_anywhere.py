"""Continuations of one prompt that begin at any block and position, each with some positions' stream replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.quick_linear import QuickLinear
from probes.blocks.ragged_run import NotRagged, RaggedRun
from probes.models.protocol import Write
from probes.points import Address

KEPT = 2**15
"""Rows kept at once, of all continuations and positions, which bounds memory."""


@torch.no_grad()
def last_rows(
    base: CachedPrompt,
    first_block: Sequence[int],
    position: Sequence[int],
    changed: Sequence[Float[Tensor, "_changed d_model"]],
    writes: Mapping[Address, Write] | None = None,
) -> Float[Tensor, "row d_model"]:
    """Return what leaves the last block at the last position under each continuation, as `CachedPrompt.resume` does.

    Args:
        base: the prompt, open from the first of the positions or before.
        first_block: per continuation, the first block that runs; n_layers runs nothing.
        position: per continuation, the first position whose stream is another than the prompt's.
        changed: what enters its first block there and at the next positions; what follows is the prompt's.
        writes: writes of points [row, pos, ...] inside blocks, under which the prompt was run and all continuations run.

    Raises:
        NotRagged: there are writes, and a block's attention is none in which each row runs apart.
    """
    order = sorted(range(len(changed)), key=lambda i: (position[i], first_block[i]))
    last = changed[0].new_empty(len(order), changed[0].shape[-1])
    size = max(1, KEPT // len(base.tokens))
    for low in range(0, len(order), size):
        part = order[low : low + size]
        given = [first_block[i] for i in part], [position[i] for i in part], [changed[i] for i in part]
        with QuickLinear():
            try:
                last[part] = RaggedRun(base, *given, writes).last()
            except NotRagged:
                if writes:
                    raise
                last[part] = _by_position(base, *given)
    return last


def _by_position(
    base: CachedPrompt, first_block: Sequence[int], position: Sequence[int], changed: Sequence[Tensor]
) -> Float[Tensor, "row d_model"]:
    """Run the continuations of each position together, for models whose rows cannot be run apart."""
    last = changed[0].new_empty(len(changed), changed[0].shape[-1])
    for begin in sorted(set(position)):
        rows = [i for i, own in enumerate(position) if own == begin]
        prompt = base.narrowed(begin)
        hidden = torch.stack([prompt.entering[first_block[i]] for i in rows])
        for own, i in zip(hidden, rows, strict=True):
            own[: len(changed[i])] = changed[i]
        last[rows] = prompt.resume([first_block[i] for i in rows], hidden).last
    return last
