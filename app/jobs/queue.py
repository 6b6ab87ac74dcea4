"""The dashboard's side of the worker: one process, one line of jobs, shared by all sessions."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
import weakref
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import streamlit as st

from app.jobs.process import begun, start
from app.jobs.protocol import (
    CANCEL,
    Request,
    Status,
    ask_to_cancel,
    cancel_asked,
    read_request,
    read_status,
    write_request,
    write_status,
)
from app.live.protocol import socket_of

KEPT = 30
"""Ended jobs whose folders are kept."""
GRACE = 90.0
"""Seconds after which a job that cannot be interrupted, since one call outside Python takes so long, is stopped with its process."""


class JobQueue:
    """Hands jobs to the worker and reads how far they are."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[str] | None
        self.folder, self._worker = begun()
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._lock = threading.RLock()
        self._names: list[str] = []
        self._ended: dict[str, Status] = {}
        self._last = 0

    def submit(self, request: Request) -> str:
        """Add a job to the line; return its name. The folder of a run is numbered where its name is taken."""
        with self._lock:
            self.ensure()
            if request.kind == "run":
                request = replace(request, out=str(self.free(Path(request.out))))
            self._last += 1
            name = f"{self._last:06d}"
            write_request(self.folder / name, request)
            self._names.append(name)
            self._tell(name)
            self._forget()
            return name

    def free(self, folder: Path) -> Path:
        """`folder`, or it with the first number under which there is nothing, and no job under way will put anything."""
        promised = {self.request(name).out for name in self.active()}
        numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
        return next(f for f in chain([folder], numbered) if not os.path.lexists(f) and str(f) not in promised)

    def request(self, name: str) -> Request:
        """What a job was asked to do."""
        return read_request(self.folder / name)

    def knows(self, name: str | None) -> bool:
        """Whether the job is still remembered."""
        return name in self._names

    def active(self) -> list[str]:
        """Jobs that wait or run, in order."""
        return [name for name in list(self._names) if not self.status(name).ended]

    def status(self, name: str) -> Status:
        """How far a job is; one whose worker died has failed."""
        with self._lock:
            if name in self._ended:
                return self._ended[name]
            status = read_status(self.folder / name)
            if not status.ended:
                status = self._overdue(name, status)
            if status.ended:
                self._ended[name] = status
            return status

    def cancel(self, name: str) -> None:
        """Ask a job to stop; one that only waits never starts."""
        ask_to_cancel(self.folder / name)

    def cancelling(self, name: str) -> bool:
        """Whether a job was asked to stop."""
        return cancel_asked(self.folder / name)

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            if self._worker is not None:
                self._worker.kill()
                self._worker.wait()
                self._worker = None

    def _overdue(self, name: str, status: Status) -> Status:
        code = self._worker.poll() if self._worker is not None else -1
        folder = self.folder / name
        if code is not None:
            why = f"The worker process ended (exit code {code}), perhaps for want of memory. What was captured stays; run it again."
            ended = replace(status, state="failed", message=why)
        elif cancel_asked(folder) and time.time() - (folder / CANCEL).stat().st_mtime > GRACE:
            self.close()
            why = "Stopped with its process, since it did not stop by itself. What was captured stays in the store."
            ended = replace(status, state="cancelled", message=why)
        else:
            return status
        write_status(folder, ended)
        self._resume(name)
        return ended

    def _resume(self, name: str) -> None:
        """Give the jobs behind `name` to a new worker."""
        behind = self._names[self._names.index(name) + 1 :]
        waiting = [other for other in behind if not read_status(self.folder / other).ended]
        self._worker = None
        for other in waiting:
            self._tell(other)

    def ensure(self) -> None:
        """Start the worker where none runs."""
        with self._lock:
            if self._worker is not None and self._worker.poll() is not None:
                # What ran in it has failed, which only the dead worker tells.
                for name in self.active():
                    self.status(name)
            if self._worker is None or self._worker.poll() is not None:
                Path(socket_of(self.folder)).unlink(missing_ok=True)
                self._worker = self._start()

    def _tell(self, name: str) -> None:
        self.ensure()
        assert self._worker is not None
        assert self._worker.stdin is not None
        self._worker.stdin.write(name + "\n")
        self._worker.stdin.flush()

    def _start(self) -> subprocess.Popen[str]:
        return start(self.folder)

    def _forget(self) -> None:
        for name in [name for name in self._names if name in self._ended][:-KEPT]:
            self._names.remove(name)
            self._ended.pop(name)
            shutil.rmtree(self.folder / name, ignore_errors=True)


@st.cache_resource(max_entries=1, show_spinner=False)
def queue() -> JobQueue:
    """The one queue of this server."""
    return JobQueue()
