"""Progress of a job: written for the dashboard to read, and stopped where it asks for that."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

from app.jobs.protocol import Phase, Status, cancel_asked, write_status
from app.live.server import attended, let_pass
from probes.progress import Progress

PAUSE = 0.1
"""Seconds between two rewrites of a status."""
SHORT = 512
"""Padded tokens per forward while somebody works live, who waits for it to end; such a capture takes a twelfth longer."""
NOTES = 12
"""Lines kept of what is said."""


class Cancelled(KeyboardInterrupt):
    """A user wants the job to stop; what was committed stays, as after Ctrl-C on the command line."""


class JobProgress(Progress):
    """Writes how far a job is, and stops it where somebody asked for that."""

    def __init__(self, folder: Path, closing: threading.Event) -> None:
        self.folder, self.closing = folder, closing
        self.status = Status("running", what="starting", began=time.time())
        self._written = 0.0
        self.publish()

    @property
    def batch_tokens(self) -> int | None:
        return SHORT if attended() else None

    def enter(self, phase: Phase, what: str = "") -> None:
        """The job comes to its next phase, in which nothing is counted yet."""
        self.status = replace(self.status, phase=phase)
        self.start(0, what)

    def start(self, total: int, what: str) -> None:
        self.status = replace(self.status, what=what, done=0, total=total, began=time.time())
        self.publish()

    def advance(self, done: int = 1) -> None:
        self.status = replace(self.status, done=self.status.done + done)
        if time.time() - self._written >= PAUSE:
            self.publish()
        self._check()
        let_pass()

    def note(self, line: str) -> None:
        self.status = replace(self.status, notes=(*self.status.notes, line)[-NOTES:])
        self.publish()

    def publish(self) -> None:
        """Write the status, then stop where that was asked for."""
        self._written = time.time()
        write_status(self.folder, self.status)
        self._check()

    def _check(self) -> None:
        if self.closing.is_set() or cancel_asked(self.folder):
            raise Cancelled
