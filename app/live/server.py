"""The resident process's ear for live work: a thread that answers between the batches of whatever job runs."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from app.live.imports import imported
from app.live.protocol import Answer, Question, key, socket_of

_WAITING = threading.Event()
"""Set while somebody waits for an answer."""
_ONE = threading.Lock()
ATTENDED = 120.0
"""Seconds after a question in which the next is expected."""
_asked_at = -math.inf
PAUSE = 0.01
"""Seconds that a job sleeps at the end of a batch to let a live request take the model."""
PATIENCE = 3.0
"""Seconds that a job lets live requests go first; a request that the job itself keeps from the model then waits for it."""


@contextmanager
def listening(jobs: Path) -> Iterator[None]:
    """Answer inside."""
    listener = Listener(socket_of(jobs), authkey=key())
    threading.Thread(target=_accept, args=(listener,), name="live", daemon=True).start()
    try:
        yield
    finally:
        with suppress(FileNotFoundError):  # a dashboard that ends removes the folder, and the socket with it
            listener.close()


def _accept(listener: Listener) -> None:
    while True:
        with suppress(OSError, EOFError, Exception):  # somebody who cannot prove himself is no reason to stop
            connection = listener.accept()
            threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: Connection) -> None:
    with connection, suppress(EOFError, OSError):
        while True:
            question = connection.recv()
            answer = _answer(question)
            connection.send(answer)
            if question.kind == "view" and not answer.refusal:
                # The page asks for the grids next: they are read while it draws what it has.
                _answer(Question("grids", answer.session, options=question.options))


def _answer(question: Question) -> Answer:
    imported()
    from app.live.answering import answer

    global _asked_at
    _asked_at = time.monotonic()
    with _ONE:
        _WAITING.set()
        try:
            return answer(question)
        except Exception as error:
            traceback.print_exc()
            return Answer(
                question.session,
                refusal=f"A fault of Bathyscope, not of your input: {type(error).__name__}: {error}",
                fault=True,
            )
        finally:
            _WAITING.clear()


def attended() -> bool:
    """Return whether somebody works live, by when the last question came."""
    return time.monotonic() - _asked_at < ATTENDED


def let_pass() -> None:
    """Let somebody who waits have the model; a job calls this between two batches."""
    rounds = 0
    while _WAITING.is_set() and rounds * PAUSE < PATIENCE:
        threading.Event().wait(PAUSE)
        rounds += 1
