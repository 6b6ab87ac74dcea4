"""Where the dashboard reads and writes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from probes.cache_folder import cache_root, expanded
from probes.cache_folder import runs_root as runs_root
from probes.errors import OptionError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
"""What a run may be called: no separators, so that it stays in the folder of runs."""


def store_root() -> Path:
    """The activation store's folder, as every command finds it."""
    return expanded(os.environ.get("BATHYSCOPE_STORE") or cache_root() / "store").absolute()


def hosts() -> tuple[str, ...]:
    """Names besides those of this machine that browsers may use for the dashboard: `$BATHYSCOPE_HOSTS`, by commas."""
    return tuple(filter(None, os.environ.get("BATHYSCOPE_HOSTS", "").split(",")))


def prompts_root() -> Path:
    """Where prompt files of runs started here are kept, named by their content."""
    return runs_root() / ".prompts"


def run_folder(name: str) -> Path:
    """The folder of a new run of that name.

    Raises:
        OptionError: a name that is not a plain folder name.
    """
    if not NAME.fullmatch(name) or name.endswith("."):
        raise OptionError(
            f"run name {name!r}: use letters, digits, dots, dashes and underscores, beginning with a letter or digit"
        )
    return runs_root() / name


def run_name(analysis: str, model: str) -> str:
    """What a run is called that nobody named: by its analysis and the last part of its model's name."""
    last = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).name).strip("-.")[:40].strip("-.")
    return f"{analysis}-{last}" if last else analysis
