"""The analyses on offer. Their names are known at once; their code brings torch, which takes seconds, and is imported when needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import streamlit as st

from analyses.registry import get_analysis, names

__all__ = ["LOADED", "get_analysis", "label", "load_soon", "names", "put_off", "shown_while_importing"]

LOADED = threading.Event()
"""Set once the analyses are imported."""
FIRST = threading.Event()
"""Set while the first example of the Live page is answered, which comes first: somebody may look at it."""
_BEGUN = threading.Event()
_LOCK = threading.Lock()
_TIMER: threading.Timer | None = None
DELAY = 4.0
"""Seconds."""


def label(name: str) -> str:
    """An analysis's name as a page shows it."""
    return name.replace("_", " ").capitalize()


@contextmanager
def shown_while_importing() -> Iterator[None]:
    """Show why the page waits while what happens inside imports analyses for the first time."""
    first = not LOADED.is_set()
    with st.spinner("Importing the analysis; this takes a few seconds, once.") if first else nullcontext():
        yield


def load_soon() -> None:
    """Import the analyses in the background, a little later: the browser first draws the page it has."""
    global _TIMER
    with _LOCK:
        if not _BEGUN.is_set():
            if _TIMER is not None:
                _TIMER.cancel()
            _TIMER = threading.Timer(DELAY, _load)
            _TIMER.daemon = True
            _TIMER.start()


@contextmanager
def put_off() -> Iterator[None]:
    """Put off an import that waits, while somebody waits for an answer inside and a little longer."""
    if _TIMER is not None:
        _TIMER.cancel()
    try:
        yield
    finally:
        if _TIMER is not None:
            load_soon()


def _load() -> None:
    if FIRST.is_set():
        load_soon()
        return
    _BEGUN.set()
    for name in names():
        with suppress(Exception):  # its own page says what is wrong with it
            get_analysis(name)
    LOADED.set()
