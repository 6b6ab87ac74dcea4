"""What an exhaustive intervention measured, and whether the truth follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probes.planted.record import Interval

SURE, SURE_IN_NOISE = 0.98, 0.9
"""A share from here on is all, and one below 1 less it is none; what lies between certifies nothing."""


@dataclass(frozen=True)
class Measured:
    """Numbers, and whether the truth that was built in follows from them."""

    values: Any
    """Shares by layer from -1, or by name."""
    agrees: bool


def window_of(values: Sequence[float], *, least: float, most: float) -> tuple[bool, Interval | None]:
    """Return whether values from layer -1 on are at least `least` in one run and elsewhere at most `most`, and that run."""
    inside = [layer - 1 for layer, value in enumerate(values) if value >= least]
    clear = all(value >= least or value <= most for value in values)
    if not inside:
        return clear, None
    return clear and inside == list(range(inside[0], inside[-1] + 1)), Interval(inside[0], inside[-1])


def sure_window(shares: Sequence[float], sure: float) -> tuple[bool, Interval | None]:
    """Return the window of shares that are all or none."""
    return window_of(shares, least=sure, most=1 - sure + 1e-9)


def set_of(shares: Mapping[str, float], *, least: float = SURE, most: float = 1 - SURE) -> frozenset[str] | None:
    """Return the names whose share is at least `least`; None where one lies between the two."""
    if any(most + 1e-9 < share < least for share in shares.values()):
        return None
    return frozenset(name for name, share in shares.items() if share >= least)
