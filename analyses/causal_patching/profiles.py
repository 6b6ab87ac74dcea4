"""What causal patching says of each layer."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.causal_patching.figures import decision_window, first_metric
from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import columns

END = ("end", "-1")


def _streams(tables: Tables, direction: str) -> pd.DataFrame:
    table = first_metric(tables)
    return table[(table["component"] == "resid_post") & (table["direction"] == direction)]


def denoise_end(tables: Tables) -> pd.DataFrame:
    """Return the share that the last position's stream brings back."""
    table = _streams(tables, "denoise")
    return columns(table[table["role"].isin(END)], "recovery", "ci_low", "ci_high")


def noise_source(tables: Tables) -> pd.DataFrame:
    """Return the share that is lost with the stream of the position that matters most before the last."""
    table = _streams(tables, "noise")
    table = table[~table["role"].isin(END)]
    strongest = table.groupby("role")["recovery"].sum().idxmax()
    return columns(table[table["role"] == strongest], "recovery", "ci_low", "ci_high")


def window_profile(tables: Tables) -> pd.DataFrame:
    """Return 1 inside the decision window and 0 outside, of each layer."""
    layers = np.sort(first_metric(tables)["layer"].unique())
    window = decision_window(tables["window"])
    assert window is not None
    inside = (layers >= min(window)) & (layers <= max(window))
    return pd.DataFrame({"layer": layers, "value": inside.astype(float)})


def _several(tables: Tables, direction: str) -> bool:
    table = _streams(tables, direction)
    return len(table) > 0 and bool(
        table["role"].isin(END).any() if direction == "denoise" else (~table["role"].isin(END)).any()
    )


PROFILES = {
    "denoise_end": ProfileSpec(
        "Answer at the last position",
        "share of the gap",
        "Share of the gap between corrupted and clean run that comes back when the last position's stream after this layer is copied from the "
        "clean run; from where it is near 1 on, the answer is carried there.",
        denoise_end,
        lambda tables: _several(tables, "denoise"),
    ),
    "noise_source": ProfileSpec(
        "Need of the source position",
        "share of the gap",
        "Share of the gap that is lost when the stream after this layer is copied from the corrupted run, at the position before the last whose "
        "loss costs most; where it falls to 0, the answer no longer needs that row.",
        noise_source,
        lambda tables: _several(tables, "noise"),
    ),
    "decision_window": ProfileSpec(
        "Decision window",
        "inside or not",
        "1 from the last layer at which a changed position is still needed to the layer from which the last position carries the answer, 0 "
        "elsewhere.",
        window_profile,
        lambda tables: decision_window(tables["window"]) is not None,
    ),
}
