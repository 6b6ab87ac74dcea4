"""The dashboard's server: `bathyscope app`, or `streamlit run app/server.py`. Streamlit behind the gate, so that no way leads round it."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
if sys.path[0] != ROOT:
    sys.path.insert(0, ROOT)

import streamlit as st  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from app import offered  # noqa: E402
from app.gate import Gate, known  # noqa: E402
from app.jobs.queue import queue  # noqa: E402
from app.live import ahead  # noqa: E402
from app.places import hosts  # noqa: E402
from probes.models.imported import uncollected  # noqa: E402

SOON = 0.3
"""Seconds after which the browser is opened: the port is bound right after start-up."""


@asynccontextmanager
async def opening(_: Any) -> AsyncIterator[None]:
    """Has the first example answered ahead, and opens a browser window unless the server is headless."""
    threading.Thread(target=_prepare, daemon=True).start()
    if not st.get_option("server.headless"):
        asyncio.get_running_loop().call_later(SOON, webbrowser.open, url())
    yield


def _prepare() -> None:
    queue().ensure()
    with uncollected():
        ahead.import_page()
        # Streamlit collects garbage after every run of a page, which holds up its last words: what was imported is left out
        # of that, a fifth of a second each time once the analyses are there.
        gc.freeze()
    ahead.answer_first()
    offered.LOADED.wait()
    gc.collect()
    gc.freeze()


def url() -> str:
    """Where this machine's browser finds the dashboard."""
    return f"http://{st.get_option('browser.serverAddress')}:{st.get_option('server.port')}"


app = st.App(
    Path(__file__).with_name("main.py"), lifespan=opening, middleware=[Middleware(Gate, names=known(hosts()))]
)  # fmt: skip
