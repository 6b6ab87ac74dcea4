"""What concept depth says of each layer."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.results.card import ProfileSpec, Tables


def _mean(tables: Tables, value: str, low: str, high: str) -> pd.DataFrame:
    """Mean over data sets, of the plain model and the first probe; their intervals combined as of independent sets."""
    scores = tables["scores"]
    selected = scores[(scores["variant"] == "plain") & (scores["probe"] == scores["probe"].iloc[0])]
    selected = selected[selected[value].notna()]  # a data set without a control task says nothing of selectivity
    rows = []
    for layer, group in selected.groupby("layer"):
        below = np.sqrt(((group[value] - group[low]) ** 2).sum(skipna=False)) / len(group)
        above = np.sqrt(((group[high] - group[value]) ** 2).sum(skipna=False)) / len(group)
        mean = group[value].mean()
        rows.append((layer, mean, mean - below, mean + above))
    return pd.DataFrame(rows, columns=["layer", "value", "ci_low", "ci_high"])


def selectivity(tables: Tables) -> pd.DataFrame:
    """Accuracy of the probe minus that of the same probe on the control task."""
    return _mean(tables, "selectivity", "selectivity_low", "selectivity_high")


def accuracy(tables: Tables) -> pd.DataFrame:
    """Test accuracy of the probe."""
    return _mean(tables, "accuracy", "ci_low", "ci_high")


PROFILES = {
    "selectivity": ProfileSpec(
        "Probe over its control",
        "accuracy minus control",
        "Test accuracy of a linear probe minus that of the same probe trained on one random label per token type (the control task of "
        "Hewitt and Liang), averaged over the data sets that have one. Near 0 the layer names the token, and any label could be looked up "
        "from it; above 0 the concept itself is laid out along a direction.",
        selectivity,
    ),
    "accuracy": ProfileSpec(
        "Probe accuracy",
        "accuracy",
        "Test accuracy of a linear probe on each layer, averaged over data sets. Chance is the majority class.",
        accuracy,
    ),
}
