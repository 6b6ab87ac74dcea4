"""What two groups' streams would say next: the mean prediction read from each layer, and how far those of two groups are apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.results.statistics import Array, quantiles
from analyses.similarity.divergence import entropy, jensen_shannon, kullback_leibler
from analyses.similarity.groups import deals, group_rows, names_of, token_counts
from probes.capture.activations import Activations
from probes.lenses import logit
from probes.models.protocol import Unembedding
from probes.points import Address

READ_TOKENS = 128
"""Tokens of a group that are read at most, drawn at random."""
ROW_TILE = 32
"""Tokens whose predictions are in memory at once."""


def readout_table(activations: Activations, groups: Sequence[str], first_token: bool, seed: int) -> pd.DataFrame:
    """Return how far apart the mean predictions of two groups are, read from each layer through the final norm and unembedding.

    A group's prediction is the mean of its tokens' whole distributions, so that no term of a divergence has to be left
    out; the released code counts the ten most probable tokens and drops every term in which either count is 0.

    Returns:
        Columns layer, group_a, group_b, kl (of b from a, nats), jsd (nats, at most log 2), low, high (95 % of the jsd of texts
        dealt to the groups at random), entropy_a, entropy_b (nats).
    """
    names = names_of(groups)
    kept = _kept(activations, groups, names, first_token, seed)
    members = np.array([groups[i] for i in kept])
    unembedding, records = activations.model.unembedding(), []
    for layer in range(activations.model.shape.n_layers):
        rows = group_rows(activations, Address("resid_post", layer), first_token)
        chosen = [rows[i][index] for i, index in kept.items()]
        sums = torch.stack([_summed(h, unembedding) for h in chosen])
        counts = np.array([len(h) for h in chosen], dtype=np.float64)
        for a, b in combinations(names, 2):
            in_a, in_b = ((members == name).astype(np.float64) for name in (a, b))
            first, second = (_mean(sums, counts, inside[None]) for inside in (in_a, in_b))
            dealt = deals(in_a, in_b, seed)
            low, high = (np.nan, np.nan) if dealt is None else quantiles(_apart(sums, counts, *dealt))
            records.append(
                {
                    "layer": layer, "group_a": a, "group_b": b, "kl": float(kullback_leibler(first, second)),
                    "jsd": float(jensen_shannon(first, second)), "low": float(low), "high": float(high),
                    "entropy_a": float(entropy(first)), "entropy_b": float(entropy(second)),
                }
            )  # fmt: skip
    return pd.DataFrame(records)


def _kept(
    activations: Activations, groups: Sequence[str], names: Sequence[str], first_token: bool, seed: int
) -> dict[int, Tensor]:
    """Return per text which of its rows are read, the same at every layer."""
    lengths = token_counts(activations, first_token)
    kept: dict[int, Tensor] = {}
    rng = np.random.default_rng(seed)
    for name in names:
        own = [i for i, group in enumerate(groups) if group == name]
        places = [(i, position) for i in own for position in range(lengths[i])]
        for k in sorted(rng.permutation(len(places))[:READ_TOKENS]):
            i, position = places[k]
            kept[i] = torch.cat([kept.get(i, torch.empty(0, dtype=torch.long)), torch.tensor([position])])
    return kept


def _summed(rows: Tensor, unembedding: Unembedding) -> Tensor:
    """Sum the predictions of rows; [d_vocab] float64."""
    tiles = torch.split(rows, ROW_TILE)
    return torch.stack([logit.all_logprobs(tile, unembedding).exp().double().sum(0).cpu() for tile in tiles]).sum(0)


def _mean(sums: Tensor, counts: Array, weights: Array) -> Tensor:
    """Log of the mean prediction of each weighting [draws, texts] of the texts; [draws, d_vocab]."""
    return ((torch.from_numpy(weights) @ sums) / torch.from_numpy(weights @ counts)[:, None]).log()


def _apart(sums: Tensor, counts: Array, a: Array, b: Array) -> Array:
    values = [
        jensen_shannon(_mean(sums, counts, x[None]), _mean(sums, counts, y[None])) for x, y in zip(a, b, strict=True)
    ]
    return np.asarray(torch.cat(values).numpy())
