"""How many forwards with a change an analysis runs: announced before they run, counted after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from probes.errors import OptionError
from probes.html_card import count
from probes.progress import Progress


@dataclass(frozen=True)
class Interventions:
    """Forwards in which something is changed, beside those that capture.

    One forward is one sequence through the model or through its last blocks; of a decoding, one written token.
    """

    forwards: Mapping[str, int] = field(default_factory=dict)
    """What is done (`block removals`, `knock-outs`) to its forwards."""
    exact: bool = True
    """False where results on the way decide how many: then the numbers are upper bounds."""
    detail: str = ""
    """What else a dry run says of them, such as the work and the time they take."""

    @property
    def total(self) -> int:
        """All forwards together."""
        return sum(self.forwards.values())

    def line(self) -> str | None:
        """The count as a dry run prints it; None where nothing is changed."""
        if not self.total:
            return None
        parts = ", ".join(f"{count:,} {name}" for name, count in self.forwards.items() if count)
        said = f"and {'' if self.exact else 'up to '}{count(self.total, 'forward')} with interventions ({parts})"
        return f"{said}: {self.detail}" if self.detail else said


class Tally:
    """Counts forwards as they are run, and tells a watcher."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.forwards = 0

    def start(self, forwards: int, what: str) -> None:
        """Announce forwards of one kind that are about to be run."""
        self.progress.start(forwards, what)

    def tick(self, forwards: int) -> None:
        """Count forwards that were run, and show them."""
        self.count(forwards)
        self.progress.advance(forwards)

    def count(self, forwards: int) -> None:
        """Count forwards that were run while something else is shown."""
        self.forwards += forwards


def swept(n: int, chosen: Sequence[int], stride: int, name: str = "layer") -> list[int]:
    """Return the indices of a sweep over `range(n)`: those chosen, or every `stride`-th where none is chosen.

    Raises:
        OptionError: a chosen index outside the range, with the legal ones.
    """
    for index in chosen:
        if not 0 <= index < n:
            raise OptionError(f"{name} {index} does not exist: legal are 0 to {n - 1}")
    return sorted(set(chosen)) if chosen else list(range(0, n, stride))
