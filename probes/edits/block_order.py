"""Edits of the order in which a model's blocks run: left out, repeated, exchanged or run side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

from probes.edits.edit import Edit
from probes.edits.line import Line, spans
from probes.edits.programs import FORMS, Program, departure
from probes.errors import OptionError, PointError
from probes.models.protocol import Model, Shape, Write
from probes.points import Address


class BlockOrder(Edit):
    """An edit of the order in which blocks run; several together are one `BlockPath`."""

    uncached: ClassVar[bool] = True

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        return self.line()

    def reordered(self, program: Program, n_layers: int) -> Program:
        """Return the program that follows from the one that ran before this edit."""
        raise NotImplementedError

    def path(self, program: Program) -> Edit:
        """Return the edit that runs the blocks as a program says."""
        return BlockPath(program)

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return none: the order of the blocks is changed, not a tensor."""
        return {}


@dataclass(frozen=True)
class BlockPath(BlockOrder):
    """The blocks run as a program says instead of 0, 1, 2, ....

    A block that runs several times cannot be read. Writing goes without a cache, as `probes.edits.generate` does.
    """

    program: Program

    verbs: ClassVar[Mapping[str, str]] = {
        "order": "order PROGRAM, such as order 0-11,12-15,12-29 or order 0-13,{14|15},16-29"
    }

    @classmethod
    def from_line(cls, verb: str, line: Line) -> Edit:
        """Return the path that a line says."""
        start = line.at
        text = line.rest(FORMS)
        try:
            return cls(Program.parse(text))
        except OptionError as error:
            line.at = start
            raise line.fault(f"{FORMS} ({error})") from None

    def line(self) -> str:
        """Return the edit as one line."""
        return f"order {self.program.text()}"

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        return f"block_path({self.program.listed()})"

    def reordered(self, program: Program, n_layers: int) -> Program:
        """Return this program, whatever ran before.

        Raises:
            PointError: a block this model does not have.
        """
        self.program.check(n_layers)
        return self.program

    def first_block(self, shape: Shape) -> int:
        """Return the first step at which another block runs than without the edit."""
        n = shape.n_layers
        return n + 1 if self.program.is_plain(n) else departure(self.program, n)

    def within(self, model: Model) -> AbstractContextManager[None]:
        """Run the model with its blocks in this order inside; the plain order changes nothing.

        Raises:
            PointError: a block this model does not have, or a backend without access to its blocks.
        """
        n_layers = model.shape.n_layers
        self.program.check(n_layers)
        if self.program.is_plain(n_layers):
            return nullcontext()
        from probes.edits.program_runs import following

        return following(model, self.program)


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

    def reordered(self, program: Program, n_layers: int) -> Program:
        """Return the program without these blocks.

        Raises:
            PointError: a block this model does not have.
        """
        if bad := [layer for layer in self.layers if layer >= n_layers]:
            raise PointError(f"block {bad[0]} of {self.line()!r}: legal blocks are 0 to {n_layers - 1}")
        kept = (tuple(block for block in step if block not in self.layers) for step in program.steps)
        return replace(program, steps=tuple(step for step in kept if step))


@dataclass(frozen=True)
class RepeatBlocks(BlockOrder):
    """The stretch of the program from where block `first` runs first to where `last` runs last is run several times."""

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

    def reordered(self, program: Program, n_layers: int) -> Program:
        """Return the program with the stretch repeated.

        Raises:
            PointError: a block that does not run.
        """
        places = [[i for i, step in enumerate(program.steps) if block in step] for block in (self.first, self.last)]
        if not all(places):
            absent = self.last if places[0] else self.first
            raise PointError(f"block {absent} of {self.line()!r} does not run: {program.text()} do")
        start, end = places[0][0], places[1][-1] + 1
        steps = program.steps
        return replace(program, steps=(*steps[:start], *steps[start:end] * self.times, *steps[end:]))


def skip(n_layers: int, *layers: int) -> BlockPath:
    """Return the path that leaves out these blocks."""
    return BlockPath(Program.of(layer for layer in range(n_layers) if layer not in layers))


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
    return BlockPath(Program.of((*range(first), *span * times, *range(last + 1, n_layers))))
