"""The grid: what a run's last row becomes when cells of another run are copied into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.causal_patching.cells import EVERYWHERE, READ_LATER, Cell
from probes.blocks.cached_prompt import CachedPrompt
from probes.models.protocol import Model, Write
from probes.points import Address

ROW_POSITIONS = 8192
"""Rows times positions that are resumed at once, which bounds memory."""
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
        sources: what is copied.
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
class ResumedGrid:
    """A causal run kept open at every position, so that a cell runs only the blocks and positions after it."""

    base: CachedPrompt
    """Open from the first position at which something is patched."""

    @property
    def unpatched(self) -> Float[Tensor, " d_model"]:
        """What leaves the last block at the last position as the run is."""
        return self.base.entering[-1][-1]

    @torch.no_grad()
    def last_rows(self, cells: Sequence[Cell], sources: Sources) -> Float[Tensor, "cell d_model"]:
        """Return what leaves the last block at the last position under each cell."""
        last = self.unpatched.expand(len(cells), -1).clone()
        for opened, indices in self._opened(cells):
            part = [cells[i] for i in indices]
            first, hidden = self._entering(opened, part, sources)
            last[indices] = opened.resume(first, hidden).last
        windowed = [i for i, cell in enumerate(cells) if len(cell.layers) > 1]
        for begin in sorted({cells[i].layers[0] for i in windowed}):
            indices = [i for i in windowed if cells[i].layers[0] == begin]
            for some in _parts(indices, len(self.base.tokens) - self.base.start):
                writes = writes_of(list(enumerate(cells[i] for i in some)), sources, self.base.start, self.base.start)
                last[some] = self.base.edited(begin, len(some), writes)
        return last

    def _opened(self, cells: Sequence[Cell]) -> Iterator[tuple[CachedPrompt, list[int]]]:
        """Yield the run open at a position, and the cells of single layers there, few enough to run together."""
        by_position: dict[int, list[int]] = defaultdict(list)
        for i, cell in enumerate(cells):
            if len(cell.layers) == 1:
                by_position[cell.position].append(i)
        for position, indices in sorted(by_position.items()):
            opened = self.base if position in (EVERYWHERE, self.base.start) else self.base.narrowed(position)
            indices.sort(key=lambda i: cells[i].layers[0])
            for part in _parts(indices, len(opened.tokens) - opened.start):
                yield opened, part

    def _entering(self, opened: CachedPrompt, cells: Sequence[Cell], sources: Sources) -> tuple[list[int], Tensor]:
        """Return per cell the first block that runs, and what enters it from the opened position on."""
        first = [cell.layer + (cell.component != "resid_pre") for cell in cells]
        hidden = torch.stack([opened.entering[block] for block in first])
        alone = opened.narrowed(opened.start, opened.start + 1) if any(_through_row(cell) for cell in cells) else opened
        for (layer, one_row), placed in _by_block(cells).items():
            run = alone if one_row else opened
            entering = run.entering[layer].expand(len(placed), -1, -1)
            writes = writes_of(
                [(row, cells[i]) for row, i in enumerate(placed)], sources, self.base.start, opened.start
            )
            left = run.through(layer, entering, writes)
            hidden[placed, : left.shape[1]] = left
        for i, cell in enumerate(cells):
            if cell.component in ("resid_pre", "resid_post"):
                at = sorted(sources.positions) if cell.position == EVERYWHERE else [cell.position]
                at = [position for position in at if position >= opened.start]
                rows = [position - opened.start for position in at]
                hidden[i, rows] = sources.given(Address(cell.component, cell.layer), at).to(hidden)
        return first, hidden


def _through_row(cell: Cell) -> bool:
    return cell.one_row and cell.component not in ("resid_pre", "resid_post")


def _by_block(cells: Sequence[Cell]) -> dict[tuple[int, bool], list[int]]:
    """Return which cells have to be written inside which block, on their row alone or on all rows from there on."""
    blocks: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        if cell.component not in ("resid_pre", "resid_post"):
            blocks[cell.layer, cell.position != EVERYWHERE and cell.component not in READ_LATER].append(i)
    return blocks


def _parts(indices: Sequence[int], positions: int) -> Iterator[list[int]]:
    size = max(1, ROW_POSITIONS // positions)
    for i in range(0, len(indices), size):
        yield list(indices[i : i + size])


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

    @torch.no_grad()
    def last_rows(self, cells: Sequence[Cell], sources: Sources) -> Float[Tensor, "cell d_vocab"]:
        """Return the logits of the last position under each cell."""
        rows: list[Tensor] = []
        for i in range(0, len(cells), FORWARD_ROWS):
            part = cells[i : i + FORWARD_ROWS]
            writes = {**self.writes, **writes_of(list(enumerate(part)), sources, self.start)}
            tokens = torch.tensor([self.tokens]).expand(len(part), -1)
            self.model.run(tokens, {Address("logits"): lambda t: rows.append(t[:, -1].clone())}, writes)
        return torch.cat(rows)


def whole_forwards(
    model: Model, tokens: Sequence[int], start: int, writes: Mapping[Address, Write] | None = None
) -> WholeForwards:
    """Run a prompt once, to be patched by whole forwards."""
    logits = capture_values(model, tokens, {Address("logits")}, writes)[Address("logits")][-1]
    return WholeForwards(model, tuple(tokens), start, writes or {}, logits)
