"""The analyses on offer. Their names are known at once; their code brings torch, which takes seconds, and is imported when needed."""

from __future__ import annotations

import threading

from analyses.registry import every_analysis, get_analysis, names

__all__ = ["get_analysis", "label", "load", "load_soon", "names", "ready"]

_LOADED = threading.Event()
IMPORTER = "import-analyses"
DELAY = 4.0
"""Seconds."""


def label(name: str) -> str:
    """An analysis's name as a page shows it."""
    return name.replace("_", " ").capitalize()


def ready() -> bool:
    """Whether the analyses are imported, so that asking for them costs nothing."""
    return _LOADED.is_set()


def load() -> None:
    """Imports the analyses."""
    every_analysis()
    _LOADED.set()


def load_soon() -> None:
    """Imports the analyses in the background, a little later: the browser first draws the page it has."""
    if not ready() and not any(thread.name == IMPORTER for thread in threading.enumerate()):
        timer = threading.Timer(DELAY, load)
        timer.name, timer.daemon = IMPORTER, True
        timer.start()
