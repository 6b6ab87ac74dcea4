"""Where a part of a study was written: file and line, for messages."""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
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

    def child(self, *keys: Key) -> Origin:
        """Return a place below this one."""
        return Origin(self.file, self.text, (*self.path, *keys))

    @property
    def line(self) -> int:
        """The line of the key or header, from 1; that of the closest written parent where the place itself was not."""
        lengths = range(len(self.path), 0, -1)
        return next((line for n in lengths if (line := _line(self.text, self.path[:n]))), 1)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def fault(message: str, origin: Origin | None, *keys: Key) -> StudyError:
    """Return the error of a place in a study; a study made in Python has no file to name."""
    return StudyError(message if origin is None else f"{origin.child(*keys)}: {message}")


@contextmanager
def located(origin: Origin | None, *keys: Key) -> Iterator[None]:
    """Give errors of the user inside the place of the study that led to them."""
    try:
        yield
    except StudyError:
        raise
    except UserError as error:
        raise fault(str(error), origin, *keys) from error


def _line(text: str, path: tuple[Key, ...]) -> int | None:
    """Return the first line with which the value at `path` is there, or None where it is not written.

    The standard parser gives no positions, so it reads the file up to one line or another.
    """
    lines = text.split("\n")
    line = 1 + bisect_left(range(1, len(lines) + 1), True, key=lambda n: _has(_beginning(lines, n), path))
    return line if line <= len(lines) else None


def _beginning(lines: list[str], n: int) -> Any:
    """Return what the first `n` lines say, with a list or text that they leave open closed."""
    for last in range(n, 0, -1):
        for end in ("", "\n]", "\n]]", '\n"""'):
            try:
                return tomllib.loads("\n".join(lines[:last]) + end)
            except (ValueError, RecursionError):
                continue
    return {}


def _has(node: Any, path: tuple[Key, ...]) -> bool:
    for key in path:
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True
