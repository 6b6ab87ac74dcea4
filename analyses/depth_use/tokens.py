"""Up to which layer a token matters: residual erasure, and integrated gradients of the answer's probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.depth_use.outputs import Outputs
from analyses.depth_use.settings import Rule, Tick
from analyses.prompt_fields import is_whole, must
from probes.blocks.batch import Blocks, Chunk, Part, on_blocks
from probes.models.protocol import Model
from probes.models.unembedding import logits_of
from probes.points import Address
from probes.prompts import Prompt

GROUP_TOKENS = 2048
"""Padded tokens of variants run at once."""
ERASED_POSITIONS = 32
"""Positions erased of one prompt at most, evenly spaced."""


class StreamMeans:
    """The mean stream entering each block, over the counted tokens of all prompts."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._n = 0

    def add(self, chunk: Chunk, counted: Bool[Tensor, "batch pos"]) -> None:
        """Enter a chunk's counted tokens."""
        sums = [h[counted.to(h.device)].double().sum(0).cpu() for h in chunk.stream[:-1]]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._n += int(counted.sum())

    def of(self, layer: int) -> Float[Tensor, " d_model"]:
        """Return the mean stream entering a block, float64."""
        return self._sums[layer] / self._n


def erased_positions(length: int) -> NDArray[np.int64]:
    """Return the positions of a prompt at which streams are overwritten."""
    return np.unique(np.linspace(0, length - 1, min(length, ERASED_POSITIONS)).round().astype(np.int64))


