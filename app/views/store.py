"""The activation store: what is held, whether it is sound, and making room."""

from __future__ import annotations

import streamlit as st

from app.places import store_root
from app.ui.takeaway import table_downloads
from probes.errors import UserError


def draw() -> None:
    """The page."""
    from analyses.cli.store import parse_size
    from probes.preflight import human

    st.title("Activation store", anchor=False)
    root = store_root()
    st.caption(
        f"Folder: `{root}`. Rows captured once are read by every analysis; evicted ones are captured again when needed."
    )
    try:
        store = _store(str(root))
        table, held = store.ls(), store.bytes_held()
    except UserError as error:
        st.error(str(error), icon=":material/database_off:")
        return
    left, middle, right = st.columns(3)
    left.metric("Held", human(held))
    middle.metric("Shards", int(table["shards"].sum()))
    right.metric("Models and settings", len(table))
    if len(table):
        shown = table.assign(size=[human(b) for b in table["bytes"]], weights=table["weights"].str[:12])
        st.dataframe(
            shown.drop(columns="bytes"),
            hide_index=True,
            key="store:ls",
            alt="What the store holds, one line per model and setting",
        )
        table_downloads(table, "store", "store")
    else:
        st.info("The store is empty: the first run fills it.", icon=":material/water:")
    st.subheader("Is it sound?", anchor=False)
    if st.button(
        "Verify every shard",
        key="store:verify",
        icon=":material/verified:",
        help="Reads every byte against its checksum.",
    ):
        with st.spinner(f"Reading {human(held)} …"):
            report = store.verify()
        said = f"{report.checked:,} shards ({human(report.bytes)}) checked, {len(report.damaged)} damaged."
        if report.damaged:
            st.error(
                f"{said} Set aside, to be captured again: {', '.join(report.damaged)}", icon=":material/heart_broken:"
            )
        else:
            st.success(said, icon=":material/check_circle:")
    st.subheader("Make room", anchor=False)
    size = st.text_input(
        "Keep at most", "20GB", key="store:size", help="Such as 20GB or 512MiB; least recently used shards go first."
    )
    sure = st.checkbox("Evict what is above that size. A run that is reading keeps its shards.", key="store:sure")
    if st.button("Evict", disabled=not sure, key="store:evict", icon=":material/delete_sweep:"):
        try:
            report = store.gc(parse_size(size))
        except UserError as error:
            st.error(str(error), icon=":material/block:")
            return
        st.success(
            f"{len(report.evicted):,} shards evicted, {human(report.bytes_freed)} freed, {human(report.bytes_held)} held now."
        )


@st.cache_resource(max_entries=2, show_spinner=False)
def _store(root: str):  # type: ignore[no-untyped-def]
    from probes.store import ActivationStore

    return ActivationStore(root)
