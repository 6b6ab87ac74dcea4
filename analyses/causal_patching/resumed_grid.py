"""The grid: what a run's last row becomes when cells of other runs are copied into it, each resumed from inside the stack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.causal_patching.cells import EVERYWHERE, READ_LATER, STREAMS, Cell
from analyses.causal_patching.grid import Sources, Values, writes_of
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.together import together
from probes.models.protocol import Read
from probes.points import Address

ROW_POSITIONS = 8192
"""Rows times positions that are resumed at once, which bounds memory."""
BATCH_COST = 48
"""Rows of the stream that a block runs in the time that one more batch takes, however small (measured on two processors)."""
PAST_ATTENTION = ("attn_out", "resid_mid")
"""Components after which nothing of a block looks at other positions."""
Copied = tuple[Cell, Sources]
"""A cell, and the run that it is copied from."""


@dataclass(frozen=True, eq=False)
class ResumedGrid:
    """A causal run kept open at every position, so that a cell runs only the blocks and positions after it."""

    base: CachedPrompt
    """Open from the first position at which something is patched."""
    _mlps: list[Float[Tensor, "pos d_model"]] = field(default_factory=list)

    @property
    def values(self) -> Values:
        """Points of the run as it is, those that were kept."""
        return self.base.values

    @property
    def unpatched(self) -> Float[Tensor, " d_model"]:
        """What leaves the last block at the last position as the run is."""
        return self.base.entering[-1][-1]

    @torch.no_grad()
    def last_rows(self, cells: Sequence[Cell], *sources: Sources) -> Float[Tensor, "source_cell d_model"]:
        """Return what leaves the last block at the last position under each cell, of one source after the other.

        Cells of all sources run together, which costs less than one source at a time.
        """
        copied = [(cell, source) for source in sources for cell in cells]
        last = self.unpatched.expand(len(copied), -1).clone()
        rows = self._rows_past_attention(copied)
        if any(cell.component == "mlp_out" and self._added_to_a_row(cell) for cell, _ in copied):
            # Read before the parts run, which would each read it again.
            self._mlp_rows  # noqa: B018
        work = [
            (indices, partial(self._resumed, position, copied, indices, rows))
            for position, indices in self._placed(copied)
        ]
        windowed = [i for i, (cell, _) in enumerate(copied) if len(cell.layers) > 1]
        for begin, source in sorted({(copied[i][0].layers[0], copied[i][1]) for i in windowed}, key=lambda key: key[0]):
            indices = [i for i in windowed if copied[i][0].layers[0] == begin and copied[i][1] is source]
            for some in _parts(indices, len(self.base.tokens) - self.base.start):
                placed = list(enumerate(copied[i][0] for i in some))
                writes = writes_of(placed, source, self.base.start, self.base.start)
                work.append((some, partial(self.base.edited, begin, len(some), writes)))
        for (indices, _), end in zip(work, together(self.base.model, [run for _, run in work]), strict=True):
            last[indices] = end
        return last

    def _resumed(
        self, position: int, copied: Sequence[Copied], indices: Sequence[int], rows: Mapping[int, Tensor]
    ) -> Float[Tensor, "source_cell d_model"]:
        """Return the last rows of cells of single layers at one position."""
        opened = self.base if position in (EVERYWHERE, self.base.start) else self.base.narrowed(position)
        first, hidden = self._entering(opened, [copied[i] for i in indices], [rows.get(i) for i in indices])
        return opened.resume(first, hidden).last

    def _placed(self, copied: Sequence[Copied]) -> Iterator[tuple[int, list[int]]]:
        """Yield the position to open at and the cells of single layers that run from there, few enough to run together."""
        by_position: dict[int, list[int]] = defaultdict(list)
        for i, (cell, _) in enumerate(copied):
            if len(cell.layers) == 1:
                by_position[cell.position].append(i)
        if all(self._known_after(cell) for cell, _ in copied):
            by_position = _joined(by_position)
        for position, indices in sorted(by_position.items()):
            start = self.base.start if position == EVERYWHERE else position
            indices.sort(key=lambda i: copied[i][0].layers[0])
            for part in _parts(indices, len(self.base.tokens) - start):
                yield position, part

    def _known_after(self, cell: Cell) -> bool:
        """Return whether the rows that leave a cell's block are known before the rows that run with it are."""
        return self._added_to_a_row(cell) or (cell.component in PAST_ATTENTION and cell.one_row)

    def _rows_past_attention(self, copied: Sequence[Copied]) -> dict[int, Float[Tensor, " d_model"]]:
        """Return the row that leaves its block under each cell at one position that replaces what attention makes of it.

        Whatever attention there would be is replaced, so that rows of all positions pass the block together.
        """
        by_point: dict[Address, list[int]] = defaultdict(list)
        for i, (cell, _) in enumerate(copied):
            if cell.component in PAST_ATTENTION and cell.one_row:
                by_point[Address(cell.component, cell.layer)].append(i)
        rows: dict[int, Tensor] = {}
        if by_point:
            alone = self.base.narrowed(self.base.start, self.base.start + 1)
        for address, indices in sorted(by_point.items(), key=lambda item: item[0].layer or 0):
            layer, at = copied[indices[0]][0].layer, [copied[i][0].position for i in indices]
            given = torch.stack([copied[i][1].given(address, [p])[0] for i, p in zip(indices, at, strict=True)])
            entering = self.base.entering[layer][[position - self.base.start for position in at]][:, None]
            left = alone.through(layer, entering, {address: lambda t, given=given: given[:, None].to(t)})  # type: ignore[misc]
            rows |= dict(zip(indices, left[:, 0], strict=True))
        return rows

    def _entering(
        self, opened: CachedPrompt, copied: Sequence[Copied], rows: Sequence[Tensor | None]
    ) -> tuple[list[int], Tensor]:
        """Return per cell the first block that runs, and what enters it from the opened position on.

        Args:
            opened: the run, open at the cells' position.
            rows: what leaves each cell's block at that position, where it is known.
        """
        first = [cell.layer + (cell.component != "resid_pre") for cell, _ in copied]
        hidden = torch.stack([opened.entering[block] for block in first])
        ready = {i: row for i, row in enumerate(rows) if row is not None}
        for i, row in ready.items():
            hidden[i, copied[i][0].position - opened.start] = row
        added = [i for i, (cell, _) in enumerate(copied) if self._added_to_a_row(cell)]
        inside = sorted(set(range(len(copied))) - set(added) - set(ready))
        alone = None
        for (layer, one_row, source), placed in _by_block([(i, *copied[i]) for i in inside]):
            if one_row and alone is None:
                alone = opened.narrowed(opened.start, opened.start + 1)
            run = alone if one_row and alone is not None else opened
            entering = run.entering[layer].expand(len(placed), -1, -1)
            cells = [(row, copied[i][0]) for row, i in enumerate(placed)]
            left = run.through(layer, entering, writes_of(cells, source, self.base.start, opened.start))
            hidden[placed, : left.shape[1]] = left
        for i in added:
            cell, sources = copied[i]
            at = sorted(sources.positions) if cell.position == EVERYWHERE else [cell.position]
            at = [position for position in at if position >= opened.start]
            places = [position - opened.start for position in at]
            given = sources.given(Address(cell.component, cell.layer), at).to(hidden)
            if cell.component in STREAMS:
                hidden[i, places] = given
            else:
                hidden[i, places] += given - self._mlp_rows[cell.layer][[position - self.base.start for position in at]]
        return first, hidden

    def _added_to_a_row(self, cell: Cell) -> bool:
        """Return whether a cell changes the stream that leaves its block by the change of what is copied alone."""
        return cell.component in STREAMS or (
            cell.component == "mlp_out" and self.base.model.anatomy.kind != "post_norm"
        )

    @property
    def _mlp_rows(self) -> list[Float[Tensor, "pos d_model"]]:
        """What the MLP of every block adds to the run, from the first patched position on."""
        # Not a cached property, whose lock another task would wait for while this one waits for its blocks.
        if not self._mlps:
            rows: dict[int, Tensor] = {}

            def keep(layer: int) -> Read:
                return lambda tensor: rows.__setitem__(layer, tensor[0].clone())

            n = self.base.model.shape.n_layers
            self.base.edited(0, 1, {}, {Address("mlp_out", layer): keep(layer) for layer in range(n)})
            self._mlps[:] = [rows[layer] for layer in range(n)]
        return self._mlps


