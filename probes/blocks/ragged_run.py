"""Continuations of one prompt that begin at any block and position, run together: each position is a row of one batch.

A block treats each position by itself, save in its attention. So positions go through it as when a model writes many texts at
once, a token of each, and every map is one large product; attention, which joins the positions, is computed apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.function_instead import FunctionInstead
from probes.blocks.key_values import KeyValues, cache_of
from probes.blocks.ragged_attention import ragged_attention, with_prompt
from probes.blocks.rerouting import call_blocks
from probes.hooks.forward_hooks import Stop
from probes.models.protocol import Write
from probes.points import Address

ROWS = 2048
"""Rows of a call, unless one continuation alone has more: products of more rows are no faster."""
TOLERANCE = 1e-3
"""How far what a block adds to a row of the prompt may be from what it adds in a run of the prompt alone, relative to it."""
ROUNDING = 1e-5
"""How far a row may be off beside that, relative to itself."""


class NotRagged(Exception):
    """A block's attention is another than the one computed here."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Some continuations in a block."""

    rows: Int[Tensor, " row"]
    """Their rows in the batch, in order."""
    owner: Int[Tensor, " row"]
    """Whose each row is, counted from 0."""
    at: Int[Tensor, " row"]
    """The position of each."""

    def placed(self, write: Write, length: int) -> Write:
        """A write of these rows [row, 1, ...] that sees each at its position in its continuation, and nothing where it has none."""

        def put(rows: Tensor) -> Tensor:
            whole = rows.new_zeros(int(self.owner[-1]) + 1, length, *rows.shape[2:])
            whole[self.owner, self.at] = rows[:, 0]
            return write(whole)[self.owner, self.at][:, None]

        return put

    def last(self) -> _Part:
        """The last row of each."""
        ends = torch.nonzero(torch.diff(self.owner, append=self.owner.new_full((1,), -1)))[:, 0]
        return _Part(self.rows[ends], self.owner[ends], self.at[ends])


