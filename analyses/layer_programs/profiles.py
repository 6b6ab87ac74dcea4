"""What layer programs say of each layer."""

from __future__ import annotations

import pandas as pd

from analyses.layer_programs.reading import LOWER_IS_BETTER
from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import columns


def _single(tables: Tables, kind: str) -> pd.DataFrame:
    """Return the gain of leaving out, or of repeating, each block alone; of the first metric, more being better."""
    table = tables["jumps"]
    metric = table["metric"].iloc[0]
    rows = table[(table["metric"] == metric) & (table["kind"] == kind) & (table["span"] == 1)]
    rows = rows.assign(layer=rows[["leave", "enter"]].min(axis=1))
    if metric in LOWER_IS_BETTER:
        rows = rows.assign(mean=-rows["mean"], ci_low=-rows["ci_high"], ci_high=-rows["ci_low"])
    return rows


def skip_cost(tables: Tables) -> pd.DataFrame:
    """Return what leaving each block out costs, of the first metric."""
    rows = _single(tables, "skip")
    rows = rows.assign(mean=-rows["mean"], ci_low=-rows["ci_high"], ci_high=-rows["ci_low"])
    return columns(rows, "mean", "ci_low", "ci_high")


def repeat_gain(tables: Tables) -> pd.DataFrame:
    """Return what running each block twice gains, of the first metric."""
    return columns(_single(tables, "repeat"), "mean", "ci_low", "ci_high")


def commutator(tables: Tables) -> pd.DataFrame:
    """Return the size of what is lost in exchanging each block with the next."""
    table = tables["pairs"]
    return columns(table[~table["first_token"]], "commutator_median")


def _has_single(tables: Tables) -> bool:
    return "jumps" in tables and bool((tables["jumps"]["span"] == 1).any())


PROFILES = {
    "skip_cost": ProfileSpec(
        "Cost of a skip",
        "change of the metric",
        "How much worse the first metric is without this block; below 0 the model does better without it.",
        skip_cost,
        _has_single,
    ),
    "repeat_gain": ProfileSpec(
        "Gain of a repeat",
        "change of the metric",
        "How much better the first metric is when this block runs twice in a row; below 0 the repeat does harm.",
        repeat_gain,
        _has_single,
    ),
    "commutator": ProfileSpec(
        "Order of neighbours",
        "share of what the pair adds",
        "Median size of the error of exchanging this block with the next, over the size of what both add to the stream; 0 where they commute.",
        commutator,
        lambda tables: "pairs" in tables,
    ),
}
