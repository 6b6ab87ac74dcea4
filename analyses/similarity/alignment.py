"""How alike two groups of texts are at each place of the model, and how long their rows are (Shukor and Cord 2024, implicit alignment)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np
import pandas as pd

from analyses.results.statistics import percentiles, resampled_ratios
from analyses.similarity.cosines import Cosines
from analyses.similarity.groups import Regroupings, centred, group_rows, names_of
from probes.capture.activations import Activations
from probes.points import Address


def alignment_table(
    activations: Activations,
    groups: Sequence[str],
    first_token: bool,
    seed: int,
    points: Sequence[str] = ("resid_post",),
    anchor: bool = False,
) -> pd.DataFrame:
    """Return the cosines between every two groups of texts; empty where fewer than two are named.

    Args:
        groups: the group of each text; texts of the empty name are in none.
        points: where in a block the rows are read.
        anchor: also compare the first group at layer 0 with the second at each layer.

    Returns:
        Columns point, layer, group_a, group_b, centred (whether the mean over all tokens was subtracted first), anchored
        (whether group_a is read at layer 0), the columns of `Cosines.statistics` (mean_cosine is NaN for two groups centred,
        whose means are opposite by construction), each with `_low` and `_high` (95 % of what texts dealt to the groups at
        random give) and `_ci_low` and `_ci_high` (95 % over texts), and within_a, within_b (mean cosine of tokens of two
        different texts of one group, not where anchored).
    """
    names = names_of(groups)
    if len(names) < 2:
        return pd.DataFrame()
    kept = [i for i, group in enumerate(groups) if group]
    members = [groups[i] for i in kept]
    ways = {(a, b): Regroupings(members, a, b, seed) for a, b in permutations(names, 2)}
    records = []
    for point in points:
        bottom = None
        for layer in range(activations.model.shape.n_layers):
            plain = group_rows(activations, Address(point, layer), first_token)
            rows = [plain[i] for i in kept]
            bottom = bottom or rows
            for subtract in (False, True):
                here, first = (centred(h, members) if subtract else h for h in (rows, bottom))
                same, place = Cosines(here, here), {"point": point, "layer": layer, "centred": subtract}
                within = {name: same.within(members, name) for name in names}
                for a, b in combinations(names, 2):
                    cosines = same.table(ways[a, b])
                    if subtract and len(names) == 2:
                        cosines |= {key: np.nan for key in cosines if key.startswith("mean_cosine")}
                    pair = {"group_a": a, "group_b": b, "anchored": False}
                    records.append(place | pair | cosines | {"within_a": within[a], "within_b": within[b]})
                anchored = Cosines(first, here) if anchor else None
                for a, b in permutations(names, 2) if anchored else ():
                    assert anchored is not None
                    pair = {"group_a": a, "group_b": b, "anchored": True}
                    records.append(place | pair | anchored.table(ways[a, b]))
    return pd.DataFrame(records)


def norm_table(
    activations: Activations, groups: Sequence[str], first_token: bool, seed: int, points: Sequence[str]
) -> pd.DataFrame:
    """Return how long each group's rows are: point, layer, group, norm (mean over tokens), low, high (95 % over texts), median, least, largest."""
    records = []
    for point in points:
        for layer in range(activations.model.shape.n_layers):
            norms = [h.norm(dim=-1).double() for h in group_rows(activations, Address(point, layer), first_token)]
            for name in names_of(groups):
                own = [h for h, group in zip(norms, groups, strict=True) if group == name]
                sums, counts = ([[float(f)] for f in parts] for parts in ([h.sum() for h in own], map(len, own)))
                low, high = percentiles(resampled_ratios(sums, counts, seed=seed)[:, 0], len(own))
                values = np.concatenate([h.numpy() for h in own])
                records.append(
                    {
                        "point": point, "layer": layer, "group": name, "norm": values.mean(), "low": low, "high": high,
                        "median": np.median(values), "least": values.min(), "largest": values.max(),
                    }
                )  # fmt: skip
    return pd.DataFrame(records)
