"""The analyses on offer. Their names are known at once; their code brings torch, which takes seconds, and is imported when needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import streamlit as st

from analyses.registry import get_analysis, names

__all__ = ["get_analysis", "importing", "label", "load_soon", "names"]

_LOADED = threading.Event()
IMPORTER = "import-analyses"
DELAY = 4.0
"""Seconds."""


def label(name: str) -> str:
    """An analysis's name as a page shows it."""
    return name.replace("_", " ").capitalize()


@contextmanager
def importing() -> Iterator[None]:
    """Show why the page waits while what happens inside imports analyses for the first time."""
    first = not _LOADED.is_set()
    with st.spinner("Importing the analysis; this takes a few seconds, once.") if first else nullcontext():
        yield


def load_soon() -> None:
    """Import the analyses in the background, a little later: the browser first draws the page it has."""
    if not _LOADED.is_set() and not any(thread.name == IMPORTER for thread in threading.enumerate()):
        timer = threading.Timer(DELAY, _load)
        timer.name, timer.daemon = IMPORTER, True
        timer.start()


def _load() -> None:
    for name in names():
        with suppress(Exception):  # its own page says what is wrong with it
            get_analysis(name)
    _LOADED.set()
