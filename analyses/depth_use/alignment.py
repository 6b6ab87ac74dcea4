"""How alike the streams of two groups of prompts are, layer by layer (Shukor and Cord 2024, implicit alignment)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyses.results.statistics import quantiles
from probes.capture.activations import Activations
from probes.points import Address

TOKENS = 512
"""Tokens of a group whose pairs are compared at most, drawn at random."""
LEAST_DEALS = 40
"""Ways of dealing prompts to two groups from which on a 95 % band of them leaves any out at either end."""
SHUFFLES = 100
"""Random regroupings of the prompts behind the control."""


def alignment_table(activations: Activations, groups: Sequence[str], first_token: bool, seed: int) -> pd.DataFrame:
    """Return the cosines between every two groups of prompts; empty where fewer than two are named.

    Returns:
        Columns layer, group_a, group_b, centred (whether the mean over all tokens was subtracted first, because streams
        share a large common direction), mean_cosine (of the two group means; NaN for two groups centred, whose means are
        opposite by construction), pair_cosine (mean over pairs of tokens), best_cosine (mean over tokens of the first
        group of their highest cosine with the second), and for the first two `_low` and `_high`: 95 % of what prompts
        dealt to the groups at random give; NaN where there are too few ways of dealing them.
    """
    names = [name for name in dict.fromkeys(groups) if name]
    rows: list[tuple[object, ...]] = []
    for layer in range(activations.model.shape.n_layers if len(names) > 1 else 0):
        stream = activations.get(Address("resid_post", layer))
        kept = [(h if first_token or len(h) == 1 else h[1:]).float() for h in stream]
        mean = torch.cat([h for h, group in zip(kept, groups, strict=True) if group]).mean(0)
        for centred in (False, True):
            moved = [h - mean for h in kept] if centred else kept
            for a, b in combinations(names, 2):
                rows.append((layer, a, b, centred, *_compare(moved, groups, a, b, seed)))
    columns = ["layer", "group_a", "group_b", "centred"]
    columns += [f"{name}_cosine{edge}" for name in ("mean", "pair") for edge in ("", "_low", "_high")]
    table = pd.DataFrame(rows, columns=[*columns, "best_cosine"])
    if len(names) == 2:
        table.loc[table["centred"], ["mean_cosine", "mean_cosine_low", "mean_cosine_high"]] = np.nan
    return table


def _compare(rows: Sequence[Tensor], groups: Sequence[str], a: str, b: str, seed: int) -> tuple[float, ...]:
    """Return mean_cosine and pair_cosine, each with its control's bounds, then best_cosine."""
    members = [i for i, group in enumerate(groups) if group in (a, b)]
    in_a = np.array([groups[i] == a for i in members])
    counts = torch.tensor([len(rows[i]) for i in members], dtype=torch.float64)
    cosines: list[float] = []
    for kept in (rows, [_unit(h) for h in rows]):
        sums = torch.stack([kept[i].double().sum(0) for i in members])
        compare = _mean_cosine if kept is rows else _pair_cosine
        rng = np.random.default_rng(seed)
        low = high = np.array(np.nan)
        if comb(len(in_a), int(in_a.sum())) >= LEAST_DEALS:
            low, high = quantiles(np.array([compare(sums, counts, rng.permutation(in_a)) for _ in range(SHUFFLES)]))
        cosines += [compare(sums, counts, in_a), float(low), float(high)]
    first, second = (_unit(_some([rows[i] for i in members if groups[i] == name], seed)) for name in (a, b))
    return (*cosines, float((first @ second.T).amax(1).mean()))


def _mean_cosine(sums: Tensor, counts: Tensor, in_a: NDArray[np.bool_]) -> float:
    first = torch.from_numpy(in_a)
    return float(torch.nn.functional.cosine_similarity(sums[first].sum(0), sums[~first].sum(0), dim=0))


def _pair_cosine(sums: Tensor, counts: Tensor, in_a: NDArray[np.bool_]) -> float:
    """Return the mean cosine of all pairs from sums of unit rows: it is the product of the two mean unit rows."""
    first = torch.from_numpy(in_a)
    return float((sums[first].sum(0) / counts[first].sum()) @ (sums[~first].sum(0) / counts[~first].sum()))


def _some(rows: Sequence[Tensor], seed: int) -> Tensor:
    whole = torch.cat(list(rows))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return whole[order[:TOKENS].sort().values]


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)
