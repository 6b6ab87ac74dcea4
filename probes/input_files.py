"""Files and folders a user names: what stands at a path, and the text of a file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

from probes.errors import UserError, shown

Kind = Literal["file", "folder", "device or pipe", "nothing"]

MAX_TEXT = 256 * 2**20
"""Bytes of a file that is read whole."""


def kind_of(path: str | Path) -> Kind:
    """Return what stands at a path; at a path that no system call accepts, nothing does."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116, as below
    except (OSError, ValueError):
        return "nothing"
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "device or pipe"


@contextmanager
def opened(path: str | Path, what: str, kind: type[UserError]) -> Iterator[TextIO]:
    """Open a file of UTF-8 text for reading; a byte order mark is skipped.

    Faults while it is read are raised in the same way.

    Args:
        what: what the file is to the reader, for messages: `prompt file`.
        kind: the class of error raised.

    Raises:
        kind: no file, a folder, a device or pipe (which may never end), no permission, or no UTF-8.
    """
    name = f"{what} {shown(str(path))}"
    try:
        # A pipe would keep us waiting for its other end, and a device may have no end.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            raise kind(f"{name} is a {kind_of(path)}: give a file")
        with open(path, encoding="utf-8-sig") as handle:  # noqa: PTH123, a text may hold what no Path accepts
            yield handle
    except FileNotFoundError:
        raise kind(f"{name} does not exist: give the path of a file") from None
    except UnicodeDecodeError as error:
        raise kind(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise kind(f"{name} cannot be read ({error.strerror}): give a file that can be") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise kind(f"{name} is no path ({error}): give the path of a file") from None


def read_text(path: str | Path, what: str, kind: type[UserError]) -> str:
    """Return the whole text of a file.

    Raises:
        kind: as `opened`, or more than `MAX_TEXT` characters.
    """
    with opened(path, what, kind) as handle:
        text = handle.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise kind(f"{what} {shown(str(path))} is longer than {MAX_TEXT:,} characters: give a smaller one")
    return text


def make_folder(folder: Path, what: str, kind: type[UserError]) -> Path:
    """Create a folder, with its parents, where it is not there yet; returns it.

    Raises:
        kind: the path is too long, runs through a file, or may not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise kind(
            f"{what} {shown(str(folder))} cannot be made ({reason}): give a folder that can be written"
        ) from None
    return folder