def erasure(model: Model, chunk: Chunk, means: StreamMeans, layers: Sequence[int], tick: Tick) -> pd.DataFrame:
    """Overwrite the stream of one token entering one block by the mean stream; the chunk holds one prompt.

    Returns:
        Columns prompt, layer, position, token_id, later_change (largest Euclidean change of a next-token distribution
        at a later position; NaN for the last), answer_change (of the distribution at the last position).
    """
    length = chunk.tokens.shape[1]
    positions = erased_positions(length)
    rows: list[tuple[Any, ...]] = []
    per_group = max(1, GROUP_TOKENS // length)
    for first in range(0, len(positions), per_group):
        erased = torch.from_numpy(positions[first : first + per_group])
        group = chunk.repeated(torch.zeros(len(erased), dtype=torch.long))
        rows += on_blocks(
            model,
            group.tokens,
            lambda blocks, g=group, at=erased: _erase(blocks, g, at, means, layers, tick),  # type: ignore[misc]
        )
    names = ["prompt", "layer", "position", "token_id", "later_change", "answer_change"]
    return pd.DataFrame(rows, columns=names)


def _erase(
    blocks: Blocks, group: Chunk, at: Tensor, means: StreamMeans, layers: Sequence[int], tick: Tick
) -> list[tuple[Any, ...]]:
    outputs = Outputs(blocks.model, group)
    rows: list[tuple[Any, ...]] = []
    index = torch.arange(len(at))
    for layer in layers:
        hidden = group.stream[layer].clone()
        hidden[index, at] = means.of(layer).to(hidden)
        distance = outputs.distance(blocks.run(hidden, layer)[-1]).view(group.tokens.shape)
        for row, position in enumerate(at.tolist()):
            later = distance[row, position + 1 :]
            change = float(later.max()) if len(later) else float("nan")
            token = int(group.tokens[row, position])
            rows.append((group.prompts[row], layer, position, token, change, float(distance[row, -1])))
        tick(len(at))
    return rows


check_answer_from = must(
    "be an int from 1: the position of the answer's first token in this line's tokens",
    lambda value: is_whole(value) and value > 0,
)


@dataclass(frozen=True)
class Target:
    """The probability that is attributed: of tokens `ids` [n], each predicted at its position in `at` [n], summed."""

    at: Tensor
    ids: Tensor

    @classmethod
    def of(cls, prompt: Prompt, outputs: Outputs) -> Target:
        """Take the prompt's tokens from `answer_from` on, or the most probable next token where it names none."""
        start = prompt.fields.get("answer_from")
        if start is None or start >= len(prompt.tokens):
            return cls(torch.tensor([len(prompt.tokens) - 1]), outputs.top[-1:].cpu())
        return cls(torch.arange(start - 1, len(prompt.tokens) - 1), torch.tensor(prompt.tokens[start:]))

    def value(self, model: Model, final: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
        """Return the probability when `final` leaves the last block."""
        rows = final[:, self.at.to(final.device)]
        logits = logits_of(model.unembedding(), rows).float()
        ids = self.ids.to(logits.device)[None, :, None].expand(len(logits), -1, 1)
        return logits.softmax(-1).gather(-1, ids).sum((1, 2))


def integrated_gradients(
    model: Model,
    chunk: Chunk,
    prompt: Prompt,
    parts: Sequence[Part],
    steps: int,
    rule: Rule,
    layers: Sequence[int],
    tick: Tick,
) -> pd.DataFrame:
    """Attribute the target's probability to each part's output at each token; the chunk holds one prompt.

    The path runs from the mean over positions of the part's output to that output, at all positions at once.

    Returns:
        Columns prompt, part, layer, position, token_id, attribution, and per (part, layer) completeness_error:
        sum of attributions minus the change of probability from the path's start to its end.
    """
    target = Target.of(prompt, Outputs(model, chunk))
    offset = 0.5 if rule == "midpoint" else 0.0
    alphas = torch.cat([(torch.arange(steps) + offset) / steps, torch.tensor([0.0, 1.0])])
    weights = torch.cat([torch.full((steps,), 1 / steps), torch.zeros(2)]).double()
    per_group = max(1, GROUP_TOKENS // chunk.tokens.shape[1])
    places = [(part, layer) for part in parts for layer in layers]
    totals = {place: torch.zeros(chunk.tokens.shape[1], dtype=torch.float64) for place in places}
    values: dict[tuple[Part, int], list[Tensor]] = {place: [] for place in places}
    for along, weight in zip(torch.split(alphas, per_group), torch.split(weights, per_group), strict=True):
        path = Path(chunk, chunk.repeated(torch.zeros(len(along), dtype=torch.long)), target, along)

        def at_places(blocks: Blocks, path: Path = path) -> list[tuple[Tensor, Tensor]]:
            return [path.step(blocks, *place, tick) for place in places]

        points = on_blocks(model, path.same.tokens, at_places)
        for place, (value, each) in zip(places, points, strict=True):
            totals[place] += (weight[:, None] * each).sum(0)
            values[place].append(value)
    frames = []
    for place, total in totals.items():
        start, end = torch.cat(values[place])[-2:].tolist()
        frames.append(_frame(chunk, *place, total, float(total.sum()) - (end - start)))
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True, eq=False)
class Path:
    """Points on the straight path from a part's mean output to its output."""

    chunk: Chunk
    same: Chunk
    """The chunk's prompt once per point."""
    target: Target
    along: Tensor
    """[points], 0 at the mean and 1 at the output."""

    def step(self, blocks: Blocks, part: Part, layer: int, tick: Tick) -> tuple[Tensor, Tensor]:
        """Return (the target's value [points], gradient times (output - mean) summed over d_model [points, pos]), float64."""
        added = self.chunk.added(part, layer)
        base = added.mean(1, keepdim=True)
        point = (base + self.along.to(added)[:, None, None] * (added - base)).detach().requires_grad_(True)
        with torch.enable_grad():
            if part == "block":
                final = blocks.run(self.same.stream[layer] + point, layer + 1)[-1]
            else:
                writes = {Address(f"{part}_out", layer): lambda _: point}
                final = blocks.run(self.same.stream[layer], layer, writes=writes)[-1]
            value = self.target.value(blocks.model, final)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        tick(len(self.along))
        return value.detach().double().cpu(), (gradient * (added - base)).sum(-1).double().cpu()


def _frame(chunk: Chunk, part: Part, layer: int, attribution: Tensor, error: float) -> pd.DataFrame:
    columns = {"prompt": chunk.prompts[0], "part": part, "layer": layer, "position": np.arange(len(attribution))}
    tokens = chunk.tokens[0].numpy()
    return pd.DataFrame(
        {**columns, "token_id": tokens, "attribution": attribution.numpy(), "completeness_error": error}
    )
