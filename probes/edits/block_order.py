"""Edits of the order in which a model's blocks run: left out, repeated or exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from probes.blocks.rerouting import Caller, rerouted
from probes.errors import OptionError, PointError
from probes.models.protocol import Model, Shape, Write
from probes.points import Address


@dataclass(frozen=True)
class BlockPath:
    """The blocks run in this order instead of 0, 1, 2, ...: left out, repeated or exchanged.

    A block that runs several times cannot be read. Writing goes without a cache, as `probes.edits.generate` does.
    """

    order: tuple[int, ...]

    uncached: ClassVar[bool] = True

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        return f"block_path({','.join(map(str, self.order))})"

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return none: a path changes the order of the blocks, not a tensor."""
        return {}

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
