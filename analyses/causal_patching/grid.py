"""What is copied from run to run, and cells patched by whole forwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.causal_patching.cells import EVERYWHERE, Cell
from probes.models.protocol import Model, Write
from probes.points import Address

FORWARD_ROWS = 32
"""Whole forwards of one batch, for models that cannot be resumed."""

Values = Mapping[Address, Tensor]
"""Points of one run, each [pos, ...], patterns [head, query, key]."""


def addresses(cells: Sequence[Cell]) -> set[Address]:
    """Return the points that cells copy."""
    return {Address(cell.component, layer) for cell in cells for layer in cell.layers}


@torch.no_grad()
def capture_values(
    model: Model, tokens: Sequence[int], points: set[Address], writes: Mapping[Address, Write] | None = None
) -> dict[Address, Tensor]:
    """Run one prompt; return copies of points, [pos, ...] ([head, query, key] for patterns)."""
    values: dict[Address, Tensor] = {}

    def keep(address: Address) -> Callable[[Tensor], None]:
        return lambda tensor: values.__setitem__(address, tensor[0].clone())

    model.run(torch.tensor([list(tokens)]), {address: keep(address) for address in points}, writes or {})
    return values


@dataclass(frozen=True, eq=False)
class Sources:
    """What is copied: the source run's points, and which of its positions each patched position is given."""

    values: Values
    positions: Mapping[int, int]
    """Patched position to source position."""

    def given(self, address: Address, at: Sequence[int]) -> Tensor:
        """Return the source's rows for patched positions, [pos, ...]."""
        return self.values[address][[self.positions[position] for position in at]]


def writes_of(
    placed: Sequence[tuple[int, Cell]], sources: Sources, start: int, offset: int = 0
) -> dict[Address, Write]:
    """Return the writes that put each cell into its row of a batch.

    Args:
        placed: (row of the batch, cell); cells at single positions and at all positions may be mixed.
        start: the first position of cells that stand at every position.
        offset: the position that the batch begins at.
    """
    grouped: dict[Address, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for row, cell in placed:
        for layer in cell.layers:
            grouped[Address(cell.component, layer)][cell.position].append((row, cell.head))
    everywhere = sorted(position for position in sources.positions if position >= start)

    def write(address: Address) -> Write:
        def put(tensor: Tensor) -> Tensor:
            out = tensor.clone()
            for position, rows_and_heads in grouped[address].items():
                at = everywhere if position == EVERYWHERE else [position]
                rows, heads = torch.tensor(rows_and_heads, device=tensor.device).T[:, :, None]
                places = torch.tensor(at, device=tensor.device)[None] - offset
                if address.point == "pattern":
                    out[rows, heads, places] = sources.values[address][heads, places + offset, : tensor.shape[-1]].to(
                        out
                    )
                elif tensor.dim() == 4:
                    out[rows, places, heads] = sources.given(address, at).to(out).transpose(0, 1)[heads[:, 0]]
                else:
                    out[rows, places] = sources.given(address, at).to(out)
            return out

        return put

    return {address: write(address) for address in grouped}


@dataclass(frozen=True, eq=False)
class WholeForwards:
    """The same cells, each by a whole forward: for models that read both ways or keep their blocks to themselves."""

    model: Model
    tokens: tuple[int, ...]
    start: int
    writes: Mapping[Address, Write]
    """What makes the run that is patched, such as noise on its embeddings."""
    unpatched: Float[Tensor, " d_vocab"]
    """Logits of the last position as the run is."""
    values: Values
    """Points of the run as it is."""

    @torch.no_grad()
    def last_rows(self, cells: Sequence[Cell], *sources: Sources) -> Float[Tensor, "source_cell d_vocab"]:
        """Return the logits of the last position under each cell, of one source after the other."""
        rows: list[Tensor] = []
        for source in sources:
            for i in range(0, len(cells), FORWARD_ROWS):
                part = cells[i : i + FORWARD_ROWS]
                writes = {**self.writes, **writes_of(list(enumerate(part)), source, self.start)}
                tokens = torch.tensor([self.tokens]).expand(len(part), -1)
                self.model.run(tokens, {Address("logits"): lambda t: rows.append(t[:, -1].clone())}, writes)
        return torch.cat(rows)


def whole_forwards(
    model: Model, tokens: Sequence[int], start: int, writes: Mapping[Address, Write], points: Collection[Address]
) -> WholeForwards:
    """Run a prompt once, to be patched by whole forwards; keep points of it."""
    logits = Address("logits")
    values = capture_values(model, tokens, {logits, *points}, writes)
    return WholeForwards(model, tuple(tokens), start, writes, values.pop(logits)[-1], values)
