"""Where a part of a study was written: file and line, for messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tomlkit
from tomlkit.items import Table

from probes.errors import UserError

Key = str | int
_MARK = "@@ bathyscope is looking for this line @@"


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
    """The line of the value at `path`.

    tomlkit gives no positions but writes a document back as it was, so what is changed can be found in what it writes.
    """
    document = tomlkit.parse(text)
    node, (*parents, last) = document, path
    try:
        for key in parents:
            node = node[key]  # type: ignore[index, assignment]
        item = node[last]  # type: ignore[index]
        if isinstance(item, Table):
            item.comment(_MARK)
        else:
            node[last] = _MARK  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        return None
    before, mark, _ = tomlkit.dumps(document).partition(_MARK)
    return before.count("\n") + 1 if mark else None
