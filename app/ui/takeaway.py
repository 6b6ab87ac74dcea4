"""What can be carried off: images, pages, tables, and the commands that make them again."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from analyses.results.result import Result
from app.places import store_root
from app.saved import Run
from app.ui.figures import data_of
from probes.errors import UserError

MIME = {"svg": "image/svg+xml", "png": "image/png", "html": "text/html", "csv": "text/csv"}
KEYS_SHOWN = 200
"""Store keys listed on a page; the others are in the run's result.json."""


def figure_downloads(make: Callable[[], go.Figure], stem: str, key: str) -> None:
    """Buttons for a figure in every format; nothing is rendered before one is pressed."""
    with st.popover("Download", icon=":material/download:", key=f"popover:{key}"):
        images = importlib.util.find_spec("kaleido") is not None
        for kind in ("svg", "png") if images else ():
            _button(kind.upper(), f"{stem}.{kind}", MIME[kind], partial(_image, make, kind), key)
        if not images:
            st.caption(
                "SVG and PNG from here need kaleido: `pip install 'bathyscope[images]'`. The camera above a figure saves SVG without it."
            )
        _button("HTML", f"{stem}.html", MIME["html"], lambda: _page(make()), key)
        _button("CSV", f"{stem}.csv", MIME["csv"], lambda: data_of(make()).to_csv(index=False).encode(), key)
        _button("Parquet", f"{stem}.parquet", None, lambda: parquet(data_of(make())), key)


def table_downloads(table: pd.DataFrame, stem: str, key: str) -> None:
    """Buttons for a table."""
    left, right, _ = st.columns([1, 1, 5])
    with left:
        _button("CSV", f"{stem}.csv", MIME["csv"], lambda: table.to_csv(index=False).encode(), key)
    with right:
        _button("Parquet", f"{stem}.parquet", None, lambda: parquet(table), key)


def parquet(table: pd.DataFrame) -> bytes:
    """A table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _button(label: str, name: str, mime: str | None, make: Callable[[], bytes], key: str) -> None:
    st.download_button(label, make, file_name=name, mime=mime, key=f"download:{key}:{label}", on_click="ignore")


def _page(figure: go.Figure) -> bytes:
    return str(figure.to_html(include_plotlyjs=True)).encode()


def _image(make: Callable[[], go.Figure], kind: str) -> bytes:
    return bytes(make().to_image(format=kind, scale=2 if kind == "png" else 1, width=1100))


def rebuild(run: Run, result: Result) -> None:
    """The command line and the Python that make a run again, and the store keys it read."""
    from analyses.running import reproduce

    folder = Path("runs") / run.name
    with st.expander("Make this run again", icon=":material/terminal:", key=f"rebuild:{run.name}"):
        if reproduce.prompts_of(result) == reproduce.PROMPTS:
            st.caption(f"This run does not say which prompt file it read: put yours in place of `{reproduce.PROMPTS}`.")
        try:
            st.code(reproduce.command(result, folder, store_root()), language="bash", wrap_lines=True)
            st.code(reproduce.python(result, folder, store_root()), language="python", wrap_lines=True)
        except UserError as error:
            st.caption(f"No command makes it again: {error}")
        keys = list(result.provenance.get("store_keys", []))
        st.caption(
            f"It read {len(keys):,} shards of the activation store."
            + ("" if keys else " It worked on weights or on interventions alone.")
        )
        if keys:
            st.code("\n".join(keys[:KEYS_SHOWN]), language=None, height=140)
