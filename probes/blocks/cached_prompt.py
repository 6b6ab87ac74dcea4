"""Prompts run once and resumed inside the stack: many continuations of one forward, each from its own block onwards.

Replacing one position's residual stream after block t changes nothing before that position and nothing in the blocks
up to t. So the prompt is run once with its keys and values kept, and each continuation runs only the blocks after t,
on the positions from the replaced one on; continuations are batched, and more of them join at each block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.blocks.key_values import KeyValues, Pair, cache_of
from probes.blocks.rerouting import Caller, block_access, call_blocks, exchanged, in_order, rerouted
from probes.blocks.together import together
from probes.blocks.whole_run import run_whole
from probes.errors import PointError, PromptError
from probes.models.protocol import Model, Read, Write
from probes.points import Address
from probes.shelf import Shelved

ROWS = 256
"""Continuations batched at once, which bounds memory."""


Choose = Callable[[Float[Tensor, "row d_vocab"]], Int[Tensor, " row"]]


def greedy(logits: Float[Tensor, "row d_vocab"]) -> Int[Tensor, " row"]:
    """Return the most probable token of each row."""
    return logits.argmax(-1)


class _Cut(Sequence[Tensor]):
    """The same positions of each of some streams."""

    def __init__(self, streams: Sequence[Tensor], positions: slice) -> None:
        self._streams, self._positions = streams, positions

    def __len__(self) -> int:
        return len(self._streams)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [stream[self._positions] for stream in self._streams[index]]
        return self._streams[index][self._positions]


@dataclass(frozen=True, eq=False)
class Resumed:
    """What the continuations of a prompt end in."""

    last: Float[Tensor, "row d_model"]
    """What leaves the last block at the last position."""
    first_block: tuple[int, ...]
    """Per row, the first block that ran anew."""
    suffix: tuple[Pair, ...] = ()
    """Per layer, the rows' keys and values in the suffix; empty unless they were to be kept."""
    leaving: Float[Tensor, "row pos d_model"] | None = None
    """What leaves the last block at every position of the suffix; None unless keys and values were to be kept."""


