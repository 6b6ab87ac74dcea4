"""How much a token's row turns from one layer to a later one: the same text and token at both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from analyses.results.statistics import Array, percentiles, quantiles, resampled_ratios
from analyses.similarity.groups import DEALS, centred, group_rows, names_of
from probes.capture.activations import Activations
from probes.points import Address


def step_table(
    activations: Activations, groups: Sequence[str], steps: Sequence[int], first_token: bool, seed: int
) -> pd.DataFrame:
    """Return the cosine of each token's stream with itself some layers later, by group of texts.

    The released code averages over all pairs of texts, one at each layer; here a text is compared with itself alone.

    Returns:
        Columns layer, step (the later layer is layer + step), group, centred (each layer's mean over tokens subtracted),
        cosine, low, high (95 % over texts), shuffled_low, shuffled_high (95 % of what as many texts drawn from all groups give).
    """
    n_layers = activations.model.shape.n_layers
    kept = [i for i, group in enumerate(groups) if group]
    members = [groups[i] for i in kept]
    streams = []
    for layer in range(n_layers):
        rows = group_rows(activations, Address("resid_post", layer), first_token)
        streams.append([rows[i] for i in kept])
    records = []
    for subtract in (False, True):
        shown = [centred(rows, members) if subtract else rows for rows in streams]
        for step in dict.fromkeys(steps):
            for layer in range(n_layers - step):
                pairs = list(zip(shown[layer], shown[layer + step], strict=True))
                sums = np.array([float(torch.cosine_similarity(x, y, dim=-1).double().sum()) for x, y in pairs])
                counts = np.array([len(x) for x, _ in pairs], dtype=np.float64)
                for name in names_of(groups):
                    row = {"layer": layer, "step": step, "group": name, "centred": subtract}
                    records.append(row | _group(sums, counts, np.array([m == name for m in members]), seed))
    return pd.DataFrame(records)


def _group(sums: Array, counts: Array, inside: np.ndarray, seed: int) -> dict[str, float]:
    drawn = resampled_ratios(sums[inside][:, None], counts[inside][:, None], seed=seed)[:, 0]
    low, high = percentiles(drawn, int(inside.sum()))
    rng, size = np.random.default_rng(seed), int(inside.sum())
    others = [rng.permutation(len(sums))[:size] for _ in range(DEALS)]
    shuffled_low, shuffled_high = quantiles(np.array([sums[i].sum() / counts[i].sum() for i in others]))
    return {
        "cosine": float(sums[inside].sum() / counts[inside].sum()), "low": float(low), "high": float(high),
        "shuffled_low": float(shuffled_low), "shuffled_high": float(shuffled_high),
    }  # fmt: skip
