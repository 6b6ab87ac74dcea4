"""Being ready before the first question: the model of the first example is loaded when the dashboard starts, and answers it."""

from __future__ import annotations

import os
import threading
from importlib import import_module

from app.jobs.queue import queue
from app.live import kept
from app.live.client import ProcessEnded, ask
from app.live.examples import EXAMPLES
from app.live.protocol import Question
from app.offered import FIRST

SWITCH = "BATHYSCOPE_PRELOAD"
"""The variable of the environment that is 0 where no model is to be loaded before it is asked for."""
PAGE = "app.views.live"
"""The first page."""
NEXT = "app.views.home"
"""The page likely to be seen next. It imports pandas, which also Streamlit needs for the first grid."""
DRAWN = 2.0
"""Seconds until a browser has drawn the page that waits for the model, and leaves a processor to others."""


def first() -> str:
    """Return the session that the Live page opens with."""
    return next(iter(EXAMPLES.values()))


def import_page() -> None:
    """Import what the first page shows, before it is asked for, and soon the next; from here on the first example is under way."""
    if os.environ.get(SWITCH) != "0" and kept.at_hand(first()):
        FIRST.set()
    import_module(PAGE)
    waits = FIRST.is_set() and kept.recall(first()) is None
    soon = threading.Timer(DRAWN if waits else 0.0, import_module, (NEXT,))
    soon.daemon = True
    soon.start()


def answer_first() -> None:
    """Ask the resident process for the first example, where its model is here, and keep what it answers."""
    if not FIRST.is_set():
        return
    try:
        view, grids = (ask(queue(), Question(kind, first())) for kind in ("view", "grids"))  # type: ignore[arg-type]
        if not view.refusal and not grids.refusal:
            kept.keep(first(), view.session, {**view.data, "grids": grids.data})
    except ProcessEnded:
        return  # the page asks again, and says what is wrong
    finally:
        FIRST.clear()
