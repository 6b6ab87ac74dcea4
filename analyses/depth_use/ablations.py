"""What the model loses when a block is left out, made coarser, frozen, or run beside its neighbours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.depth_use.contributions import PARTS
from analyses.depth_use.outputs import Outputs
from analyses.depth_use.settings import Tick
from analyses.depth_use.skips import Effects, enter
from analyses.depth_use.weights import NormScales, coarser, frozen_norms
from analyses.results.per_prompt import PerPrompt
from probes.blocks.batch import Blocks, Chunk, Part

Columns = Mapping[str, PerPrompt]
TOGETHER = 1024
"""Tokens of changed streams that are run together, which bounds memory."""


@dataclass(frozen=True, eq=False)
class ChangedStream:
    """A stream that is not the clean one, to be run to the end."""

    start: int
    """The block that it enters."""
    entering: Float[Tensor, "batch pos d_model"]
    enter: Callable[[list[Tensor]], None]
    """Receives what enters each block from there on and what leaves the last."""


@dataclass(frozen=True, eq=False)
class ChunkAblations:
    """One chunk whose blocks can be ablated: its clean stream, its clean predictions, and where statistics are taken."""

    blocks: Blocks
    chunk: Chunk
    outputs: Outputs
    counted: Tensor
    """[batch, pos]."""

    def enter_loss(self, column: PerPrompt, layer: int, final: Float[Tensor, "batch pos d_model"]) -> None:
        """Enter the change of loss when `final` leaves the last block."""
        self._enter(column, layer, self.outputs.loss(final) - self.outputs.ce)

    def _enter(self, column: PerPrompt, layer: int, values: Tensor) -> None:
        among = self.counted[self.outputs.where]
        column.add(layer, self.outputs.prompt[among], values[among])

    @property
    def rows(self) -> int:
        """Sequences of one forward."""
        return len(self.chunk.tokens)

    def run(self, changes: Iterable[ChangedStream], tick: Tick) -> None:
        """Run changed streams to the end, those that enter the same block together, and enter what they end in."""
        by_start: dict[int, list[ChangedStream]] = defaultdict(list)
        for change in changes:
            by_start[change.start].append(change)
        size = max(1, TOGETHER // self.chunk.tokens.numel())
        for start, alike in sorted(by_start.items()):
            for first in range(0, len(alike), size):
                part = alike[first : first + size]
                ran = self.blocks.run_several(self.chunk.tokens, [change.entering for change in part], start)
                for change, streams in zip(part, ran, strict=True):
                    change.enter(streams)
                    tick(self.rows)

    def removals(
        self, columns: Columns, effects: Mapping[Part, Effects], layers: Sequence[int]
    ) -> Iterator[ChangedStream]:
        """Leave out every part of each of `layers` at all positions, restarting from the stored stream that enters it.

        Args:
            effects: what later blocks lose by that, per part; parts that are not in it are not entered.
        """

        def enter(part: Part, layer: int, streams: Sequence[Tensor]) -> None:
            change = self.outputs.change(streams[-1])
            self._enter(columns[f"delta_ce_{part}"], layer, change.ce - self.outputs.ce)
            self._enter(columns[f"jsd_{part}"], layer, change.jsd)
            if part in effects:
                self._enter_effects(effects[part], layer, streams, change.probability_distance, self.counted)

        for layer in layers:
            for part in PARTS:
                yield ChangedStream(
                    layer + 1, self.blocks.leaving(self.chunk, part, layer), partial(enter, part, layer)
                )

    def skips(
        self, effects: Mapping[Part, Effects], at: Bool[Tensor, "batch pos"], layers: Sequence[int]
    ) -> Iterator[ChangedStream]:
        """Leave out every part of each of `layers` at the positions `at`; prompts without such a position have no effect."""
        counted = self.counted & at.any(1, keepdim=True)

        def enter(into: Effects, layer: int, streams: Sequence[Tensor]) -> None:
            self._enter_effects(into, layer, streams, self.outputs.distance(streams[-1]), counted)

        for layer in layers:
            for part, into in effects.items():
                leaving = self.blocks.leaving(self.chunk, part, layer, at)
                yield ChangedStream(layer + 1, leaving, partial(enter, into, layer))

    def _enter_effects(
        self, effects: Effects, layer: int, streams: Sequence[Tensor], distance: Tensor, counted: Tensor
    ) -> None:
        enter(effects, self.chunk, layer, [self.chunk.stream[layer], *streams], counted)
        among = counted[self.outputs.where]
        effects.add_output(self.outputs.prompt[among], layer, distance[among])

    def coarser(self, columns: Columns, bits: Collection[int], layers: Sequence[int]) -> Iterator[ChangedStream]:
        """Round the weights of each of `layers` alone to so many bits."""
        for layer in layers:
            block = self.blocks.anatomy.component("block", layer)
            for n in bits:
                with coarser(block, n):
                    leaving = self._leaving(layer)
                yield self._loss(columns[f"delta_ce_int{n}"], layer, layer + 1, leaving)

    def frozen(self, columns: Columns, scales: NormScales, layers: Sequence[int]) -> Iterator[ChangedStream]:
        """Freeze the norms that begin the parts of each of `layers` alone: they divide by their mean divisor."""
        rows = (self.chunk.tokens.shape[0], self.chunk.tokens.shape[1])
        for layer in layers:
            if norms := scales.of(layer):
                with frozen_norms(self.blocks.anatomy.map.module, norms, rows):
                    leaving = self._leaving(layer)
                yield self._loss(columns["delta_ce_frozen_norm"], layer, layer + 1, leaving)

    def _leaving(self, layer: int) -> Tensor:
        return self.blocks.run(self.chunk.stream[layer], layer, stop=layer + 1)[-1]

    def _loss(self, column: PerPrompt, layer: int, start: int, entering: Tensor) -> ChangedStream:
        return ChangedStream(start, entering, lambda streams: self.enter_loss(column, layer, streams[-1]))

    def read(self, columns: Columns, layers: Sequence[int]) -> None:
        """Compare what the stream leaving each of `layers` predicts with the final prediction."""
        for layer in layers:
            lens = self.outputs.lens(self.chunk.stream[layer + 1])
            self._enter(columns["lens_kl"], layer, lens.kl)
            self._enter(columns["lens_overlap"], layer, lens.overlap)

    def windows(
        self, columns: Columns, widths: Sequence[int], starts: Sequence[int], pairs: bool = False
    ) -> Iterator[ChangedStream]:
        """Run the blocks of each window side by side on the stream that enters it, and add their contributions.

        Args:
            pairs: whether the second-order terms are added, too, and entered beside.
        """
        n_layers = self.chunk.n_layers
        for start in starts if widths else ():
            entering = self.chunk.stream[start]
            joint, apart, second = entering, list[Tensor](), torch.zeros_like(entering)
            for width in range(1, min(max(widths), n_layers - start) + 1):
                layer = start + width - 1
                added = self._added(layer, entering)
                joint = joint + added
                if pairs:
                    second = second + second_order(partial(self._added, layer), entering, added, apart)
                    apart.append(added)
                if width in widths:
                    yield self._window(columns, "parallel", start, width, joint)
                if pairs and width in widths:
                    yield self._window(columns, "second_order", start, width, joint + second)

    def _added(self, layer: int, entering: Tensor) -> Tensor:
        return self.blocks.run(entering, layer, stop=layer + 1)[-1] - entering

    def _window(self, columns: Columns, kind: str, start: int, width: int, joint: Tensor) -> ChangedStream:
        errors = window_error(self.chunk.stream[start], self.chunk.stream[start + width], joint)
        prompts = self.chunk.prompt_of(self.counted)
        for name, values in zip(("error", "cosine"), errors, strict=True):
            columns[f"{kind}_{name}_{width}"].add(start, prompts, values.cpu()[self.counted])
        return self._loss(columns[f"delta_ce_{kind}_{width}"], start, start + width, joint)


def second_order(
    run: Callable[[Float[Tensor, "*rest d_model"]], Float[Tensor, "*rest d_model"]],
    entering: Float[Tensor, "*rest d_model"],
    added: Float[Tensor, "*rest d_model"],
    earlier: Sequence[Float[Tensor, "*rest d_model"]],
) -> Float[Tensor, "*rest d_model"]:
    """Return the sum over earlier blocks of f(h + f_i(h)) - f(h): what each alone changes in what block f adds.

    With these terms a window of two blocks is exact, and one of linear blocks lacks the products of three and more.

    Args:
        run: f, what the block adds to a stream.
        entering: h, what enters the window.
        added: f(h).
        earlier: f_i(h) of the blocks before it in the window.
    """
    total = torch.zeros_like(entering)
    for one in earlier:
        total = total + run(entering + one) - added
    return total


def window_error(
    entering: Float[Tensor, "*rest d_model"],
    leaving: Float[Tensor, "*rest d_model"],
    joint: Float[Tensor, "*rest d_model"],
) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
    """Return (||leaving - joint|| / ||leaving - entering||, cosine of the two steps)."""
    step, other = (leaving - entering).float(), (joint - entering).float()
    size = torch.linalg.vector_norm(step, dim=-1).clamp_min(1e-6)
    error = torch.linalg.vector_norm(step - other, dim=-1) / size
    return error, torch.nn.functional.cosine_similarity(step, other, dim=-1)
