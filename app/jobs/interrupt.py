"""Stopping a job in the middle of a long batch: as Ctrl-C does on the command line, without ending the process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from app.jobs.progress import Cancelled
from app.jobs.protocol import CANCEL

PATIENCE = 1.5
"""Seconds that a job gets to stop by itself at the end of its batch."""
PERIOD = 0.2
"""Seconds between two looks for a wish to cancel."""


class Interrupt:
    """Raises `Cancelled` in the main thread where a job does not see by itself that it is to stop."""

    def __init__(self) -> None:
        self.struck = False
        """Whether the last job was stopped in the middle of something."""
        self._folder: Path | None = None

    def listen(self) -> None:
        """Begin to look for wishes to cancel; call it once, in the main thread."""
        signal.signal(signal.SIGUSR1, self._strike)
        threading.Thread(target=self._watch, name="interrupt", daemon=True).start()

    @contextmanager
    def during(self, folder: Path) -> Iterator[None]:
        """Within, the job of that folder can be stopped anywhere; its clean-up afterwards cannot."""
        self.struck, self._folder = False, folder
        try:
            yield
        finally:
            self._folder = None

    def _watch(self) -> None:
        while True:
            time.sleep(PERIOD)
            if self._folder is not None and overdue(self._folder):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _strike(self, signum: int, frame: FrameType | None) -> None:
        # The job may have ended since the signal was sent, and another begun. A half-imported module would stay
        # broken, so an import is waited for: the next signal comes soon.
        if self._folder is not None and overdue(self._folder) and not inside_import(frame):
            self._folder, self.struck = None, True
            raise Cancelled


def overdue(folder: Path) -> bool:
    """Whether a job was asked to stop longer ago than it takes patience."""
    try:
        return time.time() - (folder / CANCEL).stat().st_mtime > PATIENCE
    except OSError:
        return False


def inside_import(frame: FrameType | None) -> bool:
    """Whether a module is being imported in that frame or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
