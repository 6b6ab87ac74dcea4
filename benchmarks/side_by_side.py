"""Timing several ways of doing the same work in one run: interleaved rounds, medians, ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one contestant."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def best(work: Callable[[], T], repeats: int = 1) -> tuple[float, T]:
    """(least processor seconds of the repeats, the last result)."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        result = work()
        seconds.append(time.process_time() - started)
    return min(seconds), result


def race(contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> list[Timing]:
    """Runs all contestants in turn, round by round, so that a drift of the machine's speed hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warmup + rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return [Timing(name, tuple(values)) for name, values in seconds.items()]


def table(timings: list[Timing], baseline: str) -> str:
    """Markdown: median, spread, and the median over rounds of the ratio to the baseline of the same round."""
    base = next(t for t in timings if t.name == baseline)
    lines = ["| way | median s | min–max s | ratio to baseline |", "|---|---|---|---|"]
    for timing in timings:
        ratio = statistics.median(a / b for a, b in zip(timing.seconds, base.seconds, strict=True))
        spread = f"{min(timing.seconds):.3f}–{max(timing.seconds):.3f}"
        lines.append(f"| {timing.name} | {timing.median:.3f} | {spread} | {ratio:.2f}× |")
    return "\n".join(lines)
