"""What a page and the resident model process say to each other: a session's text and what to do, and plain data back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["view", "grids", "attention", "heads", "everywhere", "written", "other"]
SOCKET = "live.socket"
"""The socket's name inside the folder of jobs."""
KEY = "BATHYSCOPE_LIVE_KEY"
"""The variable of the environment that holds what both sides prove themselves with."""


@dataclass(frozen=True)
class Action:
    """One change of a session, made in its own process, which knows what an edit is."""

    kind: Literal["add", "toggle", "strength", "move", "remove", "clear", "text", "other", "watch", "model"]
    at: int = 0
    """The edit's place in the stack."""
    value: Any = None


@dataclass(frozen=True)
class Question:
    """What a page asks."""

    kind: Kind
    session: str
    """The session's text, as `probes.session.State` prints it."""
    actions: tuple[Action, ...] = ()
    """Changes of the session before it is looked at."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came back."""

    session: str
    """The session's text after the changes."""
    data: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""
    """Why nothing was done; empty where all went well."""
    fault: bool = False
    """Whether the refusal is a fault of the program and not of what was asked."""


def socket_of(jobs: Path) -> str:
    """Return the address that the process of a folder of jobs listens at."""
    return str(jobs / SOCKET)


def key() -> bytes:
    """Return what both sides prove themselves with."""
    return bytes.fromhex(os.environ[KEY])
