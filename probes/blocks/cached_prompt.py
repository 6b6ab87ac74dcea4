"""Resuming a prompt inside the stack: many continuations of one forward, each from its own block onwards.

Replacing one position's residual stream after block t changes nothing before that position and nothing in the blocks
up to t. So the prompt is run once with its keys and values kept, and each continuation runs only the blocks after t,
on the positions from the replaced one on; continuations are batched, and more of them join at each block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probes.blocks.rerouting import Caller, call_blocks, module_of
from probes.errors import PointError, PromptError
from probes.models.protocol import Model, Read, Write
from probes.points import Address

ROWS = 256
"""Continuations batched at once, which bounds memory."""


@dataclass(eq=False)
class _Kept:
    """Stands for a key-value cache: the prompt's own keys and values before the suffix, for any number of rows."""

    prefix: Sequence[tuple[Tensor, Tensor] | None]
    """Per layer, [1, kv_head, start, d_head] keys and values."""
    suffix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Per layer, the keys and values of the rows that ran last, without the prefix."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the rows of `layer_idx` attend to."""
        self.suffix[layer_idx] = (key, value)
        before = self.prefix[layer_idx]
        if before is None:
            return key, value
        keys, values = (
            torch.cat((b.expand(len(key), -1, -1, -1), new), dim=2) for b, new in zip(before, (key, value), strict=True)
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the suffix."""
        before = self.prefix[layer_idx]
        return 0 if before is None else before[0].shape[2]


@dataclass(frozen=True, eq=False)
class Resumed:
    """What the continuations ended in."""

    last: Tensor
    """[rows, d_model], what leaves the last block at the last position."""
    first_block: tuple[int, ...]
    """Per row, the first block that ran anew."""
    suffix: tuple[tuple[Tensor, Tensor], ...] = ()
    """Per layer, the rows' keys and values in the suffix, where they were asked for."""


class CachedPrompt:
    """A prompt run once, its last positions open to being replaced between any two blocks.

    Args:
        tokens: the prompt.
        start: the first position that may be replaced; positions before it are settled.

    Raises:
        PointError: the model is not causal, or its backend does not hand out its blocks.
        PromptError: a start outside the prompt.
    """

    def __init__(self, model: Model, tokens: Sequence[int], start: int) -> None:
        if not model.shape.causal:
            raise PointError(f"{model.ref} reads both ways: a replaced position changes those before it too")
        n = len(tokens)
        if not -n <= start < n:
            raise PromptError(f"position {start} is outside a prompt of {n} tokens: legal are {-n} to {n - 1}")
        self.model, self.tokens, self.start = model, tuple(tokens), start % n
        self.entering: list[Tensor] = []
        """What enters each block, and last what leaves the last one: [suffix, d_model] each."""
        self._prefix: list[tuple[Tensor, Tensor] | None] = [None] * model.shape.n_layers
        self._base: list[tuple[Tensor, Tensor]] = []
        self._collect()

    @torch.no_grad()
    def _collect(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()
        with module_of(self.model) as (module, _):
            if self.start:
                module(input_ids=self._ids(self.tokens[: self.start]), past_key_values=self._cache, use_cache=True)
                self._prefix = [(layer.keys, layer.values) for layer in self._cache.layers]
            suffix = self._ids(self.tokens[self.start :])
            call_blocks(self.model, suffix, self._keep_suffix, past_key_values=self._cache, use_cache=True)

    def _keep_suffix(self, hidden: Tensor, call: Caller) -> None:
        """Keep the caller, the stream [1, suffix, d_model] around each block, and the suffix's keys and values."""
        self._call, kept = call, _Kept(self._prefix)
        self.entering = [hidden[0].clone()]
        for layer in range(self.model.shape.n_layers):
            hidden = call(layer, hidden, (self._cache, kept))
            self.entering.append(hidden[0].clone())
        self._base = [kept.suffix[layer] for layer in range(self.model.shape.n_layers)]

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.model.device)

    @torch.no_grad()
    def resume(self, first_block: Sequence[int], hidden: Tensor, keep: bool = False) -> Resumed:
        """Runs the blocks from `first_block[row]` on, for each row of `hidden` [rows, suffix, d_model].

        A row whose first block is n_layers is read as it is. `keep` keeps keys and values, for `write`.
        """
        if len(first_block) > ROWS and not keep:
            parts = [slice(i, i + ROWS) for i in range(0, len(first_block), ROWS)]
            # Rows that start together stay together, so that each part skips the blocks none of it runs.
            order = sorted(range(len(first_block)), key=lambda row: first_block[row])
            last = torch.empty(len(order), hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
            for part in parts:
                rows = order[part]
                last[rows] = self.resume([first_block[row] for row in rows], hidden[rows]).last
            return Resumed(last, tuple(first_block))
        return self._run(first_block, hidden, keep)

    @torch.no_grad()
    def _run(self, first_block: Sequence[int], hidden: Tensor, keep: bool) -> Resumed:
        n_layers = self.model.shape.n_layers
        starts = torch.tensor(first_block)
        order = starts.argsort(stable=True)
        stream, kept, held = hidden[order].clone(), _Kept(self._prefix), []
        with module_of(self.model):
            for layer in range(n_layers):
                active = int((starts <= layer).sum())
                if active:
                    stream[:active] = self._call(layer, stream[:active], (self._cache, kept))
                if keep:
                    held.append(self._held(layer, active, order, kept))
        last = torch.empty_like(stream[:, -1])
        last[order] = stream[:, -1]
        return Resumed(last, tuple(first_block), tuple(held))

    def edited(
        self,
        first_block: int,
        rows: int,
        writes: Mapping[Address, Write],
        reads: Mapping[Address, Read] | None = None,
    ) -> Tensor:
        """What leaves the last block at the last position [rows, d_model], when `rows` copies of the prompt resume at
        `first_block` under writes of points [rows, suffix, ...] in the blocks from there on.

        Raises:
            PointError: a point the model refuses, or one in an earlier block.
        """
        for address in (*writes, *(reads or {})):
            if address.layer is None or address.layer < first_block:
                raise PointError(f"{address} is not inside the blocks from {first_block} on, which are all that runs")
        hidden = self.entering[first_block].expand(rows, -1, -1)
        with self.model.hooked(reads or {}, writes, (rows, hidden.shape[1])):  # type: ignore[attr-defined]
            return self._run([first_block] * rows, hidden, keep=False).last

    @torch.no_grad()
    def through(self, layer: int, hidden: Tensor, writes: Mapping[Address, Write]) -> Tensor:
        """What leaves block `layer` [rows, suffix, d_model] where `hidden` of that shape enters it, under writes inside it.

        Raises:
            PointError: a point the model refuses, or one of another block.
        """
        for address in writes:
            if address.layer != layer:
                raise PointError(f"{address} is not inside block {layer}, which is all that runs")
        with self.model.hooked({}, writes, (len(hidden), hidden.shape[1])), module_of(self.model):  # type: ignore[attr-defined]
            return self._call(layer, hidden, (self._cache, _Kept(self._prefix)))

    def _held(self, layer: int, active: int, order: Tensor, kept: _Kept) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows at a layer: their own where they ran, the prompt's where they did not."""
        out = []
        for own, base in zip(kept.suffix.get(layer, self._base[layer]), self._base[layer], strict=True):
            rows = base.expand(len(order), -1, -1, -1).clone()
            rows[order[:active]] = own[:active]
            out.append(rows)
        return out[0], out[1]

    @torch.no_grad()
    def write(self, resumed: Resumed, first_tokens: Tensor, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of rows resumed with `keep`; the first token of each is given, [rows].

        The replaced stream stays in the prompt only: what is written afterwards is not replaced.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, own in enumerate(resumed.suffix):
            before = self._prefix[layer]
            whole = (
                own
                if before is None
                else tuple(
                    torch.cat((b.expand(len(o), -1, -1, -1), o), dim=2) for b, o in zip(before, own, strict=True)
                )
            )
            cache.update(*whole, layer)
        step = first_tokens.to(self.model.device)[:, None]
        written = [step]
        with module_of(self.model) as (module, _):
            for _step in range(max_new_tokens - 1):
                logits = module(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
                step = logits.argmax(-1, keepdim=True)
                written.append(step)
        return [[int(t) for t in row] for row in torch.cat(written, dim=1).cpu()]
