"""The activation store: what is held, whether it is sound, and making room."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from analyses.cli.store import parse_size
from app.places import store_root
from app.ui.takeaway import table_downloads
from probes.errors import UserError
from probes.html_card import size
from probes.store import ActivationStore


def draw() -> None:
    """The page."""
    st.title("Activation store", anchor=False)
    root = store_root()
    st.caption(
        f"Folder: `{root}`. Rows captured once are read by every analysis; evicted ones are captured again when needed."
    )
    try:
        store = _store(str(root))
        table, stored_bytes = store.ls(), store.bytes_held()
    except UserError as error:
        st.error(str(error), icon=":material/database_off:")
        return
    _contents(table, stored_bytes)
    _verify(store, stored_bytes)
    _evict(store)


def _contents(table: pd.DataFrame, stored_bytes: int) -> None:
    left, middle, right = st.columns(3)
    left.metric("Held", size(stored_bytes))
    middle.metric("Shards", int(table["shards"].sum()))
    right.metric("Models and settings", len(table))
    if not len(table):
        st.info("The store is empty: the first run fills it.", icon=":material/water:")
        return
    shown = table.assign(size=[size(b) for b in table["bytes"]], weights=table["weights"].str[:12])
    words = "What the store holds, one line per model and setting"
    st.dataframe(shown.drop(columns="bytes"), hide_index=True, key="store:ls", alt=words)
    table_downloads(table, "store", "store")


def _verify(store: ActivationStore, stored_bytes: int) -> None:
    st.subheader("Is it sound?", anchor=False)
    words = "Reads every byte against its checksum."
    if not st.button("Verify every shard", key="store:verify", icon=":material/verified:", help=words):
        return
    with st.spinner(f"Reading {size(stored_bytes)} …"):
        report = store.verify()
    said = f"{report.checked:,} shards ({size(report.bytes)}) checked, {len(report.damaged)} damaged."
    if report.damaged:
        names = ", ".join(report.damaged)
        st.error(f"{said} Set aside, to be captured again: {names}", icon=":material/heart_broken:")
    else:
        st.success(said, icon=":material/check_circle:")


def _evict(store: ActivationStore) -> None:
    st.subheader("Make room", anchor=False)
    words = "Such as 20GB or 512MiB; least recently used shards go first."
    limit = st.text_input("Keep at most", "20GB", key="store:size", help=words)
    sure = st.checkbox("Evict what is above that size. A run that is reading keeps its shards.", key="store:sure")
    if not st.button("Evict", disabled=not sure, key="store:evict", icon=":material/delete_sweep:"):
        return
    try:
        report = store.gc(parse_size(limit))
    except UserError as error:
        st.error(str(error), icon=":material/block:")
        return
    freed, left = size(report.bytes_freed), size(report.bytes_held)
    st.success(f"{len(report.evicted):,} shards evicted, {freed} freed, {left} held now.")


@st.cache_resource(max_entries=2, show_spinner=False)
def _store(root: str) -> ActivationStore:
    return ActivationStore(root)
