"""Where a part of a study was written: file and line, for messages."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.errors import UserError

Key = str | int


class StudyError(UserError):
    """A study that cannot be run; names file and line where it came from a file."""


@dataclass(frozen=True)
class Origin:
    """A place in a study file, as the keys that lead to it."""

    file: Path
    text: str
    path: tuple[Key, ...] = ()

    def child(self, *more: Key) -> Origin:
        """A place below this one."""
        return Origin(self.file, self.text, (*self.path, *more))

    @property
    def line(self) -> int:
        """The line of the key or header, from 1; that of the closest written parent where the place itself was not."""
        for length in range(len(self.path), 0, -1):
            found = _line(self.text, self.path[:length])
            if found:
                return found
        return 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def fault(message: str, origin: Origin | None, *more: Key) -> StudyError:
    """The error of a place in a study; a study made in Python has no file to name."""
    return StudyError(message if origin is None else f"{origin.child(*more)}: {message}")


def _line(text: str, path: tuple[Key, ...]) -> int | None:
    """The line at which the value at `path` begins, or None where it is not written.

    The standard parser gives no positions, but the value is in what it reads of the lines up to there and not before.
    """
    lines = text.split("\n")
    if not _has(_parsed(lines, len(lines)), path):
        return None
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        if _has(_parsed(lines, middle), path):
            high = middle
        else:
            low = middle
    # A statement over several lines is read only with its last one; it begins after the one before it.
    begin = _whole(lines, high - 1)
    if isinstance(path[-1], int):
        begin = next((n - 1 for n in range(begin + 1, high) if _has(_closed(lines, n), path)), high - 1)
    while begin < high - 1 and not lines[begin].split("#")[0].strip():
        begin += 1
    return begin + 1


def _whole(lines: list[str], n: int) -> int:
    """The most lines, at most `n`, that end with a statement."""
    while n and _read("\n".join(lines[:n])) is None:
        n -= 1
    return n


def _parsed(lines: list[str], n: int) -> Any:
    """What the whole statements among the first `n` lines say."""
    return _read("\n".join(lines[: _whole(lines, n)]))


def _closed(lines: list[str], n: int) -> Any:
    """What the first `n` lines say with the list that they leave open closed; None where that is no statement."""
    return _read("\n".join([*lines[:n], "]"]))


def _read(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


def _has(node: Any, path: tuple[Key, ...]) -> bool:
    for key in path:
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True
