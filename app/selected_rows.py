"""What a selection keeps of a table, and what rows of a table name."""

from __future__ import annotations

from typing import Any

import pandas as pd

from app.selection import HEADS, LAYERS, Selection


def narrowed(table: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """The rows of a table that the selection names, as far as its columns say."""
    keep = pd.Series(True, index=table.index)
    if selection.layers and (columns := [c for c in LAYERS if c in table]):
        keep &= table[columns].isin(selection.layers).any(axis=1)
    if selection.prompts and "prompt" in table:
        keep &= table["prompt"].isin(selection.prompts)
    if selection.tokens and "position" in table and pd.api.types.is_integer_dtype(table["position"]):
        keep &= table["position"].isin(selection.tokens)
    pairs = [pair for pair in HEADS if set(pair) <= set(table)]
    if selection.heads and pairs:
        keep &= pd.concat([_head_names(table, pair).isin(selection.heads) for pair in pairs], axis=1).any(axis=1)
    return table[keep]


def _head_names(table: pd.DataFrame, pair: tuple[str, str]) -> pd.Series:
    return table[pair[0]].astype(str) + "." + table[pair[1]].astype(str)


def named_by(rows: pd.DataFrame) -> dict[str, Any]:
    """What chosen rows of a table name, by kind."""
    named: dict[str, Any] = {}
    columns = {"layers": [c for c in LAYERS if c in rows], "prompts": ["prompt"], "tokens": ["position"]}
    for kind, names in columns.items():
        whole = [c for c in names if c in rows and pd.api.types.is_integer_dtype(rows[c])]
        values = sorted({int(v) for c in whole for v in rows[c]})
        if values:
            named[kind] = values
    heads = [name for pair in HEADS if set(pair) <= set(rows) for name in _head_names(rows, pair)]
    if heads:
        named["heads"] = list(dict.fromkeys(heads))
    return named
