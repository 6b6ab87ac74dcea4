"""A window on prompts that are too long to be read at once."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

WIDTH = 32
"""Positions of a prompt that a figure shows at once."""


def tells_positions(table: pd.DataFrame) -> bool:
    """Whether the rows of a table are about positions of prompts."""
    return {"prompt", "position"} <= set(table) and pd.api.types.is_integer_dtype(table["position"])


def longest(tables: Mapping[str, pd.DataFrame]) -> int:
    """One more than the last position that any table tells of; 0 where none tells positions."""
    ends = [int(table["position"].max()) + 1 for table in tables.values() if tells_positions(table) and len(table)]
    return max(ends, default=0)


def is_long(tables: Mapping[str, pd.DataFrame]) -> bool:
    """Whether a table tells of more positions of one prompt than fit into the window."""
    return any(
        len(table) and int(table.groupby("prompt")["position"].nunique().max()) > WIDTH
        for table in tables.values()
        if tells_positions(table)
    )


def windowed(table: pd.DataFrame, end: int) -> pd.DataFrame:
    """The rows of the `WIDTH` positions before `end`, or before the end of a prompt that is shorter."""
    if not tells_positions(table):
        return table
    stop = (table.groupby("prompt")["position"].transform("max") + 1).clip(upper=end)
    return table[(table["position"] < stop) & (table["position"] >= stop - WIDTH)]


def first_shown(tables: Mapping[str, pd.DataFrame]) -> int:
    """The first position of the first prompt that is drawn."""
    known = [table for table in tables.values() if tells_positions(table) and len(table)]
    return min((int(t["position"][t["prompt"] == t["prompt"].min()].min()) for t in known), default=0)
