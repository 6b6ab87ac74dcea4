"""What concept depth says of each layer."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.result import ProfileSpec, Tables


def _mean(tables: Tables, value: str, low: str, high: str) -> pd.DataFrame:
    """Mean over data sets, of the plain model and the first probe; their intervals combined as of independent sets."""
    scores = tables["scores"]
    mine = scores[(scores["variant"] == "plain") & (scores["probe"] == scores["probe"].iloc[0])]
    rows = []
    for layer, group in mine.groupby("layer"):
        below = np.sqrt(((group[value] - group[low]) ** 2).sum()) / len(group)
        above = np.sqrt(((group[high] - group[value]) ** 2).sum()) / len(group)
        mean = group[value].mean()
        rows.append((layer, mean, mean - below, mean + above))
    return pd.DataFrame(rows, columns=["layer", "value", "ci_low", "ci_high"])


def selectivity(tables: Tables) -> pd.DataFrame:
    """Accuracy of the probe minus that of the same probe on shuffled groups."""
    return _mean(tables, "selectivity", "selectivity_low", "selectivity_high")


def accuracy(tables: Tables) -> pd.DataFrame:
    """Test accuracy of the probe."""
    return _mean(tables, "accuracy", "ci_low", "ci_high")


PROFILES = {
    "selectivity": ProfileSpec(
        "Probe over its control",
        "accuracy minus control",
        "Test accuracy of a linear probe minus that of the same probe trained on labels dealt to groups at random, averaged over data sets: "
        "above 0 the concept can be read from the layer, beyond what any labels would give.",
        selectivity,
    ),
    "accuracy": ProfileSpec(
        "Probe accuracy",
        "accuracy",
        "Test accuracy of a linear probe on each layer, averaged over data sets. Chance is the majority class.",
        accuracy,
    ),
}
