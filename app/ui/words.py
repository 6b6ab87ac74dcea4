"""Words with their numbers."""

from __future__ import annotations


def plural(count: int, noun: str, several: str = "") -> str:
    """`1 prompt`, `2 prompts`, `3 passes`."""
    return f"{count:,} " + (noun if count == 1 else several or f"{noun}s")
