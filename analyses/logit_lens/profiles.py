"""What the logit lens says of each layer."""

from __future__ import annotations

import pandas as pd

from analyses.logit_lens.curve import ROWS
from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import mean_by_layer


def agreement(tables: Tables) -> pd.DataFrame:
    """Share of positions whose top token is already the final one."""
    return mean_by_layer(tables["read"], "agrees", ROWS)


def entropy(tables: Tables) -> pd.DataFrame:
    """Entropy of the layer's prediction, in bits."""
    return mean_by_layer(tables["read"], "entropy_bits", ROWS)


PROFILES = {
    "agreement": ProfileSpec(
        "Agreement with the output",
        "share of positions",
        "The share of positions at which the layer's top token, read through the final norm and unembedding, is already the model's own.",
        agreement,
    ),
    "entropy": ProfileSpec(
        "Entropy of the lens",
        "bits",
        "The entropy of the prediction read at each layer, averaged over positions: low where the layer is sure of a token.",
        entropy,
    ),
}
