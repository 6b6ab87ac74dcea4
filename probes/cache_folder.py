"""Where Bathyscope keeps what can be fetched or computed again, where runs are saved, and paths that begin with ~."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def expanded(path: str | Path) -> Path:
    """Return a path with `~` and `~user` replaced by that user's home folder; as it is, like a shell, where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_root() -> Path:
    """Return `$BATHYSCOPE_CACHE`, or the user's cache folder; holds `models`, `pages` and, unless told otherwise, `store`."""
    return expanded(os.environ.get("BATHYSCOPE_CACHE") or platformdirs.user_cache_dir("bathyscope"))


def runs_root() -> Path:
    """Return the folder of saved runs: `$BATHYSCOPE_RUNS`, or `runs` where the program was started."""
    return expanded(os.environ.get("BATHYSCOPE_RUNS") or "runs").absolute()
