"""Where Bathyscope keeps what can be fetched or computed again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_root() -> Path:
    """Return `$BATHYSCOPE_CACHE`, or the user's cache folder; holds `models` and, unless told otherwise, `store`."""
    return Path(os.environ.get("BATHYSCOPE_CACHE") or platformdirs.user_cache_dir("bathyscope")).expanduser()