class CachedPrompt:
    """A prompt run once, to be resumed from any block with its last positions (the suffix) replaced.

    Args:
        model: the model, of a backend that hands out its blocks.
        tokens: the prompt.
        start: the suffix's first position; positions before it stay as they are.
        writes: writes of points [1, pos, ...], under which the prompt is run.
        points: points inside the blocks of which `values` are kept.

    Raises:
        PointError: the model is not causal, its backend does not hand out its blocks, or it refuses a point.
        PromptError: a start outside the prompt.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int],
        start: int,
        writes: Mapping[Address, Write] | None = None,
        points: Collection[Address] = (),
    ) -> None:
        if not model.shape.causal:
            raise PointError(f"{model.ref} reads both ways: a replaced position changes those before it too")
        n = len(tokens)
        if not -n <= start < n:
            raise PromptError(f"position {start} is outside a prompt of {n} tokens: legal are {-n} to {n - 1}")
        self.model, self.tokens, self.start = block_access(model), tuple(tokens), start % n
        whole = run_whole(self.model, self._ids(self.tokens), self.start, writes or {}, points)
        self.entering: Shelved | _Cut = whole.entering
        """The stream [suffix, d_model] that enters each block, and after these the one that leaves the last."""
        self._keys, self._values = whole.keys, whole.values
        self.values = whole.points
        """The points that were kept, [pos, ...] over the whole prompt."""
        self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        """Have the model prepare its blocks' arguments for the suffix; no block runs."""
        self._cache = cache_of(self.start, self.model.shape.n_layers)
        suffix = self._ids(self.tokens[self.start :])
        arguments = {"past_key_values": self._cache, "use_cache": True}
        self._call: Caller = call_blocks(self.model, suffix, lambda _, call: call, **arguments)

    def narrowed(self, start: int, stop: int | None = None) -> CachedPrompt:
        """Return the prompt open from a later position, its positions from `stop` on cut off; no block runs.

        Args:
            start: the new suffix's first position, inside the suffix of this one.
            stop: the position after the last that is kept; None keeps all.

        Raises:
            PromptError: a start or stop outside the suffix.
        """
        stop = len(self.tokens) if stop is None else stop
        if not self.start <= start < stop <= len(self.tokens):
            raise PromptError(
                f"positions {start} to {stop} are not inside the suffix: legal are {self.start} to {len(self.tokens)}"
            )
        narrow = copy(self)
        narrow.tokens, narrow.start = self.tokens[:stop], start
        narrow.entering = _Cut(self.entering, slice(start - self.start, stop - self.start))
        narrow._prepare()
        return narrow

    def _before(self) -> KeyValues:
        """A cache that holds what is before the suffix."""
        return KeyValues(partial(self._pair, slice(self.start)) if self.start else None, start=self.start)

    def keys_and_values(self, layer: int) -> Pair:
        """Return the prompt's keys and values [1, kv_head, pos, d_head] at a layer, of all its positions."""
        return self._pair(slice(len(self.tokens)), layer)

    def _pair(self, positions: slice, layer: int) -> Pair:
        """The prompt's keys and values at a layer, at some positions."""
        return self._keys[layer][:, :, positions], self._values[layer][:, :, positions]

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.model.device)

    @torch.no_grad()
    def resume(
        self, first_block: Sequence[int], hidden: Float[Tensor, "row pos d_model"], keep: bool = False
    ) -> Resumed:
        """Run the blocks from `first_block[row]` on, for each row of `hidden`.

        Args:
            first_block: per row; n_layers runs nothing and takes the row as what leaves the last block.
            hidden: what enters each row's first block.
            keep: keep keys and values, for `write`.
        """
        if len(first_block) > ROWS and not keep:
            # Rows that start together stay together, so that each part skips the blocks none of it runs.
            order = sorted(range(len(first_block)), key=lambda row: first_block[row])
            parts = [order[i : i + ROWS] for i in range(0, len(order), ROWS)]
            ends = together(
                self.model,
                [partial(self._resume_rows, [first_block[row] for row in rows], hidden, rows) for rows in parts],
            )
            last = torch.empty(len(order), hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
            for rows, end in zip(parts, ends, strict=True):
                last[rows] = end
            return Resumed(last, tuple(first_block))
        given = [hidden]
        del hidden
        return self._run(first_block, given, keep, saved=not keep)

    @torch.no_grad()
    def _run(self, first_block: Sequence[int], given: list[Tensor], keep: bool = False, *, saved: bool) -> Resumed:
        """Run rows that fit together; the stream is taken out of `given`, so that it waits on the shelf and nowhere else.

        Only what leaves the last block is `saved` for a run after a kill: not what is kept or read inside the blocks.
        """
        n_layers, shelf = self.model.shape.n_layers, self.model.shelf
        starts = torch.tensor(first_block)
        order = starts.argsort(stable=True)
        stream, cache = given.pop()[order].clone(), self._before()
        suffix: list[Pair] = []
        run, done = self.model.saved_run(starts, stream) if saved else None, 0 if keep else min(first_block)
        for blocks, tensors in run.saved() if run else ():
            done, stream = blocks, tensors["rows"].to(stream.device)
        for layer in range(done, n_layers):
            waiting = shelf.keep(stream)
            del stream
            with self.model.exclusive(), self.model.at(layer):
                stream = waiting.get(shelf)
                active = int((starts <= layer).sum())
                if active:
                    stream[:active] = self._call(layer, stream[:active], exchanged(self._cache, cache))
                if keep:
                    suffix.append(self._suffix(layer, active, order, cache))
                if run and self.model.ends_group(layer):
                    run.save(layer + 1, {"rows": stream}, instead=True)
        if keep:
            leaving = torch.empty_like(stream)
            leaving[order] = stream
            return Resumed(leaving[:, -1], tuple(first_block), tuple(suffix), leaving)
        last = torch.empty_like(stream[:, -1])
        last[order] = stream[:, -1]
        return Resumed(last, tuple(first_block))

    def _resume_rows(self, first_block: Sequence[int], hidden: Tensor, rows: Sequence[int]) -> Tensor:
        return self.resume(first_block, hidden[list(rows)]).last

    def edited(
        self,
        first_block: int,
        rows: int,
        writes: Mapping[Address, Write],
        reads: Mapping[Address, Read] | None = None,
    ) -> Float[Tensor, "row d_model"]:
        """Resume copies of the prompt under writes; return what leaves the last block at the last position.

        Args:
            first_block: the block that every copy resumes at.
            rows: how many copies.
            writes: writes of points [rows, suffix, ...] in the blocks that run.
            reads: reads of points [rows, suffix, ...] in the blocks that run.

        Raises:
            PointError: a point the model refuses, or one in an earlier block.
        """
        for address in (*writes, *(reads or {})):
            if address.layer is None or address.layer < first_block:
                raise PointError(f"{address} is not inside the blocks from {first_block} on, which are all that runs")
        hidden = self.entering[first_block].expand(rows, -1, -1)
        with self.model.hooked(reads or {}, writes, (rows, hidden.shape[1])):
            return self._run([first_block] * rows, [hidden], saved=not reads).last

    @torch.no_grad()
    def through(
        self,
        layer: int,
        hidden: Float[Tensor, "row pos d_model"],
        writes: Mapping[Address, Write],
        reads: Mapping[Address, Read] | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what leaves block `layer` where `hidden` enters it, under reads and writes inside it.

        Raises:
            PointError: a point the model refuses, or one of another block.
        """
        for address in (*writes, *(reads or {})):
            if address.layer != layer:
                raise PointError(f"{address} is not inside block {layer}, which is all that runs")
        with self.model.hooked(reads or {}, writes, (len(hidden), hidden.shape[1])), self.model.exclusive():
            return self.block(layer, hidden)

    def block(self, layer: int, hidden: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """Return what leaves block `layer` where `hidden` enters it, differentiably; the caller holds the model exclusively."""
        return self._call(layer, hidden, exchanged(self._cache, self._before()))

    def _suffix(self, layer: int, active: int, order: Tensor, cache: KeyValues) -> Pair:
        """Keys and values of all rows at a layer: their own where they ran, the prompt's where they did not."""
        whole = []
        base_pair = self._pair(slice(self.start, len(self.tokens)), layer)
        for own, base in zip(cache.suffix.get(layer, base_pair), base_pair, strict=True):
            rows = base.expand(len(order), -1, -1, -1).clone()
            rows[order[:active]] = own[:active]
            whole.append(rows)
        return whole[0], whole[1]

    @torch.no_grad()
    def write(
        self, resumed: Resumed, first_tokens: Int[Tensor, row], max_new_tokens: int, choose: Choose = greedy
    ) -> list[list[int]]:
        """Write continuations of rows resumed with `keep`; return their token ids.

        The replaced stream stays in the prompt only: what is written afterwards is not replaced.

        Args:
            resumed: what the rows ended in.
            first_tokens: the first token that each row writes.
            max_new_tokens: tokens of each continuation, the first among them.
            choose: the next token of each row from its logits; the most probable by default.
        """
        from transformers import DynamicCache

        cache, whole = DynamicCache(), self._before()
        for layer, own in enumerate(resumed.suffix):
            cache.update(*whole.update(*own, layer), layer)
        step = first_tokens.to(self.model.device)[:, None]
        written = [step]
        with rerouted(self.model, in_order(self.model.shape.n_layers)):
            for _step in range(max_new_tokens - 1):
                logits = self.model.module(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
                step = choose(logits)[:, None]
                written.append(step)
        return [[int(t) for t in row] for row in torch.cat(written, dim=1).cpu()]
