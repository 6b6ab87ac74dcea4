"""How the command line talks: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
"""How every Typer here is made: help and errors are plain text."""

JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line, for programs.")]


def say(*lines: str) -> None:
    """Lines on standard output."""
    sys.stdout.writelines(_encodable(line) + "\n" for line in lines)


def warn(line: str) -> None:
    """A line on standard error."""
    sys.stderr.write(_encodable(line) + "\n")


def _encodable(line: str) -> str:
    """Show bytes of a path that are no text by their numbers."""
    return line.encode("utf-8", "backslashreplace").decode()


class ConsoleProgress(Progress):
    """A bar with an estimate on a terminal, plain lines otherwise.

    Args:
        of: what every line begins with, where several things are done one after another.
        every_step: a line for each step, instead of four in all and a bar.
    """

    def __init__(self, of: str = "", every_step: bool = False) -> None:
        self._every_step = every_step
        self._of = f"{of} · " if of else ""
        self._bar: Bar | None = None
        self._total = self._done = 0
        self._what = ""

    def start(self, total: int, what: str) -> None:
        """Begin to count `total` of something; 0 where nothing is counted."""
        self.stop()
        self._total, self._done, self._what = total, 0, what
        if total and not self._every_step and (bar := _bar()) is not None:
            passes = f"{what} passes" if what == "forward" else f"{what}s"
            self._task = bar.add_task(self._of + passes, total=total)
            bar.start()
            self._bar = bar

    def advance(self, done: int = 1) -> None:
        """Count so many as done."""
        before, self._done = self._done, self._done + done
        if self._bar is not None:
            self._bar.advance(self._task, done)
        elif self._every_step or 4 * before // self._total != 4 * self._done // self._total:
            warn(f"{self._of}{self._what}: {self._done:,} of {self._total:,}")

    def note(self, line: str) -> None:
        """Print a line."""
        warn(line)

    def stop(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Bar | None:
    """A bar on standard error; None where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True) if console.is_terminal else None
