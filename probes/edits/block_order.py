"""Edits of the order in which a model's blocks run: left out, repeated or exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

from torch import Tensor

from probes.blocks.rerouting import Caller, rerouted
from probes.edits.edit import Edit
from probes.edits.line import Line, spans
from probes.errors import OptionError, PointError
from probes.models.protocol import Model, Shape, Write
from probes.points import Address


class BlockOrder(Edit):
    """An edit of the order in which blocks run; several together are one `BlockPath`."""

    uncached: ClassVar[bool] = True

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        return self.line()

    def reordered(self, order: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
        """Return the order that follows from `order`."""
        raise NotImplementedError

    def path(self, order: tuple[int, ...]) -> Edit:
        """Return the edit that runs the blocks in an order."""
        return BlockPath(order)

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return none: the order of the blocks is changed, not a tensor."""
        return {}


@dataclass(frozen=True)
class BlockPath(BlockOrder):
    """The blocks run in this order instead of 0, 1, 2, ...: left out, repeated or exchanged.

    A block that runs several times cannot be read. Writing goes without a cache, as `probes.edits.generate` does.
    """

    order: tuple[int, ...]

    verbs: ClassVar[Mapping[str, str]] = {"order": "order BLOCKS, such as order 0-11,12-15,12-29"}

    @classmethod
    def from_line(cls, verb: str, line: Line) -> Edit:
        """Return the path that a line says."""
        return cls(line.numbers("the blocks in the order in which they run, such as 0-11,12-15,12-29"))

    def line(self) -> str:
        """Return the edit as one line."""
        return f"order {spans(self.order)}"

    def reordered(self, order: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
        """Return this order, whatever it was before."""
        return self.order

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        return f"block_path({','.join(map(str, self.order))})"

    def first_block(self, shape: Shape) -> int:
        """Return the first place of the order at which another block runs than without the edit."""
        plain = range(shape.n_layers)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.order, plain, strict=False)))
        return same if self.order != tuple(plain) else shape.n_layers + 1

    @contextmanager
    def within(self, model: Model) -> Iterator[None]:
        """Run the model with its blocks in this order inside; the plain order changes nothing.

        Raises:
            PointError: a block this model does not have, or a backend without access to its blocks.
        """
        n = model.shape.n_layers
        if bad := [layer for layer in self.order if not 0 <= layer < n]:
            raise PointError(f"block {bad[0]} in a path: legal blocks are 0 to {n - 1}")
        if self.order == tuple(range(n)):
            yield
            return

        def program(hidden: Tensor, call: Caller) -> Tensor:
            for layer in self.order:
                hidden = call(layer, hidden)
            return hidden

        with rerouted(model, program, cached=False):
            yield


@dataclass(frozen=True)
class SkipBlocks(BlockOrder):
    """These blocks pass their input on."""

    layers: tuple[int, ...]

    verbs: ClassVar[Mapping[str, str]] = {"skip": "skip LAYER, such as skip 5 or skip 3-5,9"}

    @classmethod
    def from_line(cls, verb: str, line: Line) -> Edit:
        """Return the edit that a line says."""
        return cls(line.numbers("a layer, or several such as 3-5,9"))

    def line(self) -> str:
        """Return the edit as one line."""
        return f"skip {spans(self.layers)}"

    def reordered(self, order: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
        """Return the order without these blocks.

        Raises:
            PointError: a block this model does not have.
        """
        if bad := [layer for layer in self.layers if layer >= n_layers]:
            raise PointError(f"block {bad[0]} of {self.line()!r}: legal blocks are 0 to {n_layers - 1}")
        return tuple(layer for layer in order if layer not in self.layers)


@dataclass(frozen=True)
class RepeatBlocks(BlockOrder):
    """The stretch of the order from block `first` to block `last` runs several times in a row."""

    first: int
    last: int
    times: int = 2

    verbs: ClassVar[Mapping[str, str]] = {"repeat": "repeat A-B [xTIMES], such as repeat 5-8 or repeat 5-5 x3"}

    def __post_init__(self) -> None:
        if self.first > self.last or self.times < 1:
            raise OptionError(f"{self.line()!r}: the lower block goes first, and the times are at least 1")

    @classmethod
    def from_line(cls, verb: str, line: Line) -> Edit:
        """Return the edit that a line says."""
        first = line.integer("blocks such as 5-8")
        last = line.integer("the last block") if line.takes("-") else first
        return cls(first, last, line.repetitions(2))

    def line(self) -> str:
        """Return the edit as one line."""
        return f"repeat {self.first}-{self.last}{'' if self.times == 2 else f' x{self.times}'}"

    def reordered(self, order: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
        """Return the order with the stretch repeated.

        Raises:
            PointError: a block that does not run.
        """
        if self.first not in order or self.last not in order:
            absent = self.first if self.first not in order else self.last
            raise PointError(f"block {absent} of {self.line()!r} does not run: {spans(order)} do")
        start, end = order.index(self.first), len(order) - order[::-1].index(self.last)
        return (*order[:start], *order[start:end] * self.times, *order[end:])


def skip(n_layers: int, *layers: int) -> BlockPath:
    """Return the path that leaves out these blocks."""
    return BlockPath(tuple(layer for layer in range(n_layers) if layer not in layers))


def repeat(n_layers: int, first: int, last: int, times: int = 2) -> BlockPath:
    """Return the path that runs blocks first..last `times` times in a row.

    Raises:
        OptionError: a span that is empty or reaches outside, or less than one time.
    """
    if not 0 <= first <= last < n_layers or times < 1:
        raise OptionError(
            f"repeat blocks {first}..{last} {times} times: legal are spans inside 0..{n_layers - 1}, times >= 1"
        )
    span = tuple(range(first, last + 1))
    return BlockPath((*range(first), *span * times, *range(last + 1, n_layers)))
