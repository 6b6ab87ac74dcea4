"""What communication channels say of each layer."""

from __future__ import annotations

import pandas as pd

from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import counts


def _ends(tables: Tables, side: str) -> pd.DataFrame:
    table = tables["composition"]
    flagged = table[table["flagged"]]
    return counts(flagged[side], int(table["target_layer"].max()) + 1)


def writers(tables: Tables) -> pd.DataFrame:
    """Count the flagged channels that begin in the layer."""
    return _ends(tables, "source_layer")


def readers(tables: Tables) -> pd.DataFrame:
    """Count the flagged channels that end in the layer."""
    return _ends(tables, "target_layer")


PROFILES = {
    "writers": ProfileSpec(
        "Channels written",
        "flagged channels",
        "How many pairs of heads, flagged for a component that stands out of its null, have their writing head in this layer.",
        writers,
    ),
    "readers": ProfileSpec(
        "Channels read",
        "flagged channels",
        "How many pairs of heads, flagged for a component that stands out of its null, have their reading head in this layer.",
        readers,
    ),
}
