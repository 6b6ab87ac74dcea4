"""Imports that begin when the dashboard or its worker starts, before anybody asks."""

from __future__ import annotations

import threading
from contextlib import suppress
from importlib import import_module

from probes.models.imported import MODULES

AHEAD = ("app.live.answering", *MODULES)
"""What loading and reading a model imports."""
NAME = "import-ahead"


def import_ahead() -> None:
    """Import in another thread; what needs a model calls `imported` first, so that no module is imported by two threads."""
    threading.Thread(target=_import, name=NAME, daemon=True).start()


def _import() -> None:
    for name in AHEAD:
        with suppress(Exception):  # whoever needs it meets the error, and says it
            import_module(name)


def imported() -> None:
    """Wait for the imports, where any were begun."""
    for thread in threading.enumerate():
        if thread.name == NAME:
            thread.join()
