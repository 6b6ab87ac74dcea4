"""How much each part of a block adds to the stream, in which direction, and how little it changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.results.per_prompt import PerPrompt
from analyses.results.statistics import cluster_bootstrap
from probes.blocks.batch import Chunk, Part

PARTS: tuple[Part, ...] = ("block", "attn", "mlp")


@dataclass(frozen=True)
class Contribution:
    """Measures of what one part of one block adds, per token [batch, pos]."""

    relative_norm: Tensor
    """||c|| / ||x||, with x the stream that the part adds to."""
    cosine: Tensor
    """cos(c, x): negative erases, positive amplifies, 0 is a new direction."""
    similarity: Tensor
    """1 - cos(x, x + c), the importance of LLM-Drop."""
    kept: Tensor
    """cos(x, x + c)."""


def contribution(chunk: Chunk, part: Part, layer: int, parallel: bool) -> Contribution:
    """Measure one part's contribution; an MLP of a sequential block adds to the stream that attention has added to."""
    before, added = chunk.stream[layer].float(), chunk.added(part, layer).float()
    if part == "mlp" and not parallel:
        before = before + chunk.added("attn", layer).float()
    norm = torch.linalg.vector_norm
    relative = norm(added, dim=-1) / norm(before, dim=-1).clamp_min(1e-6)
    cosine = _cosine(added, before)
    kept = _cosine(before, before + added)
    return Contribution(relative, cosine, 1 - kept, kept)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    # In float64, because 1 - cosine of nearly equal vectors is the quantity of interest.
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).float()


class Contributions:
    """Contributions of all tokens, collected chunk by chunk."""

    def __init__(self, n_layers: int, parallel: bool, first_token: bool) -> None:
        self.n_layers, self.parallel, self.first_token = n_layers, parallel, first_token
        self._frames: list[pd.DataFrame] = []

    def add(self, chunk: Chunk, columns: Mapping[str, PerPrompt]) -> None:
        """Enter a chunk, and the counted tokens' values into `columns` that bear the proxies' names."""
        real, counted = chunk.real, chunk.counted(self.first_token)
        position = torch.arange(chunk.tokens.shape[1])[None].expand_as(real)[real]
        prompts, among = chunk.prompt_of(real), counted[real]
        for part in PARTS:
            for layer in range(self.n_layers):
                parts = contribution(chunk, part, layer, self.parallel)
                values = {
                    "relative_norm": parts.relative_norm.cpu()[real],
                    "cosine": parts.cosine.cpu()[real],
                    "similarity": parts.similarity.cpu()[real],
                }
                for name, value in values.items():
                    columns[f"{name}_{part}"].add(layer, prompts[among], value[among])
                if part == "block":
                    columns["lim"].add(layer, prompts[among], -parts.kept.cpu()[real][among])
                arrays = {name: value.numpy() for name, value in values.items()}
                keys = {"part": part, "layer": layer, "prompt": prompts.numpy(), "first": position.numpy() == 0}
                self._frames.append(pd.DataFrame({**keys, **arrays}))

    def table(self, seed: int) -> pd.DataFrame:
        """Return columns tokens (all or not_first), part, layer, relative_norm, ci_low, ci_high, median, largest, cosine,
        cosine_low, cosine_high, similarity, n.
        """
        frame = pd.concat(self._frames, ignore_index=True)
        rows: list[Sequence[object]] = []
        for tokens, chosen in (("all", frame), ("not_first", frame[~frame["first"]])):
            for (part, layer), group in chosen.groupby(["part", "layer"], sort=False):
                values = group[["relative_norm", "cosine", "similarity"]].to_numpy()
                intervals = cluster_bootstrap(values, group["prompt"], seed=seed, resamples=300)
                norm = values[:, 0]
                spread = (float(np.median(norm)), float(norm.max()))
                bounds = (intervals.mean[0], intervals.low[0], intervals.high[0], *spread)
                cosine = (intervals.mean[1], intervals.low[1], intervals.high[1])
                rows.append((tokens, part, layer, *bounds, *cosine, intervals.mean[2], len(group)))
        names = (
            "tokens part layer relative_norm ci_low ci_high median largest cosine cosine_low cosine_high similarity n"
        )
        return pd.DataFrame(rows, columns=names.split())
