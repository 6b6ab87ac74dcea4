"""What dashboard and worker say to each other: one folder a job, with a request, a status and perhaps a wish to cancel.

The dashboard writes `request.json` and then the job's name as a line to the worker's standard input. The worker rewrites
`status.json` (whole, by rename) while it works. A file `cancel` asks it to stop at the next batch, or soon within a long one.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from analyses.running.model_spec import ModelSpec
from probes.locked_files import write_whole

Kind = Literal["run", "estimate", "check"]
Phase = Literal["", "loading", "planning", "running", "saving"]
PHASES: tuple[Phase, ...] = ("loading", "running", "saving")
"""What a job goes through, in order."""
State = Literal["queued", "running", "done", "refused", "failed", "cancelled"]
CANCEL = "cancel"
"""The file that asks a job to stop."""
ENDED = ("done", "refused", "failed", "cancelled")


@dataclass(frozen=True)
class Request:
    """What the worker is asked to do."""

    kind: Kind
    model: ModelSpec
    analysis: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    prompts: str | None = None
    """The prompt file, or None where the analysis makes its own."""
    store: str = ""
    out: str = ""
    """Folder of the result."""
    edits: tuple[str, ...] = ()
    """Lines under which the model is read."""


@dataclass(frozen=True)
class Status:
    """How far a job is."""

    state: State = "queued"
    phase: Phase = ""
    what: str = ""
    """What is being counted, for instance `forward`; or what is being done."""
    done: int = 0
    total: int = 0
    began: float = 0.0
    """When this count began, in seconds of the clock."""
    notes: tuple[str, ...] = ()
    message: str = ""
    """Why it ended, where it did not end well."""
    lines: tuple[str, ...] = ()
    """The cost, as a user reads it."""
    answer: dict[str, Any] = field(default_factory=dict)
    """What a check found, or counts of a run."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def share(self) -> float | None:
        """How much of the present count is done, from 0 to 1; None where nothing is counted."""
        if self.phase == "saving":
            return 1.0  # all counts are done by then
        return min(1.0, self.done / self.total) if self.total else None

    def remaining(self, now: float | None = None) -> float | None:
        """Seconds this count will still take, by its pace so far; None where nothing is known."""
        if not self.done or not self.total or self.done >= self.total:
            return None
        elapsed = (time.time() if now is None else now) - self.began
        return elapsed * (self.total - self.done) / self.done


def write_request(folder: Path, request: Request) -> None:
    """Put a new job into `folder`."""
    folder.mkdir(parents=True)
    write_whole(folder / "request.json", json.dumps(asdict(request), default=str))
    write_status(folder, Status())


def read_request(folder: Path) -> Request:
    """The request of a job."""
    record = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    return Request(**{**record, "model": ModelSpec(**record["model"]), "edits": tuple(record["edits"])})


def write_status(folder: Path, status: Status) -> None:
    """Replace the job's status as a whole."""
    write_whole(folder / "status.json", json.dumps(asdict(status), default=str))


def read_status(folder: Path) -> Status:
    """The job's status."""
    record = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    return Status(**{**record, "notes": tuple(record["notes"]), "lines": tuple(record["lines"])})


def ask_to_cancel(folder: Path) -> None:
    """Ask the worker to stop this job."""
    (folder / CANCEL).touch()


def cancel_asked(folder: Path) -> bool:
    """Whether somebody wants this job to stop."""
    return (folder / CANCEL).exists()
