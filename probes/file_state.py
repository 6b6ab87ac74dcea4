"""What tells, without reading it, that a file is as it was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FileState = tuple[str, int, int, int]
"""Path, inode, bytes and time of the last change."""


def file_states(paths: Iterable[Path]) -> tuple[FileState, ...]:
    """Return the state of every file, in the order of their paths.

    Raises:
        OSError: a file that is not there.
    """
    stats = [(path, path.stat()) for path in sorted(paths)]
    return tuple((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
