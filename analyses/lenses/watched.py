"""Tokens looked for in lens readings: their ranks, and how often they are among the first k, beside chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.lenses.items import Watched, others
from analyses.results.statistics import wilson
from probes.capture.activations import Activations
from probes.lenses import logit
from probes.lenses.protocol import Lens
from probes.points import Address
from probes.reducers import ROWS

DRAWS = 5
"""Other prompts' tokens that chance is measured with, for each prompt."""
ANY_LAYER = -1
"""Stands in `layer` for a layer that is chosen by the items."""


def place_rows(activations: Activations, watched: Sequence[Watched], layer: int, place: str) -> Tensor:
    """Return the rows of a layer at a named position of each watched prompt, [item, d_model]."""
    texts = activations.get(Address("resid_post", layer), ROWS)
    return torch.stack([texts[item.prompt][item.places[place]] for item in watched]).float()


def watched_tables(
    activations: Activations,
    watched: Sequence[Watched],
    lenses: Mapping[str, Lens],
    seed: int,
    at_layers: Sequence[int] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables `watched` and `chance_ranks`, the same of other prompts' tokens.

    A name is read by its best spelling, at all layers or some.
    """
    model = activations.model
    unembedding = model.unembedding()
    at_layers = at_layers or range(model.shape.n_layers)
    foreign = others(watched, DRAWS, seed)
    parts, chance = [], []
    for place in dict.fromkeys(name for item in watched for name in item.places):
        at = [i for i, item in enumerate(watched) if place in item.places]
        items = [watched[i] for i in at]
        ids, columns = _columns(items, [foreign[i] for i in at])
        cells = [(layer, name) for layer in at_layers for name in lenses]
        layers = {layer: place_rows(activations, items, layer, place) for layer in at_layers}
        rows = torch.cat([lenses[name].readable(layers[layer], layer).float() for layer, name in cells])
        seen = logit.read(rows, unembedding, ids=ids.repeat(len(cells), 1), ranks=True)
        every_rank = seen.ranks.cpu().numpy().reshape(len(cells), len(items), -1)
        every_logprob = seen.logprobs.cpu().numpy().reshape(len(cells), len(items), -1)
        for (layer, name), ranks, logprobs in zip(cells, every_rank, every_logprob, strict=True):
            for row, item in enumerate(items):
                own, *rest = columns[row]
                best = own[int(ranks[row, own].argmin())]
                parts.append(
                    (name, item.prompt, item.places[place], place, layer, item.name, item.spellings[own.index(best)],
                     item.token_ids[own.index(best)], int(ranks[row, best]), float(logprobs[row, best]))
                )  # fmt: skip
                chance += [(name, item.prompt, place, layer, item.name, int(ranks[row, other].min())) for other in rest]
    head = ["lens", "prompt", "position", "position_name", "layer", "name", "spelling", "token_id", "rank", "logprob"]
    short = ["lens", "prompt", "position_name", "layer", "name", "rank"]
    return pd.DataFrame(parts, columns=head), pd.DataFrame(chance, columns=short)


def _columns(
    items: Sequence[Watched], foreign: Sequence[Sequence[tuple[int, ...]]]
) -> tuple[Tensor, list[list[list[int]]]]:
    """Token ids [item, column], padded by each item's first; and per item the columns of its own and each foreign name."""
    groups = [[item.token_ids, *rest] for item, rest in zip(items, foreign, strict=True)]
    width = max(sum(map(len, group)) for group in groups)
    ids, columns = [], []
    for group in groups:
        flat = [token for tokens in group for token in tokens]
        starts = np.cumsum([0, *map(len, group)])
        columns.append([list(range(a, b)) for a, b in pairwise(starts)])
        ids.append([*flat, *[flat[0]] * (width - len(flat))])
    return torch.tensor(ids), columns


def pass_at_k(watched: pd.DataFrame, chance: pd.DataFrame, ks: Sequence[int], seed: int) -> pd.DataFrame:
    """Return how often a watched name is among the first k, by layer and at layers chosen in two ways.

    Columns lens, name, position_name, layer, k, n, value, ci_low, ci_high, chance, chosen. Layer -1 stands for the layer that
    is best on the other half of the prompts (`other_half`), and for the best layer of each prompt (`oracle`); for the latter,
    chance is an oracle too. Neither chooses the last layer, which is the model's own output through every lens.
    """
    rows = []
    for (lens, name, place), table in watched.groupby(["lens", "name", "position_name"], sort=False):
        ranks = table.pivot(index="prompt", columns="layer", values="rank")
        same = (chance["lens"] == lens) & (chance["name"] == name) & (chance["position_name"] == place)
        wrong = chance[same].assign(draw=lambda t: t.groupby(["prompt", "layer"]).cumcount())
        drawn = wrong.pivot(index=["prompt", "draw"], columns="layer", values="rank").reindex(columns=ranks.columns)
        for k in ks:
            hits = (ranks < k).to_numpy(dtype=float)
            by_chance = (drawn < k).to_numpy(dtype=float)
            columns = {int(layer): ("", hits[:, i], by_chance[:, i]) for i, layer in enumerate(ranks.columns)}
            rows += [
                _row(lens, name, place, layer, k, values, wrong_values, chosen)
                for layer, (chosen, values, wrong_values) in columns.items()
            ]
            hits, by_chance = hits[:, :-1], by_chance[:, :-1]
            best = _other_half(hits, seed)
            wrong_best = by_chance[:, hits.mean(0).argmax()]
            rows.append(_row(lens, name, place, ANY_LAYER, k, best, wrong_best, "other_half"))
            rows.append(_row(lens, name, place, ANY_LAYER, k, hits.max(1), by_chance.max(1, initial=0), "oracle"))
    return pd.DataFrame(rows)


def _other_half(hits: np.ndarray, seed: int) -> np.ndarray:
    """Per prompt, whether it is hit at the layer that hits most of the other half."""
    order = np.random.default_rng(seed).permutation(len(hits))
    halves = np.array_split(order, 2)
    values = np.zeros(len(hits))
    for own, other in (halves, halves[::-1]):
        if len(other):
            values[own] = hits[own, hits[other].mean(0).argmax()]
    return values


def _row(
    lens: object,
    name: object,
    place: object,
    layer: int,
    k: int,
    values: np.ndarray,
    chance: np.ndarray,
    chosen: str,
) -> dict[str, object]:
    low, high = wilson(int(values.sum()), len(values))
    return {
        "lens": lens, "name": name, "position_name": place, "layer": layer, "k": k, "n": len(values),
        "value": float(values.mean()), "ci_low": low, "ci_high": high,
        "chance": float(chance.mean()) if len(chance) else np.nan, "chosen": chosen,
    }  # fmt: skip
