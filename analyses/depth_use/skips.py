"""What leaving out a part of a block changes in later blocks: now, for later positions, and without propagation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.depth_use.outputs import Outputs
from analyses.depth_use.settings import SPLIT_TOKENS, SkipRule, Tick
from analyses.results.statistics import Array, cluster_bootstrap, draw_groups, percentiles
from probes.blocks.batch import Blocks, Chunk, Part

Variant = Literal["current", "future", "local"]
POOLED = 2**22
"""Numbers pooled at once while resampling."""
SPLIT_STRIDE = 8
"""Positions that may split a prompt are multiples of this, as in the released code."""


@dataclass(frozen=True)
class Effects:
    """Relative changes of later blocks' contributions, per prompt; NaN where a block is not later or was not measured."""

    mean: Array
    """[prompt, skipped, affected], over tokens."""
    median: Array
    highest: Array
    output: Array
    """[prompt, skipped], the largest Euclidean change of a next-token distribution."""

    @classmethod
    def empty(cls, n_prompts: int, n_layers: int) -> Effects:
        """Return effects of which none is known."""
        grid = (n_prompts, n_layers, n_layers)
        mean, median, highest = (np.full(grid, np.nan) for _ in range(3))
        return cls(mean, median, highest, np.full(grid[:2], np.nan))

    def add(
        self,
        chunk: Chunk,
        skipped: int,
        affected: int,
        change: Float[Tensor, "batch pos"],
        where: Bool[Tensor, "batch pos"],
    ) -> None:
        """Enter changes [batch, pos] at the positions `where`; rows of one prompt are pooled."""
        change = change.cpu()
        for prompt in dict.fromkeys(chunk.prompts):
            rows = torch.tensor([p == prompt for p in chunk.prompts])
            values = change[rows][where[rows]]
            if len(values):
                self.mean[prompt, skipped, affected] = float(values.mean())
                self.median[prompt, skipped, affected] = float(values.median())
                self.highest[prompt, skipped, affected] = float(values.max())

    def add_output(self, prompts: Int[Tensor, " n"], skipped: int, distance: Float[Tensor, " n"]) -> None:
        """Enter distances [n] of next-token distributions of tokens of `prompts` [n]."""
        for prompt in dict.fromkeys(prompts.tolist()):
            self.output[prompt, skipped] = float(distance[prompts == prompt].max())


def left_out_at(chunk: Chunk, rule: SkipRule) -> Bool[Tensor, "batch pos"]:
    """Return where a part is left out: at all tokens, or, as in the released code, never at a prompt's first."""
    out = chunk.real.clone()
    out[:, 0] &= torch.tensor(rule == "everywhere")
    return out


