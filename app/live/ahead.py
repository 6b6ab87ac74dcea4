"""Being ready before the first question: imports when the dashboard starts, the model while the browser loads the Live page."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module

from starlette.types import ASGIApp, Receive, Scope, Send

MODULES = (
    "app.live.answering", "transformers.modeling_utils", "transformers.modeling_layers",
    "transformer_lens.factories.architecture_adapter_factory", "transformer_lens.model_bridge.sources._bridge_builder",
)  # fmt: skip
"""What loading and reading a model imports, which takes longer than the model itself."""

_IMPORTED = threading.Event()
_BEGUN = threading.Event()


def import_ahead() -> None:
    """Import in another thread; what needs a model calls `imported` first, so that no module is imported by two threads."""
    threading.Thread(target=_import, name="import-ahead", daemon=True).start()


def _import() -> None:
    try:
        for name in MODULES:
            with suppress(Exception):  # whoever needs it meets the error, and says it
                import_module(name)
    finally:
        _IMPORTED.set()


def imported() -> None:
    """Wait for the imports, where any were begun."""
    if any(thread.name == "import-ahead" for thread in threading.enumerate()):
        _IMPORTED.wait()


@dataclass(frozen=True)
class Ahead:
    """An ASGI application before which the first example is answered as soon as a browser navigates to the Live page."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on every request."""
        if scope["type"] == "http" and _opens_live(scope) and not _BEGUN.is_set():
            _BEGUN.set()
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
    from app.ui.live_desk import EXAMPLES

    with suppress(Exception):  # the page asks again, and says what is wrong
        for kind in ("view", "grids"):
            ask(queue(), Question(kind, next(iter(EXAMPLES.values()))))  # type: ignore[arg-type]
