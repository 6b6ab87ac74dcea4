"""Continuations of one prompt that begin at any block and position, run together: one block after another, for all of them.

At each block those that begin near each other share a batch. The positions before a continuation's own first are then run
once more, which takes less than one more call for a few rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.cached_prompt import CachedPrompt

CALL = 30
"""Rows of a block that take about as long as calling it once more."""
BATCH = 2048
"""Rows of a call, unless one continuation alone has more: products of more rows are no faster."""
KEPT = 2**15
"""Rows kept at once, of all continuations and positions, which bounds memory."""

Run = tuple[int, int, int]
"""Continuations in a row that begin at one position: the position, the first of them and the one behind the last."""


@torch.no_grad()
def last_rows(
    base: CachedPrompt,
    first_block: Sequence[int],
    position: Sequence[int],
    changed: Sequence[Float[Tensor, "_changed d_model"]],
) -> Float[Tensor, "row d_model"]:
    """Return what leaves the last block at the last position under each continuation, as `CachedPrompt.resume` does.

    Args:
        base: the prompt, open from the first of the positions or before.
        first_block: per continuation, the first block that runs; n_layers runs nothing.
        position: per continuation, the first position whose stream is another than the prompt's.
        changed: what enters its first block there and at the next positions; what follows is the prompt's.
    """
    order = sorted(range(len(changed)), key=lambda i: (position[i], first_block[i]))
    last = changed[0].new_empty(len(order), changed[0].shape[-1])
    opened, size = {base.start: base}, max(1, KEPT // len(base.tokens))
    for at in range(0, len(order), size):
        part = order[at : at + size]
        last[part] = _last_of([(first_block[i], position[i], changed[i]) for i in part], base, opened)
    return last


def _last_of(
    ordered: Sequence[tuple[int, int, Tensor]], base: CachedPrompt, opened: dict[int, CachedPrompt]
) -> Float[Tensor, "row d_model"]:
    """Run continuations in the order of their positions and, at one position, of their first blocks.

    Args:
        ordered: first block, position and changed rows of each.
        base: the prompt.
        opened: the prompt open from some positions; more are added.
    """
    n_layers, length, start = base.model.shape.n_layers, len(base.tokens), ordered[0][1]
    firsts, begins, rows = (list(column) for column in zip(*ordered, strict=True))
    stream = rows[0].new_empty(len(rows), length - start, rows[0].shape[-1])
    for own, first, begin, changed in zip(stream, firsts, begins, rows, strict=True):
        own[begin - start :] = base.entering[first][begin - base.start :]
        own[begin - start : begin - start + len(changed)] = changed
    for layer in range(min(firsts), n_layers):
        batches = list(_batches(firsts, begins, layer, length))
        at_last = layer == n_layers - 1
        for position in {*(batch.start for batch in batches), *([length - 1] if at_last else [])} - opened.keys():
            opened[position] = base.narrowed(position)
        plain = base.entering[layer]
        with base.model.exclusive(), base.model.at(layer):
            for batch in batches:
                entering, prompt = batch.gathered(stream, plain), opened[batch.start]
                if at_last:
                    batch.scatter(prompt.last_of_block(layer, entering, opened[length - 1]), stream)
                else:
                    batch.scatter(prompt.block(layer, entering), stream)
    return stream[:, -1]


@dataclass
class _Batch:
    """Continuations that run a block together, from position `start` to the end of a prompt of `length` tokens."""

    start: int
    length: int
    runs: list[Run] = field(default_factory=list)
    count: int = 0

    def add(self, begin: int, low: int, high: int) -> None:
        """Take more continuations."""
        self.runs.append((begin, low, high))
        self.count += high - low

    def gathered(
        self, stream: Float[Tensor, "row pos d_model"], plain: Float[Tensor, "pos d_model"]
    ) -> Float[Tensor, "batch_row suffix d_model"]:
        """Return the batch's rows of `stream`; before a continuation's own first position they are the prompt's."""
        rows = plain[self.start - self.length :].repeat(self.count, 1, 1)
        for begin, own, inside in self._places():
            rows[inside, begin - self.length :] = stream[own, begin - self.length :]
        return rows

    def scatter(
        self, rows: Float[Tensor, "batch_row suffix d_model"], stream: Float[Tensor, "row pos d_model"]
    ) -> None:
        """Put what a block made of the rows, or of their last positions alone, into `stream`."""
        for begin, own, inside in self._places():
            kept = min(self.length - begin, rows.shape[1])
            stream[own, -kept:] = rows[inside, -kept:]

    def _places(self) -> Iterator[tuple[int, slice, slice]]:
        """Give per run its position, and its rows in the stream and in the batch."""
        done = 0
        for begin, low, high in self.runs:
            yield begin, slice(low, high), slice(done, done + high - low)
            done += high - low


def _batches(firsts: Sequence[int], begins: Sequence[int], layer: int, length: int) -> Iterator[_Batch]:
    """Share out the continuations that run a block."""
    batch: _Batch | None = None
    for begin, rows in groupby(range(len(begins)), begins.__getitem__):
        low, *more = rows
        high = bisect_right(firsts, layer, low, (more or [low])[-1] + 1)
        while low < high:
            if batch is not None:
                again = (high - low) * (begin - batch.start) <= CALL
                fits = (batch.count + high - low) * (length - batch.start) <= BATCH
                if not (again and fits):
                    yield batch
                    batch = None
            batch = batch or _Batch(begin, length)
            room = max(1, BATCH // (length - batch.start) - batch.count)
            batch.add(begin, low, min(high, low + room))
            low = min(high, low + room)
    if batch is not None:
        yield batch
