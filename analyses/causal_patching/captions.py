"""The line above every figure: what was patched into what, what was read, and on how many pairs."""

from __future__ import annotations

from collections.abc import Iterable

import plotly.graph_objects as go

from analyses.results.card import Tables
from analyses.results.theme import plain

DIRECTIONS = {"denoise": "denoising: clean into corrupted", "noise": "noising: corrupted into clean"}


def run_line(tables: Tables, directions: Iterable[str], further: str = "") -> str:
    """Say on what a figure was made: directions, metric, corruption and pairs kept."""
    pairs = tables["pairs"]
    metric = pairs["metric"].iloc[0]
    each = pairs[pairs["metric"] == metric]
    ways = " and ".join(DIRECTIONS[direction].split(":")[0] for direction in dict.fromkeys(directions))
    kept = f"{int(each['kept'].sum())} of {len(each)} pairs"
    return ", ".join(
        part for part in (ways, metric, f"{pairs['corruption'].iloc[0]} corruption", kept, further) if part
    )


def captioned(figure: go.Figure, tables: Tables, directions: Iterable[str], further: str = "") -> go.Figure:
    """Return a figure with that line above it."""
    return figure.update_layout(title={"text": plain(run_line(tables, directions, further)), "font": {"size": 12}})
