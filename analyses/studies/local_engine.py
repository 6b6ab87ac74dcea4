"""The local engine: worker processes with a device each, which die with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from analyses.studies.definition import StudyModel
from analyses.studies.run_cells import Event, ModelHolder, Outcome, Started, run_unit
from analyses.studies.scheduling import Unit, take
from analyses.studies.study_folder import StudyFolder
from probes.models.imported import MODULES
from probes.store import ActivationStore

FORKSERVER = multiprocessing.get_context("forkserver")
PRELOADED = ("analyses.studies.run_cells", *MODULES)
"""Imported once, by the process that workers are forked from; it touches no device."""


@dataclass(frozen=True)
class Finished:
    """A worker has nothing left of its unit."""


def devices(workers: int | None) -> list[str]:
    """Return a device for each worker: every CUDA device, or the processors shared out."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return ["cpu"] * (workers or 1)
    return [f"cuda:{i % count}" for i in range(workers or count)]


def processors() -> int:
    """Return how many processors this process may use, within its affinity and its container's limit."""
    from joblib import cpu_count

    return max(1, int(cpu_count()))


def run_local(
    units: Sequence[Unit], folder: StudyFolder, store: Path, workers: int | None = None
) -> Iterator[tuple[Unit, Event]]:
    """Run the units; yield what happens, as it happens. With 0 workers, in this process.

    A worker that dies takes only the cell it was running with it.
    """
    if workers == 0:
        models, activations = ModelHolder(), ActivationStore(store)
        for unit in units:
            for event in run_unit(unit, models, activations, folder):
                yield unit, event
        return
    places = devices(workers)[: len(units)]
    threads = max(1, processors() // len(places))
    waiting = list(units)
    team = [_Worker(device, threads, folder, store) for device in places]
    try:
        while waiting or any(worker.unit for worker in team):
            for worker in team:
                if waiting and worker.unit is None:
                    others = [other.model for other in team if other is not worker]
                    worker.give(take(waiting, worker.model, others))
            busy = {worker.connection: worker for worker in team if worker.unit}
            for connection in wait(list(busy)):
                yield from _receive(busy[connection], waiting)  # type: ignore[index]
    finally:
        for worker in team:
            worker.stop()


def _receive(worker: _Worker, waiting: list[Unit]) -> Iterator[tuple[Unit, Event]]:
    """Take one message of a worker, or what follows from its death."""
    assert worker.unit is not None
    unit = worker.unit
    try:
        event = worker.connection.recv()
    except (EOFError, ConnectionError):
        lost, left = worker.give_up()
        waiting[:0] = [left] if left else []
        yield from ((unit, outcome) for outcome in lost)
        return
    worker.note(event)
    if not isinstance(event, Finished):
        yield unit, event


class _Worker:
    """A process that runs one unit after the other; started when it first gets one."""

    def __init__(self, device: str, threads: int, folder: StudyFolder, store: Path) -> None:
        self._arguments = (device, threads, folder, store)
        self.folder = folder
        self.unit: Unit | None = None
        self.model: StudyModel | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self._ended: set[str] = set()
        self._running: str | None = None
        self.connection: Connection

    def give(self, unit: Unit) -> None:
        """Hand a unit to the process, a new one where there is none or the old one has died while it waited."""
        if self._process is None or not self._process.is_alive():
            self.stop()
            FORKSERVER.set_forkserver_preload(list(PRELOADED))
            self.connection, far = FORKSERVER.Pipe()
            self._process = FORKSERVER.Process(target=_serve, args=(far, *self._arguments), daemon=True)
            self._process.start()
            far.close()
        self.unit, self.model, self._ended, self._running = unit, unit.model, set(), None
        self.connection.send(unit)

    def note(self, event: Event | Finished) -> None:
        """Note what a message says of the unit in hand."""
        if isinstance(event, Started):
            self._running = event.cell
        elif isinstance(event, Outcome):
            self._ended.add(event.cell)
            self._running = None
        elif isinstance(event, Finished):
            self.unit = None

    def give_up(self) -> tuple[list[Outcome], Unit | None]:
        """Return the cells that a dead worker takes with it, recorded as failed, and those that can still be run."""
        assert self.unit is not None
        assert self._process is not None
        self._process.join()
        left = [cell for cell in self.unit.cells if cell.name not in self._ended]
        lost = [cell for cell in left if cell.name == self._running] or left
        reason = _reason(self._process.exitcode, self._running is None)
        for cell in lost:
            self.folder.fail(cell.name, reason, "WorkerDied")
        others = tuple(cell for cell in left if cell not in lost)
        self.stop()
        self.unit, self.model = None, None
        return [Outcome(cell.name, "failed", error=reason) for cell in lost], Unit(others) if others else None

    def stop(self) -> None:
        """End the process; what it had committed stays."""
        if self._process is not None:
            self.connection.close()
            self._process.kill()
            self._process.join()
            self._process = None


def _reason(exitcode: int | None, before_any: bool) -> str:
    ended = signal.Signals(-exitcode).name if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
    memory = (
        "; most often the memory ran out: give fewer workers or a smaller dtype" if exitcode == -signal.SIGKILL else ""
    )
    while_doing = "loading the model or capturing" if before_any else "running this cell"
    return f"the worker process ended by {ended} while {while_doing}{memory}"


def _serve(connection: Connection, device: str, threads: int, folder: StudyFolder, store: Path) -> None:
    """Run the units that come over the connection, until it closes."""
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    os.environ |= {"LOKY_MAX_CPU_COUNT": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    threadpool_limits(threads)
    models, activations = ModelHolder(device), ActivationStore(store)
    while True:
        try:
            unit = connection.recv()
            for event in run_unit(unit, models, activations, folder):
                connection.send(event)
            connection.send(Finished())
        except (EOFError, ConnectionError):
            return


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
