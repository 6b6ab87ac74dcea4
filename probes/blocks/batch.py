"""The blocks of a model run from any depth on one padded batch, and the batch with its clean stream to start from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from probes.anatomy import Anatomy
from probes.blocks.rerouting import Caller, call_blocks, module_of
from probes.hooks.forward_hooks import ForwardHooks
from probes.models.protocol import Model, Read, Write
from probes.points import Address

Part = Literal["block", "attn", "mlp"]
"""What of a block is meant: all of it, or what one half adds to the stream."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some prompts as one padded batch, with their clean stream."""

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
        """Number of blocks."""
        return len(self.stream) - 1

    def added(self, part: Part, layer: int) -> Tensor:
        """Return what a part of a block adds to the stream, [batch, pos, d_model]."""
        if part == "attn":
            return self.attn[layer]
        whole = self.stream[layer + 1] - self.stream[layer]
        return whole if part == "block" else whole - self.attn[layer]

    def counted(self, first_token: bool) -> Tensor:
        """Return where statistics are taken, [batch, pos]: at real tokens.

        Args:
            first_token: include each prompt's first token. A prompt of one token keeps it in any case.
        """
        if first_token:
            return self.real
        counted = self.real.clone()
        counted[:, 0] &= self.real.sum(1) == 1
        return counted

    def repeated(self, rows: Tensor) -> Chunk:
        """Return the chunk of the given rows [n] of this one; a row may repeat."""
        prompts = tuple(self.prompts[int(row)] for row in rows)
        at = rows.to(self.stream[0].device)
        stream, attn = ([hidden[at] for hidden in layers] for layers in (self.stream, self.attn))
        return Chunk(prompts, self.tokens[rows], self.real[rows], stream, attn)

    def prompt_of(self, where: Tensor) -> Tensor:
        """Return the prompt of each True position of `where` [batch, pos]; [n]."""
        return torch.tensor(self.prompts)[:, None].expand_as(where)[where]


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
        """Run the blocks from `start` on; return what entered each of them and what left the last, [batch, pos, d_model].

        Args:
            hidden: what enters block `start`, [batch, pos, d_model].
            stop: the block before which to stop; None runs to the end.
            skip: blocks that pass their input on.
            reads: reads of points inside the blocks that run.
            writes: writes of points inside the blocks that run.
        """
        streams = [hidden]
        with self._hooked(hidden, reads or {}, writes or {}):
            for layer in range(start, self.model.shape.n_layers if stop is None else stop):
                streams.append(streams[-1] if layer in skip else self.call(layer, streams[-1]))
        return streams

    def without(self, chunk: Chunk, part: Part, layer: int, where: Tensor | None = None) -> list[Tensor]:
        """Run the clean stream from `layer` on with one part left out; the result is that of `run`.

        Args:
            where: positions [batch, pos] at which it is left out; None is everywhere.
        """
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
        hooks = ForwardHooks(sites, reads, writes, stop=False)
        return hooks.on(self.anatomy.map.module, (hidden.shape[0], hidden.shape[1]))


def left_out(parts: Sequence[tuple[Part, int]], where: Tensor | None = None) -> dict[Address, Write]:
    """Return writes of zero for attention and MLP parts, everywhere or at the positions `where` [batch, pos]."""

    def write(added: Tensor) -> Tensor:
        return torch.zeros_like(added) if where is None else added.masked_fill(where[..., None].to(added.device), 0)

    return {Address(f"{part}_out", layer): write for part, layer in parts}


def on_blocks(model: Model, tokens: Tensor, work: Callable[[Blocks], T]) -> T:
    """Return `work` of the blocks as the model calls them for `tokens` [batch, pos]; no block runs but those it runs.

    Raises:
        PointError: the backend does not hand out its blocks.
    """
    with module_of(model) as (_, anatomy), torch.no_grad():
        return call_blocks(model, tokens, lambda _, call: work(Blocks(model, anatomy, call)), use_cache=False)
