"""A run of the benchmark: tasks through all contestants on two processes, and the folder that keeps it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from analyses.ground_truth.answers import Answer, digest, from_json, to_json
from probes.errors import ModelError, OptionError
from probes.planted.record import Kind, Record, Tier

if TYPE_CHECKING:
    # Processes start working before this one has what scores their answers.
    from analyses.ground_truth.score import Scored

PROCESSES = 2
QUICK = ("C1", "D1", "E1", "F1", "G1", "J2", "K1", "M1", "N1", "O1")
"""Tasks of a quick run: every kind of question, and every method, on a small one of each family but A, B, H, I and L."""
FURTHER_SEEDS = tuple(range(1, 6))
FURTHER: Mapping[Kind, tuple[str, ...]] = {
    "mending": ("C1", "C3"), "channel": ("E1", "E2", "E3", "E4"), "pivot": ("F1", "F2", "F3", "F4"),
    "redundant": ("G1", "G2", "G3", "G4"), "norm": ("J1", "J2"), "order": ("M1", "M2"), "subspace": ("O1",),
}  # fmt: skip
"""Kinds that one or two families ask, too few clusters for an interval, and compiled tasks that ask them at further seeds."""
PRELOADED = "analyses.ground_truth.preloaded"
DEV_SEEDS = tuple(range(5))
"""Seeds that are public, on which methods may be mended."""


def seed_of_release(release: str, task: str) -> int:
    """Return the seed of a task that exists from a release's tag on: nobody has seen it before."""
    return int(hashlib.sha256(f"depthbench:{release}{task}".encode()).hexdigest()[:7], 16)


@dataclass(frozen=True)
class Ran:
    """What one run gave."""

    answers: tuple[Answer, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...]
    """Of runs that were refused."""
    seconds: float

    @property
    def digest(self) -> str:
        """A digest of all answers, without the seconds they took."""
        return digest(self.answers)

    @property
    def scored(self) -> Scored:
        """The answers held against the truth."""
        from analyses.ground_truth.score import score

        return score(self.answers, records=self.records)

    def save(self, folder: str | Path) -> Path:
        """Write `answers.json`, `records.json`, `run.json`, `tables/*.parquet` and `report.html`; return the folder."""
        from analyses.ground_truth.report import render
        from analyses.results.provenance import versions

        folder = Path(folder)
        (folder / "tables").mkdir(parents=True, exist_ok=True)
        scored = self.scored
        (folder / "answers.json").write_text(to_json(self.answers), encoding="utf-8")
        records = [json.loads(record.to_json()) for record in self.records]
        (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
        about = {"digest": self.digest, "seconds": self.seconds, "notes": self.notes, "versions": versions()}
        (folder / "run.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        scored.rows.to_parquet(folder / "tables" / "rows.parquet", index=False)
        scored.summary.to_parquet(folder / "tables" / "summary.parquet", index=False)
        page = render(self.records, scored, digest=self.digest, seconds=self.seconds, notes=self.notes)
        (folder / "report.html").write_text(page, encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Ran:
        """Read a run that was saved.

        Raises:
            OptionError: the folder holds none.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            records = json.loads((folder / "records.json").read_text(encoding="utf-8"))
            answers = from_json((folder / "answers.json").read_text(encoding="utf-8"))
            truths = tuple(Record.from_json(json.dumps(record)) for record in records)
            return cls(tuple(answers), truths, tuple(about["notes"]), float(about["seconds"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{folder} holds no run of the benchmark ({error}); give a folder that one wrote"
            ) from None


@dataclass(frozen=True)
class Job:
    """One task for all contestants."""

    task: str
    seed: int
    methods: tuple[str, ...]
    kinds: tuple[Kind, ...] = ()
    """Kinds of questions that are asked; all where none is named."""


def further_jobs(tiers: Sequence[Tier], methods: tuple[str, ...]) -> list[Job]:
    """Return the tasks of `FURTHER` at `FURTHER_SEEDS`, where their tier is among these, each for its kind alone."""
    pairs = [(task, kind) for kind, tasks in FURTHER.items() for task in tasks] if "compiled" in tiers else []
    return [Job(task, seed, methods, (kind,)) for task, kind in pairs for seed in FURTHER_SEEDS]


def chosen_tasks(tiers: Sequence[Tier], names: Sequence[str], quick: bool) -> list[str]:
    """Return the ids of the tasks to run: those named, or all of the tiers, or of these the quick ones.

    Raises:
        OptionError: none is left.
    """
    from probes import planted

    known = [task for tier in tiers for task in planted.tasks(tier)]
    tasks = list(names) or [task for task in known if not quick or task in QUICK]
    if not tasks:
        raise OptionError(f"no task of tiers {', '.join(tiers)} is left: name tasks, or other tiers")
    return tasks


def run_bench(
    jobs: Sequence[Job],
    processes: int = PROCESSES,
    note: Callable[[str], object] = str,
    advance: Callable[[], object] = str,
) -> Ran:
    """Run every job; each process has one thread and takes the next job when it is free.

    Args:
        note: receives a line for each run that is refused, and each task that is left out for want of a certificate.
        advance: called when a task is finished.
    """
    started = time.perf_counter()
    results: dict[Job, Outcome] = {}
    if processes == 1:
        for job in jobs:
            results[job] = _work(job)[1]
            advance()
    else:
        # Forked from a process that has imported everything and run nothing, so that they share no threads or locks of
        # this one's torch.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        with context.Pool(processes, initializer=_one_thread) as pool:
            for job, result in pool.imap_unordered(_work, jobs):
                results[job] = result
                advance()
    answers, records, notes = [], [], []
    for job in jobs:
        text, record, lines = results[job]
        answers += from_json(text)
        records += [Record.from_json(record)] if record else []
        notes += lines
    for line in notes:
        note(line)
    return Ran(tuple(answers), tuple(records), tuple(notes), time.perf_counter() - started)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


Outcome = tuple[str, str, list[str]]
"""Answers and record as JSON texts, which are smaller than models, and notes; no record where a task has no certificate."""


def _work(job: Job) -> tuple[Job, Outcome]:
    """Answer a task in this process."""
    from analyses.ground_truth.contestants import answer_task
    from probes import ActivationStore, from_hf, planted

    notes: list[str] = []
    try:
        task = planted.task(job.task, seed=job.seed)
    except ModelError as error:
        return job, ("[]", "", [f"{job.task}@{job.seed} is left out: {error}"])
    if job.kinds:
        questions = tuple(question for question in task.record.questions if question.kind in job.kinds)
        task = replace(task, record=replace(task.record, questions=questions))
    model = from_hf(task.module, tokenizer=task.tokenizer, ref=task.ref)
    with tempfile.TemporaryDirectory(prefix="bathyscope-bench-") as folder:
        answers = answer_task(task, model, ActivationStore(folder), job.methods, notes.append)
    return job, (to_json(answers), task.record.to_json(), notes)
