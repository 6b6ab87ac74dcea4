"""Words with their numbers."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
