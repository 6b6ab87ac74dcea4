"""The worker process: `python -m app.jobs.worker FOLDER`, job names on standard input, one line each."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from queue import Queue

from app.jobs.interrupt import Interrupt
from app.jobs.progress import NOTES, JobProgress
from app.jobs.protocol import Status, read_request, write_status
from app.live import server as live
from app.live.imports import import_ahead, imported
from probes.errors import UserError

MERCY = 10.0
"""Seconds that a running job gets to stop by itself once the dashboard is gone."""


def work(folder: Path, closing: threading.Event, interrupt: Interrupt | None = None) -> None:
    """Does the job in `folder`; every ending is written to its status."""
    progress: JobProgress | None = None
    notes: tuple[str, ...] = ()
    interrupt = interrupt or Interrupt()
    try:
        progress = JobProgress(folder, closing)
        from app.jobs.execute import do

        with interrupt.during(folder):
            answer = do(read_request(folder), progress)
        ended = replace(progress.status, state="done", answer=answer)
    except KeyboardInterrupt:
        ended = Status(
            "cancelled", message="Cancelled. What was captured stays in the store: the same run goes on from there."
        )
    except UserError as error:
        ended = Status("refused", message=str(error))
    except MemoryError:
        ended = Status("failed", message="Out of memory: use fewer or shorter prompts, or a smaller model.")
    except Exception as error:
        notes = tuple(traceback.format_exc().splitlines()[-NOTES:])
        ended = Status("failed", message=f"A fault of Bathyscope, not of your input: {type(error).__name__}: {error}")
    if interrupt.struck:
        _drop_model()
    if progress is not None and ended.state != "done":
        ended = replace(ended, notes=notes or progress.status.notes, lines=progress.status.lines)
    write_status(folder, ended)


def _drop_model() -> None:
    """A model that was stopped in the middle of a forward may keep a hook of it: the next job loads it anew."""
    from app.jobs.models import drop

    drop()


def main(jobs: Path) -> None:
    """Does jobs in the order they are named, until the dashboard is gone."""
    waiting: Queue[str | None] = Queue()
    closing = threading.Event()
    interrupt = Interrupt()
    interrupt.listen()

    def listen() -> None:
        for line in sys.stdin:
            waiting.put(line.strip())
        closing.set()
        waiting.put(None)
        time.sleep(MERCY)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    import_ahead()
    with live.listening(jobs):
        while (name := waiting.get()) is not None:
            imported()
            work(jobs / name, closing, interrupt)
    gc.unfreeze()  # what stays frozen, libraries report as leaked when the process ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
