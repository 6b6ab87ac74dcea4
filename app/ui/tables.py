"""Sortable tables that follow the selection, and from whose rows one can be made."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.selected_rows import named_by, narrowed
from app.selection import Selection, select
from app.ui.takeaway import table_downloads

SHOWN = 1000
"""Rows sent to the browser; downloads have all."""


def draw_table(table: pd.DataFrame, selection: Selection, stem: str, key: str, of: str) -> None:
    """A table with its downloads; chosen rows can become the selection, of the prompts `of`."""
    cut = narrowed(table, selection)
    said = (
        f"{len(cut):,} of {len(table):,} rows follow the selection."
        if len(cut) < len(table)
        else f"{len(table):,} rows."
    )
    if len(cut) > SHOWN:
        said += f" The first {SHOWN:,} are shown; downloads have all."
    st.caption(said)
    if not len(cut):
        st.info("No row is of the selection. Clear it in the side bar to see all.", icon=":material/filter_alt_off:")
        return
    shown = cut.head(SHOWN)
    state = st.dataframe(
        shown, hide_index=True, key=f"table:{key}", on_select="rerun", selection_mode="multi-row", height=330,
        alt=f"Table {stem}, {said}",
    )  # fmt: skip
    rows = [row for row in state.selection.rows if row < len(shown)]
    named = named_by(shown.iloc[rows]) if rows else {}
    if named:
        words = "; ".join(f"{kind} {', '.join(map(str, values[:6]))}" for kind, values in named.items())
        st.button(
            f"Select {words}", key=f"select:{key}", on_click=lambda: select(**named, of=of), icon=":material/ads_click:"
        )
    table_downloads(cut, stem, key)
