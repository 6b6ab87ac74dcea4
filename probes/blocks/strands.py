"""What goes through a model's blocks: a line of work, and the contexts and the thread that go with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

ContextMaker = Callable[[], AbstractContextManager[Any]]
"""Makes a context anew each time it is entered."""


class Cancelled(BaseException):
    """Ends a task whose results nobody waits for any more."""


@dataclass(eq=False)
class Strand:
    """One line of work: a task, or the thread that calls from outside."""

    contexts: list[tuple[ContextMaker, ExitStack]] = field(default_factory=list)
    """What has to be in place while it runs, and only then."""
    alterations: list[tuple[int, ContextMaker]] = field(default_factory=list)
    """What has to be in place while a block runs."""
    inside: int | None = None
    """The block it has in place."""
    path: tuple[int, ...] = ()
    """Where it stands in the work: counts of what was begun before it, the same in every process."""
    begun: int = 0
    """Tasks and runs begun by it so far."""

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Take what it has in place away inside."""
        self._leave()
        yield
        self._enter()

    @contextmanager
    def inherited(self) -> Iterator[None]:
        """Put in place inside what it began with."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        for context, entered in self.contexts:
            entered.enter_context(context())

    def _leave(self) -> None:
        for _, entered in reversed(self.contexts):
            entered.close()


@dataclass(eq=False)
class Task(Strand):
    """Ordinary code in a thread of its own, which runs only while it has the turn."""

    work: Callable[[], Any] = lambda: None
    layer: int | None = None
    """The block it waits for."""
    then: int | None = None
    """The block it will probably want next."""
    waits_for: Sequence[Task] = ()
    result: Any = None
    error: BaseException | None = None
    done: bool = False
    cancelled: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        """Whether it can go on without another block."""
        return self.layer is None and all(task.done for task in self.waits_for)
