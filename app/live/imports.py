"""Imports that begin when the dashboard or its worker starts, before anybody asks."""

from __future__ import annotations

import gc
import threading

from probes.models.imported import MODULES, import_all, uncollected

AHEAD = ("app.live.answering", *MODULES)
"""What loading and reading a model imports."""
NAME = "import-ahead"


def import_ahead() -> None:
    """Import in another thread; what needs a model calls `imported` first, so that no module is imported by two threads."""
    threading.Thread(target=_import, name=NAME, daemon=True).start()


def _import() -> None:
    with uncollected():
        import_all(AHEAD)
        gc.freeze()  # what was imported stays, and is not looked through for garbage while somebody waits


def imported() -> None:
    """Wait for the imports, where any were begun."""
    for thread in threading.enumerate():
        if thread.name == NAME:
            thread.join()
