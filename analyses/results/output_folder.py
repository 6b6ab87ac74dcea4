"""What may stand at `--out`: nothing, an empty folder, or what the same command wrote before."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from analyses.results.exchange import sweep
from analyses.results.record import FORMAT, parse
from probes.errors import OptionError, UserError

_KINDS: Mapping[Callable[[int], bool], str] = {
    stat.S_ISLNK: "a symbolic link",
    stat.S_ISREG: "a file",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
}


def entries(folder: Path, what: str) -> list[str]:
    """The names in an output folder; none where it is still to be made.

    Args:
        what: what may be written over, for the message: `a result`.

    Raises:
        OptionError: it is no folder, cannot be read, or cannot be made.
    """
    legal = f"give a new or empty folder, or one that holds {what}"
    try:
        mode = os.lstat(folder).st_mode
        if stat.S_ISDIR(mode):
            return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        _check_parent(folder.parent, folder)
        return []
    except (OSError, ValueError) as error:
        raise OptionError(f"--out {str(folder)!r} cannot be used ({error}): {legal}") from error
    kind = next((name for test, name in _KINDS.items() if test(mode)), "no folder")
    raise OptionError(f"--out {str(folder)!r} is {kind}: {legal}")


def check_output(folder: Path) -> frozenset[str]:
    """The files that saving a result in `folder` may replace: those of the result that is there.

    Raises:
        OptionError: the path is no folder, or the folder holds other things and no result of this format.
    """
    sweep(folder.parent)
    names = entries(folder, "a result")
    if not names:
        return frozenset()
    if os.path.ismount(folder):
        raise OptionError(f"--out {str(folder)!r} is where a disk is mounted: give a folder inside it")
    try:
        record = parse(folder / "result.json")
    except (OSError, ValueError):
        record = {}
    if "format" not in record or not isinstance(record.get("analysis"), str):
        raise OptionError(f"--out {str(folder)!r} holds files that are not a result: give a new or empty folder")
    if record["format"] != FORMAT:
        raise OptionError(f"--out {str(folder)!r} holds a result of format {record['format']!r}: give another folder")
    return _files(record)


def _files(record: Mapping[str, Any]) -> frozenset[str]:
    """The files a result says it wrote; results of the first release did not say, and wrote these."""
    said = record.get("files")
    if isinstance(said, list):
        return frozenset(name for name in said if isinstance(name, str))
    from analyses.registry import get_analysis

    try:
        figures = [f"figures/{name}.json" for name in get_analysis(record["analysis"]).figures]
    except UserError:
        figures = []
    tables = record.get("tables")
    named = [f"tables/{name}.parquet" for name in tables] if isinstance(tables, dict) else []
    return frozenset(["result.json", "profiles.json", "report.html", *figures, *named])


def _check_parent(parent: Path, folder: Path) -> None:
    """Refuse a folder that cannot be made."""
    try:
        while not os.path.lexists(parent):
            parent = parent.parent
        possible = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:
        raise OptionError(f"--out {str(folder)!r} cannot be made ({error}): give another folder") from error
    if not possible:
        why = "cannot be written" if parent.is_dir() else "is no folder"
        raise OptionError(f"--out {str(folder)!r} cannot be made: {str(parent)!r} {why}; give another folder")
