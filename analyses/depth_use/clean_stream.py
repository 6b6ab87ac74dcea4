"""Blocks run from any depth on one padded batch, and the clean stream they start from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from probes.anatomy import Anatomy
from probes.blocks.rerouting import Caller, module_of, rerouted
from probes.capture.activations import Activations
from probes.hooks.forward_hooks import ForwardHooks
from probes.models.protocol import Model, Read, Write
from probes.points import Address
from probes.prompts import Batch, batches

Part = Literal["block", "attn", "mlp"]
"""What of a block is meant: all of it, or what one half adds to the stream."""

CHUNK_TOKENS = 1024
"""Padded tokens studied at once."""
CHUNK_LOGITS = 2**26
"""Log-probabilities held at once, which bounds a chunk of a model with a large vocabulary."""

STRETCH = 1.5
"""How many times longer than its shortest prompt the longest of a chunk may be."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a model with the arguments (rotary angles, masks) that the model gives them for one batch."""

    model: Model
    anatomy: Anatomy
    call: Caller

    def run(
        self,
        hidden: Tensor,
        start: int,
        *,
        stop: int | None = None,
        skip: Collection[int] = (),
        reads: Mapping[Address, Read] | None = None,
        writes: Mapping[Address, Write] | None = None,
    ) -> list[Tensor]:
        """The stream [batch, pos, d_model] entering block `start` (which is `hidden`), the next, ... and leaving `stop`-1.

        Args:
            stop: the block before which to stop; None runs to the end.
            skip: blocks that pass their input on.
        """
        streams = [hidden]
        with self._hooked(hidden, reads or {}, writes or {}):
            for layer in range(start, self.model.shape.n_layers if stop is None else stop):
                streams.append(streams[-1] if layer in skip else self.call(layer, streams[-1]))
        return streams

    def without(self, chunk: Chunk, part: Part, layer: int, where: Tensor | None = None) -> list[Tensor]:
        """`run` from the clean stream entering `layer` on, with one part left out at all positions or at `where` [batch, pos]."""
        entering = chunk.stream[layer]
        if part != "block":
            return self.run(entering, layer, writes=left_out([(part, layer)], where))
        leaving = entering
        if where is not None:
            leaving = torch.where(where.to(entering.device)[..., None], entering, chunk.stream[layer + 1])
        return [entering, *self.run(leaving, layer + 1)]

    def _hooked(
        self, hidden: Tensor, reads: Mapping[Address, Read], writes: Mapping[Address, Write]
    ) -> AbstractContextManager[None]:
        if not reads and not writes:
            return nullcontext()
        sites = {address: self.anatomy.site(address) for address in {*reads, *writes}}
        taps = ForwardHooks(sites, reads, writes, stop=False)
        return taps.on(self.anatomy.map.module, (hidden.shape[0], hidden.shape[1]))


def left_out(parts: Sequence[tuple[Part, int]], where: Tensor | None = None) -> dict[Address, Write]:
    """Writes of zero for attention and MLP parts, everywhere or at the positions `where` [batch, pos]."""

    def write(added: Tensor) -> Tensor:
        return torch.zeros_like(added) if where is None else added.masked_fill(where[..., None].to(added.device), 0)

    return {Address(f"{part}_out", layer): write for part, layer in parts}


class _Finished(Exception):
    """The work is done, so the forward that carried it need not go on."""


def on_blocks(model: Model, tokens: Tensor, work: Callable[[Blocks], T]) -> T:
    """`work` on the blocks as they are called for `tokens` [batch, pos]; no block runs but those it runs.

    Raises:
        PointError: the backend does not hand out its blocks.
    """
    found: list[T] = []
    with module_of(model) as (module, anatomy):

        def program(hidden: Tensor, call: Caller) -> Tensor:
            found.append(work(Blocks(model, anatomy, call)))
            raise _Finished

        with rerouted(model, program), torch.no_grad(), suppress(_Finished):
            module(input_ids=tokens.to(model.device), use_cache=False)
    return found[0]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some prompts as one padded batch, with their clean stream from the store."""

    prompts: tuple[int, ...]
    """[batch], which prompt each row is."""
    tokens: Tensor
    """[batch, pos], padded on the right."""
    real: Tensor
    """[batch, pos], True where a token is no padding."""
    stream: Sequence[Tensor]
    """[batch, pos, d_model] entering each block and leaving the last, on the model's device; zero where padded."""
    attn: Sequence[Tensor]
    """[batch, pos, d_model], what each block's attention adds."""

    @property
    def n_layers(self) -> int:
        return len(self.stream) - 1

    def added(self, part: Part, layer: int) -> Tensor:
        """What a part of a block adds to the stream, [batch, pos, d_model]."""
        if part == "attn":
            return self.attn[layer]
        whole = self.stream[layer + 1] - self.stream[layer]
        return whole if part == "block" else whole - self.attn[layer]

    def counted(self, first_token: bool) -> Tensor:
        """[batch, pos], the real tokens that statistics are taken over: all but each prompt's first, unless wanted."""
        if first_token:
            return self.real
        out = self.real.clone()
        out[:, 0] &= self.real.sum(1) == 1
        return out

    def repeated(self, rows: Tensor) -> Chunk:
        """The chunk of these rows [n], which may repeat."""
        prompts = tuple(self.prompts[int(row)] for row in rows)
        at = rows.to(self.stream[0].device)
        stream, attn = ([h[at] for h in kept] for kept in (self.stream, self.attn))
        return Chunk(prompts, self.tokens[rows], self.real[rows], stream, attn)

    def prompt_of(self, where: Tensor) -> Tensor:
        """The prompt of each True position of `where` [batch, pos]; [n]."""
        return torch.tensor(self.prompts)[:, None].expand_as(where)[where]


def chunks(activations: Activations, prompts: Sequence[int], *, together: bool = False) -> Iterator[Chunk]:
    """The prompts of these indices in padded batches of similar length, or all in one."""
    model = activations.model
    limit = max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // model.shape.d_vocab))
    n_layers = model.shape.n_layers
    stream_at = [Address("resid_pre", 0), *(Address("resid_post", layer) for layer in range(n_layers))]
    stream_rows = [activations.get(address) for address in stream_at]
    attn_rows = [activations.get(Address("attn_out", layer)) for layer in range(n_layers)]
    groups = [list(prompts)] if together else list(_alike(activations.sequences, prompts))
    found = ((group, batch) for group in groups for batch in _batched(activations.sequences, group, together, limit))
    for group, batch in found:
        mine = [group[i] for i in batch.indices]
        stream, attn = (
            [_padded([layer[i] for i in mine], batch).to(model.device) for layer in rows]
            for rows in (stream_rows, attn_rows)
        )
        real = torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]
        yield Chunk(tuple(mine), batch.tokens, real, stream, attn)


def _batched(sequences: Sequence[tuple[int, ...]], group: Sequence[int], together: bool, limit: int) -> Iterator[Batch]:
    longest = max(len(sequences[i]) for i in group)
    return batches([sequences[i] for i in group], longest * len(group) if together else limit)


def _alike(sequences: Sequence[tuple[int, ...]], prompts: Sequence[int]) -> Iterator[list[int]]:
    """Groups of prompts whose lengths differ by at most `STRETCH`, so that little of a batch is padding."""
    group: list[int] = []
    for index in sorted(prompts, key=lambda i: len(sequences[i])):
        if group and len(sequences[index]) > STRETCH * len(sequences[group[0]]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _padded(rows: Sequence[Tensor], batch: Batch) -> Tensor:
    out = rows[0].new_zeros(*batch.tokens.shape, rows[0].shape[-1])
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out
