"""The blocks of a model run from any depth on one padded batch, and the batch with its clean stream to start from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.anatomy import Anatomy
from probes.blocks.rerouting import Caller, block_access, call_blocks
from probes.models.protocol import BlockAccess, Model, Read, Write
from probes.points import Address

Part = Literal["block", "attn", "mlp"]
"""What of a block is meant: all of it, or what one half adds to the stream."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some prompts as one padded batch, with their clean stream."""

    prompts: tuple[int, ...]
    """[batch], which prompt each row is."""
    tokens: Int[Tensor, "batch pos"]
    """Token ids, padded on the right."""
    real: Bool[Tensor, "batch pos"]
    """True where a token is no padding."""
    stream: Sequence[Float[Tensor, "batch pos d_model"]]
    """What enters each block and what leaves the last, on the model's device; zero where padded."""
    attn: Sequence[Float[Tensor, "batch pos d_model"]]
    """What each block's attention adds."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.stream) - 1

    def added(self, part: Part, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """Return what a part of a block adds to the stream."""
        if part == "attn":
            return self.attn[layer]
        whole = self.stream[layer + 1] - self.stream[layer]
        return whole if part == "block" else whole - self.attn[layer]

    def counted(self, first_token: bool) -> Bool[Tensor, "batch pos"]:
        """Return where statistics are taken: at real tokens.

        Args:
            first_token: include each prompt's first token. A prompt of one token keeps it in any case.
        """
        if first_token:
            return self.real
        counted = self.real.clone()
        counted[:, 0] &= self.real.sum(1) == 1
        return counted

    def repeated(self, rows: Int[Tensor, row]) -> Chunk:
        """Return the chunk of the given rows of this one; a row may repeat."""
        prompts = tuple(self.prompts[int(row)] for row in rows)
        at = rows.to(self.stream[0].device)
        stream, attn = ([hidden[at] for hidden in layers] for layers in (self.stream, self.attn))
        return Chunk(prompts, self.tokens[rows], self.real[rows], stream, attn)

    def prompt_of(self, where: Bool[Tensor, "batch pos"]) -> Int[Tensor, row]:
        """Return the prompt of each True position of `where`."""
        return torch.tensor(self.prompts)[:, None].expand_as(where)[where]


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a model with the arguments (rotary angles, masks) that the model gives them for one batch."""

    model: BlockAccess
    call: Caller

    @property
    def anatomy(self) -> Anatomy:
        """Where the points lie in the model's module."""
        return self.model.anatomy

    def run(
        self,
        hidden: Float[Tensor, "batch pos d_model"],
        start: int,
        *,
        stop: int | None = None,
        skip: Collection[int] = (),
        reads: Mapping[Address, Read] | None = None,
        writes: Mapping[Address, Write] | None = None,
    ) -> list[Float[Tensor, "batch pos d_model"]]:
        """Run the blocks from `start` on; return what enters each of them and what leaves the last.

        Args:
            hidden: what enters block `start`.
            start: the first block.
            stop: the block before which to stop; None runs to the end.
            skip: blocks that pass their input on.
            reads: reads of points inside the blocks that run.
            writes: writes of points inside the blocks that run.
        """
        streams = [hidden]
        with self.model.hooked(reads or {}, writes or {}, (hidden.shape[0], hidden.shape[1])):
            for layer in range(start, self.model.shape.n_layers if stop is None else stop):
                streams.append(streams[-1] if layer in skip else self.call(layer, streams[-1]))
        return streams

    def without(
        self, chunk: Chunk, part: Part, layer: int, where: Bool[Tensor, "batch pos"] | None = None
    ) -> list[Float[Tensor, "batch pos d_model"]]:
        """Run the clean stream from `layer` on with one part of that block left out; return what `run` returns.

        Args:
            chunk: the batch and its clean stream.
            part: what is left out.
            layer: of which block.
            where: at which positions; None is all.
        """
        return [chunk.stream[layer], *self.run(self.leaving(chunk, part, layer, where), layer + 1)]

    def leaving(
        self, chunk: Chunk, part: Part, layer: int, where: Bool[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what leaves a block that the clean stream enters, with one part of it left out; see `without`."""
        entering = chunk.stream[layer]
        if part != "block":
            return self.run(entering, layer, stop=layer + 1, writes=left_out([(part, layer)], where))[-1]
        if where is None:
            return entering
        return torch.where(where.to(entering.device)[..., None], entering, chunk.stream[layer + 1])

    def run_several(
        self,
        tokens: Int[Tensor, "batch pos"],
        entering: Sequence[Float[Tensor, "batch pos d_model"]],
        start: int,
    ) -> list[list[Float[Tensor, "batch pos d_model"]]]:
        """Return what `run` returns of each of several streams of the batch, which run as one: that costs less than one by one.

        Args:
            tokens: the batch that the blocks are of.
            entering: what enters block `start` in each.
            start: the first block.
        """
        n = len(entering)
        if n == 1:
            return [self.run(entering[0], start)]
        streams = on_blocks(
            self.model, tokens.repeat(n, 1), lambda blocks: blocks.run(torch.cat(list(entering)), start)
        )
        return [list(own) for own in zip(*(stream.chunk(n) for stream in streams), strict=True)]


def left_out(parts: Sequence[tuple[Part, int]], where: Bool[Tensor, "batch pos"] | None = None) -> dict[Address, Write]:
    """Return writes of zero for attention and MLP parts, everywhere or at the positions `where`."""

    def write(added: Tensor) -> Tensor:
        return torch.zeros_like(added) if where is None else added.masked_fill(where[..., None].to(added.device), 0)

    return {Address(f"{part}_out", layer): write for part, layer in parts}


def on_blocks(model: Model, tokens: Int[Tensor, "batch pos"], work: Callable[[Blocks], T]) -> T:
    """Return what `work` makes of the blocks as the model calls them for `tokens`; no block runs but those it runs.

    Raises:
        PointError: the backend does not hand out its blocks.
    """
    access = block_access(model)
    with torch.no_grad():
        return call_blocks(model, tokens, lambda _, call: work(Blocks(access, call)), use_cache=False)
