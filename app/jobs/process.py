"""The worker process: begun before all else, since what it imports takes longest, and handed to the queue once there is one."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from app.live.protocol import KEY

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_ARENA_MAX": "1"}
"""Has glibc keep what is freed: logits come and go, and fresh pages for each cost a tenth of the time. The threads that answer live
work would otherwise have arenas of their own, which give everything above 64 MB back at once."""
ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds `app`."""

Worker = tuple[Path, "subprocess.Popen[str] | None"]
"""A folder of jobs and the process that does them."""

_BEGUN: list[Worker] = []


def begin() -> None:
    """Start a worker for the queue that is made next."""
    folder = _folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _BEGUN.append((folder, start(folder)))


def begun() -> Worker:
    """Return the worker that was begun, or a folder without one."""
    return _BEGUN.pop() if _BEGUN else (_folder(), None)


def start(folder: Path) -> subprocess.Popen[str]:
    """Start a process that does the jobs of a folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "app.jobs.worker", str(folder)],
        stdin=subprocess.PIPE,
        text=True,
        env={**MALLOC, **os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


def _folder() -> Path:
    os.environ.setdefault(KEY, secrets.token_hex(32))
    return Path(tempfile.mkdtemp(prefix="bathyscope-jobs-"))
