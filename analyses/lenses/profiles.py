"""What the comparison of lenses says of each layer."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import mean_by_layer

ROWS = ["prompt", "position"]
READABLE = 0.5
"""Share of prompts in which a watched token has to be first for its layer to count as readable."""


def fitted(tables: Tables) -> str:
    """The first lens that is not the logit lens, or that one."""
    names = list(dict.fromkeys(tables["read"]["lens"]))
    return next((name for name in names if name != "logit"), names[0])


def agreement(tables: Tables) -> pd.DataFrame:
    """Share of positions whose top token is already the final one, through the first fitted lens."""
    read = tables["read"]
    return mean_by_layer(read[read["lens"] == fitted(tables)], "agrees", ROWS)


def entropy(tables: Tables) -> pd.DataFrame:
    """Entropy of the first fitted lens's reading, in bits."""
    read = tables["read"]
    return mean_by_layer(read[read["lens"] == fitted(tables)], "entropy_bits", ROWS)


def watched_rank(tables: Tables) -> pd.DataFrame:
    """Base-ten logarithm of one more than the rank of the watched tokens, through the first fitted lens."""
    watched = tables["watched"]
    own = watched[watched["lens"] == fitted(tables)]
    own = own.assign(log_rank=np.log10(own["rank"] + 1), where=own["position_name"] + " " + own["name"])
    return mean_by_layer(own, "log_rank", ["prompt", "where"])


PROFILES = {
    "agreement": ProfileSpec(
        "Agreement with the output, through a fitted lens",
        "share of positions",
        "The share of positions at which the layer's top token, read through the first fitted lens of the run, is already the model's own.",
        agreement,
    ),
    "entropy": ProfileSpec(
        "Entropy of a fitted lens",
        "bits",
        "The entropy of the prediction read at each layer through the first fitted lens of the run, averaged over positions.",
        entropy,
    ),
    "watched_rank": ProfileSpec(
        "Rank of the watched tokens",
        "log10 (rank + 1)",
        "How far down the vocabulary the watched tokens stand, through the first fitted lens of the run: 0 is first place.",
        watched_rank,
        lambda tables: "watched" in tables,
    ),
}
