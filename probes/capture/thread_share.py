"""As many threads as processors are free: on a busy machine threads that wait for one another cost more than they bring.

`bathyscope bench contention` measures it: two captures at once on two cores are quicker with one thread each.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

PERIOD = 0.1
"""Seconds over which it is counted what others take, at least."""
COUNTERS = Path("/proc/stat")
"""Where Linux counts what its processors did; elsewhere all threads are used always."""


@dataclass(frozen=True)
class Usage:
    """Seconds since some moment: of the clock, of all processors at work, and of them for this process."""

    clock: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> Usage | None:
        """Return the usage up to now; None where the machine does not tell."""
        with suppress(OSError, ValueError, IndexError):
            # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = [int(word) for word in COUNTERS.read_text().split("\n", 1)[0].split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
            own = os.times()
            return cls(time.monotonic(), busy, own.user + own.system)
        return None


def threads_between(before: Usage, after: Usage, processors: int, most: int) -> int:
    """Return how many threads, at most `most`, the processors have room for that others did not use between two moments."""
    others = ((after.busy - before.busy) - (after.own - before.own)) / (after.clock - before.clock)
    return max(1, min(most, round(processors - others)))


class ThreadShare:
    """Inside, torch computes in this thread with no more threads than processors are free, each time that `adapt` is called."""

    def __enter__(self) -> ThreadShare:
        self._most = torch.get_num_threads()
        self._before = Usage.now() if self._most > 1 else None
        return self

    def adapt(self) -> None:
        """Use as many threads as there was room for since the last time, which was `PERIOD` seconds ago or more."""
        if self._before is None or time.monotonic() - self._before.clock < PERIOD:
            return
        if (now := Usage.now()) is not None:
            torch.set_num_threads(threads_between(self._before, now, os.cpu_count() or self._most, self._most))
            self._before = now

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        torch.set_num_threads(self._most)
