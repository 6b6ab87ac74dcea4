"""The dashboard's script, which `app/server.py` serves."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if sys.path[0] != ROOT:
    sys.path.insert(0, ROOT)

import streamlit as st  # noqa: E402

from app import offered  # noqa: E402
from app.selection import KEY, KINDS, OF, current, params_of  # noqa: E402
from app.ui import keep, selector  # noqa: E402
from app.ui.theme import mode, page_style  # noqa: E402


def pages() -> dict[str, list[object]]:
    """Every page: home, one for each registered analysis, and what belongs to all of them."""
    return {
        "": [
            st.Page(partial(_view, "live"), title="Live", icon=":material/touch_app:", url_path="live"),
            st.Page(partial(_view, "home"), title="Home", icon=":material/water:", default=True),
        ],
        "Analyses": [
            st.Page(
                partial(_view, "analysis", name), title=offered.label(name), url_path=name, icon=":material/layers:"
            )
            for name in offered.names()
        ],
        "Kept": [
            st.Page(partial(_view, "runs"), title="Runs", url_path="runs", icon=":material/folder_open:"),
            st.Page(partial(_view, "store"), title="Store", url_path="store", icon=":material/database:"),
            st.Page(partial(_view, "model"), title="Model", url_path="model", icon=":material/fact_check:"),
        ],
    }


def _view(name: str, *given: str) -> None:
    """Draw a page, whose code is imported when it is first asked for."""
    with offered.shown_while_importing() if name in ("analysis", "model") else nullcontext():
        view = import_module(f"app.views.{name}")
    view.draw(*given)


def _working() -> None:
    """Jobs under way that this page does not show."""
    from app.jobs.queue import queue
    from app.ui import progress

    for name in queue().active():
        if name not in progress.shown():
            st.caption(f":material/hourglass_top: Under way: {progress.title_of(queue().request(name))}")


def main() -> None:
    """Draw the page that the address names, then the side bar, which may follow what the page offers."""
    st.set_page_config(page_title="Bathyscope", page_icon="🔭", layout="wide")
    st.html(page_style(mode()))
    keep.keep()
    current()
    page = st.navigation(pages(), expanded=True)
    st.session_state["jobs-shown"] = set()
    page.run()
    with st.sidebar:
        _working()
        selector.draw()
    _address()
    offered.load_soon()


def _address() -> None:
    """Keep the selection in the address, so that it can be sent to somebody."""
    params = params_of(st.session_state[KEY])
    for kind in (*KINDS, OF):
        if kind in params and st.query_params.get(kind) != params[kind]:
            st.query_params[kind] = params[kind]
        elif kind not in params and kind in st.query_params:
            del st.query_params[kind]


main()
