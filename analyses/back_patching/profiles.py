"""What back-patching says of each layer."""

from __future__ import annotations

import pandas as pd

from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import mean_by_layer

ROWS = ["prompt", "position_name"]


def _gain(tables: Tables, layer: str) -> pd.DataFrame:
    grid = tables["grid"]
    gained = grid.assign(gain=grid["answer_logprob"] - grid["baseline_logprob"])
    return mean_by_layer(gained[gained[layer] >= 0], "gain", ROWS, layer)  # -1 is the embedding


def target_gain(tables: Tables) -> pd.DataFrame:
    """Return the mean gain of the answer's log-probability by the layer that a later state is put into."""
    return _gain(tables, "target_layer")


def source_gain(tables: Tables) -> pd.DataFrame:
    """Return the mean gain of the answer's log-probability by the layer that the state is taken from."""
    return _gain(tables, "source_layer")


PROFILES = {
    "target_gain": ProfileSpec(
        "Back-patching gain, by target",
        "nats of the answer",
        "Change of the answer's log-probability when a later layer's state replaces this layer's output, averaged over the source layers "
        "and questions tried. Above 0 the answer becomes more probable.",
        target_gain,
    ),
    "source_gain": ProfileSpec(
        "Back-patching gain, by source",
        "nats of the answer",
        "Change of the answer's log-probability when this layer's state is put back into an earlier one, averaged over the target layers "
        "and questions tried.",
        source_gain,
    ),
}