class RaggedRun:
    """Continuations of a prompt; the prompt itself runs among them, and every block is proved by it.

    Args:
        base: the prompt, open from the first of the positions or before.
        first_block: per continuation, the first block that runs.
        position: per continuation, the first position whose stream is another than the prompt's.
        changed: what enters its first block there and at the next positions; what follows is the prompt's.
        writes: writes of points [row, pos, ...] inside blocks, under which the prompt was run and all continuations run.

    Raises:
        NotRagged: the model cannot be told where a row stands, or numbers are too coarse to prove a block.
    """

    def __init__(
        self,
        base: CachedPrompt,
        first_block: Sequence[int],
        position: Sequence[int],
        changed: Sequence[Float[Tensor, "_changed d_model"]],
        writes: Mapping[Address, Write] | None = None,
    ) -> None:
        model, length, lowest = base.model, len(base.tokens), min(first_block)
        if "position_ids" not in signature(model.module.forward).parameters or changed[0].dtype.itemsize < 4:
            raise NotRagged
        self.base, self.writes = base, writes or {}
        # Those that begin at near positions run in one part: then little of its rectangle is empty.
        self.order = sorted(range(len(changed)), key=lambda i: position[i])
        begin = torch.tensor([base.start, *(position[i] for i in self.order)])
        self.first = torch.tensor([lowest, *(first_block[i] for i in self.order)])
        spans = length - begin
        self.owner = torch.repeat_interleave(torch.arange(len(spans)), spans)
        self.at = torch.arange(len(self.owner)) - (spans.cumsum(0) - length)[self.owner]
        rows = [base.entering[lowest]]
        for i in self.order:
            rows += [changed[i], base.entering[first_block[i]][position[i] - base.start + len(changed[i]) :]]
        self.stream = torch.cat(rows)
        self.cache = cache_of(0, model.shape.n_layers)
        where = {"position_ids": self.at[:, None].to(model.device), "past_key_values": self.cache, "use_cache": True}
        self.call = call_blocks(model, torch.tensor(base.tokens)[self.at, None], lambda _, call: call, **where)

    def last(self) -> Float[Tensor, "row d_model"]:
        """Return what leaves the last block at the last position of each continuation.

        Raises:
            NotRagged: a block adds something else to the prompt than in a run of the prompt alone.
        """
        model, n_layers = self.base.model, self.base.model.shape.n_layers
        for layer in range(int(self.first[0]), n_layers):
            plain, leaving = self.base.entering[layer], self.base.entering[layer + 1]
            self.stream[: len(plain)] = plain
            with model.exclusive(), model.at(layer):
                for part in self._parts(self.first <= layer):
                    self._run(layer, part, only_last=layer == n_layers - 1)
            proved = slice(-1 if layer == n_layers - 1 else 0, None)
            _prove(self.stream[: len(plain)][proved], plain[proved], leaving[proved])
        ends = _Part(torch.arange(len(self.owner)), self.owner, self.at).last().rows
        last = torch.empty_like(self.stream[ends[1:]])
        last[self.order] = self.stream[ends[1:]]
        return last

    def _parts(self, running: Tensor) -> Iterator[_Part]:
        """Share out the continuations that run a block, in parts of about as many rows."""
        rows = torch.nonzero(running[self.owner])[:, 0]
        count = -(-len(rows) // ROWS)
        # A continuation is of the part in which its first row falls.
        part = torch.full(running.shape, -1)
        part.scatter_reduce_(
            0, self.owner[rows], torch.arange(len(rows)) * count // len(rows), "amin", include_self=False
        )
        for number in range(count):
            own = rows[part[self.owner[rows]] == number]
            if len(own):
                yield _Part(own, torch.unique_consecutive(self.owner[own], return_inverse=True)[1], self.at[own])

    def _run(self, layer: int, part: _Part, only_last: bool) -> None:
        """Put what leaves a block in the place of what enters it, at all rows or at the last of each continuation."""
        known = KeyValues(None, stops=only_last)

        def attend(query: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
            keys, values = (
                with_prompt(own[:, :, 0], prompt[0], part.owner, part.at)
                for own, prompt in zip(known.suffix[layer], self.base.keys_and_values(layer), strict=True)
            )
            return ragged_attention(query[:, :, 0], keys, values, asking.owner, asking.at, scale)[:, :, None]

        asking, cache = part, known
        if only_last:
            with suppress(Stop):
                self._call(layer, part, known)
            asking, cache = part.last(), KeyValues(None)
        if only_last and layer not in known.suffix:
            raise NotRagged
        with FunctionInstead(functional.scaled_dot_product_attention, attend):
            self.stream[asking.rows] = self._call(layer, asking, cache)

    def _call(self, layer: int, part: _Part, cache: KeyValues) -> Float[Tensor, "row d_model"]:
        def own(argument: Any) -> Any:
            if argument is self.cache:
                return cache
            if isinstance(argument, tuple | list):
                return type(argument)(own(part) for part in argument)
            per_row = isinstance(argument, Tensor) and argument.dim() and len(argument) == len(self.owner)
            return argument[part.rows.to(argument.device)] if per_row else argument

        length = len(self.base.tokens)
        writes = {a: part.placed(write, length) for a, write in self.writes.items() if a.layer == layer}
        with self.base.model.hooked({}, writes, (len(part.rows), 1)):
            return self.call(layer, self.stream[part.rows, None], own)[:, 0]


def _prove(leaving: Tensor, entering: Tensor, expected: Tensor) -> None:
    """Compare what a block made of the prompt's rows with what leaves it in a run of the prompt alone."""
    off, added, size = (rows.float().norm(dim=-1) for rows in (leaving - expected, expected - entering, expected))
    if not (off <= TOLERANCE * added + ROUNDING * size).all():
        raise NotRagged
