"""The folder of a study: a result per cell, what failed and why, and who is at work on what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from analyses.results import exchange
from analyses.results.output_folder import entries
from analyses.studies.cells import Cell
from analyses.studies.definition import Study
from probes.errors import OptionError
from probes.locked_files import write_whole


@dataclass(frozen=True)
class StudyFolder:
    """Paths of a study's folder, which several processes may share.

    `study.json`, `cells/NAME/` (results), `failed/NAME.json`, `locks/`, and once finished `index.parquet`,
    `profiles.parquet`, `tables/` and `report.html`.
    """

    root: Path

    @property
    def index(self) -> Path:
        """The table of its cells, written last."""
        return self.root / "index.parquet"

    @property
    def report(self) -> Path:
        """The page of the finished study."""
        return self.root / "report.html"

    def cell(self, name: str) -> Path:
        """Return the folder of a cell's result."""
        return self.root / "cells" / name

    def failure(self, name: str) -> Path:
        """Return the file that says why a cell failed."""
        return self.root / "failed" / f"{name}.json"

    def done(self, name: str) -> bool:
        """Whether the cell's result is there, whole."""
        return (self.cell(name) / "result.json").is_file()

    def check(self) -> None:
        """Refuse a folder that holds something other than a study.

        Raises:
            OptionError: it is a file, or holds other things.
        """
        if entries(self.root, "this study") and not (self.root / "study.json").is_file():
            raise OptionError(f"--out {str(self.root)!r} holds files that are not a study: give a new or empty folder")

    def prepare(self, study: Study, cells: Sequence[Cell]) -> bool:
        """Write down what the study is; return whether that has changed."""
        for name in ("cells", "failed", "locks"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        # What processes left that were killed while they saved.
        exchange.sweep(self.root / "cells")
        described = {"name": study.name, "title": study.title, "cells": {cell.name: cell.label for cell in cells}}
        text = json.dumps(described, indent=2, ensure_ascii=False)
        record = self.root / "study.json"
        if record.is_file() and record.read_text(encoding="utf-8") == text:
            return False
        write_whole(record, text)
        return True

    def fail(self, name: str, error: str, kind: str, trace: str = "") -> None:
        """Record why a cell failed."""
        failure = {"error": error, "kind": kind, "traceback": trace}
        write_whole(self.failure(name), json.dumps(failure, indent=2, ensure_ascii=False))

    def why(self, name: str) -> dict[str, Any] | None:
        """Return the recorded failure of a cell, or None."""
        path = self.failure(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process may run the cell: False while another one does."""
        lock = FileLock(self.root / "locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            exchange.sweep(self.root / "cells")
            yield True
        finally:
            lock.release()