def relative_change(
    chunk: Chunk, layer: int, before: Float[Tensor, "batch pos d_model"], after: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos"]:
    """Return ||c - c'|| / ||c|| per token, with c the clean contribution of block `layer`, c' = after - before."""
    clean = chunk.added("block", layer).float()
    size = torch.linalg.vector_norm(clean, dim=-1).clamp_min(1e-6)
    return torch.linalg.vector_norm(clean - (after - before).float(), dim=-1) / size


def enter(effects: Effects, chunk: Chunk, skipped: int, streams: Sequence[Tensor], where: Tensor) -> None:
    """Enter the effects of a run that started at block `skipped` into `effects`."""
    for offset, (before, after) in enumerate(pairwise(streams)):
        layer = skipped + offset
        effects.add(chunk, skipped, layer, relative_change(chunk, layer, before, after), where)


def local_effects(
    effects: Effects,
    blocks: Blocks,
    chunk: Chunk,
    part: Part,
    at: Bool[Tensor, "batch pos"],
    where: Bool[Tensor, "batch pos"],
    layers: Sequence[int],
    tick: Tick,
) -> None:
    """Measure what each later block changes when an earlier part's contribution is missing from the stream that enters it.

    One pair of blocks at a time, so nothing propagates.

    Args:
        at: the positions at which the contribution is subtracted.
        where: the positions at which effects are taken.
    """
    for skipped in layers:
        lost = chunk.added(part, skipped) * at.to(chunk.stream[0].device)[..., None]
        for layer in range(skipped + 1, chunk.n_layers):
            lacking = chunk.stream[layer] - lost
            after = blocks.run(lacking, layer, stop=layer + 1)[-1]
            effects.add(chunk, skipped, layer, relative_change(chunk, layer, lacking, after), where)
            tick(len(chunk.tokens))


@dataclass(frozen=True)
class Split:
    """Prompts repeated once per split position t; parts are left out before t and effects measured from t on."""

    chunk: Chunk
    skipped: Tensor
    """[rows, pos]."""
    after: Tensor
    """[rows, pos]."""


def split_positions(length: int, most: int, rng: np.random.Generator) -> list[int]:
    """Draw up to `most` positions of {8, 16, ..., length - 5}; the middle of a prompt too short for those, or none."""
    candidates = list(range(SPLIT_STRIDE, length - 4, SPLIT_STRIDE))
    if candidates:
        return sorted(int(t) for t in rng.permutation(candidates)[:most])
    return [length // 2] if length >= SPLIT_TOKENS else []


def positions_of(prompt: int, length: int, most: int, seed: int) -> list[int]:
    """Draw the split positions of the prompt of this index."""
    return split_positions(length, most, np.random.default_rng((seed, prompt)))


def split(chunk: Chunk, most: int, seed: int, rule: SkipRule) -> Split | None:
    """Repeat the chunk once per split position; None where every prompt is too short."""
    rows, at = [], []
    for row, prompt in enumerate(chunk.prompts):
        length = int(chunk.real[row].sum())
        positions = positions_of(prompt, length, most, seed)
        rows += [row] * len(positions)
        at += positions
    if not rows:
        return None
    repeated = chunk.repeated(torch.tensor(rows))
    position = torch.arange(repeated.tokens.shape[1])[None]
    t = torch.tensor(at)[:, None]
    return Split(repeated, left_out_at(repeated, rule) & (position < t), repeated.real & (position >= t))


def future_effects(
    effects: Effects, blocks: Blocks, halves: Split, part: Part, outputs: Outputs, layers: Sequence[int], tick: Tick
) -> None:
    """Leave each part out before the split, and measure what changes after it, where the part itself still runs."""
    chunk = halves.chunk
    for skipped in layers:
        streams = blocks.without(chunk, part, skipped, halves.skipped)
        enter(effects, chunk, skipped, streams, halves.after)
        effects.add_output(outputs.prompt, skipped, outputs.distance(streams[-1]))
        tick(len(chunk.tokens))


def effect_table(effects: Effects, variant: Variant, part: Part, seed: int) -> pd.DataFrame:
    """Return columns variant, part, skipped, affected, effect (largest), mean, median, ci_low, ci_high (of the mean, over prompts).

    Rows of layers that were not left out are absent.
    """
    used = ~np.isnan(effects.mean).all(axis=(1, 2))
    mean, n = effects.mean[used], int(used.sum())
    draws = draw_groups(n, seed)
    rows = []
    for skipped, affected in zip(*np.nonzero(~np.isnan(mean).all(axis=0)), strict=True):
        values = mean[:, skipped, affected]
        low, high = percentiles(values[draws].mean(axis=1), n)
        median = float(np.nanmedian(effects.median[used, skipped, affected]))
        highest = float(np.nanmax(effects.highest[used, skipped, affected]))
        rows.append((variant, part, skipped, affected, highest, float(values.mean()), median, low, high))
    names = ["variant", "part", "skipped", "affected", "effect", "mean", "median", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=names)


def output_table(effects: Effects, variant: Variant, part: Part, seed: int) -> pd.DataFrame:
    """Return columns variant, part, skipped, effect (largest over prompts), mean with ci_low and ci_high, and median (over prompts)."""
    used, layers = (np.flatnonzero(~np.isnan(effects.output).all(axis=axis)) for axis in (1, 0))
    values = effects.output[np.ix_(used, layers)]
    mean = cluster_bootstrap(values, used, seed=seed)
    columns = {"variant": variant, "part": part, "skipped": layers, "effect": values.max(axis=0), "mean": mean.mean}
    return pd.DataFrame({**columns, "ci_low": mean.low, "ci_high": mean.high, "median": np.median(values, axis=0)})


def depth_score(matrix: Array) -> Any:
    """Return the centre of mass of effects over depth, in layers: sum of s e_s over sum of e_s, e_s the mean effect on later layers.

    Args:
        matrix: [..., skipped, affected]; only entries right of the diagonal count, and of those the ones that are known.
            The result has the leading axes; it is a number where there are none.
    """
    n = matrix.shape[-1]
    known = np.triu(np.ones((n, n), dtype=bool), 1) & ~np.isnan(matrix)
    e = np.where(known, matrix, 0).sum(-1) / np.maximum(known.sum(-1), 1)
    with np.errstate(invalid="ignore"):
        return (np.arange(n) * e).sum(-1) / e.sum(-1)


def depth_scores(effects: Effects, variant: Variant, part: Part, groups: Sequence[str], seed: int) -> pd.DataFrame:
    """Return the depth score per group of prompts and overall, by largest and by mean effect, with intervals over prompts."""
    used = np.flatnonzero(~np.isnan(effects.mean).all(axis=(1, 2)))
    named = {"all": used, **{g: used[[groups[int(i)] == g for i in used]] for g in dict.fromkeys(groups) if g}}
    rows = []
    for group, members in named.items():
        if not len(members):
            continue
        draws = members[draw_groups(len(members), seed)]
        for by, values, pool in (("largest", effects.highest, np.max), ("mean", effects.mean, np.mean)):
            several = np.array_split(draws, max(1, draws.size * values[0].size // POOLED))
            scores = np.concatenate([depth_score(pool(values[d], axis=1)) for d in several])
            low, high = percentiles(scores, len(members))
            score = depth_score(pool(values[members], axis=0))
            rows.append((variant, part, group, by, len(members), float(score), float(low), float(high)))
    names = ["variant", "part", "group", "by", "prompts", "score", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=names)
