"""Edits of the order in which a model's blocks run: left out, repeated, exchanged or run side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from probes.blocks.rerouting import Caller, rerouted
from probes.edits.program_runs import run_step
from probes.edits.programs import Program
from probes.errors import OptionError
from probes.models.protocol import Model, Shape, Write
from probes.points import Address


@dataclass(frozen=True)
class BlockPath:
    """The blocks run as a program says instead of 0, 1, 2, ....

    A block that runs several times cannot be read. Writing goes without a cache, as `probes.edits.generate` does.
    """

    program: Program

    uncached: ClassVar[bool] = True

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        return f"block_path({self.program.listed()})"

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return none: a path changes the order of the blocks, not a tensor."""
        return {}

    @contextmanager
    def within(self, model: Model) -> Iterator[None]:
        """Run the model with its blocks in this order inside; the plain order changes nothing.

        Raises:
            PointError: a block this model does not have, or a backend without access to its blocks.
        """
        n_layers = model.shape.n_layers
        self.program.check(n_layers)
        if self.program.is_plain(n_layers):
            yield
            return

        def route(hidden: Tensor, call: Caller) -> Tensor:
            for step in self.program.steps:
                hidden = run_step(call, step, hidden, self.program.mean)
            return hidden

        with rerouted(model, route, cached=False):
            yield


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
