"""What voids say of each layer."""

from __future__ import annotations

import pandas as pd

from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import columns


def active(tables: Tables) -> pd.DataFrame:
    """Share of tokens for which the layer is active, at the first alpha and in the first phase."""
    usage = tables["usage"]
    first = usage.iloc[0]
    rows = usage[(usage["alpha"] == first["alpha"]) & (usage["phase"] == first["phase"])]
    return columns(rows, "active_fraction", "ci_low", "ci_high")


PROFILES = {
    "active": ProfileSpec(
        "Active tokens",
        "share of tokens",
        "The share of tokens for which the layer's step in L2 norm reaches the void rule's threshold, at the first alpha and in the "
        "first phase of the run. Layers near 0 are void for almost every token.",
        active,
    ),
}