def _by_block(copied: Sequence[tuple[int, Cell, Sources]]) -> list[tuple[tuple[int, bool, Sources], list[int]]]:
    """Return which cells have to be written inside which block, in order, on their row alone or on all rows from there on."""
    blocks: dict[tuple[int, bool, Sources], list[int]] = defaultdict(list)
    for i, cell, source in copied:
        blocks[cell.layer, cell.position != EVERYWHERE and cell.component not in READ_LATER, source].append(i)
    return sorted(blocks.items(), key=lambda item: item[0][0])


def _joined(by_position: Mapping[int, list[int]]) -> dict[int, list[int]]:
    """Return the cells by the position that they run from, those of a later one with an earlier one where that costs less.

    Then each of them runs the rows between too, and one batch is saved.
    """
    joined: dict[int, list[int]] = {}
    for position, indices in sorted(by_position.items(), reverse=True):
        later = min(joined, default=EVERYWHERE)
        if EVERYWHERE < position < later and len(joined[later]) * (later - position) <= BATCH_COST:
            joined[position] = [*indices, *joined.pop(later)]
        else:
            joined[position] = list(indices)
    return joined


def _parts(indices: Sequence[int], positions: int) -> Iterator[list[int]]:
    size = max(1, ROW_POSITIONS // positions)
    for i in range(0, len(indices), size):
        yield list(indices[i : i + size])
