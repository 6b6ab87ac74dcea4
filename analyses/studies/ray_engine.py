"""The Ray engine: captures as batch inference over an actor pool, cells as tasks; scheduling and retries are Ray's."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyses.studies.cells import Cell
from analyses.studies.ray_tasks import Batches, CaptureActor, pack_rows, plan_unit, run_one
from analyses.studies.run_cells import Captured, Event, Outcome, failed
from analyses.studies.scheduling import Unit
from analyses.studies.shared_captures import generates
from analyses.studies.study_folder import StudyFolder
from probes.errors import OptionError
from probes.store import ActivationStore

LOG = logging.getLogger("analyses.studies")
MOST_CPUS = 8
"""Processors of one actor or task, at most; a small model gains nothing from more."""
RETRIES = 3
"""How often a cell is run again after its process has died."""


@dataclass(frozen=True)
class Resources:
    """What one actor or task takes of the cluster."""

    cpus: int
    gpus: int
    copies: int
    """How many of them the cluster can hold at a time."""
    memory: int
    """Bytes of the smallest node, beyond which an actor would wait for ever."""

    def as_options(self) -> dict[str, Any]:
        """Return them as Ray takes them; a task on a GPU counts no processor beside it."""
        return {"num_gpus": self.gpus} if self.gpus else {"num_cpus": self.cpus}


def run_ray(
    units: Sequence[Unit], folder: StudyFolder, store: Path, address: str | None = None
) -> Iterator[tuple[Unit, Event]]:
    """Run the units on a Ray cluster; `store` and the folder must lie on a file system that every node shares.

    Raises:
        OptionError: Ray is not installed, or there is no cluster at the address.
    """
    with _cluster(address) as ray:
        one = ray.remote(max_retries=RETRIES)(run_one)
        waiting: dict[Any, tuple[Unit, Cell]] = {}
        for unit in units:
            needed = _resources(ray, unit)
            first = [cell for cell in unit.cells if generates(cell)]
            written = {one.options(**needed.as_options()).remote(c, _absolute(folder), store): (unit, c) for c in first}
            yield from _ended(ray, written, folder, until=0)
            rest = [cell for cell in unit.cells if not generates(cell)]
            if len(rest) > 1:
                planned = _plan(ray, unit, rest, store, needed, folder)
                if isinstance(planned, list):
                    yield from ((unit, outcome) for outcome in planned)
                    continue
                yield unit, _capture(ray, unit, planned, store, needed)
            for cell in rest:
                waiting[one.options(**needed.as_options()).remote(cell, _absolute(folder), store)] = unit, cell
            yield from _ended(ray, waiting, folder, until=needed.copies)
        yield from _ended(ray, waiting, folder, until=0)


def _absolute(folder: StudyFolder) -> StudyFolder:
    return StudyFolder(folder.root.absolute())


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Connect to the cluster; a connection that was made here ends with the run."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise OptionError("--engine ray needs Ray: pip install 'bathyscope[ray]'") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    starts_here = not ray.is_initialized()
    if starts_here:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            raise OptionError(f"no Ray cluster at --address {address!r}: {error}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        yield ray
    finally:
        if starts_here:
            ray.shutdown()


def _resources(ray: Any, unit: Unit) -> Resources:
    """Give each task a GPU where the cluster has any, else processors of its smallest node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    gpus, memory = int(sum(node.get("GPU", 0) for node in nodes)), int(min(node["memory"] for node in nodes))
    if gpus and unit.model.spec.device != "cpu":
        return Resources(0, 1, gpus, memory)
    cpus = max(1, min(MOST_CPUS, *(int(node["CPU"]) for node in nodes)))
    return Resources(cpus, 0, max(1, sum(int(node["CPU"]) // cpus for node in nodes)), memory)


def _plan(
    ray: Any, unit: Unit, cells: Sequence[Cell], store: Path, needed: Resources, folder: StudyFolder
) -> Batches | list[Outcome]:
    """Return the shared captures of these cells, or how all of them ended where the model cannot be loaded."""
    task = ray.remote(max_retries=RETRIES)(plan_unit).options(**needed.as_options())
    try:
        return ray.get(task.remote(list(cells), store))
    except Exception as error:
        cause = getattr(error, "cause", None)
        return [failed(cell, folder, cause if isinstance(cause, Exception) else error) for cell in cells]


def _capture(ray: Any, unit: Unit, planned: Batches, store: Path, needed: Resources) -> Captured:
    """Capture what is missing by batch inference; the shards are then taken into the store's catalogue."""
    rows = pack_rows(planned)
    if not rows:
        return Captured(0, 0)
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        CaptureActor,
        fn_constructor_args=(unit.model, planned.features, store),
        compute=ray.data.ActorPoolStrategy(size=min(needed.copies, len(rows))),
        memory=min(planned.memory, needed.memory),
        **needed.as_options(),
    )
    try:
        done = data.take_all()
    except ray.exceptions.RayError as error:
        LOG.warning("%s: the shared capture broke off (%s); its cells capture what is missing", unit.label, error)
        done = []
    # Opening the store indexes the shards that the actors left.
    ActivationStore(store)
    return Captured(sum(row["forwards"] for row in done), sum(row["bytes"] for row in done))


def _ended(
    ray: Any, waiting: dict[Any, tuple[Unit, Cell]], folder: StudyFolder, until: int
) -> Iterator[tuple[Unit, Event]]:
    """Yield what the tasks say as they end, until at most so many are left."""
    while len(waiting) > until:
        ready, _ = ray.wait(list(waiting))
        unit, cell = waiting.pop(ready[0])
        try:
            events = ray.get(ready[0])
        except Exception as error:
            events = [failed(cell, folder, error)]
        for event in events:
            yield unit, event
