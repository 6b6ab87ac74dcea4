"""Progress reports of long work; front ends subclass it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Watches long work; this one says nothing."""

    @property
    def batch_tokens(self) -> int | None:
        """Padded tokens per forward, at most, where somebody waits for a forward to end; None where nobody does."""
        return None

    def start(self, total: int, what: str) -> None:
        """`total` units of `what` (for instance `forward`) are about to be done."""

    def advance(self, done: int = 1) -> None:
        """`done` more units are finished."""

    def over(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Yield the items, each counted as one unit of `what` once it is done with."""
        self.start(len(items), what)
        for item in items:
            yield item
            self.advance()

    def stop(self) -> None:
        """Nothing more is done; whatever was shown of it goes."""

    def note(self, line: str) -> None:
        """Something a user should read, in one line."""


QUIET = Progress()
"""Progress that nobody watches."""
