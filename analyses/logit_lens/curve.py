"""The lens along depth: means over positions with intervals over prompts, beside what chance gives."""

from __future__ import annotations

import pandas as pd

from analyses.results.profiles import mean_by_layer

ROWS = ["prompt", "position"]
MEASURES = ("agrees", "chance_agrees", "entropy_bits", "kl_to_final", "final_logprob")
"""Share of positions whose top token is the final one; the same with the final tokens of other prompts; entropy; divergence
from the final prediction (nats); log-probability of the final top token (nats)."""


def curve(read: pd.DataFrame) -> pd.DataFrame:
    """The table `curve`: columns layer, measure, mean, ci_low, ci_high, positions, prompts; one row a layer and measure.

    Measures that a table of an older run does not hold are left out, and chance where there is only one prompt.
    """
    if "top_token_id" in read:
        read = read.assign(chance_agrees=chance(read))
    parts = [
        mean_by_layer(read, name, ROWS).rename(columns={"value": "mean"}).assign(measure=name)
        for name in MEASURES
        if name in read and read[name].notna().any()
    ]
    table = pd.concat(parts, ignore_index=True)
    sizes = {"positions": len(read.drop_duplicates(ROWS)), "prompts": read["prompt"].nunique()}
    return table[["layer", "measure", "mean", "ci_low", "ci_high"]].assign(**sizes)


def chance(read: pd.DataFrame) -> pd.Series:
    """Per row, the share of the other prompts' positions whose final token is this row's top token; NaN without others."""
    ends = read.drop_duplicates(ROWS)
    everywhere = ends["final_token_id"].value_counts()
    own = ends.groupby(["prompt", "final_token_id"]).size()
    at = pd.MultiIndex.from_arrays([read["prompt"], read["top_token_id"]])
    shared = read["top_token_id"].map(everywhere).fillna(0).to_numpy() - own.reindex(at, fill_value=0).to_numpy()
    others = len(ends) - read["prompt"].map(ends["prompt"].value_counts())
    return pd.Series(shared, index=read.index) / others.where(others > 0)
