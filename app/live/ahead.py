"""Being ready before the first question: the first example is answered while the browser loads the Live page."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from app.live.examples import EXAMPLES


@dataclass(frozen=True)
class Ahead:
    """An ASGI application before which the first example is answered as soon as a browser navigates to the Live page."""

    app: ASGIApp
    begun: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on every request."""
        if scope["type"] == "http" and _opens_live(scope) and not self.begun.is_set():
            self.begun.set()
            threading.Thread(target=answer_first, daemon=True).start()
        await self.app(scope, receive, send)


def _opens_live(scope: Scope) -> bool:
    # Only a navigation: no foreign page has a model loaded by naming this address as a picture. A link has its own session.
    navigates = (b"sec-fetch-dest", b"document") in scope["headers"]
    return navigates and scope["path"].rstrip("/").endswith("/live") and not scope["query_string"]


def answer_first() -> None:
    """Ask the resident process for the first example, so that it is known when the page asks."""
    from app.jobs.queue import queue
    from app.live.client import ask
    from app.live.protocol import Question

    with suppress(Exception):  # the page asks again, and says what is wrong
        for kind in ("view", "grids"):
            ask(queue(), Question(kind, next(iter(EXAMPLES.values()))))  # type: ignore[arg-type]
