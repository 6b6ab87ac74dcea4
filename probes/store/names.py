"""What people call the models whose rows a store holds: for listings alone, no part of any key."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FILE = "names.jsonl"
LONGEST = 1000
"""Characters of a name that are kept, so that a line is written in one piece."""


@dataclass(frozen=True)
class Names:
    """A file of JSON lines `["weights", "name"]` that many processes append to; unreadable lines are passed over."""

    root: Path

    def read(self) -> dict[str, list[str]]:
        """Return the names each digest of weights goes by, in the order they came; nothing where there is no file."""
        try:
            lines = (self.root / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return {}
        names: dict[str, list[str]] = {}
        for line in lines:
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry):
                    names.setdefault(entry[0], []).append(entry[1])
        return {weights: list(dict.fromkeys(known)) for weights, known in names.items()}

    def add(self, weights: str, name: str) -> None:
        """Keep a name; a store that cannot be written goes without."""
        name = name[:LONGEST]
        if not name or name in self.read().get(weights, ()):
            return
        with suppress(OSError):
            descriptor = os.open(self.root / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, (json.dumps([weights, name]) + "\n").encode())
            finally:
                os.close(descriptor)
