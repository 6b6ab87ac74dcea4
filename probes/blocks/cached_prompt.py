"""Prompts run once and resumed inside the stack: many continuations of one forward, each from its own block onwards.

Replacing one position's residual stream after block t changes nothing before that position and nothing in the blocks
up to t. So the prompt is run once with its keys and values kept, and each continuation runs only the blocks after t,
on the positions from the replaced one on; continuations are batched, and more of them join at each block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.blocks.rerouting import Caller, block_access, call_blocks
from probes.errors import PointError, PromptError
from probes.models.protocol import Model, Read, Write
from probes.points import Address

ROWS = 256
"""Continuations batched at once, which bounds memory."""


@dataclass(eq=False)
class _KeyValues:
    """Stands for a key-value cache: the prompt's own keys and values before the suffix, for any number of rows."""

    prefix: Sequence[tuple[Tensor, Tensor] | None]
    """Per layer, [1, kv_head, start, d_head] keys and values."""
    suffix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Per layer, the keys and values of the rows that ran last, without the prefix."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the rows' keys and values of a layer; return those that the rows attend to, with the prompt's before them."""
        self.suffix[layer_idx] = (key, value)
        before = self.prefix[layer_idx]
        if before is None:
            return key, value
        keys, values = (
            torch.cat((b.expand(len(key), -1, -1, -1), new), dim=2) for b, new in zip(before, (key, value), strict=True)
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions before the suffix."""
        before = self.prefix[layer_idx]
        return 0 if before is None else before[0].shape[2]


@dataclass(frozen=True, eq=False)
class Resumed:
    """What the continuations of a prompt end in."""

    last: Float[Tensor, "row d_model"]
    """What leaves the last block at the last position."""
    first_block: tuple[int, ...]
    """Per row, the first block that ran anew."""
    suffix: tuple[tuple[Tensor, Tensor], ...] = ()
    """Per layer, the rows' keys and values in the suffix; empty unless they were to be kept."""


class CachedPrompt:
    """A prompt run once, to be resumed from any block with its last positions (the suffix) replaced.

    Args:
        model: the model, of a backend that hands out its blocks.
        tokens: the prompt.
        start: the suffix's first position; positions before it stay as they are.
        writes: writes of points [1, suffix, ...], under which the suffix is run.

    Raises:
        PointError: the model is not causal, or its backend does not hand out its blocks.
        PromptError: a start outside the prompt.
    """

    def __init__(
        self, model: Model, tokens: Sequence[int], start: int, writes: Mapping[Address, Write] | None = None
    ) -> None:
        if not model.shape.causal:
            raise PointError(f"{model.ref} reads both ways: a replaced position changes those before it too")
        n = len(tokens)
        if not -n <= start < n:
            raise PromptError(f"position {start} is outside a prompt of {n} tokens: legal are {-n} to {n - 1}")
        self.model, self.tokens, self.start = block_access(model), tuple(tokens), start % n
        self.entering: list[Tensor] = []
        """The stream [suffix, d_model] that enters each block, and after these the one that leaves the last."""
        self._prefix: list[tuple[Tensor, Tensor] | None] = [None] * model.shape.n_layers
        self._base: list[tuple[Tensor, Tensor]] = []
        self._collect(writes or {})

    @torch.no_grad()
    def _collect(self, writes: Mapping[Address, Write]) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()
        with self.model.exclusive():
            if self.start:
                self.model.module(
                    input_ids=self._ids(self.tokens[: self.start]), past_key_values=self._cache, use_cache=True
                )
                self._prefix = [(layer.keys, layer.values) for layer in self._cache.layers]
            suffix = self._ids(self.tokens[self.start :])
            with self.model.hooked({}, writes, (1, suffix.shape[1])) if writes else nullcontext():
                call_blocks(self.model, suffix, self._keep_suffix, past_key_values=self._cache, use_cache=True)

    @torch.no_grad()
    def narrowed(self, start: int, stop: int | None = None) -> CachedPrompt:
        """Return the prompt open from a later position, its positions from `stop` on cut off; no block runs.

        Args:
            start: the new suffix's first position, inside the suffix of this one.
            stop: the position after the last that is kept; None keeps all.

        Raises:
            PromptError: a start or stop outside the suffix.
        """
        from transformers import DynamicCache

        stop = len(self.tokens) if stop is None else stop
        if not self.start <= start < stop <= len(self.tokens):
            raise PromptError(
                f"positions {start} to {stop} are not inside the suffix: legal are {self.start} to {len(self.tokens)}"
            )
        narrow = copy(self)
        narrow.tokens, narrow.start = self.tokens[:stop], start
        before, after = slice(0, start - self.start), slice(start - self.start, stop - self.start)
        narrow.entering = [stream[after] for stream in self.entering]
        narrow._prefix = [_joined(old, own, before) for old, own in zip(self._prefix, self._base, strict=True)]
        narrow._base = [(keys[:, :, after], values[:, :, after]) for keys, values in self._base]
        narrow._cache = DynamicCache()
        for layer, before_suffix in enumerate(narrow._prefix):
            if before_suffix is not None:
                narrow._cache.update(*before_suffix, layer)
        with self.model.exclusive():
            arguments = {"past_key_values": narrow._cache, "use_cache": True}
            narrow._call = call_blocks(self.model, self._ids(narrow.tokens[start:]), lambda _, call: call, **arguments)
        return narrow

    def _keep_suffix(self, hidden: Tensor, call: Caller) -> None:
        """Keep the caller, the stream [1, suffix, d_model] around each block, and the suffix's keys and values."""
        self._call, cache = call, _KeyValues(self._prefix)
        self.entering = [hidden[0].clone()]
        for layer in range(self.model.shape.n_layers):
            hidden = call(layer, hidden, (self._cache, cache))
            self.entering.append(hidden[0].clone())
        self._base = [cache.suffix[layer] for layer in range(self.model.shape.n_layers)]

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
            last = torch.empty(len(order), hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
            for i in range(0, len(order), ROWS):
                rows = order[i : i + ROWS]
                last[rows] = self.resume([first_block[row] for row in rows], hidden[rows]).last
            return Resumed(last, tuple(first_block))
        return self._run(first_block, hidden, keep)

    @torch.no_grad()
    def _run(self, first_block: Sequence[int], hidden: Tensor, keep: bool) -> Resumed:
        n_layers = self.model.shape.n_layers
        starts = torch.tensor(first_block)
        order = starts.argsort(stable=True)
        stream, cache = hidden[order].clone(), _KeyValues(self._prefix)
        suffix: list[tuple[Tensor, Tensor]] = []
        with self.model.exclusive():
            for layer in range(n_layers):
                active = int((starts <= layer).sum())
                if active:
                    stream[:active] = self._call(layer, stream[:active], (self._cache, cache))
                if keep:
                    suffix.append(self._suffix(layer, active, order, cache))
        last = torch.empty_like(stream[:, -1])
        last[order] = stream[:, -1]
        return Resumed(last, tuple(first_block), tuple(suffix))

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
            return self._run([first_block] * rows, hidden, keep=False).last

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
        return self._call(layer, hidden, (self._cache, _KeyValues(self._prefix)))

    def _suffix(self, layer: int, active: int, order: Tensor, cache: _KeyValues) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows at a layer: their own where they ran, the prompt's where they did not."""
        whole = []
        for own, base in zip(cache.suffix.get(layer, self._base[layer]), self._base[layer], strict=True):
            rows = base.expand(len(order), -1, -1, -1).clone()
            rows[order[:active]] = own[:active]
            whole.append(rows)
        return whole[0], whole[1]

    @torch.no_grad()
    def write(self, resumed: Resumed, first_tokens: Int[Tensor, row], max_new_tokens: int) -> list[list[int]]:
        """Write greedy continuations of rows resumed with `keep`; return their token ids.

        The replaced stream stays in the prompt only: what is written afterwards is not replaced.

        Args:
            resumed: what the rows ended in.
            first_tokens: the first token that each row writes.
            max_new_tokens: tokens of each continuation, the first among them.
        """
        from transformers import DynamicCache

        cache, whole = DynamicCache(), _KeyValues(self._prefix)
        for layer, own in enumerate(resumed.suffix):
            cache.update(*whole.update(*own, layer), layer)
        step = first_tokens.to(self.model.device)[:, None]
        written = [step]
        with self.model.exclusive():
            for _step in range(max_new_tokens - 1):
                logits = self.model.module(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
                step = logits.argmax(-1, keepdim=True)
                written.append(step)
        return [[int(t) for t in row] for row in torch.cat(written, dim=1).cpu()]


def _joined(
    prefix: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor], before: slice
) -> tuple[Tensor, Tensor] | None:
    """Return a layer's keys and values before the suffix, with those of the suffix at `before` behind them."""
    added = (own[0][:, :, before], own[1][:, :, before])
    if prefix is None:
        return added if added[0].shape[2] else None
    keys, values = (torch.cat(pair, dim=2) for pair in zip(prefix, added, strict=True))
    return keys, values
