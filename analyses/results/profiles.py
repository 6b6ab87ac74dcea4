"""Helpers for depth profiles: what an analysis says of each layer, from its tables alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from analyses.results.card import Tables
from analyses.results.statistics import cluster_bootstrap


def columns(table: pd.DataFrame, value: str, low: str | None = None, high: str | None = None) -> pd.DataFrame:
    """Columns layer, value and, where named, ci_low and ci_high, ordered by layer."""
    names = {value: "value", **({low: "ci_low", high: "ci_high"} if low and high else {})}
    return table[["layer", *names]].rename(columns=names).sort_values("layer").reset_index(drop=True)


def named_rows(
    table: str, column: str, name: str, low: str = "ci_low", high: str = "ci_high"
) -> tuple[Callable[[Tables], pd.DataFrame], Callable[[Tables], bool]]:
    """How a profile is read off the rows of a long table whose `column` is `name`, and whether there are such rows."""

    def rows(tables: Tables) -> pd.DataFrame:
        return tables[table][tables[table][column] == name]

    return lambda tables: columns(rows(tables), "mean", low, high), lambda tables: len(rows(tables)) > 0


def mean_by_layer(table: pd.DataFrame, value: str, rows: list[str], layer: str = "layer") -> pd.DataFrame:
    """Mean of `value` per layer with a 95 % interval from resampling whole prompts.

    Args:
        rows: columns that, with the layer, name a row of the table; the first is `prompt`.
    """
    wide = table.pivot_table(index=rows, columns=layer, values=value, aggfunc="mean").dropna()
    interval = cluster_bootstrap(wide.to_numpy(dtype=float), wide.index.get_level_values(rows[0]).to_numpy())
    bounds = {"value": interval.mean, "ci_low": interval.low, "ci_high": interval.high}
    return pd.DataFrame({"layer": wide.columns.astype(int), **bounds})


def counts(layers: pd.Series, n_layers: int) -> pd.DataFrame:
    """How often each of `n_layers` layers occurs."""
    counted = np.bincount(layers.to_numpy(dtype=int), minlength=n_layers)
    return pd.DataFrame({"layer": np.arange(n_layers), "value": counted})
