"""The page's side of live work: a question, an answer, and a process that is started where there is none."""

from __future__ import annotations

import time
from multiprocessing.connection import Client, Connection

from app.jobs.queue import JobQueue
from app.live.protocol import Answer, Question, key, socket_of

START = 60.0
"""Seconds that a process gets to open its ear."""


class ProcessEnded(Exception):
    """The resident process ended while it answered."""


def ask(queue: JobQueue, question: Question) -> Answer:
    """Return the answer of the resident process, which is started where there is none; asked once more if it ends.

    Raises:
        ProcessEnded: it ended twice, for instance for want of memory.
    """
    for attempt in (1, 2):
        try:
            with _connection(queue) as connection:
                connection.send(question)
                answer = connection.recv()
                assert isinstance(answer, Answer)
                return answer
        except (EOFError, OSError) as error:
            if attempt == 2:
                raise ProcessEnded(
                    "The model process ended while it answered, perhaps for want of memory. The session is kept: try "
                    "again, with a shorter prompt or a smaller model."
                ) from error
    raise AssertionError


def _connection(queue: JobQueue) -> Connection:
    queue.ensure()
    until = time.monotonic() + START
    while True:
        try:
            return Client(socket_of(queue.folder), authkey=key())
        # The last two: a process that is being killed still accepts for a moment.
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, EOFError):
            if time.monotonic() > until:
                raise
            queue.ensure()
            time.sleep(0.03)
